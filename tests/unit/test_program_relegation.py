"""A program that cannot make its deadline: all of its calls go on as best effort, and every client is told."""

import pytest

from tempo_router.actions import Abort, Admit, Expire, Reject, Relegate, Retune
from tempo_router.events import ProgramFinished, ProgramRelegated, ProgramRetargeted, RunningCall, Ticked
from tempo_router.request import DispatchId, ProgramCall, ProgramId, RequestId
from tests.builders import CHAT, arrived, planned_replica, progressed, request, router

PROGRAM = ProgramId("p")


def calls_of(core, *names: str) -> None:
    for name in names:
        core.handle(arrived(name, slo=ProgramCall(PROGRAM, 600.0)))


@pytest.mark.parametrize("policy", ["fcfs", "density", "tempo"])
def test_what_waits_and_what_runs_is_relegated_and_nothing_else(policy):
    core = router("gpu0", policy=policy, max_running=1)
    calls_of(core, "running", "waiting")
    core.handle(arrived("other", slo=CHAT))
    core.handle(progressed("gpu0", 1.0, {1: 1}))
    told = [one for one in core.handle(ProgramRelegated(2.0, PROGRAM)) if isinstance(one, Relegate)]
    assert sorted(one.request_id for one in told) == ["running", "waiting"]
    core.audit()


def test_where_hopeless_work_is_refused_only_answers_that_have_begun_go_on():
    core = router("gpu0", max_running=2, hopeless="refuse")
    calls_of(core, "begun", "sent", "waiting")
    core.handle(progressed("gpu0", 1.0, {1: 1}))
    actions = core.handle(ProgramRelegated(2.0, PROGRAM))
    assert {type(one) for one in actions} == {Relegate, Expire, Abort}
    assert [one.request_id for one in actions if isinstance(one, Relegate)] == ["begun"]
    assert {one.request_id for one in actions if isinstance(one, Expire)} == {"sent", "waiting"}
    assert core.spec_of(RequestId("begun")) is not None
    core.audit()


def test_later_plans_leave_its_calls_behind():
    core = router("gpu0", policy="tempo")
    core.handle(planned_replica("gpu0"))
    calls_of(core, "one", "two")
    core.handle(progressed("gpu0", 1.0, {1: 1, 2: 1}))
    core.handle(ProgramRelegated(2.0, PROGRAM))
    retunes = [one for at_s in (3.0, 4.0) for one in core.handle(Ticked(at_s)) if isinstance(one, Retune)]
    assert len(retunes) == 2
    assert all(standing.is_relegated for one in retunes for _, standing in one.standings)


@pytest.mark.parametrize("policy", ["fcfs", "tempo"])
def test_a_call_that_crossed_with_the_relegation_is_relegated_too(policy):
    core = router(policy=policy)
    calls_of(core, "before")
    core.handle(ProgramRelegated(1.0, PROGRAM))
    assert core.handle(ProgramRelegated(1.0, PROGRAM)) == [], "what is told twice changes nothing"
    told = core.handle(arrived("crossed", at_s=2.0, slo=ProgramCall(PROGRAM, 598.0)))
    assert [one.request_id for one in told if isinstance(one, Relegate)] == ["crossed"]
    core.audit()


def test_where_hopeless_work_is_refused_its_later_calls_are_refused_at_the_door():
    core = router(hopeless="refuse")
    calls_of(core, "before")
    core.handle(ProgramRelegated(1.0, PROGRAM))
    told = core.handle(arrived("later", at_s=2.0, slo=ProgramCall(PROGRAM, 598.0)))
    assert told == [Reject(RequestId("later"), 0, "deadline_impossible", None)]
    core.audit()


def test_a_call_that_a_replica_brings_back_to_a_relegated_program_is_relegated_there():
    core = router()
    calls_of(core, "before")
    core.handle(ProgramRelegated(1.0, PROGRAM))
    running = RunningCall(DispatchId(9 << 32 | 1), request("brought", slo=ProgramCall(PROGRAM, 600.0)), new_tokens=3)
    told = core.handle(planned_replica("gpu0", running=(running,)))
    assert Relegate(RequestId("brought")) in told
    [retune] = [one for one in told if isinstance(one, Retune)]
    assert [(name, standing.is_relegated) for name, standing in retune.standings] == [(running.dispatch_id, True)]
    core.audit()


@pytest.mark.parametrize(("hopeless", "told"), [("relegate", [Admit, Relegate]), ("refuse", [Reject])])
def test_a_program_that_was_relegated_before_its_first_call_here_is_relegated_with_it(hopeless, told):
    core = router(hopeless=hopeless)
    assert core.handle(ProgramRelegated(1.0, PROGRAM)) == [], "nobody's loss yet"
    actions = core.handle(arrived("first", at_s=2.0, slo=ProgramCall(PROGRAM, 598.0)))
    assert [type(one) for one in actions] == told
    core.audit()


def test_more_time_before_its_first_call_and_the_end_of_a_program_undo_that():
    for undo in (ProgramRetargeted(1.5, PROGRAM, 900.0), ProgramFinished(1.5, PROGRAM)):
        core = router()
        core.handle(ProgramRelegated(1.0, PROGRAM))
        core.handle(undo)
        [admit] = core.handle(arrived("first", at_s=2.0, slo=ProgramCall(PROGRAM, 598.0)))
        assert isinstance(admit, Admit)
        assert admit.success_probability > 0
