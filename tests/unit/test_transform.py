from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation import transform
from tempo_router.simulation.step_profiles import LinearStepTime, load_profile
from tempo_router.simulation.trace import Trace, TraceCall, Unit

CHAT = Unit("c", 2.0, Latency(2.0, 0.1), (TraceCall("c", 100, 11),), "chat")
CODE = Unit("k", 4.0, Deadline(20.0), (TraceCall("k", 5000, 1),), "code")
PROGRAM = Unit(
    "p",
    8.0,
    Deadline(60.0),
    (
        TraceCall("p0", 100, 1),
        TraceCall("p1", 100, 1, 1, (0,), 5.0),
        TraceCall("p2", 100, 101, 1, (0,), 1.0),
        TraceCall("p3", 100, 1, 2, (1, 2), 0.5),
    ),
    "research",
    is_program=True,
)
IDLE = Unit("b", 8.0, BestEffort(), (TraceCall("b", 100, 1),), "batch")
TRACE = Trace("t", (CHAT, CODE, PROGRAM, IDLE))
# 1 s per step, 1 ms per prompt token; decode steps 1 s + 1 ms per token of context.
STEPS = LinearStepTime(1.0, 0.001, 0.0, 0.001, 0.0)


def test_faster_divides_arrivals_and_leaves_gaps():
    trace = transform.faster(TRACE, 4)

    assert [unit.arrival_s for unit in trace.units] == [0.5, 1, 2, 2]
    assert [unit.calls for unit in trace.units] == [unit.calls for unit in TRACE.units]


def test_permuted_keeps_times_and_units_but_not_their_match():
    trace = transform.permuted(TRACE, 3)

    assert [unit.arrival_s for unit in trace.units] == [2, 4, 8, 8]
    assert sorted(unit.unit_id for unit in trace.units) == ["b", "c", "k", "p"]
    assert [unit.unit_id for unit in trace.units] != ["c", "k", "p", "b"]
    assert transform.permuted(TRACE, 3) == trace
    assert transform.permuted(TRACE, 0) == TRACE


@given(st.integers(1, 10**6))
def test_a_permutation_loses_nothing(seed):
    trace = transform.permuted(TRACE, seed)

    assert sorted(unit.calls[0].request_id for unit in trace.units) == ["b", "c", "k", "p0"]
    assert [unit.arrival_s for unit in trace.units] == [unit.arrival_s for unit in TRACE.units]


def test_targets_scale_and_best_effort_stays_without():
    slos = [unit.slo for unit in transform.with_slo_scale(TRACE, 0.5).units]

    assert slos == [Latency(1.0, 0.05), Deadline(10.0), Deadline(30.0), BestEffort()]


def test_unloaded_targets_are_what_each_unit_takes_alone():
    slos = [unit.slo for unit in transform.with_unloaded_slos(TRACE, 2.0, STEPS).units]

    assert slos[0] == Latency(pytest.approx(2 * 1.1), pytest.approx(2 * 1.111))
    # 5,000 tokens are three steps.
    assert slos[1] == Deadline(pytest.approx(2 * 8.0))
    # p2 decides: p0 1.1, gap 1, p2 1.1 + 100 steps of 1.15, gap 0.5, p3 1.1.
    assert slos[2] == Deadline(pytest.approx(2 * (1.1 + 1 + 1.1 + 115 + 0.5 + 1.1)))
    assert slos[3] == BestEffort()


def test_no_first_token_is_due_sooner_than_the_floor_and_gaps_between_tokens_have_none():
    quick = LinearStepTime(0.005, 0.00001, 0.0, 0.0, 0.0)

    def target(**floor):
        return transform.with_unloaded_slos(Trace("t", (CHAT,)), 2.0, quick, **floor).units[0].slo

    assert target() == Latency(transform.TTFT_FLOOR_S, pytest.approx(0.01))
    assert target(ttft_floor_s=0.0) == Latency(pytest.approx(2 * 0.006), pytest.approx(0.01))
    assert target(ttft_floor_s=3.0) == Latency(3.0, pytest.approx(0.01))


def test_the_mean_step_is_exact_where_step_times_are_linear_in_the_context():
    steps = load_profile("toy-cpu").step_time
    call = TraceCall("c", 300, 40)
    one_by_one = transform.unloaded_call_s(TraceCall("c", 300, 1), steps) + sum(
        steps.duration_s((), 1, 300 + produced) for produced in range(1, 40)
    )

    assert transform.unloaded_call_s(call, steps) == pytest.approx(one_by_one, rel=1e-9)


