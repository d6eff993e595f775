"""A first proof that the order of the queue matters: one overload, four policies, everything else the same.

    python -m benchmarks.ordering [--json out.json] [--seeds 1 2 3] [--overload 1.5] [--counted 25]

Router, worker and ingress link run in real time over gRPC with real Redis; the engine is simulated with the step times
of a GPU. Requests arrive as a Poisson process: streams, deadlines and best effort. Arrivals, lengths and classes follow
from the seed, so each policy gets the same ones. What a request says of its answer's length is a bound; the length
itself is forced in the engine and unknown to the router.

The capacity is measured first, from a backlog; the rate of arrivals is `overload` times it. Requests that arrive in the
counted window are counted, whatever became of them; arrivals go on until the last of them is decided. The formulas are
those of tempo_router.metrics. The policies of one seed run at the same time, each in a process of its own.
"""

import argparse
import asyncio
import logging
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec
import structlog

from benchmarks.figures_file import add_json_option, write_figures
from cluster import wire_pb2 as wire
from cluster.embedded_redis import start_embedded_redis
from cluster.ingress_link import IngressLink
from cluster.redis_store import RedisStore
from cluster.router_server import RouterServer
from tempo_router.config import SchedulingConfig, TempoConfig
from tempo_router.metrics import DeliveryTracker, Outcome, refused_outcome, summarise
from tempo_router.option_values import above_zero
from tempo_router.request import BestEffort, Deadline, GroupId, Latency, ProgramCall, RequestId, RequestSpec, Slo
from tempo_router.simulation.step_profiles import load_profile
from workers.engine import EngineCall, OnDeath, OnStep
from workers.simulated_engine import SimulatedEngine
from workers.worker import Worker

POLICIES = ("fcfs", "class_priority", "edf", "density")
PROFILE = "llama-3-8b:h100-80g:1"
MAX_RUNNING = 64
MAX_OUTPUT_TOKENS = 1024
HOST = "127.0.0.1"
WARM_UP_S = 6.0
"""Arrivals that are not counted: the queue fills, lengths and step times are learnt."""
DECIDED_AFTER_S = 14.0
"""Arrivals and service go on for so long after the counted window."""
CAPACITY_REQUESTS = 400
MEASURED = ("requests_per_s", "tokens_per_s", "throughput_tokens_per_s", "worst", "latency", "deadline")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request. Lengths are log-normal, cut at their bounds. sigma: of both logarithms."""

    name: str
    share: float
    slo: Slo
    prompt_median: int
    output_median: int
    sigma: float = 0.6


KINDS = (
    Kind("chat", 0.50, Latency(ttft_s=1.0, tbt_s=0.05), prompt_median=300, output_median=150),
    Kind("tool", 0.35, Deadline(ttlt_s=8.0), prompt_median=600, output_median=120),
    Kind("background", 0.15, BestEffort(), prompt_median=600, output_median=200),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the load. at_s: from the start of the run. output_tokens: how long its answer will be."""

    at_s: float
    kind: Kind
    prompt_tokens: int
    output_tokens: int


def arrivals(seed: int, per_s: float, until_s: float) -> Iterator[Arrival]:
    """A Poisson process; the same seed gives the same requests at any rate, closer together or further apart."""
    rng = random.Random(seed)
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(1.0) / per_s) < until_s:
        kind = rng.choices(KINDS, [kind.share for kind in KINDS])[0]
        prompt_tokens = _length(rng, kind.prompt_median, kind.sigma, 4096)
        yield Arrival(at_s, kind, prompt_tokens, _length(rng, kind.output_median, kind.sigma, MAX_OUTPUT_TOKENS))


def _length(rng: random.Random, median: int, sigma: float, most: int) -> int:
    return max(8, min(most, round(rng.lognormvariate(math.log(median), sigma))))


# ---- the fleet


class ForcedLengths(SimulatedEngine):
    """An engine whose answers have the lengths of a table."""

    lengths: dict[str, int]

    def submit(self, call: EngineCall) -> None:
        """Queue the request, bounded by its length: `ignore_eos` makes the answer exactly that long."""
        super().submit(replace(call, max_output_tokens=self.lengths[call.request_id]))


