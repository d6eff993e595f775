"""What happened. The only input of RouterCore; each event carries the time at which the router learnt of it."""

from dataclasses import dataclass
from typing import Literal

from tempo_router.known_stages import KnownStage
from tempo_router.prediction import Lengths
from tempo_router.request import DispatchId, ProgramId, ReplicaId, RequestId, RequestSpec


@dataclass(frozen=True, slots=True)
class ReplicaCapacity:
    """What one replica's engine can hold; fixed from its start.

    max_running: sequences decoded in one step (vLLM's max_num_seqs).
    max_step_tokens: tokens computed in one step (vLLM's max_num_batched_tokens).
    kv_tokens: tokens that fit into the KV cache.
    has_step_planner: every step is composed by `StepPlanner`, which can hold running calls and takes `Retune`.
    """

    max_running: int
    max_step_tokens: int
    kv_tokens: int
    has_step_planner: bool = False


@dataclass(frozen=True, slots=True)
class RunningCall:
    """A call that a replica already runs when it attaches (the router was restarted, or lost the link)."""

    dispatch_id: DispatchId
    spec: RequestSpec
    new_tokens: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """One engine step as the replica measured it; the features of the step-time model.

    prefill_tokens: prompt tokens computed. decodes: sequences that produced a token without prefill.
    context_tokens: summed context of those sequences. duration_s: from the start of the step to its outputs.
    attention_tokens: summed over the pieces of prompts: their tokens times the context before their middle, that is
    chunk x (cached before it + chunk / 2); 0 if the replica does not say.
    """

    duration_s: float
    prefill_tokens: int
    decodes: int
    context_tokens: int
    attention_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What the replica's engine holds after a step."""

    running: int
    waiting: int
    free_kv_tokens: int
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0


FinishReason = Literal["completed", "cancelled", "lost", "error"]
"""completed: the engine ended the answer. cancelled: aborted on request. lost: the replica gave the call up
because its ingress is not connected; the ingress must submit it again. error: the engine failed on it."""


@dataclass(frozen=True, slots=True)
class CallFinished:
    """A call left the replica. output_tokens counts this attempt only."""

    dispatch_id: DispatchId
    reason: FinishReason
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request entered, or entered again with a higher attempt."""

    at_s: float
    spec: RequestSpec


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The owner wants no more tokens. is_complete: the answer had ended (a stop string), the client had not left."""

    at_s: float
    request_id: RequestId
    is_complete: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaAttached:
    """A replica connected, new or again; `running` is all that it runs.

    is_draining: it came back while it drains; what it runs is adopted and nothing new is sent to it.
    """

    at_s: float
    replica_id: ReplicaId
    capacity: ReplicaCapacity
    running: tuple[RunningCall, ...] = ()
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaDraining:
    """The replica finishes what it has and takes nothing new."""

    at_s: float
    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """The replica is gone, with everything that it ran."""

    at_s: float
    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Progressed:
    """News from one replica, once per engine step. `step` is None when nothing was computed (an abort took effect).

    tokens: (dispatch, tokens produced since the last report) for every call that produced any.
    """

    at_s: float
    replica_id: ReplicaId
    load: ReplicaLoad
    step: StepReport | None = None
    tokens: tuple[tuple[DispatchId, int], ...] = ()
    finished: tuple[CallFinished, ...] = ()


@dataclass(frozen=True, slots=True)
class Predicted:
    """A predictor has an opinion on the answer's length; it may come late, or never."""

    at_s: float
    request_id: RequestId
    attempt: int
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class ProgramOutlined:
    """These are all stages that this program will have, ascending, whether or not any call of it has come."""

    at_s: float
    program_id: ProgramId
    stages: tuple[KnownStage, ...]


@dataclass(frozen=True, slots=True)
class ProgramFinished:
    """The client says that no further call of this program will come. is_complete False: it gave up halfway."""

    at_s: float
    program_id: ProgramId
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ProgramRelegated:
    """This program can no longer make its deadline: all of its calls go on as best effort."""

    at_s: float
    program_id: ProgramId


@dataclass(frozen=True, slots=True)
class ProgramRetargeted:
    """This program has another deadline, in seconds on the router's clock; it has a chance again if it had none."""

    at_s: float
    program_id: ProgramId
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed. Deadlines expire and late work is relegated even when nothing else happens."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Settled:
    """Replicas and ingresses had time to report after the router's start; before it nothing is dispatched."""

    at_s: float


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """The application stops: new requests are refused, what waits and runs is finished."""

    at_s: float


Event = (
    Arrived
    | Cancelled
    | Predicted
    | ProgramFinished
    | ProgramOutlined
    | ProgramRelegated
    | ProgramRetargeted
    | ReplicaAttached
    | ReplicaDraining
    | ReplicaLost
    | Progressed
    | Ticked
    | Settled
    | DrainStarted
)
