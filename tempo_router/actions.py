"""What to do about it. The only output of RouterCore; the shell carries actions out in order."""

from dataclasses import dataclass
from typing import Literal

from tempo_router.request import DispatchId, ProgramId, ReplicaId, RequestId, Slo
from tempo_router.standing import UNRANKED, Standing


@dataclass(frozen=True, slots=True)
class Admit:
    """The request waits, or runs. Answers every Arrived that is not rejected, before any Dispatch of it.

    expected_wait_s: time until its first token, predicted. success_probability: chance to meet its SLO, 0 to 1.
    """

    request_id: RequestId
    attempt: int
    expected_wait_s: float
    success_probability: float


RejectReason = Literal["queue_full", "deadline_impossible", "too_large", "draining"]
"""queue_full: the bound on waiting requests or tokens is reached. deadline_impossible: not even an idle replica
could meet it, or its program cannot make its deadline. too_large: no replica's KV cache could ever hold it. draining:
the application is stopping."""


@dataclass(frozen=True, slots=True)
class Reject:
    """The request is not taken; the client may try again after retry_after_s (None: retrying cannot help)."""

    request_id: RequestId
    attempt: int
    reason: RejectReason
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Run this request on this replica. priority: the engine's order among queued calls, lower is sooner.

    standing: what a step planner orders by; other engines know only the priority.
    """

    dispatch_id: DispatchId
    request_id: RequestId
    attempt: int
    replica_id: ReplicaId
    priority: int
    standing: Standing = UNRANKED


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop this call on its replica; its tokens are no longer wanted."""

    dispatch_id: DispatchId
    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Relegate:
    """The request can no longer meet its SLO; it goes on as best effort."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Expire:
    """The request can no longer meet its SLO and the operator chose to refuse such work; it left the queue."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Evict:
    """The attempt was lost with its replica; its owner must submit the request again, with a higher attempt."""

    request_id: RequestId
    attempt: int


@dataclass(frozen=True, slots=True)
class Retune:
    """How running calls stand now; only for replicas with a step planner. step_cap_s: None leaves it to the rule."""

    replica_id: ReplicaId
    standings: tuple[tuple[DispatchId, Standing], ...]
    step_cap_s: float | None = None


@dataclass(frozen=True, slots=True)
class Retarget:
    """A running call has another target: the deadline of its program moved. Only for replicas with a step planner.

    slo: counted from the call's own arrival.
    """

    replica_id: ReplicaId
    dispatch_id: DispatchId
    slo: Slo


@dataclass(frozen=True, slots=True)
class Redate:
    """The deadline of a request's program moved: its owner judges it by this one, and it has a chance again.

    deadline_s: on the router's clock.
    """

    request_id: RequestId
    program_id: ProgramId
    deadline_s: float


DeferReason = Literal["no_room", "no_worth"]
"""no_room: denser work takes all that the capacity timeline has. no_worth: by the estimates nothing of it can be in
time, though it is not given up yet."""


@dataclass(frozen=True, slots=True)
class Defer:
    """The plan no longer has room for a request with a target, waiting or running: it only fills what is spare.

    Said of each attempt when that begins, and not again before a `Readmit`.
    """

    request_id: RequestId
    reason: DeferReason


@dataclass(frozen=True, slots=True)
class Readmit:
    """The plan has room again for a request that was deferred."""

    request_id: RequestId


Action = Admit | Reject | Dispatch | Abort | Relegate | Expire | Evict | Retune | Retarget | Redate | Defer | Readmit
