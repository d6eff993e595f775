"""What dashboards are told of the queue: every request in one state."""

from dataclasses import astuple

from tempo_router.events import Cancelled, ReplicaDraining, Ticked
from tempo_router.request import BestEffort, Deadline, ReplicaId, RequestId
from tempo_router.snapshot import QueueStates, RouterSnapshot
from tests.builders import arrived, attached, progressed, router

DUE_S = 20.0


def total(snapshot: RouterSnapshot) -> int:
    """Requests in any state."""
    return sum(sum(astuple(states)) for states in snapshot.states.values())


def test_every_request_is_in_one_state():
    core = router("gpu0", policy="tempo", max_running=2)
    core.handle(arrived("begun", slo=Deadline(1e4)))
    core.handle(progressed(tokens={1: 1}))
    core.handle(arrived("unbegun", slo=Deadline(1e4)))
    for number in range(60):
        core.handle(arrived(f"r{number}", 0.001 * number, slo=Deadline(DUE_S), prompt_tokens=4000))
    core.handle(arrived("last", slo=BestEffort()))
    core.handle(Ticked(2.0))
    snapshot = core.snapshot()

    deadlines = snapshot.states["deadline"]
    assert (deadlines.begun, deadlines.unbegun, deadlines.relegated, deadlines.unplaceable) == (1, 1, 0, 0)
    assert deadlines.deferred > 0
    assert deadlines.in_turn > 0
    assert deadlines.in_turn + deadlines.deferred == snapshot.waiting["deadline"] == 60
    assert snapshot.states["best_effort"] == QueueStates(in_turn=1)
    assert total(snapshot) == 63

    core.handle(Ticked(DUE_S + 1))
    assert core.snapshot().states["deadline"].relegated == 60


def test_what_fits_nowhere_is_counted_apart():
    core = router("only", policy="fcfs", max_running=1)
    core.handle(arrived("first", slo=BestEffort()))
    core.handle(arrived("huge", slo=Deadline(1e4), prompt_tokens=9_000))
    assert core.snapshot().states["deadline"] == QueueStates(in_turn=1)
    core.handle(ReplicaDraining(1.0, ReplicaId("only")))
    core.handle(attached("small", 1.0, kv_tokens=5_000))
    assert core.snapshot().states["deadline"] == QueueStates(unplaceable=1)
    assert core.snapshot().unplaceable == 1

    core.handle(Cancelled(1.0, RequestId("huge")))
    assert total(core.snapshot()) == 1


def test_a_call_that_runs_beyond_its_room_is_deferred_in_its_engine():
    core = router("gpu0", policy="tempo")
    core.handle(arrived("r", slo=Deadline(DUE_S)))
    core.handle(progressed(at_s=0.5, tokens={1: 1}))
    assert core.snapshot().states["deadline"] == QueueStates(begun=1)
    core.handle(Ticked(DUE_S))
    assert core.snapshot().states["deadline"] == QueueStates(deferred_in_engine=1)
