"""Timers of requests that become hopeless before their first token."""

import pytest

from tempo_router.events import ReplicaCapacity
from tempo_router.fleet import Fleet
from tempo_router.hopeless import HopelessTimers, is_hopeless
from tempo_router.prediction import LengthHistograms
from tempo_router.request import ReplicaId, Slo
from tempo_router.step_time import StepTimeModel
from tempo_router.value import hopeless_at_s
from tempo_router.waiting import WaitingRequest
from tests.builders import BACKGROUND, TOOL, request

STEPS = StepTimeModel()


def in_line(name: str, ticket: int, slo: Slo = TOOL, arrival_s: float = 0.0) -> WaitingRequest:
    spec = request(name, slo=slo, arrival_s=arrival_s)
    lengths = LengthHistograms().lookup(spec)
    one = WaitingRequest(spec, ticket, arrival_s, lengths, 0.1, hopeless_at_s(spec, lengths, STEPS.pace()))
    one.is_in_line = True
    return one


def test_requests_are_due_when_they_become_hopeless_earliest_first_and_once():
    timers = HopelessTimers()
    late, early = in_line("late", 1, arrival_s=1.0), in_line("early", 2)
    for one in (late, early):
        timers.set(one)
    before_s = early.hopeless_at_s - 0.01
    assert timers.due(STEPS, before_s) == []
    assert not is_hopeless(early, STEPS.pace(), before_s)
    assert timers.due(STEPS, late.hopeless_at_s) == [early, late]
    assert is_hopeless(late, STEPS.pace(), late.hopeless_at_s)
    assert timers.due(STEPS, 1e6) == []


def test_best_effort_is_never_due():
    timers = HopelessTimers()
    timers.set(in_line("r", 1, BACKGROUND))
    assert timers.due(STEPS, 1e9) == []


@pytest.mark.parametrize("change", [{"is_in_line": False}, {"is_given_up": True}])
def test_a_request_that_left_or_was_relegated_is_not_due(change: dict[str, bool]):
    timers = HopelessTimers()
    one = in_line("r", 1)
    timers.set(one)
    for name, value in change.items():
        setattr(one, name, value)
    assert timers.due(STEPS, 1e6) == []


def test_a_timer_that_fires_too_early_is_set_anew():
    timers = HopelessTimers()
    one = in_line("r", 1)
    real_s = one.hopeless_at_s
    one.hopeless_at_s = 1.0  # as it was estimated when it came: too soon
    timers.set(one)
    assert timers.due(STEPS, 1.0) == []
    assert timers.due(STEPS, real_s - 0.01) == []
    assert timers.due(STEPS, real_s) == [one]


def test_of_several_timers_of_a_request_the_last_one_counts():
    """Whose program's deadline moves is timed anew; both dates may have passed when somebody looks."""
    timers = HopelessTimers()
    one = in_line("r", 1)
    for _ in range(500):
        timers.set(one)
        timers.sweep(live=1)
        timers.audit(live=1)
    assert timers.due(STEPS, 1e6) == [one]


def test_timers_of_requests_that_left_do_not_pile_up():
    timers = HopelessTimers()
    for ticket in range(1, 5000):
        one = in_line(f"r{ticket}", ticket)
        timers.set(one)
        one.is_in_line = False
        timers.sweep(live=1)
        timers.audit(live=1)


def test_a_call_that_waits_in_its_engine_is_due_until_its_first_token():
    timers = HopelessTimers()
    fleet = Fleet(epoch=0, queue_depth=2)
    replica = fleet.attach(ReplicaId("gpu0"), ReplicaCapacity(4, 512, 10_000), StepTimeModel())
    one, other = in_line("unstarted", 1), in_line("started", 2)
    for request_ in (one, other):
        timers.set_started(request_, fleet.start(request_, replica, 0.0), 0.0)
    unstarted, started = fleet.running[one.spec.request_id], fleet.running[other.spec.request_id]
    replica.progress([started], [(started.dispatch_id, 1)])
    assert timers.due(STEPS, one.hopeless_at_s - 0.01) == []
    assert timers.due(STEPS, 1e6) == [unstarted]


def test_a_call_that_has_left_its_engine_is_not_due():
    timers = HopelessTimers()
    fleet = Fleet(epoch=0, queue_depth=2)
    replica = fleet.attach(ReplicaId("gpu0"), ReplicaCapacity(4, 512, 10_000), StepTimeModel())
    one = in_line("gone", 1)
    call = fleet.start(one, replica, 0.0)
    timers.set_started(one, call, 0.0)
    fleet.release(call)
    assert timers.due(STEPS, 1e6) == []
