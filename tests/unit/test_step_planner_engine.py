"""What the step planner is told by an engine that has its own mind: caches, last tokens in flight, preemptions."""

import pytest

from tempo_router.columns import Columns, Floats
from tempo_router.config import SchedulingConfig
from tempo_router.events import StepReport
from tempo_router.kv_blocks import KvBlocks
from tempo_router.live_call import LiveCall, StepPlan
from tempo_router.policies import build_policy
from tempo_router.policies.base import Context
from tempo_router.policies.tempo import Tempo
from tempo_router.prediction import LengthHistograms
from tempo_router.request import DispatchId, Latency, RequestSpec
from tempo_router.standing import Standing
from tempo_router.step_planner import LEAST_CHUNK, StepPlanner
from tempo_router.step_time import StepTimeModel
from tests.builders import BACKGROUND, CHAT, TOOL, request

BLOCK = 16


@pytest.fixture
def planner():
    one = StepPlanner(
        build_policy(SchedulingConfig(policy="tempo")),
        slots=4,
        max_step_tokens=2048,
        kv=KvBlocks(40, BLOCK),
        steps=StepTimeModel(),
    )
    yield one
    one.audit()


def add(planner: StepPlanner, number: int, spec: RequestSpec, density: float = 1.0) -> LiveCall:
    standing = Standing(density, is_admitted=True)
    return planner.add(DispatchId(number), spec, LengthHistograms().lookup(spec), standing, spec.arrival_s)


def step(planner: StepPlanner, now_s: float, missed: tuple[LiveCall, ...] = ()) -> StepPlan:
    plan = planner.plan(now_s)
    assert plan is not None
    planner.stepped(plan, missed)
    return plan


def test_a_call_that_the_engine_left_out_has_made_no_token(planner):
    one, other = (add(planner, number, request(f"r{number}", prompt_tokens=10)) for number in (1, 2))
    step(planner, 0.0)
    step(planner, 0.1, missed=(one,))

    assert (one.new_tokens, other.new_tokens) == (1, 2)
    planner.audit()
    step(planner, 0.2)
    assert (one.new_tokens, other.new_tokens) == (2, 3)


def test_a_cached_prefix_is_not_computed_again(planner):
    call = add(planner, 1, request("r", prompt_tokens=100))
    plan = planner.plan(0.0)
    assert plan.prefill_tokens == 100
    planner.found(call, 96, 100)
    planner.stepped(StepPlan(((call, 4),), 0, 0))

    assert (call.is_decoding, call.new_tokens) == (True, 1)


def test_what_an_engine_preempts_by_itself_starts_again_behind_its_own_answer(planner):
    call = add(planner, 1, request("r", prompt_tokens=10))
    step(planner, 0.0)
    step(planner, 0.1)
    planner.lost(call)

    assert (call.is_decoding, call.blocks, call.missing_tokens) == (False, 0, 12)
    planner.lost(call)
    assert planner.evictions == 1, "it had nothing left to lose"


def test_a_victim_of_the_plan_is_named_until_the_next_plan(planner):
    last = add(planner, 1, request("last", slo=BACKGROUND, prompt_tokens=480))
    step(planner, 0.0)
    add(planner, 2, request("first", slo=CHAT, arrival_s=0.1, prompt_tokens=300), density=5.0)
    step(planner, 0.5)

    assert list(planner.evicted) == [last]
    step(planner, 0.6)
    assert list(planner.evicted) == []


@pytest.mark.parametrize("calls", [8, 64])
def test_a_plan_looks_once_at_the_order_however_many_give_way(calls, monkeypatch):
    """Equal calls come to their next block in the same step; there is room for few of them."""
    looks: list[int] = []
    arrange = Tempo.arrange_columns

    def counted(policy: Tempo, columns: Columns, context: Context) -> Floats:
        looks.append(len(columns.generated))
        return arrange(policy, columns, context)

    monkeypatch.setattr(Tempo, "arrange_columns", counted)
    planner = StepPlanner(
        build_policy(SchedulingConfig(policy="tempo")),
        slots=calls,
        max_step_tokens=2048,
        kv=KvBlocks(calls + 2, BLOCK),
        steps=StepTimeModel(),
    )
    planner.step_cap_s = 1.0
    for number in range(calls):
        add(planner, number, request(f"r{number}", slo=TOOL, prompt_tokens=BLOCK - 2), density=1.0 + 0.1 * number)
    step(planner, 0.0)
    step(planner, 0.01)
    order = planner.ordered()
    looks.clear()
    step(planner, 0.02)

    gone = list(planner.evicted)
    assert len(gone) >= calls // 2 - 1
    assert gone == order[::-1][: len(gone)], "the last gave way, the last of all first"
    assert len(looks) == 1
    planner.audit()


def test_calls_that_go_on_are_named_until_the_next_plan(planner):
    """Whoever does not ask must not find every call that was ever held."""
    streams = [add(planner, number, request(f"r{number}", slo=TOOL, prompt_tokens=10)) for number in range(5)]
    now_s, named = 0.0, []
    for turn in range(40):
        # The least dense of five calls is held; each is so in turn.
        for number, call in enumerate(streams):
            planner.retune(call.call_id, Standing(0.01 if number == turn % 5 else 1.0, is_admitted=True))
        now_s += 0.5
        step(planner, now_s)
        named.append(list(planner.resumed))
        planner.audit()
    assert sum(map(len, named)) > 20, "nobody was held"
    assert max(map(len, named)) == 1
    for call in streams:
        planner.remove(call)

    assert list(planner.resumed) == list(planner.evicted) == []