class Clients:
    """Listens to the link and keeps the score of each request."""

    link: IngressLink

    def __init__(self) -> None:
        self.trackers: dict[RequestId, DeliveryTracker] = {}
        self.outcomes: dict[RequestId, Outcome] = {}
        self.tokens = 0
        self._ended = 0
        self._marks: dict[int, asyncio.Future[tuple[float, int]]] = {}

    async def send(self, spec: RequestSpec) -> None:
        """Submit; a refusal is an outcome."""
        self.trackers[spec.request_id] = DeliveryTracker(spec.slo, spec.arrival_s)
        payload = msgspec.msgpack.encode([spec.attempt_id, [], None, {"ignore_eos": True}])
        verdict = await self.link.submit(spec, [payload])
        if not verdict.is_admitted:
            self.outcomes[spec.request_id] = refused_outcome(spec.slo)

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        """Score the tokens."""
        now_s = time.monotonic()
        for delta in frame.deltas:
            request_id = self.link.claim(worker_id, delta.request_id)
            if request_id is None:
                continue
            tracker = self.trackers[request_id]
            tracker.delivered(now_s, len(delta.token_ids))
            self.tokens += len(delta.token_ids)
            if delta.finish_reason:
                self._count_end(now_s)
                self.outcomes[request_id] = tracker.finish(now_s, completed=delta.finish_reason != "error")
                self.link.finish(request_id)

    def _count_end(self, now_s: float) -> None:
        self._ended += 1
        mark = self._marks.pop(self._ended, None)
        if mark is not None:
            mark.set_result((now_s, self.tokens))

    async def when_ended(self, count: int) -> tuple[float, int]:
        """Wait until so many answers have ended; the time and the tokens of all answers at that moment."""
        mark: asyncio.Future[tuple[float, int]] = asyncio.get_running_loop().create_future()
        self._marks[count] = mark
        return await mark

    def attempt_lost(self, request_id: RequestId) -> None:
        """Must not happen here."""
        raise RuntimeError(f"{request_id} lost its worker")

    def relegated(self, request_id: RequestId) -> None:
        """It goes on as best effort; the score does not change."""

    def redated(self, request_id: RequestId, slo: ProgramCall) -> None:
        """Must not happen here."""
        raise RuntimeError(f"{request_id} has another deadline: {slo}")

    def program_cancelled(self, request_id: RequestId) -> None:
        """As good as refused."""
        self.expired(request_id)

    def expired(self, request_id: RequestId) -> None:
        """Dropped from the queue: as good as refused."""
        self.outcomes[request_id] = self.trackers[request_id].finish(time.monotonic(), completed=False)

    def outcome(self, request_id: RequestId) -> Outcome:
        """How it ended; what has not ended by now counts as missed, with the tokens that came in time."""
        return self.outcomes.get(request_id) or self.trackers[request_id].finish(time.monotonic(), completed=False)


@asynccontextmanager
async def fleet(policy: str, lengths: dict[str, int]) -> Any:
    """A router, a worker and a link, connected; yields the clients."""
    scheduling = SchedulingConfig.model_validate({"policy": policy})
    config = TempoConfig(scheduling=scheduling)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tempo-bench-"))
        redis = start_embedded_redis(folder)
        stack.callback(redis.stop)
        store = await RedisStore.connect(redis.url, "bench")
        stack.push_async_callback(store.close)
        router = RouterServer(config, store, owner="bench", host=HOST)
        address = await router.start()
        stack.push_async_callback(router.stop)

        async def locate() -> str:
            return address

        worker = Worker("worker-1", locate_router=locate, host=HOST, transport=config.transport)
        await worker.start(_engine(worker.on_step, worker.on_death, lengths))
        stack.push_async_callback(worker.stop)
        clients = Clients()
        clients.link = IngressLink(
            "ingress-1",
            locate_router=locate,
            listener=clients,
            transport=config.transport,
            router_wait_s=60.0,
            engine_version="none",
        )
        clients.link.start()
        stack.push_async_callback(clients.link.stop)
        await clients.link.first_worker()
        yield clients
        failure = router.failure() or clients.link.failure()
        if failure is not None or worker.failure() is not None:
            raise RuntimeError(f"the fleet failed: {failure or worker.failure()}")


def _engine(on_step: OnStep, on_death: OnDeath, lengths: dict[str, int]) -> ForcedLengths:
    profile = load_profile(PROFILE)
    shape = replace(profile.shape, max_running=MAX_RUNNING)
    engine = ForcedLengths(profile, shape=shape, on_step=on_step, on_death=on_death)
    engine.lengths = lengths
    return engine


def _spec(number: int, arrival: Arrival, slo: Slo) -> RequestSpec:
    request_id = f"r{number}"
    return RequestSpec(
        request_id=RequestId(request_id),
        arrival_s=time.monotonic(),
        slo=slo,
        prompt_tokens=arrival.prompt_tokens,
        max_output_tokens=MAX_OUTPUT_TOKENS,
        group_id=GroupId(request_id),
        model="bench",
        app=arrival.kind.name,
    )


