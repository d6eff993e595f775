"""Runs in virtual time: what they come to, judged by an account of the test's own."""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

from tempo_router.actions import Action, Dispatch, Expire
from tempo_router.config import SchedulingConfig
from tempo_router.errors import ConfigError
from tempo_router.events import Cancelled, Event
from tempo_router.request import BestEffort, Deadline, Latency, RequestId
from tempo_router.simulation import simulator
from tempo_router.simulation.generate import generate, generator_config
from tempo_router.simulation.report import Report
from tempo_router.simulation.simulator import Setup, _Run, simulate
from tempo_router.simulation.step_profiles import load_profile, scaled
from tempo_router.simulation.trace import Trace, TraceCall, Unit

PROFILE = load_profile("llama-3-8b:h100-80g:1")
STATUSES = {"finished", "refused", "expired", "abandoned", "cut"}


@cache
def workload(rate_per_s: float, duration_s: float, seed: int = 1, slo_factor: float = 1.0) -> Trace:
    settings = {"rate_per_s": rate_per_s, "duration_s": duration_s, "slo_factor": slo_factor, "best_effort_weight": 0.1}
    return generate(generator_config(settings), seed)


def setup(policy: str = "tempo", **more: Any) -> Setup:
    return Setup(policy, more.pop("profiles", (PROFILE,)), **more)


def alone(slo: Latency | Deadline | BestEffort, arrival_s: float, prompt: int, output: int, name: str) -> Unit:
    return Unit(name, arrival_s, slo, (TraceCall(name, prompt, output),))


def finished_run(trace: Trace, chosen: Setup) -> tuple[_Run, Report]:
    run = _Run(trace, chosen, None)
    return run, run.run()


def met_share(report: Report) -> float:
    verdicts = [unit.is_met for unit in report.units if unit.is_met is not None]
    return sum(verdicts) / len(verdicts)


@pytest.mark.parametrize("policy", ["tempo", "fcfs", "jitserve"])
def test_the_same_trace_and_setup_give_the_same_report(policy: str):
    trace = workload(6.0, 12.0)
    first, second = (simulate(trace, setup(policy)) for _ in range(2))

    assert first.units == second.units
    assert np.array_equal(first.stream_gaps_s, second.stream_gaps_s)
    assert (first.duration_s, first.steps, first.produced_tokens) == (
        second.duration_s,
        second.steps,
        second.produced_tokens,
    )


@pytest.mark.parametrize("policy", ["tempo", "fcfs", "class_priority"])
def test_good_tokens_are_those_that_were_delivered_in_time(policy: str):
    trace = workload(9.0, 20.0, slo_factor=0.7)
    run, report = finished_run(trace, setup(policy, sheds=False))
    verdicts = Counter()

    for unit, unit_run, outcome in zip(trace.units, run._runs, report.units, strict=True):
        assert unit_run is not None
        answers = [unit_run.answers.get(position) for position in range(len(unit.calls))]
        times = [[] if answer is None else answer[1].token_times_s(answer[0]) for answer in answers]
        is_whole = [len(one) for one in times] == [call.output_tokens for call in unit.calls]
        if isinstance(unit.slo, Latency):
            slo = unit.slo
            due = [unit.arrival_s + slo.ttft_s + number * slo.tbt_s for number in range(len(times[0]))]
            on_time = sum(at_s <= due_s for at_s, due_s in zip(times[0], due, strict=True))
            expected = (on_time, is_whole and on_time == len(times[0]))
        elif isinstance(unit.slo, Deadline):
            is_met = is_whole and max(max(one) for one in times) <= unit.arrival_s + unit.slo.ttlt_s
            expected = (unit.output_tokens if is_met else 0, is_met)
        else:
            expected = (0, None)
        assert (outcome.good_tokens, outcome.is_met) == expected, f"{unit.unit_id}: {outcome}"
        assert outcome.output_tokens == sum(len(one) for one in times)
        verdicts[outcome.is_met] += 1
    assert verdicts[True]
    assert verdicts[False], "nothing was late: the load is too low for this test"


