"""A program that cannot make its deadline: all of its calls go on as best effort, and every client is told."""

import pytest

from tempo_router.actions import Abort, Expire, Relegate
from tempo_router.events import ProgramRelegated
from tempo_router.request import ProgramCall, ProgramId, RequestId
from tests.builders import CHAT, arrived, progressed, router

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


def test_a_program_that_is_not_known_is_nobodys_loss():
    assert router("gpu0").handle(ProgramRelegated(1.0, PROGRAM)) == []
