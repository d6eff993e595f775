"""Tempo's scheduler class inside vLLM's, with made-up tokens and a clock of ours. No model is loaded."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import structlog

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("vllm")

from vllm.sampling_params import StructuredOutputsParams  # noqa: E402
from vllm.v1.core.sched.interface import PauseState  # noqa: E402

from tempo_router.errors import ConfigError, EngineVersionError  # noqa: E402
from tempo_router.request import (  # noqa: E402
    BestEffort,
    Deadline,
    DispatchId,
    GroupId,
    Latency,
    RequestId,
    RequestSpec,
    Slo,
)
from tempo_router.standing import Standing  # noqa: E402
from tests.vllm_scheduler import Drive, Shape, base_config, compile_grammar, make_scheduler  # noqa: E402
from workers import tempo_scheduler  # noqa: E402
from workers.call_facts import CallFacts, CallUpdate, News  # noqa: E402
from workers.default_model import ensure_default_model  # noqa: E402

CHAT = Latency(ttft_s=2.0, tbt_s=0.05)
TOOL = Deadline(ttlt_s=20.0)
BACKGROUND = BestEffort()
SLOS: tuple[Slo, ...] = (CHAT, TOOL, BACKGROUND, Latency(0.3, 0.02), Deadline(0.5))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ensure_default_model(tmp_path_factory.mktemp("data"))


def facts(
    number: int, now_s: float, slo: Slo = CHAT, density: float = 1.0, *, is_admitted: bool = True, prompt: int = 10
) -> CallFacts:
    spec = RequestSpec(RequestId(f"r{number}"), now_s, slo, prompt, 100, GroupId(f"r{number}"))
    return CallFacts(DispatchId(number), spec, standing=Standing(density, is_admitted))


def drive(model, shape: Shape | None = None, **options) -> Drive:
    shape = shape or Shape()
    return Drive(make_scheduler(model, shape, **options), is_async=shape.is_async)


def test_this_vllm_is_as_the_adapter_needs_it():
    assert tempo_scheduler.differences() == []


def test_a_changed_vllm_is_named(monkeypatch):
    monkeypatch.delattr(tempo_scheduler.Scheduler, "_preempt_request")
    monkeypatch.setattr(tempo_scheduler.Scheduler, "add_request", lambda self, request, extra: None)
    monkeypatch.delattr(tempo_scheduler.Request, "num_output_tokens")
    monkeypatch.delattr(tempo_scheduler.StructuredOutputRequest, "grammar")
    assert tempo_scheduler.differences() == [
        "Scheduler.add_request takes (self, request, extra), not (self, request)",
        "Scheduler._preempt_request does not exist",
        "Request has no num_output_tokens",
        "StructuredOutputRequest has no grammar",
    ]


def test_a_cache_that_answers_in_another_shape_is_named(monkeypatch):
    def changed(self, request) -> tuple[int, list]:
        return 0, []

    monkeypatch.setattr(tempo_scheduler.KVCacheManager, "get_computed_blocks", changed)
    assert tempo_scheduler.differences() == [
        "KVCacheManager.get_computed_blocks returns tuple[int, list], of which the second is no number of tokens"
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ec_transfer_config": object()}, "transfer of encoder outputs"),
        ({"model_config.is_diffusion": True}, "diffusion models"),
        (
            {"model_config.is_multimodal_model": True, "scheduler_config.disable_chunked_mm_input": True},
            "images that are not cut (disable_chunked_mm_input is on)",
        ),
        (
            {"cache_config.mamba_cache_mode": "align"},
            "Mamba states cached at block ends (mamba_cache_mode is align)",
        ),
    ],
)
def test_what_keeps_prompts_whole_or_is_unknown_is_not_planned(model, changes, reason):
    """A cap on a step's tokens would then keep prompts out for ever."""
    config = base_config(model)
    assert tempo_scheduler.not_planned(config) == []
    assert tempo_scheduler.not_planned(Changed(config, changes)) == [reason]