def test_every_unit_ends_once_and_nothing_of_it_stays(monkeypatch: pytest.MonkeyPatch):
    ends: Counter[str] = Counter()
    end_unit = _Run._end_unit

    def counted(run: _Run, unit_run: simulator._UnitRun, status: simulator.Status) -> None:
        ends[unit_run.unit.unit_id] += 1
        end_unit(run, unit_run, status)

    monkeypatch.setattr(_Run, "_end_unit", counted)
    trace = workload(12.0, 15.0, slo_factor=0.7)
    run, report = finished_run(trace, setup(patience=3.0))

    assert ends == Counter(unit.unit_id for unit in trace.units)
    assert {unit.status for unit in report.units} <= STATUSES - {"cut"}
    assert len({unit.status for unit in report.units}) > 1, "all ended alike: the load is too low for this test"
    for replica in run._replicas.values():
        # What was given up at the very last moment leaves at the end of its step.
        if not replica.is_idle:
            replica.end_step(run._now_s + 1.0)
        replica.take_cancelled()
        assert len(replica.planner) == 0
        assert replica.kv.held == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_below_capacity_a_clairvoyant_meets_nearly_everything(seed: int):
    # A backlog of 600 such units is worked off, first come first served, at 3.2 per second: this is half of that.
    report = simulate(workload(1.6, 160.0, seed), setup(knowledge="true"))

    assert len(report.units) > 220
    assert met_share(report) >= 0.995, f"{met_share(report):.4f} of the units met their SLO"


@pytest.mark.parametrize(("kv", "is_short"), [(0.25, False), (0.02, True)])
def test_with_a_smaller_cache_everything_ends_no_token_is_lost_and_nothing_is_held(kv: float, is_short: bool):
    settings = {"rate_per_s": 6.0, "duration_s": 12.0, "agent.share": 0.0}
    trace = generate(generator_config(settings), 1)
    run, report = finished_run(trace, setup(profiles=(scaled(PROFILE, kv=kv),), sheds=False))
    (replica,) = run._replicas.values()

    assert {unit.status for unit in report.units} == {"finished"}
    assert (report.preemptions > 0) == (report.recomputed_tokens > 0) == is_short
    assert [unit.output_tokens for unit in report.units] == [unit.output_tokens for unit in trace.units]
    assert report.produced_tokens == sum(unit.output_tokens for unit in trace.units)
    replica.planner.audit()
    assert (len(replica.planner), replica.kv.held) == (0, 0)


def test_unlike_replicas_share_the_work_and_beat_the_slow_one():
    trace = workload(8.0, 10.0)
    slow = scaled(PROFILE, time=3.0)
    run, both = finished_run(trace, setup(profiles=(PROFILE, slow)))
    fast_one, slow_one = run._replicas.values()
    only_slow = simulate(trace, setup(profiles=(slow,)))

    assert fast_one.produced_tokens > slow_one.produced_tokens > 0
    assert sum(unit.good_tokens for unit in both.units) > sum(unit.good_tokens for unit in only_slow.units)


