"""The attached replicas and every call on them."""

from tempo_router.errors import InvalidEventError
from tempo_router.events import Progressed, ReplicaCapacity, RunningCall
from tempo_router.replicas import Call, Replica
from tempo_router.request import DispatchId, ReplicaId, RequestId
from tempo_router.step_time import StepTimeModel
from tempo_router.waiting import WaitingRequest

_SLOTS_BEFORE_THE_FIRST = 128


class Fleet:
    """Who runs, and where. Numbers the dispatches of one router's life.

    replicas: in order of attaching. calls: dispatched and not ended, aborted ones included. running: by request, the
    calls that are wanted. kv_sizes: ascending, of the replicas that take work. slots: sequences that the largest of
    them decodes together. `recount` must follow whatever changes which replicas take work, or their capacities.
    """

    __slots__ = ("_attached", "_epoch", "_next_dispatch", "calls", "kv_sizes", "replicas", "running", "slots")

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._next_dispatch = 1
        self._attached = 0
        self.replicas: dict[ReplicaId, Replica] = {}
        self.calls: dict[DispatchId, Call] = {}
        self.running: dict[RequestId, Call] = {}
        self.kv_sizes: list[int] = []
        self.slots = _SLOTS_BEFORE_THE_FIRST

    def takers(self) -> list[Replica]:
        """Replicas that take work, full or not, in order of attaching."""
        return [replica for replica in self.replicas.values() if not replica.is_draining]

    def attach(self, replica_id: ReplicaId, capacity: ReplicaCapacity, steps: StepTimeModel) -> Replica:
        """A replica came, or came back. steps: of all replicas; a new one is believed to be like them."""
        replica = self.replicas.get(replica_id)
        if replica is None:
            self._attached += 1
            own = StepTimeModel(steps.coefficients) if steps.observed else StepTimeModel()
            replica = self.replicas[replica_id] = Replica(replica_id, self._attached, capacity, own)
        replica.capacity = capacity
        return replica

    def recount(self) -> None:
        """The set of replicas that take work, or their capacities, changed."""
        takers = self.takers()
        self.kv_sizes = sorted(replica.capacity.kv_tokens for replica in takers)
        self.slots = max((replica.capacity.max_running for replica in takers), default=_SLOTS_BEFORE_THE_FIRST)

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