class Changed:
    """A configuration with some fields as given, by their path; the others are as they were."""

    def __init__(self, config: Any, changes: dict[str, Any]) -> None:
        self._config = config
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        if name in self._changes:
            return self._changes[name]
        inner = {path.partition(".")[2]: value for path, value in self._changes.items() if path.startswith(f"{name}.")}
        found = getattr(self._config, name)
        return Changed(found, inner) if inner else found


def test_an_image_may_be_cut_or_there_is_none(model):
    config = base_config(model)
    assert tempo_scheduler.not_planned(Changed(config, {"model_config.is_multimodal_model": True})) == []
    assert tempo_scheduler.not_planned(Changed(config, {"scheduler_config.disable_chunked_mm_input": True})) == []


def test_a_method_that_vllm_newly_asks_of_its_queues_is_named(monkeypatch):
    queue = tempo_scheduler.RequestQueue
    monkeypatch.setattr(queue, "find_request", lambda self, request_id: None, raising=False)
    monkeypatch.setattr(queue, "__abstractmethods__", queue.__abstractmethods__ | {"find_request"})
    monkeypatch.setattr(queue, "remove_requests", lambda self, requests, finished: None)
    assert tempo_scheduler.differences() == [
        "RequestQueue asks for find_request, which PlannedQueue does not have",
        "RequestQueue.remove_requests takes (self, requests, finished), PlannedQueue's (self, requests)",
    ]


@pytest.mark.parametrize("is_async", [False, True])
def test_without_pressure_every_answer_is_whole(model, is_async):
    run = drive(model, Shape(is_async=is_async))
    for number in range(6):
        run.submit(f"r{number}", list(range(20 + number)), 5 + number, facts(number, run.now_s))
    run.drain()
    assert {name: len(answer) for name, answer in run.answers.items()} == {f"r{n}": 5 + n for n in range(6)}
    assert all(run.answers[name] == run.expected(name, len(run.answers[name])) for name in run.answers)
    run.check_nothing_is_left()


def test_the_first_in_the_order_gets_the_prefill_budget(model):
    run = drive(model, Shape(max_step_tokens=64))
    run.submit("r0", list(range(100)), 3, facts(0, run.now_s, BACKGROUND))
    run.submit("r1", list(range(100, 200)), 3, facts(1, run.now_s, TOOL))
    run.submit("r2", list(range(200, 250)), 3, facts(2, run.now_s, CHAT, density=5.0))
    assert run.step() == {"r2": 50, "r1": 14}
    run.drain()
    run.check_nothing_is_left()


def test_a_newcomer_overtakes_a_prompt_that_is_partly_computed(model):
    """vLLM serves running requests first: the other must sit out."""
    run = drive(model, Shape(max_step_tokens=64))
    run.submit("r0", list(range(300)), 3, facts(0, run.now_s, BACKGROUND))
    assert run.step() == {"r0": 64}
    run.submit("r1", list(range(1000, 1300)), 3, facts(1, run.now_s, CHAT))
    assert run.step() == {"r1": 64}
    run.drain()
    assert {name: len(answer) for name, answer in run.answers.items()} == {"r0": 3, "r1": 3}
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_who_is_last_in_the_order_is_held_while_better_calls_have_the_slots(model, is_async):
    run = drive(model, Shape(slots=2, places=4, is_async=is_async))
    for number in range(2):
        run.submit(f"r{number}", list(range(10)), 40, facts(number, run.now_s, BACKGROUND))
    for _ in range(4):
        run.step()
    run.submit("r2", list(range(50, 60)), 5, facts(2, run.now_s, CHAT, density=9.0))
    # The order of live calls stands for 0.3 s.
    run.now_s += 0.4
    seen = [set(run.step()) for _ in range(12)]

    together = [names for names in seen if "r2" in names]
    assert together
    assert all(len(names) <= 2 for names in seen), "never more than the slots in one step"
    assert any(len(names) == 1 or not names >= {"r0", "r1"} for names in together)
    run.drain()
    assert run.scheduler.planner.holds > 0
    assert {name: len(answer) for name, answer in run.answers.items()} == {"r0": 40, "r1": 40, "r2": 5}
    assert all(run.answers[name] == run.expected(name, len(run.answers[name])) for name in run.answers)
    run.check_nothing_is_left()