def test_a_call_that_goes_on_and_gives_way_before_a_step_was_computed_keeps_no_trace_of_it(planner):
    """Else a call that stands at the edge for long would remember every time."""
    call = add(planner, 1, request("r", prompt_tokens=10))
    step(planner, 0.0)
    for number in range(5):
        planner._hold(call)
        planner._resume(call)
        planner._resumed.clear()
        assert call.segments == [], f"after {number + 1} times"


def test_a_moved_deadline_changes_the_order_of_the_next_step(planner):
    # The cap lets one prompt into each step.
    planner.step_cap_s = 1e-6
    calls = [add(planner, number, request(f"r{number}", slo=TOOL, prompt_tokens=200)) for number in (1, 2)]
    assert [call for call, _ in step(planner, 0.0).prefills] == [calls[0]]
    planner.retarget(DispatchId(2), Latency(ttft_s=0.1, tbt_s=0.1))

    assert [call for call, _ in step(planner, 0.01).prefills] == [calls[1]]


def test_a_stream_that_became_a_deadline_no_longer_bounds_the_step(planner):
    call = add(planner, 1, request("r", slo=Latency(ttft_s=0.05, tbt_s=0.01), prompt_tokens=10))
    step(planner, 0.0)
    assert planner._paces.tightest_s == 0.01
    planner.retarget(DispatchId(1), TOOL)

    assert planner._paces.tightest_s == 0.1
    assert call.spec.slo == TOOL


def test_while_the_step_times_are_unsure_steps_keep_a_margin(planner):
    """Equal steps take one time 0.1 s and the next 0.5 s, for more than a minute: no fit is right about that."""
    planner.step_cap_s = 0.4
    steps = planner._steps
    for number in range(2000):
        steps.observe(StepReport(0.5 if number % 2 else 0.1, 500, 0, 0, 125_000.0))
        if steps.is_unsure:
            break
    assert steps.is_unsure

    assert steps.upper_ratio > 1.2
    assert planner._capped_budget(1.0) == steps.budget_tokens(0.4 / steps.upper_ratio, 0, 0)
    assert LEAST_CHUNK < planner._capped_budget(1.0) < steps.budget_tokens(0.4, 0, 0)


def test_begun_prompts_that_fell_out_of_the_order_go_on_when_nobody_ahead_fits(planner):
    """Both would have to give way for the first in the order, which is deferred and may take from nobody."""
    planner.step_cap_s = 1e-6
    begun = [add(planner, number, request(f"r{number}", slo=TOOL, prompt_tokens=300)) for number in (1, 2)]
    step(planner, 0.0)
    planner.retune(DispatchId(1), Standing(0.1, is_admitted=True))
    step(planner, 0.5)
    assert all(call.blocks for call in begun)
    for number in range(3, 7):
        add(planner, number, request(f"r{number}", slo=TOOL, prompt_tokens=600), density=100.0)
    for call in planner.live:
        planner.retune(call.call_id, Standing(call.standing.density, is_admitted=False))
    plan = step(planner, 1.0)

    assert [call for call, _ in plan.prefills] == [begun[1]]
    assert planner.evictions == 0


def test_steps_are_longer_while_nobody_here_has_a_target_that_can_be_met(planner):
    planner.step_cap_s = 1e-6
    add(planner, 1, request("background", slo=BACKGROUND, prompt_tokens=400))
    alone = planner._capped_budget(0.0)
    fixed_s = planner._steps.pace().fixed_s
    assert alone == min(2048, planner._steps.budget_tokens(min(0.1, 10 * fixed_s), 0, 0)) > LEAST_CHUNK

    add(planner, 2, request("stream", slo=CHAT, prompt_tokens=10))
    assert planner._capped_budget(0.0) < alone
    planner.retune(DispatchId(2), Standing(1.0, is_admitted=True, is_relegated=True))
    assert planner._capped_budget(0.0) == alone, "it was given up"
    planner.retune(DispatchId(2), Standing(1.0, is_admitted=True))
    assert planner._capped_budget(0.0) < alone
    planner.remove(planner.find(DispatchId(2)))
    assert planner._capped_budget(0.0) == alone


@pytest.mark.parametrize("slots", [1, 4])
def test_a_call_that_is_relegated_goes_last_in_the_next_step(slots):
    """And one that is no longer, first again; no time passes, so no other look at the order is due."""
    planner = StepPlanner(
        build_policy(SchedulingConfig(policy="tempo")),
        slots=slots,
        max_step_tokens=64,
        kv=KvBlocks(100, BLOCK),
        steps=StepTimeModel(),
    )
    for number in range(2):
        add(planner, number, request(f"r{number}", slo=TOOL, prompt_tokens=700))
    assert [call.call_id for call, _ in step(planner, 0.0).prefills] == [0]
    planner.retune(DispatchId(0), Standing(1.0, True, 0.0, True))
    assert [call.call_id for call, _ in step(planner, 0.0).prefills] == [1]
    planner.retune(DispatchId(0), Standing(1.0, True))
    planner.retune(DispatchId(1), Standing(1.0, True, 0.0, True))
    assert [call.call_id for call, _ in step(planner, 0.0).prefills] == [0]
    planner.audit()
