"""A program's deadline moves while its calls wait and run: all of them have the new one at once."""

from dataclasses import replace

import pytest

from tempo_router.actions import Admit, Dispatch, Expire, Redate, Relegate, Retarget, Retune
from tempo_router.events import Arrived, ProgramRelegated, ProgramRetargeted, ReplicaLost, Ticked
from tempo_router.request import ProgramCall, ProgramId, ReplicaId, RequestId
from tests.builders import CHAT, arrived, attached, capacity, progressed, router

PROGRAM = ProgramId("p")


def started(policy: str = "tempo"):
    """One call of the program runs, one waits, and so does somebody else's."""
    core = router(policy=policy)
    planned = replace(attached("gpu0", max_running=1), capacity=replace(capacity(1), has_step_planner=True))
    core.handle(planned)
    core.handle(arrived("running", slo=ProgramCall(PROGRAM, 600.0)))
    core.handle(progressed("gpu0", 1.0, {1: 1}))
    core.handle(arrived("waiting", at_s=1.0, slo=ProgramCall(PROGRAM, 599.0)))
    core.handle(arrived("other", at_s=1.0, slo=CHAT))
    return core


def deadline_of(core, name: str) -> float:
    spec = core.spec_of(RequestId(name))
    return spec.arrival_s + spec.slo.ttlt_s


@pytest.mark.parametrize("policy", ["fcfs", "edf", "tempo"])
def test_what_waits_and_what_runs_has_the_new_deadline(policy):
    core = started(policy)
    actions = core.handle(ProgramRetargeted(2.0, PROGRAM, 60.0))
    told = [one.slo for one in actions if isinstance(one, Retarget)]
    assert told == [ProgramCall(PROGRAM, 60.0)], "counted from the running call's own arrival"
    assert deadline_of(core, "running") == deadline_of(core, "waiting") == pytest.approx(60.0)
    heard = [one for one in actions if isinstance(one, Redate)]
    assert heard == [Redate(RequestId(name), PROGRAM, 60.0) for name in ("running", "waiting")]
    assert core.spec_of(RequestId("other")).slo == CHAT
    core.audit()


@pytest.mark.parametrize("policy", ["fcfs", "tempo"])
def test_a_relegated_program_has_another_chance(policy):
    core = started(policy)
    relegated = core.handle(ProgramRelegated(2.0, PROGRAM))
    assert any(standing.is_relegated for one in relegated if isinstance(one, Retune) for _, standing in one.standings)
    actions = core.handle(ProgramRetargeted(3.0, PROGRAM, 1200.0))
    forgiven = [standing for one in actions if isinstance(one, Retune) for _, standing in one.standings]
    assert forgiven
    assert not any(standing.is_relegated for standing in forgiven)
    core.audit()


@pytest.mark.parametrize("policy", ["fcfs", "tempo"])
def test_a_call_that_began_while_its_program_was_relegated_has_a_chance_too(policy):
    core = started(policy)
    core.handle(ProgramRelegated(2.0, PROGRAM))
    told = core.handle(arrived("late", at_s=3.0, slo=ProgramCall(PROGRAM, 597.0)))
    assert [one.success_probability for one in told if isinstance(one, Admit)] == [0.0]
    assert Relegate(RequestId("late")) in told
    moved = core.handle(ProgramRetargeted(4.0, PROGRAM, 1200.0))
    assert Redate(RequestId("late"), PROGRAM, 1200.0) in moved
    core.handle(ReplicaLost(5.0, ReplicaId("gpu0")))
    core.handle(replace(attached("gpu1", at_s=6.0), capacity=replace(capacity(1), has_step_planner=True)))
    program = core.ledger.programs[PROGRAM]
    assert not any(job.is_relegated for job in program.live.values())
    core.audit()


def test_a_call_that_waits_in_its_engine_is_watched_again_once_it_is_forgiven():
    core = router("gpu0", policy="fcfs", max_running=1)
    core.handle(arrived("sent", slo=ProgramCall(PROGRAM, 600.0)))
    core.handle(ProgramRelegated(1.0, PROGRAM))
    core.handle(ProgramRetargeted(2.0, PROGRAM, 60.0))
    assert Relegate(RequestId("sent")) in core.handle(Ticked(70.0))
    core.audit()


def test_a_deadline_that_has_passed_is_nobodys_chance():
    core = router()
    told = core.handle(arrived("late", at_s=3.0, slo=ProgramCall(PROGRAM, -1.0)))
    assert [one.success_probability for one in told if isinstance(one, Admit)] == [0.0]
    assert Relegate(RequestId("late")) in told
    assert deadline_of(core, "late") == core.ledger.programs[PROGRAM].deadline_s == pytest.approx(2.0)
    core.audit()


def test_the_order_follows_the_new_deadline():
    core = router("gpu0", policy="edf", max_running=1)
    core.handle(arrived("busy", slo=CHAT))
    core.handle(progressed("gpu0", 0.1, {1: 1}))
    core.handle(arrived("late", slo=ProgramCall(PROGRAM, 600.0)))
    core.handle(arrived("early", slo=ProgramCall(ProgramId("q"), 300.0)))
    core.handle(ProgramRetargeted(0.2, PROGRAM, 100.0))
    actions = core.handle(progressed("gpu0", 0.3, {}, finished={1: "completed"}))
    assert [one.request_id for one in actions if isinstance(one, Dispatch)][:1] == ["late"]


def test_a_call_that_comes_again_with_the_old_deadline_gets_the_new_one():
    core = started()
    old = core.spec_of(RequestId("running"))
    core.handle(ProgramRetargeted(2.0, PROGRAM, 60.0))
    core.handle(ReplicaLost(3.0, ReplicaId("gpu0")))
    core.handle(Arrived(3.0, replace(old, attempt=1, generated_tokens=1)))
    assert deadline_of(core, "running") == pytest.approx(60.0)
    assert core.ledger.programs[PROGRAM].deadline_s == pytest.approx(60.0)
    core.audit()


@pytest.mark.parametrize(("hopeless", "told"), [("relegate", Relegate), ("refuse", Expire)])
def test_a_call_whose_old_and_new_deadline_have_passed_is_given_up_once(hopeless, told):
    core = router(hopeless=hopeless)
    core.handle(arrived("waiting", slo=ProgramCall(PROGRAM, 60.0)))
    core.handle(ProgramRetargeted(1.0, PROGRAM, 80.0))
    assert core.handle(Ticked(100.0)) == [told(RequestId("waiting"))]
    core.audit()


def test_a_program_that_is_not_known_and_a_deadline_that_stays_change_nothing():
    assert router("gpu0").handle(ProgramRetargeted(1.0, PROGRAM, 9.0)) == []
    core = started()
    core.handle(ProgramRetargeted(2.0, PROGRAM, 600.0))
    assert not core.ledger.programs[PROGRAM].is_retargeted