def test_blocks_are_taken_from_the_end_of_the_order_and_not_given_back_in_the_same_step(model):
    run = drive(model, Shape(blocks=20))
    run.submit("r0", list(range(200)), 50, facts(0, run.now_s, BACKGROUND))
    run.step()
    run.step()
    run.submit("r1", list(range(1000, 1200)), 5, facts(1, run.now_s + 0.0, CHAT, density=9.0))
    run.now_s += 0.4
    scheduled = run.step()
    assert set(scheduled) == {"r1"}
    assert run.scheduler.planner.evictions == 1
    assert run.preempted == ["r0"], "vLLM names whom the planner evicted, too"
    run.drain()
    assert {name: len(answer) for name, answer in run.answers.items()} == {"r0": 50, "r1": 5}
    assert run.answers["r0"] == run.expected("r0", 50)
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("watermark", "window", "prompt"), [(0.0, 2048, 600), (0.0, 64, 600), (0.3, 0, 950)])
def test_a_prompt_that_is_half_computed_gives_way_where_a_prompt_takes_more_blocks_than_its_tokens_fill(
    model, watermark, window, prompt, is_async
):
    """Two kinds of layers that take their own, and blocks that vLLM keeps from prompts."""
    shape = Shape(blocks=100, prefix_cache=False, watermark=watermark, window=window, is_async=is_async)
    run = drive(model, shape)
    run.submit("r0", list(range(600)), 20, facts(0, run.now_s, BACKGROUND, prompt=600))
    run.step()
    run.submit("r1", list(range(1000, 1000 + prompt)), 20, facts(1, run.now_s, CHAT, prompt=prompt))
    assert set(run.step()) == {"r1"}
    assert run.preempted == ["r0"]
    run.drain(limit=100)
    assert all(run.answers[name] == run.expected(name, 20) for name in ("r0", "r1"))
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_that_share_a_long_prefix_run_at_once(model, is_async):
    """It takes half of the blocks: a second call needs only what it adds to it, and gives back no more."""
    run = drive(model, Shape(slots=16, places=24, max_step_tokens=512, blocks=200, is_async=is_async))
    prefix = list(range(1600))
    for number in range(30):
        run.submit(f"r{number}", [*prefix, *range(3000 + number, 3016 + number)], 60, facts(number, run.now_s, TOOL))
    run.drain(limit=300)
    assert max(len(scheduled) for scheduled in run.scheduled) == 16
    assert run.scheduler.planner.evictions <= 1
    assert all(run.answers[name] == run.expected(name, 60) for name in run.answers)
    run.check_nothing_is_left()


def test_decodes_may_take_the_blocks_that_are_kept_from_prompts(model):
    """Whoever decodes would else lose its cache to a share that nobody may use."""
    run = drive(model, Shape(blocks=31, prefix_cache=False, watermark=0.5))
    for number in range(2):
        run.submit(f"r{number}", list(range(70)), 100, facts(number, run.now_s, TOOL))
    run.drain(limit=150)
    assert run.scheduler.planner.evictions == 0
    assert run.preempted == []
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_an_engine_with_fewer_blocks_than_were_reckoned_does_not_spin(model, is_async):
    """Nobody decodes and nobody is held: the prompt that sits out is in the way of the one that it makes room for."""
    run = drive(model, Shape(blocks=60, prefix_cache=False, is_async=is_async))
    measure = run.scheduler._kv.measure
    run.scheduler._kv.measure = lambda free, **counts: measure(free + 50, **counts)
    run.submit("r0", list(range(600)), 20, facts(0, run.now_s, BACKGROUND))
    run.step()
    run.submit("r1", list(range(1000, 1800)), 20, facts(1, run.now_s, CHAT))
    run.drain(limit=100)
    assert all(run.answers[name] == run.expected(name, 20) for name in ("r0", "r1"))
    run.check_nothing_is_left()