def test_a_chain_of_calls_reads_its_prefix_from_the_cache():
    calls = (
        TraceCall("a", 1600, 100, prefix_id="chain"),
        TraceCall("b", 2000, 50, stage=1, parents=(0,), gap_s=1.0, prefix_id="chain", prefix_tokens=1700),
        TraceCall("c", 2200, 20, stage=2, parents=(1,), gap_s=1.0, prefix_id="chain", prefix_tokens=2050),
    )
    chain = Unit("chain", 0.0, Deadline(60.0), calls, is_program=True)
    report = simulate(Trace("chain", (chain,)), setup())

    # The last token of an answer is in no cache yet, and a block is shared whole or not at all.
    assert report.prefix_hit_tokens in {
        sum(tokens // 16 * 16 for tokens in (1700, 2050)),
        sum((tokens - 1) // 16 * 16 for tokens in (1700, 2050)),
    }
    assert report.units[0].is_met
    strangers = tuple(alone(Deadline(60.0), 0.0, call.prompt_tokens, 5, call.request_id) for call in calls)
    assert simulate(Trace("strangers", strangers), setup()).prefix_hit_tokens == 0


def test_a_program_is_sent_call_by_call_with_its_gaps():
    calls = (TraceCall("a", 100, 10), TraceCall("b", 100, 10, stage=1, parents=(0,), gap_s=5.0))
    program = Unit("p", 1.0, Deadline(60.0), calls, is_program=True)
    run, report = finished_run(Trace("two", (program,)), setup())
    (unit_run,) = run._runs
    assert unit_run is not None
    first, second = (unit_run.answers[position][1].token_times_s(unit_run.answers[position][0]) for position in (0, 1))

    assert second[0] > first[-1] + 5.0
    assert report.units[0].ttlt_s == pytest.approx(second[-1] - 1.0)


def flood(seconds: float = 2.0) -> Trace:
    """Prompts that need about a minute of the engine, and are due soon."""
    return Trace("flood", tuple(alone(Deadline(seconds), 0.01 * i, 4000, 100, f"u{i}") for i in range(200)))


def test_clients_without_patience_leave_and_those_with_it_stay():
    hasty = simulate(flood(), setup("fcfs", sheds=False, patience=1.0))
    patient = simulate(flood(), setup("fcfs", sheds=False))

    left = [unit for unit in hasty.units if unit.status == "abandoned"]
    assert len(left) > 100
    assert all(unit.is_met is False and unit.good_tokens == 0 for unit in left)
    assert hasty.duration_s < patient.duration_s
    assert {unit.status for unit in patient.units} == {"finished"}


def test_a_reader_who_sees_tokens_does_not_leave():
    stream = alone(Latency(0.5, 0.001), 0.0, 100, 400, "reader")
    report = simulate(Trace("reader", (stream,)), setup("fcfs", sheds=False, patience=2.0))

    assert report.duration_s > 1.0, "it was over before patience could end"
    assert report.units[0].status == "finished"


def test_refused_clients_come_again_as_often_as_they_were_told():
    def arrivals(retries: int) -> tuple[int, Report]:
        run, report = finished_run(flood(), setup("tempo", retries=retries))
        assert all(unit_run is not None and unit_run.retries <= retries for unit_run in run._runs)
        return sum(unit_run.retries for unit_run in run._runs if unit_run is not None), report

    none, first = arrivals(0)
    some, second = arrivals(2)
    assert none == 0
    given_up = [unit for unit in first.units if unit.status in {"refused", "expired"}]
    assert given_up, "nothing was refused: this test tests nothing"
    assert 0 < some <= 2 * len(second.units)
    assert len(second.units) == len(first.units)


def test_with_a_backlog_all_units_come_at_once():
    units = tuple(alone(Deadline(1000.0), 10.0 * i, 500, 20, f"u{i}") for i in range(20))
    spread = simulate(Trace("spread", units), setup("fcfs"))
    at_once = simulate(Trace("spread", units), setup("fcfs", backlog=True))

    assert spread.duration_s > 190.0
    assert at_once.duration_s < 10.0


def test_switches_change_what_is_done():
    trace = workload(12.0, 8.0, slo_factor=0.5)
    plain = simulate(trace, setup())
    switched = SchedulingConfig.model_validate({"switches": {"timeline": False, "reserve": False}})

    assert simulate(trace, setup(scheduling=switched)).units != plain.units


@pytest.mark.parametrize("limit", [{"max_waiting_requests": 3}, {"max_waiting_tokens": 3000}])
def test_the_line_is_endless_unless_it_is_limited(limit):
    trace = workload(12.0, 8.0)
    endless = simulate(trace, setup("fcfs", max_running=2, sheds=False))
    limited = simulate(
        trace, setup("fcfs", max_running=2, sheds=False, scheduling=SchedulingConfig.model_validate(limit))
    )

    assert all(unit.status != "refused" for unit in endless.units)
    assert any(unit.status == "refused" for unit in limited.units)


def test_progress_is_told_and_ends_with_one():
    told: list[float] = []
    simulate(workload(6.0, 20.0), setup("fcfs"), on_progress=told.append)

    assert told == sorted(told)
    assert told[-1] == 1.0
    assert all(0.0 <= share <= 1.0 for share in told)


@pytest.mark.parametrize(("change", "said"), [({"profiles": ()}, "profiles"), ({"max_running": 0}, "max_running")])
def test_a_setup_that_cannot_run_is_refused(change: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        setup(**change)


@pytest.mark.parametrize("wrong", [{"patience": 0.0}, {"patience": float("nan")}, {"retries": -1}])
def test_clients_that_cannot_be_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        setup(**wrong)


def test_empty_hours_cost_no_events():
    answer = Deadline(20.0)
    units = (alone(answer, 0.0, 100, 10, "first"), alone(answer, 1e8, 100, 10, "three years later"))
    run, report = finished_run(Trace("rare", units), setup())
    assert [unit.status for unit in report.units] == ["finished", "finished"]
    assert report.duration_s > 1e8
    assert run.events < 1000


def test_what_an_action_leads_to_waits_until_the_other_actions_are_carried_out(monkeypatch: pytest.MonkeyPatch):
    """A call of a program expires and its sibling is sent, by one event: the sibling is sent, then cancelled."""
    calls = (TraceCall("late", 500, 20), TraceCall("sibling", 50, 20))
    trace = Trace("pair", (Unit("pair", 0.0, Deadline(30.0), calls),))
    run = _Run(trace, setup("edf"), None)
    handle, heard = run._core.handle, []

    def with_an_end(event: Event) -> list[Action]:
        heard.append(event)
        actions = handle(event)
        if any(isinstance(one, Dispatch) and one.request_id == "sibling" for one in actions):
            actions = [*handle(Cancelled(event.at_s, RequestId("late"))), Expire(RequestId("late")), *actions]
        return actions

    monkeypatch.setattr(run._core, "handle", with_an_end)
    report = run.run()

    assert [unit.status for unit in report.units] == ["expired"]
    assert [event.request_id for event in heard if isinstance(event, Cancelled)] == ["sibling"]
    assert run._core.spec_of(RequestId("sibling")) is None, "the core still has it run"
