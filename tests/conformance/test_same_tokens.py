"""Greedy answers are those of stock vLLM, whatever the planner does to the requests on their way.

One stock engine says what is right; then planned engines, with and without asynchronous scheduling, answer the same
requests while a mischievous planner holds decodes at random and takes the KV cache of others, in a cache far too small,
with prefixes cached, prompts cut into chunks, `n` > 1, grammars, and clients that leave in the middle.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.sampling_params import StructuredOutputsParams  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402

from workers import tempo_scheduler  # noqa: E402
from workers.default_model import ensure_default_model  # noqa: E402
from workers.tempo_scheduler import TempoScheduler  # noqa: E402

REQUESTS = 40
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Mischief(TempoScheduler):
    """Before each step some who decode are held for a while, and some lose their cache."""

    rng = random.Random(0)
    held = 0
    taken = 0

    def _plan(self) -> Any:
        planner, rng = self.planner, self.rng
        for call in list(planner.held_calls):
            if rng.random() < 0.3:
                planner._resume(call)
        for call in list(planner.decoding):
            draw = rng.random()
            if draw < 0.10:
                planner._hold(call)
                Mischief.held += 1
            elif draw < 0.13:
                planner.lost(call)
                self._preempt([call])
                Mischief.taken += 1
        return super()._plan()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ensure_default_model(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def engine(model, *, kind: str, is_async: bool = False, **more: Any) -> LLMEngine:
    """kind: stock or planned. more: further engine arguments."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "max_model_len": 1024,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "num_gpu_blocks_override": 49,
        "kv_cache_memory_bytes": 64 * 1024 * 1024,
        # What rounds differently in another batch could make another token the likeliest.
        "dtype": "float32",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": True,
        **more,
    }
    if kind != "stock":
        arguments["scheduler_cls"] = Mischief
        arguments["additional_config"] = {tempo_scheduler.KEY: {"slots": 8, "scheduling": {"policy": "tempo"}}}
    config = EngineArgs(**arguments).create_engine_config()
    # The CPU platform switches it off; production on GPUs has it on.
    config.scheduler_config.async_scheduling = is_async
    from vllm.v1.executor import Executor

    return LLMEngine(config, Executor.get_class(config), log_stats=False)


def requests() -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """(name, prompt, sampling): long and short, some beginning alike, some with a grammar, some with n = 2."""
    rng = random.Random(11)
    shared = [rng.randrange(97, 123) for _ in range(70)]
    for number in range(REQUESTS):
        prompt = [rng.randrange(97, 123) for _ in range(rng.choice((1, 5, 40, 64, 150)))]
        if rng.random() < 0.4:
            prompt = shared + prompt
        sampling: dict[str, Any] = {"max_tokens": rng.choice((1, 8, 40, 90)), "ignore_eos": True}
        if number % 10 == 3:
            sampling = {"max_tokens": 120, "structured_outputs": StructuredOutputsParams(json=SCHEMA)}
        elif number % 10 == 7:
            # vLLM allows it only where it samples; of one token to choose from.
            sampling |= {"n": 2, "temperature": 1.0, "top_k": 1}
        yield f"r{number}", prompt, sampling


def facts(rng: random.Random) -> dict[str, Any]:
    slo = rng.choice(
        (
            {"class": "latency", "due_in_s": 1.0, "tbt_s": 0.05},
            {"class": "deadline", "due_in_s": rng.choice((0.5, 30.0))},
            {"class": "best_effort"},
        )
    )
    standing = [rng.choice((0.0, 0.5, 20.0)), rng.random() < 0.7, 0.0, rng.random() < 0.1]
    return {tempo_scheduler.KEY: {**slo, "standing": standing}}