def test_a_cached_prefix_leaves_the_budget_to_others(model):
    run = drive(model, Shape(max_step_tokens=64))
    prompt = list(range(160))
    run.submit("r0", prompt, 1, facts(0, run.now_s))
    run.drain()
    run.submit("r1", [*prompt, 1, 2, 3], 1, facts(1, run.now_s, density=5.0))
    run.submit("r2", list(range(1000, 1040)), 1, facts(2, run.now_s))
    assert run.step() == {"r1": 3, "r2": 40}
    run.drain()
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_news_reach_the_order_within_two_steps(model, is_async):
    """A moved deadline, another tier, another standing: all of them for calls that wait in the engine."""
    run = drive(model, Shape(max_step_tokens=64, is_async=is_async))
    # Larger than any step: the one that is first gets all of it.
    for number in range(3):
        prompt = list(range(1000 * number, 1000 * number + 700))
        run.submit(f"r{number}", prompt, 2, facts(number, run.now_s, TOOL, density=1.0))
    assert set(run.step()) == {"r0"}

    run.scheduler.tell(News((CallUpdate("r1", slo=Deadline(0.5)),), None))
    assert "r1" in set(run.step()) | set(run.step()), "its deadline moved"
    run.scheduler.tell(News((CallUpdate("r1", standing=Standing(1.0, True, 0.0, True)),), None))
    run.scheduler.tell(News((CallUpdate("r2", slo=Latency(0.2, 0.05)),), None))
    run.now_s += 0.4
    assert "r2" in set(run.step()) | set(run.step()), "it became a stream"
    run.drain()
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_who_is_relegated_goes_last_within_two_steps(model, is_async):
    """Alone, and within the time for which the order of live calls stands."""
    run = drive(model, Shape(max_step_tokens=64, is_async=is_async))
    for number in range(2):
        prompt = list(range(1000 * number, 1000 * number + 700))
        run.submit(f"r{number}", prompt, 2, facts(number, run.now_s, TOOL, density=1.0))
    assert set(run.step()) == {"r0"}
    began_s = run.now_s
    run.scheduler.tell(News((CallUpdate("r0", standing=Standing(1.0, True, 0.0, True)),), None))
    run.step()
    assert set(run.step()) == {"r1"}
    assert run.now_s - began_s < 0.3
    run.drain()
    assert all(run.answers[name] == run.expected(name, 2) for name in ("r0", "r1"))
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_that_is_relegated_gives_its_slot_to_one_that_is_held(model, is_async):
    run = drive(model, Shape(slots=2, places=4, is_async=is_async))
    for number in range(2):
        run.submit(f"r{number}", list(range(10)), 60, facts(number, run.now_s, TOOL))
    for _ in range(4):
        run.step()
    run.submit("r2", list(range(50, 60)), 60, facts(2, run.now_s, CHAT, density=9.0))
    # The order of live calls stands for 0.3 s.
    run.now_s += 0.4
    for _ in range(6):
        last = set(run.step())
    assert "r2" in last
    assert run.scheduler.planner.held == 1
    run.scheduler.tell(News((CallUpdate("r2", standing=Standing(0.0, True, 0.0, True)),), None))
    run.step()
    assert set(run.step()) == {"r0", "r1"}
    run.drain()
    assert all(run.answers[name] == run.expected(name, 60) for name in ("r0", "r1", "r2"))
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_news_that_overtake_their_request_count(model, is_async):
    run = drive(model, Shape(max_step_tokens=64, is_async=is_async))
    run.scheduler.tell(News((CallUpdate("r1", standing=Standing(50.0, True)),), None))
    run.step()
    run.submit("r0", list(range(300)), 2, facts(0, run.now_s))
    run.submit("r1", list(range(1000, 1300)), 2, facts(1, run.now_s))
    assert set(run.step()) == {"r1"}
    run.drain()
    run.check_nothing_is_left()


def test_the_step_cap_of_the_router_bounds_the_prompts_of_a_step(model):
    run = drive(model, Shape(max_step_tokens=256))
    for _ in range(64):
        run.observe(0.004, 4)
    run.submit("r0", list(range(10)), 30, facts(0, run.now_s))
    run.step()
    run.submit("r1", list(range(1000, 1400)), 2, facts(1, run.now_s))
    run.scheduler.tell(News((), 0.0005))
    short = run.step()["r1"]
    run.scheduler.tell(News((), 0.5))
    assert run.step()["r1"] > 2 * short
    run.drain()


