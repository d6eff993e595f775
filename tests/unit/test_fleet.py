"""Who runs, and where."""

import pytest

from tempo_router.errors import InvalidEventError
from tempo_router.events import RunningCall, StepReport
from tempo_router.fleet import Fleet
from tempo_router.replicas import Call, Replica
from tempo_router.request import DispatchId, ReplicaId, RequestId
from tempo_router.step_time import StepTimeModel
from tests.builders import capacity, progressed, request, waiting

EPOCH = 7


def attach(fleet: Fleet, name: str = "gpu0", max_running: int = 4, kv_tokens: int = 10_000) -> Replica:
    replica = fleet.attach(ReplicaId(name), capacity(max_running, kv_tokens), StepTimeModel())
    fleet.recount()
    return replica


def start(fleet: Fleet, replica: Replica, name: str = "r") -> Call:
    return fleet.start(waiting(request(name)), replica, now_s=1.0)


def test_dispatches_carry_the_epoch_and_are_numbered_from_one():
    fleet = Fleet(EPOCH, queue_depth=2)
    replica = attach(fleet)
    ids = [start(fleet, replica, name).dispatch_id for name in ("a", "b")]
    assert ids == [EPOCH << 32 | 1, EPOCH << 32 | 2]
    assert all(fleet.is_of_this_life(one) for one in ids)
    assert not fleet.is_of_this_life(DispatchId(1))


def test_an_abandoned_call_no_longer_runs_but_keeps_its_room_until_it_is_released():
    fleet = Fleet(EPOCH, queue_depth=2)
    replica = attach(fleet)
    call = start(fleet, replica)
    assert fleet.abandon(RequestId("r")) is call
    assert fleet.abandon(RequestId("r")) is None
    assert not fleet.running
    assert replica.committed_kv == call.kv_tokens
    fleet.audit()
    again = start(fleet, replica)
    fleet.release(call)
    assert fleet.running == {"r": again}
    assert replica.committed_kv == again.kv_tokens
    fleet.release(again)
    assert (fleet.running, fleet.calls, replica.committed_kv) == ({}, {}, 0)
    fleet.audit()


def test_sizes_and_slots_are_those_of_the_replicas_that_take_work():
    fleet = Fleet(EPOCH, queue_depth=2)
    for name, slots, kv_tokens in (("large", 8, 9000), ("small", 2, 500), ("gone", 64, 70_000)):
        attach(fleet, name, slots, kv_tokens)
    fleet.replicas[ReplicaId("gone")].is_draining = True
    fleet.recount()
    assert [replica.replica_id for replica in fleet.takers] == ["large", "small"]
    assert fleet.kv_sizes == [500, 9000]
    assert fleet.slots == 8


def test_a_replica_that_comes_back_keeps_its_calls_and_has_its_new_capacity():
    fleet = Fleet(EPOCH, queue_depth=2)
    call = start(fleet, attach(fleet, max_running=4))
    replica = attach(fleet, max_running=9)
    assert replica.calls == {call.dispatch_id: call}
    assert replica.capacity.max_running == fleet.slots == 9


def test_a_new_replica_is_believed_to_be_as_fast_as_the_others_were():
    seen = StepTimeModel()
    for _ in range(200):
        seen.observe(StepReport(duration_s=0.5, prefill_tokens=0, decodes=4, context_tokens=400))
    newcomer = Fleet(EPOCH, queue_depth=2).attach(ReplicaId("gpu0"), capacity(), seen)
    assert newcomer.steps.pace().alone_s == pytest.approx(seen.pace().alone_s)
    assert newcomer.steps.pace().alone_s > 10 * StepTimeModel().pace().alone_s


def test_a_dispatch_that_was_never_made_is_an_error_and_one_of_another_life_is_not():
    fleet = Fleet(EPOCH, queue_depth=2)
    attach(fleet)
    never, foreign = DispatchId(EPOCH << 32 | 1), DispatchId(3 << 32 | 99)
    with pytest.raises(InvalidEventError, match="number 1 of epoch 7"):
        fleet.check_over(progressed("gpu0", tokens={never: 1}))
    with pytest.raises(InvalidEventError, match="was never made"):
        fleet.check_reported(RunningCall(never, request(), 0), ReplicaId("gpu0"))
    fleet.check_over(progressed("gpu0", tokens={foreign: 1}))
    fleet.check_reported(RunningCall(foreign, request(), 0), ReplicaId("gpu0"))


def test_a_replica_cannot_report_on_a_call_of_another():
    fleet = Fleet(EPOCH, queue_depth=2)
    call = start(fleet, attach(fleet, "gpu0"))
    attach(fleet, "gpu1")
    with pytest.raises(InvalidEventError, match="runs on 'gpu0'"):
        fleet.check_over(progressed("gpu1", finished={call.dispatch_id: "completed"}))
    with pytest.raises(InvalidEventError, match="runs on 'gpu0'"):
        fleet.check_reported(RunningCall(call.dispatch_id, call.spec, 0), ReplicaId("gpu1"))
    fleet.check_over(progressed("gpu0", finished={call.dispatch_id: "completed"}))