def answers(
    served: LLMEngine,
    aborts: frozenset[str] = frozenset(),
    asked: Iterable[tuple[str, list[int], dict[str, Any]]] | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> dict[str, list[tuple[int, ...]]]:
    """What each request got. aborts: these are given up after a few tokens. adapters: LoRA requests, by name."""
    rng = random.Random(3)
    left = list(asked if asked is not None else requests())
    got: dict[str, dict[int, tuple[int, ...]]] = {}
    while left or served.has_unfinished_requests():
        for _ in range(rng.choice((0, 0, 1, 4))):
            if left:
                name, prompt, sampling = left.pop(0)
                params = SamplingParams(extra_args=facts(rng), **{"temperature": 0.0, **sampling})
                adapter = (adapters or {}).get(name)
                served.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=adapter)
        for output in served.step():
            name = output.request_id
            # Of n = 2 each output has the one answer that went on.
            got.setdefault(name, {}).update((one.index, tuple(one.token_ids)) for one in output.outputs)
            if name in aborts and max(map(len, got[name].values())) >= 3 and not output.finished:
                served.abort_request([name])
    return {name: [tokens for _, tokens in sorted(by_index.items())] for name, by_index in got.items()}


def scheduler_of(served: LLMEngine) -> Any:
    return served.engine_core.engine_core.scheduler


def what_is_left(scheduler: Any) -> dict[str, int]:
    """Of requests, records of ours and blocks, after the last step; all zero if nothing is."""
    scheduler.audit()
    pool = scheduler.kv_cache_manager.block_pool
    return {
        "requests": len(scheduler.requests),
        "running and waiting": sum(scheduler.get_request_counts()),
        "records": len(scheduler.planner) + len(scheduler._loras.waiting) + len(scheduler._early),
        # One is the null block.
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    }


NOTHING = {"requests": 0, "running and waiting": 0, "records": 0, "blocks": 0}


def some_long_ones(asked: Iterable[tuple[str, list[int], dict[str, Any]]]) -> frozenset[str]:
    """Ten whose answers are so long that their clients can leave in the middle; of those with n = 2, all."""
    long_ones = {name: sampling.get("n", 1) for name, _, sampling in asked if sampling["max_tokens"] >= 40}
    twins = [name for name, answers_wanted in long_ones.items() if answers_wanted > 1]
    others = [name for name in long_ones if name not in twins]
    return frozenset([*twins, *random.Random(8).sample(others, 10 - len(twins))])


def assert_only_they_are_cut_short(
    found: Mapping[str, list[tuple[int, ...]]], right: Mapping[str, list[tuple[int, ...]]], aborts: frozenset[str]
) -> None:
    """Whoever stayed has the right answers, whoever left the beginnings of them, and some of those are not whole."""
    assert [name for name in right if name not in aborts and found.get(name) != right[name]] == []
    for name in aborts:
        for one, whole in zip(found[name], right[name], strict=False):
            assert one == whole[: len(one)], f"{name} is no beginning of the right answer"
    cut_short = [name for name in aborts if found[name] != right[name]]
    assert len(cut_short) > len(aborts) / 2, "hardly anybody left in the middle: this tests nothing"
    wanted_two = [name for name in aborts if len(right[name]) == 2]
    assert not wanted_two or set(wanted_two) & set(cut_short), "nobody left who waited for two answers"


@pytest.fixture(scope="module")
def right(model) -> dict[str, list[tuple[int, ...]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        stock = engine(model, kind="stock")
        found = answers(stock)
        stock.engine_core.shutdown()
    assert len(found) == REQUESTS
    return found


@pytest.mark.parametrize("is_async", [False, True])
def test_every_answer_is_that_of_stock_vllm(model, right, is_async):
    Mischief.rng, Mischief.held, Mischief.taken = random.Random(5), 0, 0
    planned = engine(model, kind="planned", is_async=is_async)
    found = answers(planned)
    differing = [name for name in right if found.get(name) != right[name]]
    left = what_is_left(scheduler_of(planned))
    planned.engine_core.shutdown()

    assert differing == []
    assert left == NOTHING
    assert Mischief.held > 30, "hardly anybody was held: this tests nothing"
    assert Mischief.taken > 10, "hardly anybody lost the cache: this tests nothing"


@pytest.mark.parametrize("is_async", [False, True])
def test_who_stays_is_not_disturbed_by_who_leaves(model, right, is_async):
    """Of those who leave, some wait for two answers."""
    aborts = some_long_ones(requests())
    Mischief.rng = random.Random(6)
    planned = engine(model, kind="planned", is_async=is_async)
    found = answers(planned, aborts)
    left = what_is_left(scheduler_of(planned))
    planned.engine_core.shutdown()

    assert_only_they_are_cut_short(found, right, aborts)
    assert left == NOTHING