def test_a_request_that_says_nothing_is_best_effort(model):
    run = drive(model, Shape(max_step_tokens=64))
    run.submit("silent", list(range(300)), 2)
    run.submit("r1", list(range(1000, 1100)), 2, facts(1, run.now_s))
    assert set(run.step()) == {"r1"}
    run.drain()
    assert len(run.answers["silent"]) == 2
    run.check_nothing_is_left()


def test_facts_that_cannot_be_read_make_it_best_effort_aloud(model):
    run = drive(model)
    request = run.submit("odd", list(range(20)), 2, facts(0, run.now_s))
    run.drain()
    broken = run.submit("broken", list(range(20)), 2)
    assert request is not broken
    broken.sampling_params.extra_args = {tempo_scheduler.KEY: {"class": "urgent"}}
    read = run.scheduler._facts(broken, run.now_s)
    assert read.spec.slo == BACKGROUND
    run.drain()
    run.check_nothing_is_left()


def test_the_time_that_a_grammar_takes_to_compile_counts_towards_the_target(model):
    run = drive(model)
    came_s = run.now_s
    request = run.submit(
        "r0", list(range(10)), 3, facts(0, came_s, TOOL), structured_outputs=StructuredOutputsParams(regex="a*")
    )
    run.step()
    run.now_s += 3.0
    compile_grammar(request)
    run.step()
    spec = run.scheduler._calls["r0"].spec
    assert (spec.arrival_s, spec.slo) == (came_s, TOOL)
    run.drain()
    assert run.answers["r0"] == run.expected("r0", 3)
    run.check_nothing_is_left()


@pytest.mark.parametrize(
    "says",
    [
        "x",
        ["latency"],
        7,
        '["latency"]',
        {"class": "best_effort", "key": -1},
        {"class": "best_effort", "key": math.inf},
        {"class": "best_effort", "generated": math.inf},
        {"class": "latency", "due_in_s": math.nan, "tbt_s": 0.1},
        {"class": "deadline", "due_in_s": 5.0, "standing": [math.nan, True, 0.0, False]},
    ],
)
def test_whatever_a_client_says_the_engine_serves_it(model, says):
    run = drive(model, Shape(slots=2, places=3))
    run.submit("silent", list(range(10)), 30)
    for number in range(3):
        run.submit(f"r{number}", list(range(10)), 30, facts(number, run.now_s))
    run.step()
    with structlog.testing.capture_logs() as logs:
        run.submit("odd", list(range(20)), 5, says=says)
    assert [(entry["event"], entry["effect"]) for entry in logs] == [("slo_unreadable", "best effort")]
    assert run.scheduler._calls["odd"].spec.slo == BACKGROUND
    run.drain()
    assert run.answers["odd"] == run.expected("odd", 5)
    run.check_nothing_is_left()


@pytest.mark.parametrize(
    "says",
    [
        {"class": "latency", "due_in_s": -math.inf, "tbt_s": 0.1},
        {"class": "latency", "due_in_s": 1.0, "tbt_s": 0.0},
        {"class": "latency", "due_in_s": 1.0, "tbt_s": -1.0},
        {"class": "latency", "due_in_s": 1e300, "tbt_s": math.inf},
        {"class": "deadline", "due_in_s": math.inf},
        {"class": "deadline", "due_in_s": -1e300},
        {"class": "deadline", "due_in_s": 5.0, "lengths": [5.0, 3.0, -math.inf]},
        {"class": "deadline", "due_in_s": 5.0, "lengths": [math.inf]},
        {"class": "deadline", "due_in_s": 5.0, "standing": [math.inf, True, math.inf, False]},
        {"class": "deadline", "due_in_s": 5.0, "standing": [-1.0, True, -math.inf, False]},
        '{"class": "best_effort", "key": 1000000000000000000000000000000, "age_s": 1e300}',
    ],
)
def test_targets_that_nobody_means_do_no_harm(model, says):
    run = drive(model, Shape(slots=2, places=3, blocks=16))
    for number in range(3):
        run.submit(f"r{number}", list(range(60)), 30, facts(number, run.now_s))
    run.step()
    for number in range(2):
        run.submit(f"odd{number}", list(range(20)), 25, says=says)
        run.step()
    run.now_s += 0.4
    run.drain(limit=600)
    assert all(run.answers[name] == run.expected(name, len(answer)) for name, answer in run.answers.items())
    run.check_nothing_is_left()