def test_deadlines_scale_and_streams_keep_their_targets():
    slos = [unit.slo for unit in transform.with_deadline_scale(TRACE, 0.5).units]

    assert slos == [Latency(2.0, 0.1), Deadline(10.0), Deadline(30.0), BestEffort()]


def test_lengths_scale_with_gaps_and_no_call_is_left_without_tokens():
    shared = replace(PROGRAM.calls[2], prefix_id="notes", prefix_tokens=60)
    unit = replace(PROGRAM, calls=(*PROGRAM.calls[:2], shared, PROGRAM.calls[3]))
    (scaled,) = transform.with_length_scale(Trace("t", (unit,)), 0.1).units

    assert scaled.calls == (
        TraceCall("p0", 10, 1),
        TraceCall("p1", 10, 1, 1, (0,), 0.5),
        TraceCall("p2", 10, 10, 1, (0,), 0.1, prefix_id="notes", prefix_tokens=6),
        TraceCall("p3", 10, 1, 2, (1, 2), 0.05),
    )
    assert (scaled.arrival_s, scaled.slo) == (8.0, Deadline(60.0))
    (small,) = transform.with_length_scale(Trace("t", (IDLE,)), 0.001).units
    assert (small.calls[0].prompt_tokens, small.calls[0].output_tokens) == (1, 1)


def test_names_change_everywhere_but_no_prefix_comes_where_none_was():
    unit = replace(CHAT, calls=(replace(CHAT.calls[0], prefix_id="notes", prefix_tokens=60),))
    trace = transform.with_names(Trace("t", (unit, CODE)), "0-")

    assert [(one.unit_id, one.calls[0].request_id, one.calls[0].prefix_id) for one in trace.units] == [
        ("0-c", "0-c", "0-notes"), ("0-k", "0-k", ""),
    ]  # fmt: skip
    assert trace.units[0].calls[0].prefix_tokens == 60


@pytest.mark.parametrize("change", [transform.with_deadline_scale, transform.with_length_scale])
def test_a_scale_is_above_zero(change):
    with pytest.raises(ConfigError, match=r"factor=0\.0: must be above zero"):
        change(TRACE, 0.0)


def test_parts_of_a_trace():
    assert transform.without_apps(TRACE, {"code", "batch"}).units == (CHAT, PROGRAM)
    assert transform.at_most_tokens(TRACE, 200).units == (CHAT, IDLE)
    assert transform.at_most_tokens(TRACE, 201).units == (CHAT, PROGRAM, IDLE)
    assert transform.first_s(TRACE, 8.0).units == (CHAT, CODE)
    assert transform.first_output_tokens(TRACE, 12).units == (CHAT, CODE)
    assert transform.first_output_tokens(TRACE, 13).units == (CHAT, CODE, PROGRAM)
    assert transform.first_output_tokens(TRACE, 10**6) == TRACE


def test_a_share_of_the_single_calls_becomes_best_effort():
    half = transform.as_best_effort(TRACE, 0.5, seed=1)

    changed = [new for new, old in zip(half.units, TRACE.units, strict=True) if new != old]
    assert 1 <= len(changed) <= 2
    assert all(unit.slo == BestEffort() for unit in changed)
    assert transform.as_best_effort(TRACE, 0.5, seed=1) == half
    assert transform.as_best_effort(TRACE, 0.0, seed=1) == TRACE
    whole = transform.as_best_effort(TRACE, 1.0, seed=1).units
    assert {unit.slo for unit in whole if not unit.is_program} == {BestEffort()}
    assert [unit for unit in whole if unit.is_program] == [PROGRAM]


@pytest.mark.parametrize(
    "change",
    [
        lambda: transform.faster(TRACE, 0),
        lambda: transform.faster(TRACE, float("nan")),
        lambda: transform.with_slo_scale(TRACE, -1),
        lambda: transform.with_unloaded_slos(TRACE, float("inf"), STEPS),
        lambda: transform.with_unloaded_slos(TRACE, 2.0, STEPS, ttft_floor_s=-0.1),
        lambda: transform.with_unloaded_slos(TRACE, 2.0, STEPS, ttft_floor_s=float("nan")),
        lambda: transform.as_best_effort(TRACE, 1.5, 0),
    ],
)
def test_a_factor_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError, match="must be"):
        change()
