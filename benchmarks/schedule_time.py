"""What planning costs inside vLLM: the time of one `schedule()` with Tempo's scheduler and with vLLM's own.

    python -m benchmarks.schedule_time [--json out.json] [--steps 300] [--rounds 5]

No model runs: tokens are made up, so what is measured is scheduling alone, in CPU time of the thread. vLLM's own is
the class that it takes by default, the asynchronous one, of which Tempo's is a subclass. Both are in this process and
take turns step by step, every second time the other one first. A round's figures are the median, mean and 90th
percentile of its steps; a shape's are the medians over its rounds of the ratio of the two sides.

Shapes: so many requests decode, so many wait. `steady`: nobody comes or goes. `churn`: in every step one request
in 150 ends and a new one comes, as with answers of 150 tokens; what waits is then looked at again and again.
"""

import argparse
import copy
import gc
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tempo_router.request import BestEffort, Deadline, DispatchId, GroupId, Latency, RequestId, RequestSpec, Slo
from tempo_router.standing import Standing
from workers.call_facts import KEY, CallFacts, values_from_facts
from workers.default_model import ensure_default_model

SHAPES = tuple(itertools.product((64, 256, 1024), (0, 5000)))
_SLOS: Sequence[Slo] = (Latency(2.0, 0.1), Deadline(20.0), BestEffort())
_PROMPT = 64
_ANSWER = 150
_WARM_UP = 30


@dataclass(frozen=True, slots=True)
class Figure:
    """Of one shape. Times in microseconds, over all rounds; ratios: Tempo over vLLM, by round."""

    running: int
    waiting: int
    load: str
    stock_p50_us: float
    tempo_p50_us: float
    stock_p90_us: float
    tempo_p90_us: float
    ratio_p50: float
    ratio_p50_range: tuple[float, float]
    ratio_mean: float
    ratio_p90: float