def test_a_request_that_cannot_be_kept_leaves_nothing_behind(model, monkeypatch):
    run = drive(model)
    monkeypatch.setattr(tempo_scheduler, "facts_from_values", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.submit("odd", list(range(20)), 2)
    run.check_nothing_is_left()


def test_a_plain_server_with_what_cannot_be_planned_ends_at_its_start(model, monkeypatch):
    """It asks nobody before; there are no priorities that it could go by."""
    monkeypatch.setattr(tempo_scheduler, "not_planned", lambda config: ["speculative decoding", "KV transfer"])
    with pytest.raises(ConfigError, match="cannot plan for speculative decoding; KV transfer; start vLLM without"):
        drive(model)
    monkeypatch.delattr(tempo_scheduler.StructuredOutputRequest, "grammar")
    with pytest.raises(EngineVersionError, match="StructuredOutputRequest has no grammar"):
        drive(model)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_in_any_crowd_no_token_is_lost_and_nothing_is_left(model, seed, prefix_cache, is_async):
    """Small cache, few slots and places, aborts in the middle, standings that change: what breaks schedulers.

    In some of them layers of two kinds and a watermark; pauses and grammars that take long.
    """
    rng = random.Random(f"{seed}:{prefix_cache}:{is_async}")
    slots = rng.choice((2, 4, 8))
    window = rng.choice((0, 0, 64, 2048))
    shape = Shape(
        slots=slots,
        places=slots + rng.choice((0, 1, slots)),
        max_step_tokens=rng.choice((32, 100, 256)),
        blocks=rng.choice((24, 30, 40)) * (2 if window else 1),
        prefix_cache=prefix_cache,
        is_async=is_async,
        window=window,
        watermark=rng.choice((0.0, 0.0, 0.3)),
    )
    run = drive(model, shape)
    wanted: dict[str, int] = {}
    in_compilation: list[Any] = []
    for number in range(120):
        name = f"r{number}"
        shared = [7] * rng.choice((0, 16, 40))
        prompt = [*shared, *(rng.randrange(256) for _ in range(rng.choice((1, 15, 16, 17, 90, 250))))]
        wanted[name] = rng.choice((1, 2, 17, 60))
        known = facts(number, run.now_s, rng.choice(SLOS), rng.choice((0.0, 0.1, 10.0)), is_admitted=rng.random() < 0.7)
        grammar = {"structured_outputs": StructuredOutputsParams(regex="a*")} if rng.random() < 0.1 else {}
        request = run.submit(name, prompt, wanted[name], known if rng.random() < 0.9 else None, **grammar)
        in_compilation += [request] if grammar else []
        if rng.random() < 0.04:
            run.scheduler.set_pause_state(rng.choice((PauseState.PAUSED_NEW, PauseState.PAUSED_ALL)))
        live = run.go_on(rng, wanted)
        if rng.random() < 0.5:
            run.scheduler.set_pause_state(PauseState.UNPAUSED)
        if in_compilation and rng.random() < 0.5:
            compile_grammar(in_compilation.pop(0))
        if live and rng.random() < 0.3:
            standing = Standing(rng.choice((0.0, 0.01, 99.0)), rng.random() < 0.6, 0.0, rng.random() < 0.2)
            update = CallUpdate(rng.choice(live), standing, rng.choice((None, *SLOS)))
            run.scheduler.tell(News((update,), rng.choice((None, 0.01))))
        run.now_s += rng.choice((0.0, 0.0, 0.4))
    for request in in_compilation:
        compile_grammar(request)
    run.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(400):
        run.step()
        run.scheduler.audit()
    assert run.scheduler.running == [], "a pause waits for ever"
    run.scheduler.set_pause_state(PauseState.UNPAUSED)
    run.drain()

    planner = run.scheduler.planner
    assert planner.holds + planner.evictions > 5, "hardly anybody was held or evicted: this history tests nothing"
    for name, tokens in wanted.items():
        answer = run.answers[name]
        assert answer == run.expected(name, len(answer)), f"{name} is garbled"
        assert run.ended[name] == "abort" or len(answer) == tokens, f"{name} has {len(answer)} of {tokens} tokens"
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("places", [8, 10, 12])
def test_who_is_held_gives_its_place_to_a_newcomer_that_finds_none(model, places, is_async):
    """Eight run and four come, as many as a router sends; held calls would keep half the slots idle."""
    run = drive(model, Shape(slots=8, places=places, is_async=is_async))
    for number in range(8):
        run.submit(f"r{number}", list(range(10)), 300, facts(number, run.now_s, BACKGROUND))
    for _ in range(40):
        run.step()
    came_s = run.now_s
    for number in range(8, 12):
        run.submit(f"r{number}", list(range(10)), 100, facts(number, run.now_s, CHAT))
    run.now_s += 0.4
    # Who has just been held has a token on its way, and so has who takes part while that comes.
    seen = [len(run.step()) for _ in range(80)][6:]
    assert seen == [8] * len(seen)
    assert all(run.first_token_s[f"r{number}"] - came_s < CHAT.ttft_s for number in range(8, 12))
    assert len(run.preempted) == 12 - places
    run.drain(limit=1000)
    assert all(run.answers[name] == run.expected(name, len(answer)) for name, answer in run.answers.items())
    assert sum(len(answer) for answer in run.answers.values()) == 8 * 300 + 4 * 100
    run.check_nothing_is_left()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_pause_that_waits_for_what_runs_waits_for_those_held_too(model, is_async):
    """And for prompts that sit out; whoever has not begun waits for the end of the pause."""
    run = drive(model, Shape(slots=3, places=6, max_step_tokens=64, is_async=is_async))
    for number in range(3):
        run.submit(f"r{number}", list(range(10)), 50, facts(number, run.now_s, BACKGROUND))
    for _ in range(5):
        run.step()
    run.submit("r3", list(range(300)), 5, facts(3, run.now_s, BACKGROUND))
    for number in range(4, 6):
        run.submit(f"r{number}", list(range(1000, 1300)), 40, facts(number, run.now_s, CHAT))
    run.now_s += 0.4
    while not run.scheduler.planner.held:
        run.step()
    run.step()
    run.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    run.submit("late", list(range(10)), 5, facts(6, run.now_s, CHAT))
    for _ in range(150):
        run.step()
        run.scheduler.audit()
    assert run.scheduler.running == []
    assert "late" not in run.ended
    assert {"r0", "r1", "r2"} <= set(run.ended)

    run.scheduler.set_pause_state(PauseState.UNPAUSED)
    run.drain(limit=200)
    assert all(run.answers[name] == run.expected(name, len(answer)) for name, answer in run.answers.items())
    assert {name: len(answer) for name, answer in run.answers.items()} == {
        "r0": 50, "r1": 50, "r2": 50, "r3": 5, "r4": 40, "r5": 40, "late": 5
    }  # fmt: skip
    run.check_nothing_is_left()


def test_resetting_the_cache_under_running_requests_loses_nothing(model):
    run = drive(model)
    for number in range(4):
        run.submit(f"r{number}", list(range(40)), 20, facts(number, run.now_s))
    for _ in range(5):
        run.step()
    assert run.scheduler.reset_prefix_cache(reset_running_requests=True)
    run.scheduler.audit()
    run.drain()
    assert all(run.answers[f"r{n}"] == run.expected(f"r{n}", 20) for n in range(4))
    run.check_nothing_is_left()


def test_lengths_that_the_router_expects_count(model):
    """Of two equal deadlines the one with more left to produce is the more urgent."""
    from tempo_router.prediction import Lengths

    run = drive(model, Shape(max_step_tokens=64))
    for number, length in ((0, 10.0), (1, 90.0)):
        known = replace(facts(number, run.now_s, TOOL), lengths=Lengths((length,) * 20))
        run.submit(f"r{number}", list(range(1000 * number, 1000 * number + 300)), 100, known)
    assert set(run.step()) == {"r1"}
    run.drain()
