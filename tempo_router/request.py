"""What a client asks for: the request, its service-level objective, and the ids that name things.

A spec never changes. What is learnt about a request afterwards is state and belongs to the router.
Inside the project every time is in seconds and every latency starts at the arrival at the ingress.
"""

from dataclasses import dataclass
from typing import Literal, NewType, assert_never

RequestId = NewType("RequestId", str)
GroupId = NewType("GroupId", str)
ProgramId = NewType("ProgramId", str)
ReplicaId = NewType("ReplicaId", str)
DispatchId = NewType("DispatchId", int)

SloClass = Literal["latency", "deadline", "program", "best_effort"]


@dataclass(frozen=True, slots=True)
class Latency:
    """A stream that is read as it comes: token i (0-based) is due at arrival + ttft_s + i * tbt_s."""

    ttft_s: float
    tbt_s: float


@dataclass(frozen=True, slots=True)
class Deadline:
    """An answer that is useful as a whole and only if its last token comes within ttlt_s of the arrival."""

    ttlt_s: float


@dataclass(frozen=True, slots=True)
class ProgramCall:
    """One call of a program. ttlt_s is the time left to the *program's* deadline when this call arrived."""

    program_id: ProgramId
    ttlt_s: float


@dataclass(frozen=True, slots=True)
class BestEffort:
    """Work without a target: it takes what is left."""


Slo = Latency | Deadline | ProgramCall | BestEffort


def slo_class(slo: Slo) -> SloClass:
    """The name of the class that a target belongs to, as metrics and responses print it."""
    match slo:
        case Latency():
            return "latency"
        case Deadline():
            return "deadline"
        case ProgramCall():
            return "program"
        case BestEffort():
            return "best_effort"
        case _:
            assert_never(slo)


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One call of a model, as the router sees it: lengths and targets, never text.

    prompt_tokens: length of the client's prompt.
    max_output_tokens: bound on the whole answer, including what earlier attempts delivered.
    attempt: 0 for the first try; higher when the request continues after a worker was lost.
    generated_tokens: answer tokens that earlier attempts delivered; the engine reads them again with the prompt.
    group_id, group_size: siblings of one client request (`n` > 1) share a group; they are admitted together
        and go to one replica. A request alone has its own id as group and size 1.
    app: what the client calls itself; with `model` it selects the learned length distribution.
    stage: 0-based stage of a program's call. prefix_id, prefix_tokens: a name for what the prompt begins with, and
        how many of its leading tokens were in earlier requests of that name; "" and 0 where nothing is known.
    program_id, call_id: the program that it belongs to and its name there, "" for none; also of a call with targets of
        its own, which are not the program's deadline.
    """

    request_id: RequestId
    arrival_s: float
    slo: Slo
    prompt_tokens: int
    max_output_tokens: int
    group_id: GroupId
    group_size: int = 1
    model: str = ""
    app: str = ""
    tenant: str = ""
    tier: str = ""
    attempt: int = 0
    generated_tokens: int = 0
    stage: int = 0
    prefix_id: str = ""
    prefix_tokens: int = 0
    program_id: str = ""
    call_id: str = ""

    @property
    def deadline_s(self) -> float | None:
        """When the last token is due, on the clock of arrival_s; None for streams and best effort."""
        match self.slo:
            case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
                return self.arrival_s + ttlt_s
            case Latency() | BestEffort():
                return None
            case _:
                assert_never(self.slo)

    @property
    def attempt_id(self) -> str:
        """Names this attempt: the request id itself for the first one, `id@attempt` for later ones."""
        return self.request_id if self.attempt == 0 else f"{self.request_id}@{self.attempt}"

    @property
    def context_tokens(self) -> int:
        """Tokens that the engine must hold before it can produce the next one."""
        return self.prompt_tokens + self.generated_tokens
