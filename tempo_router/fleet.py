"""The attached replicas and every call on them."""

from operator import attrgetter

from tempo_router.errors import InvalidEventError
from tempo_router.events import Progressed, ReplicaCapacity, RunningCall
from tempo_router.replicas import Call, Replica
from tempo_router.request import DispatchId, ReplicaId, RequestId
from tempo_router.step_time import StepTimeModel
from tempo_router.waiting import WaitingRequest

_SLOTS_BEFORE_THE_FIRST = 128

_number = attrgetter("number")


class Fleet:
    """Who runs, and where. Numbers the dispatches of one router's life.

    replicas: in order of attaching. calls: dispatched and not ended, aborted ones included. running: by request, the
    calls that are wanted. kv_sizes: ascending, of the replicas that take work. slots: sequences that the largest of
    them decodes together. takers: replicas that take work, full or not, in order of attaching. `recount` must follow
    whatever changes which replicas take work, or their capacities.

    queue_depth, is_deep: how much a replica takes beyond its slots (Replica.is_open).
    """

    __slots__ = (
        "_attached",
        "_changed",
        "_epoch",
        "_is_deep",
        "_next_dispatch",
        "_open",
        "_queue_depth",
        "_slot_s",
        "calls",
        "kv_sizes",
        "replicas",
        "running",
        "slots",
        "takers",
    )

    def __init__(self, epoch: int, queue_depth: int, *, is_deep: bool = False) -> None:
        self._epoch = epoch
        self._queue_depth = queue_depth
        self._is_deep = is_deep
        self._next_dispatch = 1
        self._attached = 0
        # Every event asks which replicas are open, and changes one: only those that changed are looked at again.
        self._changed: set[Replica] = set()
        self._open: dict[Replica, None] = {}
        self._slot_s: dict[Replica, float] = {}
        self.replicas: dict[ReplicaId, Replica] = {}
        self.calls: dict[DispatchId, Call] = {}
        self.running: dict[RequestId, Call] = {}
        self.kv_sizes: list[int] = []
        self.slots = _SLOTS_BEFORE_THE_FIRST
        self.takers: list[Replica] = []

    def open_replicas(self) -> list[Replica]:
        """Replicas that take a call now, in order of attaching."""
        self._look_at_changed()
        return sorted(self._open, key=_number)

    def next_slot_s(self) -> float:
        """Predicted time until some replica has a slot for one more call; 0 where none is attached."""
        self._look_at_changed()
        return min(self._slot_s.values(), default=0.0)

    def _look_at_changed(self) -> None:
        for replica in self._changed:
            self._open.pop(replica, None)
            self._slot_s.pop(replica, None)
            if replica.is_draining or self.replicas.get(replica.replica_id) is not replica:
                continue
            has_slot = replica.is_open(self._queue_depth)
            self._slot_s[replica] = 0.0 if has_slot else replica.next_slot_s()
            if has_slot or (self._is_deep and replica.is_open(self._queue_depth, is_deep=True)):
                self._open[replica] = None
        self._changed.clear()

    def attach(self, replica_id: ReplicaId, capacity: ReplicaCapacity, steps: StepTimeModel) -> Replica:
        """A replica came, or came back. steps: of all replicas; a new one is believed to be like them."""
        replica = self.replicas.get(replica_id)
        if replica is None:
            self._attached += 1
            own = StepTimeModel(steps.coefficients) if steps.observed else StepTimeModel()
            replica = self.replicas[replica_id] = Replica(replica_id, self._attached, capacity, own, self._changed)
        replica.capacity = capacity
        return replica

    def recount(self) -> None:
        """The set of replicas that take work, or their capacities, changed."""
        self.takers = [replica for replica in self.replicas.values() if not replica.is_draining]
        self.kv_sizes = sorted(replica.capacity.kv_tokens for replica in self.takers)
        self.slots = max((replica.capacity.max_running for replica in self.takers), default=_SLOTS_BEFORE_THE_FIRST)
        self._changed.update(self._slot_s, self.replicas.values())

    def start(self, request: WaitingRequest, replica: Replica, now_s: float) -> Call:
        """Make the call that a request becomes on a replica."""
        dispatch_id = DispatchId(self._epoch << 32 | self._next_dispatch)
        self._next_dispatch += 1
        call = Call(
            dispatch_id,
            request.spec,
            replica,
            request.lengths,
            new_tokens=0,
            ticket=self._next_dispatch,
            since_s=now_s,
            standing=request.standing,
        )
        call.cached_tokens = request.cached_tokens
        call.is_deferred = request.is_deferred
        call.is_given_up = request.is_given_up
        self.add(call)
        self.keep(call)
        return call

    def add(self, call: Call) -> None:
        """A call is on its replica; `keep` or an abort must follow."""
        self.calls[call.dispatch_id] = call
        call.replica.add(call)

    def keep(self, call: Call) -> None:
        """A call that was added is wanted: its request runs."""
        self.running[call.spec.request_id] = call

    def abandon(self, request_id: RequestId) -> Call | None:
        """Nobody wants the call of a running request any longer; it keeps its room until its replica says it ended."""
        call = self.running.pop(request_id, None)
        if call is not None:
            call.is_aborted = True
        return call

    def release(self, call: Call) -> None:
        """A call ended or was lost: its room is free."""
        del self.calls[call.dispatch_id]
        call.replica.remove(call)
        if not call.is_aborted:
            del self.running[call.spec.request_id]

    def is_of_this_life(self, dispatch_id: DispatchId) -> bool:
        """Whether this router made the dispatch, not one before it."""
        return dispatch_id >> 32 == self._epoch

    def check_reported(self, reported: RunningCall, replica_id: ReplicaId) -> None:
        """Raises InvalidEventError where a replica cannot be running what it says it runs."""
        self._check_made(reported.dispatch_id)
        call = self.calls.get(reported.dispatch_id)
        if call is not None and call.replica.replica_id != replica_id:
            raise InvalidEventError(
                f"replica {replica_id!r} reports dispatch {reported.dispatch_id} of {call.spec.attempt_id!r}, "
                f"which runs on {call.replica.replica_id!r}"
            )

    def check_over(self, event: Progressed) -> None:
        """Dispatches that the replica does not have may be over; they cannot be another's, or never made.

        Raises InvalidEventError where they are.
        """
        reported = [dispatch_id for dispatch_id, _ in event.tokens]
        for dispatch_id in (*reported, *(finished.dispatch_id for finished in event.finished)):
            call = self.calls.get(dispatch_id)
            if call is None:
                self._check_made(dispatch_id)
            elif call.replica.replica_id != event.replica_id:
                raise InvalidEventError(
                    f"replica {event.replica_id!r} reports on dispatch {dispatch_id} of {call.spec.attempt_id!r}, "
                    f"which runs on {call.replica.replica_id!r}"
                )

    def _check_made(self, dispatch_id: DispatchId) -> None:
        number = dispatch_id & 0xFFFFFFFF
        if self.is_of_this_life(dispatch_id) and not 0 < number < self._next_dispatch:
            raise InvalidEventError(
                f"dispatch {dispatch_id} (number {number} of epoch {self._epoch}) was never made; "
                f"the last number is {self._next_dispatch - 1}"
            )

    def audit(self) -> None:
        """Check the replicas, and that both views of their calls agree. Raises AssertionError."""
        on_replicas = 0
        for replica in self.replicas.values():
            replica.audit()
            on_replicas += len(replica.calls)
            for dispatch_id, call in replica.calls.items():
                assert self.calls.get(dispatch_id) is call, f"dispatch {dispatch_id} is unknown to the router"
        assert on_replicas == len(self.calls), f"{len(self.calls)} calls, {on_replicas} on replicas"
        wanted = {call.spec.request_id: call for call in self.calls.values() if not call.is_aborted}
        assert wanted == self.running, f"calls {sorted(wanted)} but running {sorted(self.running)}"
        self._audit_open()

    def _audit_open(self) -> None:
        takers = [one for one in self.replicas.values() if not one.is_draining]
        assert takers == self.takers, f"{self.takers} take work, should be {takers}"
        found = [one for one in takers if one.is_open(self._queue_depth, is_deep=self._is_deep)]
        assert found == self.open_replicas(), f"{self.open_replicas()} are open, should be {found}"
        waits_s = (0.0 if one.is_open(self._queue_depth) else one.next_slot_s() for one in takers)
        assert self.next_slot_s() == min(waits_s, default=0.0), f"a slot is free after {self.next_slot_s()} s"