class Side:
    """One scheduler with its requests."""

    def __init__(self, kind: str, config: Any, running: int, waiting: int, *, churns: bool) -> None:
        import torch
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from workers.tempo_scheduler import TempoScheduler

        own = copy.copy(config)
        own.scheduler_config = copy.copy(config.scheduler_config)
        own.scheduler_config.max_num_seqs = running
        own.scheduler_config.max_num_batched_tokens = 8192
        own.cache_config = copy.copy(config.cache_config)
        own.cache_config.num_gpu_blocks = blocks = 60 * running + 1000
        own.cache_config.enable_prefix_caching = False
        settings = {"slots": running, "scheduling": {"policy": "tempo"}}
        own.additional_config = {KEY: settings}
        if kind == "tempo":
            # As a worker starts it: half as many places again, for calls that are held.
            own.scheduler_config.max_num_seqs = running + running // 2
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
        owner = TempoScheduler if kind == "tempo" else AsyncScheduler
        self.scheduler: Any = owner(
            vllm_config=own,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(own),
            block_size=16,
        )
        self._churns = churns
        self._rng = random.Random(1)
        self._numbers = itertools.count()
        self._running = running
        for _ in range(running + waiting):
            self.submit()

    def submit(self) -> None:
        """A request with some standing, as a router would have given it; answers are cut by the benchmark."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        number, now_s = next(self._numbers), time.monotonic()
        # Nobody overtakes the first ones: who runs and who waits shall be the same on both sides.
        density = 1e6 if number < self._running else self._rng.random()
        name = f"r{number}"
        spec = RequestSpec(RequestId(name), now_s, self._rng.choice(_SLOS), _PROMPT, 4000, GroupId(name))
        facts = CallFacts(DispatchId(number), spec, standing=Standing(density, is_admitted=number < self._running))
        params = SamplingParams(
            max_tokens=4000,
            ignore_eos=True,
            extra_args={KEY: values_from_facts(facts, now_s)},
        )
        params.update_from_generation_config({}, 257)
        prompt = [self._rng.randrange(256) for _ in range(_PROMPT)]
        self.scheduler.add_request(
            Request(request_id=name, prompt_token_ids=prompt, sampling_params=params, pooling_params=None)
        )

    def step(self) -> float:
        """One step. Returns the CPU seconds of its `schedule()`."""
        from vllm.v1.outputs import ModelRunnerOutput

        from tempo_router.events import StepReport

        began_s = time.thread_time()
        output = self.scheduler.schedule()
        took_s = time.thread_time() - began_s
        names = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        tokens = [[] if requests[name].is_prefill_chunk else [7] for name in names]
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=tokens,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        self.scheduler.update_from_output(output, result)
        if hasattr(self.scheduler, "observe"):
            # As on a GPU with a small model; the planner's own time does not depend on it.
            count = len(names)
            self.scheduler.observe(StepReport(0.01 + 1e-5 * count, 0, count, 200 * count))
        if self._churns and names:
            self._replace(max(1, round(len(names) / _ANSWER)), names)
        return took_s

    def _replace(self, count: int, names: Sequence[str]) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(self._rng.sample(list(names), count), RequestStatus.FINISHED_ABORTED)
        for _ in range(count):
            self.submit()


def measure(config: Any, running: int, waiting: int, *, churns: bool, steps: int, rounds: int) -> Figure:
    """Both sides in turn."""
    sides = {kind: Side(kind, config, running, waiting, churns=churns) for kind in ("stock", "tempo")}
    for side in sides.values():
        for _ in range(_WARM_UP):
            side.step()
    times: dict[str, list[list[float]]] = {kind: [] for kind in sides}
    gc.collect()
    for _ in range(rounds):
        for own in times.values():
            own.append([])
        for number in range(steps):
            for kind in sorted(sides, reverse=bool(number % 2)):
                times[kind][-1].append(sides[kind].step())

    def over_all(kind: str, share: float) -> float:
        every = sorted(itertools.chain.from_iterable(times[kind]))
        return round(every[int(share * (len(every) - 1))] * 1e6, 1)

    def ratios(figure: Any) -> list[float]:
        return [figure(ours) / figure(theirs) for ours, theirs in zip(times["tempo"], times["stock"], strict=True)]

    medians = ratios(statistics.median)
    return Figure(
        running,
        waiting,
        "churn" if churns else "steady",
        over_all("stock", 0.5),
        over_all("tempo", 0.5),
        over_all("stock", 0.9),
        over_all("tempo", 0.9),
        round(statistics.median(medians), 3),
        (round(min(medians), 3), round(max(medians), 3)),
        round(statistics.median(ratios(statistics.fmean)), 3),
        round(statistics.median(ratios(lambda one: sorted(one)[int(0.9 * len(one))])), 3),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--steps", type=int, default=300, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--running", type=int, nargs="+", default=None, help="only these numbers of running requests")
    parser.add_argument("--folder", type=Path, default=Path("bench-results"), help="for the model")
    options = parser.parse_args(arguments)
    from vllm.engine.arg_utils import EngineArgs

    model = ensure_default_model(options.folder / "data")
    config = EngineArgs(model=str(model), max_model_len=4096, enforce_eager=True).create_engine_config()
    figures = []
    print("running waiting load    stock p50   tempo p50  ratio (range)          mean   p90")
    for running, waiting in SHAPES:
        if options.running and running not in options.running:
            continue
        for churns in (False, True):
            one = measure(config, running, waiting, churns=churns, steps=options.steps, rounds=options.rounds)
            figures.append(asdict(one))
            low, high = one.ratio_p50_range
            print(
                f"{running:7} {waiting:7} {one.load:7} {one.stock_p50_us:9.0f} µs {one.tempo_p50_us:9.0f} µs "
                f"{one.ratio_p50:6.2f} ({low:.2f}..{high:.2f}) {one.ratio_mean:6.2f} {one.ratio_p90:6.2f}",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
