"""LoRA adapters in Tempo's scheduler class inside vLLM's, with made-up tokens: never more in a step than `max_loras`.

vLLM asserts it of the requests that run, and an assertion ends the engine. No model and no adapter is loaded.
"""

import random

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("vllm")

from tempo_router.request import Deadline  # noqa: E402
from tempo_router.standing import Standing  # noqa: E402
from tests.conformance.test_tempo_scheduler import BACKGROUND, CHAT, SLOS, TOOL, drive, facts  # noqa: E402
from tests.vllm_scheduler import Shape  # noqa: E402
from workers.call_facts import CallUpdate, News  # noqa: E402
from workers.default_model import ensure_default_model  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ensure_default_model(tmp_path_factory.mktemp("data"))


def test_an_adapter_whose_call_is_held_keeps_its_place(model):
    """A newcomer with another one would take it, and both would run once the call goes on."""
    run = drive(model, Shape(slots=2, places=4, max_loras=1))
    run.submit("r0", list(range(10)), 20, facts(0, run.now_s, BACKGROUND))
    run.submit("r1", list(range(50, 60)), 40, facts(1, run.now_s, BACKGROUND), adapter=1)
    for _ in range(4):
        run.step()
    run.submit("r2", list(range(100, 110)), 5, facts(2, run.now_s, CHAT))
    # The order of live calls stands for 0.3 s.
    run.now_s += 0.4
    run.step()
    assert [call.spec.request_id for call in run.scheduler.planner.held_calls] == ["r1"]
    run.submit("r3", list(range(150, 160)), 60, facts(3, run.now_s, CHAT), adapter=2)
    run.now_s += 0.4
    run.drain()
    assert {name: len(answer) for name, answer in run.answers.items()} == {"r0": 20, "r1": 40, "r2": 5, "r3": 60}
    run.check_nothing_is_left()


def test_an_adapter_whose_prompt_sits_a_step_out_keeps_its_place(model):
    run = drive(model, Shape(max_step_tokens=64, max_loras=1))
    run.submit("r0", list(range(300)), 3, facts(0, run.now_s, BACKGROUND), adapter=1)
    assert run.step() == {"r0": 64}
    run.submit("r1", list(range(1000, 1300)), 3, facts(1, run.now_s, CHAT), adapter=2)
    run.submit("r2", list(range(2000, 2300)), 3, facts(2, run.now_s, CHAT))
    assert run.step() == {"r2": 64}
    run.drain()
    assert {name: len(answer) for name, answer in run.answers.items()} == {"r0": 3, "r1": 3, "r2": 3}
    run.check_nothing_is_left()


def test_who_waits_for_a_place_leaves_the_budget_to_others(model):
    run = drive(model, Shape(max_step_tokens=64, max_loras=1))
    run.submit("r0", list(range(10)), 20, facts(0, run.now_s, BACKGROUND), adapter=1)
    run.step()
    run.submit("r1", list(range(1000, 1300)), 3, facts(1, run.now_s, CHAT, density=9.0), adapter=2)
    run.submit("r2", list(range(2000, 2020)), 3, facts(2, run.now_s, BACKGROUND))
    assert run.step() == {"r0": 1, "r2": 20}
    run.drain()
    run.check_nothing_is_left()


def test_a_cached_prefix_counts_only_under_its_own_adapter(model):
    run = drive(model, Shape(max_step_tokens=256, max_loras=2))
    prompt = list(range(160))
    run.submit("r0", prompt, 1, facts(0, run.now_s), adapter=1)
    run.drain()
    run.submit("r1", [*prompt, 1, 2, 3], 1, facts(1, run.now_s), adapter=1)
    run.submit("r2", prompt, 1, facts(2, run.now_s), adapter=2)
    assert run.step() == {"r1": 3, "r2": 160}
    run.drain()
    run.check_nothing_is_left()


def test_the_time_that_a_call_waits_for_a_place_counts_towards_its_target(model):
    run = drive(model, Shape(max_loras=1))
    run.submit("r0", list(range(10)), 20, facts(0, run.now_s), adapter=1)
    came_s = run.now_s
    run.submit("r1", list(range(1000, 1010)), 3, facts(1, run.now_s, TOOL), adapter=2)
    while run.scheduler._loras.waiting:
        run.step()
    spec = run.scheduler._calls["r1"].spec
    assert run.now_s > came_s
    assert (spec.arrival_s, spec.slo) == (pytest.approx(came_s), TOOL)
    run.drain()


def test_news_of_a_call_that_waits_for_a_place_add_up(model):
    run = drive(model, Shape(max_loras=1))
    run.submit("r0", list(range(10)), 5, facts(0, run.now_s), adapter=1)
    run.submit("r1", list(range(1000, 1010)), 3, facts(1, run.now_s, TOOL), adapter=2)
    run.step()
    run.scheduler.tell(News((CallUpdate("r1", slo=Deadline(0.5)),), None))
    run.scheduler.tell(News((CallUpdate("r1", standing=Standing(50.0, True)),), None))
    while run.scheduler._loras.waiting:
        run.step()
    call = run.scheduler._calls["r1"]
    assert (call.spec.slo, call.standing) == (Deadline(0.5), Standing(50.0, True))
    run.drain()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("max_loras", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_in_any_crowd_no_step_has_too_many_adapters_and_no_token_is_lost(model, seed, max_loras, is_async):
    """Small cache, few slots, holds, aborts in the middle, four adapters and none."""
    rng = random.Random(f"{seed}:{max_loras}:{is_async}")
    shape = Shape(slots=4, places=6, max_step_tokens=100, blocks=30, is_async=is_async, max_loras=max_loras)
    run = drive(model, shape)
    wanted: dict[str, int] = {}
    adapter_of: dict[str, int] = {}
    waited = 0
    for number in range(120):
        name = f"r{number}"
        prompt = [
            *[7] * rng.choice((0, 16, 40)),
            *(rng.randrange(256) for _ in range(rng.choice((1, 15, 17, 90, 250)))),
        ]
        wanted[name], adapter_of[name] = rng.choice((1, 2, 17, 60)), rng.choice((0, 0, 1, 2, 3, 4))
        known = facts(number, run.now_s, rng.choice(SLOS), rng.choice((0.0, 0.1, 10.0)), is_admitted=rng.random() < 0.7)
        run.submit(name, prompt, wanted[name], known if rng.random() < 0.9 else None, adapter=adapter_of[name])
        waited += name in run.scheduler._loras.waiting
        run.go_on(rng, wanted)
        run.now_s += rng.choice((0.0, 0.0, 0.4))
    run.drain()

    assert waited > 5, "hardly anybody waited for a place: this history tests nothing"
    assert run.scheduler.planner.holds + run.scheduler.planner.evictions > 5, "hardly anybody was held or evicted"
    for scheduled in run.scheduled:
        assert len({adapter_of[name] for name in scheduled} - {0}) <= max_loras
    for name, tokens in wanted.items():
        answer = run.answers[name]
        assert answer == run.expected(name, len(answer)), f"{name} is garbled"
        assert run.ended[name] == "abort" or len(answer) == tokens, f"{name} has {len(answer)} of {tokens} tokens"
    run.check_nothing_is_left()
