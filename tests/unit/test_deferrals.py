"""Whom the plan has no room for is told once, when it turns out, and once more when there is room again."""

from tempo_router.actions import Action, Defer, Dispatch, Expire, Readmit
from tempo_router.events import Cancelled, Ticked
from tempo_router.request import BestEffort, Deadline, RequestId
from tempo_router.router import RouterCore
from tests.builders import arrived, dispatched, planned_replica, progressed, router

DUE_S = 20.0
REQUESTS = 60


def crowded(core: RouterCore) -> list[Action]:
    """Far more answers are wanted by the same time than one replica can give."""
    actions = core.handle(arrived("best effort", slo=BestEffort()))
    for number in range(REQUESTS):
        actions += core.handle(arrived(f"r{number}", 0.001 * number, slo=Deadline(DUE_S), prompt_tokens=4000))
    return actions


def plans(core: RouterCore, begin_s: float, end_s: float) -> list[Action]:
    """Time passes, with a plan every half second at least."""
    actions: list[Action] = []
    at_s = begin_s
    while at_s < end_s:
        actions += core.handle(Ticked(at_s))
        at_s += 0.5
    return actions


def said(actions: list[Action]) -> dict[RequestId, list[type]]:
    """What each request was told, in order."""
    told: dict[RequestId, list[type]] = {}
    for one in actions:
        if isinstance(one, Defer | Readmit):
            told.setdefault(one.request_id, []).append(type(one))
    return told


def take_turns(told: dict[RequestId, list[type]]) -> bool:
    """Whether nobody was told the same twice running, and nobody to be back who was not away."""
    return all(kinds == ([Defer, Readmit] * len(kinds))[: len(kinds)] for kinds in told.values())


def test_who_waits_without_room_is_told_once_and_best_effort_never():
    core = router("gpu0", policy="tempo", max_running=1)
    actions = crowded(core) + plans(core, 0.1, 2.0)
    told = said(actions)
    assert 0 < len(told) < REQUESTS, "some have room, some have not"
    assert all(kinds == [Defer] for kinds in told.values())
    assert "best effort" not in told
    assert {one.reason for one in actions if isinstance(one, Defer)} == {"no_room"}


def test_who_expires_was_told_to_be_deferred_before():
    core = router("gpu0", policy="tempo", max_running=1, hopeless="refuse")
    actions = crowded(core) + plans(core, 0.1, DUE_S + 1)
    expired = [one.request_id for one in actions if isinstance(one, Expire)]
    assert expired
    first: dict[tuple[type, RequestId], int] = {}
    for position, one in enumerate(actions):
        if isinstance(one, Defer | Expire):
            first.setdefault((type(one), one.request_id), position)
    assert all(first[Defer, name] < first[Expire, name] for name in expired)
    assert take_turns(said(actions))


def test_who_gets_room_again_is_told():
    core = router("gpu0", policy="tempo", max_running=1)
    before = said(crowded(core) + plans(core, 0.1, 3.0))
    deferred = list(before)
    for name in deferred[: len(deferred) // 2]:
        core.handle(Cancelled(3.0, name))
    for number in range(REQUESTS):
        if f"r{number}" not in deferred:
            core.handle(Cancelled(3.0, RequestId(f"r{number}")))
    after = said(plans(core, 3.0, 4.0))
    assert after
    assert all(kinds == [Readmit] for kinds in after.values())
    assert after.keys() <= set(deferred)


def test_a_call_that_runs_is_told_when_its_room_is_lost():
    core = router(policy="tempo")
    core.handle(planned_replica(max_running=1))
    [dispatch] = [one for one in core.handle(arrived("r", slo=Deadline(DUE_S))) if isinstance(one, Dispatch)]
    core.handle(progressed(at_s=0.5, tokens={dispatch.dispatch_id: 1}))
    actions = plans(core, 1.0, DUE_S + 1)
    assert said(actions) == {"r": [Defer]}
    assert [one.reason for one in actions if isinstance(one, Defer)] == ["no_worth"]


def test_what_was_told_of_a_request_that_waits_is_not_told_again_when_it_runs():
    core = router("gpu0", policy="tempo", max_running=1)
    actions = crowded(core)
    at_s = 0.1
    while not (fillers := {name for name, _ in dispatched(actions)} & said(actions).keys()):
        running = [one.dispatch_id for one in actions if isinstance(one, Dispatch)][-1]
        actions += core.handle(progressed(at_s=at_s, tokens={running: 1}, finished={running: "completed"}))
        at_s += 0.1
        assert at_s < DUE_S, "nobody who was deferred ever filled what was spare"
    actions += plans(core, at_s, DUE_S)
    assert take_turns(said(actions))
    assert fillers