# ---- runs


async def capacity_per_s() -> float:
    """Requests/s that the engine completes of this mixture while more than enough wait."""
    backlog = list(arrivals(seed=0, per_s=1.0, until_s=CAPACITY_REQUESTS))
    lengths = {f"r{number}": arrival.output_tokens for number, arrival in enumerate(backlog)}
    mean_tokens = statistics.fmean(lengths.values())
    async with fleet("fcfs", lengths) as clients:
        specs = [_spec(number, arrival, BestEffort()) for number, arrival in enumerate(backlog)]
        await asyncio.gather(*(clients.send(spec) for spec in specs))
        # While requests wait: neither the filling at the beginning nor the emptying at the end.
        first = await clients.when_ended(MAX_RUNNING)
        last = await clients.when_ended(len(backlog) - 2 * MAX_RUNNING)
    return float((last[1] - first[1]) / (last[0] - first[0]) / mean_tokens)


async def one_run(policy: str, seed: int, per_s: float, counted_s: float) -> dict[str, Any]:
    """One policy under one load."""
    load = list(arrivals(seed, per_s, WARM_UP_S + counted_s + DECIDED_AFTER_S))
    lengths = {f"r{number}": arrival.output_tokens for number, arrival in enumerate(load)}
    async with fleet(policy, lengths) as clients:
        began_s = time.monotonic()
        sending = []
        for number, arrival in enumerate(load):
            await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.monotonic()))
            spec = _spec(number, arrival, arrival.kind.slo)
            sending.append(asyncio.create_task(clients.send(spec)))
        await asyncio.gather(*sending)
        counted = [
            clients.outcome(RequestId(f"r{number}"))
            for number, arrival in enumerate(load)
            if WARM_UP_S <= arrival.at_s < WARM_UP_S + counted_s
        ]
        # What still runs is of no interest any more.
        for request_id in list(clients.link.open):
            clients.link.cancel(request_id)
    goodput = summarise(counted, counted_s)
    return {
        "policy": policy,
        "seed": seed,
        **asdict(goodput),
        **{str(name): share for name, share in goodput.attainment.items()},
        "worst": min(goodput.attainment.values()),
    }


def _in_process(arguments: tuple[str, int, float, float]) -> dict[str, Any]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return asyncio.run(one_run(*arguments))


def compare(seeds: Sequence[int], overload: float, counted_s: float) -> dict[str, Any]:
    """All policies under the load of each seed."""
    capacity = asyncio.run(capacity_per_s())
    print(f"capacity {capacity:.1f} requests/s, load {overload} times it")
    runs: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(len(POLICIES)) as pool:
        for seed in seeds:
            runs += pool.map(_in_process, [(policy, seed, overload * capacity, counted_s) for policy in POLICIES], 1)
    return {"capacity_requests_per_s": capacity, "overload": overload, "runs": runs, "summary": summary(runs)}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Per policy and measure: mean over the seeds, least and most; and the ratio to fcfs, seed by seed."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    base = {run["seed"]: run for run in runs if run["policy"] == "fcfs"}
    for policy in POLICIES:
        of_policy = [run for run in runs if run["policy"] == policy]
        table[policy] = {}
        for name in MEASURED:
            values = [float(run[name]) for run in of_policy]
            row = {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}
            if all(base[run["seed"]][name] for run in of_policy):
                row["ratio_to_fcfs"] = statistics.fmean(run[name] / base[run["seed"]][name] for run in of_policy)
            table[policy][name] = {key: round(value, 3) for key, value in row.items()}
    return table


def print_summary(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """For people."""
    titles = ("good req/s", "good tokens/s", "all tokens/s", "worst class", "streams", "deadlines")
    print(f"{'policy':<16}" + "".join(f"{title:>24}" for title in titles))
    for policy, row in table.items():
        cells = []
        for name in MEASURED:
            one = row[name]
            digits = 0 if "tokens" in name else 1 if "per_s" in name else 3
            cells.append(f"{one['mean']:.{digits}f} ({one['least']:.{digits}f}..{one['most']:.{digits}f})")
        print(f"{policy:<16}" + "".join(f"{cell:>24}" for cell in cells))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--overload", type=above_zero, default=1.5, help="arrivals as a multiple of the capacity")
    parser.add_argument("--counted", type=above_zero, default=25.0, help="seconds of arrivals that are counted")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    figures = compare(options.seeds, options.overload, options.counted)
    print_summary(figures["summary"])
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
