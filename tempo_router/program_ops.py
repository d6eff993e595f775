"""What clients ask of programs, as plain values: they cross processes, and a book of programs carries them out.

Dates are seconds since the epoch. `tenant` is who asks; nobody sees or touches another tenant's programs.
"""

from dataclasses import dataclass
from typing import Literal

from tempo_router.known_stages import KnownStage
from tempo_router.program_graph import CallStatus, NewCall, Objective


@dataclass(frozen=True, slots=True)
class CreateProgram:
    """A program with a deadline, or without one as best effort. outline: its stages, where they are known.

    is_graph: they are those of a graph that is to run, so it must not have begun. runner: the ingress that runs it.
    operation: names this wish, so that it is carried out once. asked_s: the deadline as its client gave it, in seconds
    from when it asked, or None: as a date. Who asks again for the same has the same program.
    """

    program_id: str
    tenant: str
    app: str = ""
    deadline_s: float | None = None
    objective: Objective = "deadline"
    name: str = ""
    operation: str = ""
    asked_s: float | None = None
    outline: tuple[KnownStage, ...] = ()
    is_graph: bool = False
    runner: str = ""


@dataclass(frozen=True, slots=True)
class BeginCall:
    """A call of a program begins.

    is_new_allowed: create the program if it is not known (its client chose the name). may_restart: if it is over, begin
    another one of this name: a session goes on after a silence. alias: another id by which sub-agents name it.
    """

    program_id: str
    tenant: str
    call: NewCall
    is_new_allowed: bool = False
    may_restart: bool = False
    alias: str = ""
    app: str = ""
    name: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class EndCall:
    """A call ended, as its ingress saw it. is_last: the client said that no further call follows.

    response_id: OpenAI's name of the answer, by which a later call may continue it.
    """

    program_id: str
    call_id: str
    attempt: int
    status: CallStatus
    prompt_tokens: int = 0
    output_tokens: int = 0
    is_last: bool = False
    response_id: str = ""


@dataclass(frozen=True, slots=True)
class ExtendProgram:
    """Another deadline."""

    program_id: str
    tenant: str
    deadline_s: float


@dataclass(frozen=True, slots=True)
class FinishProgram:
    """No further call will come. operation: names this wish, so that it is carried out once."""

    program_id: str
    tenant: str
    operation: str


@dataclass(frozen=True, slots=True)
class CancelProgram:
    """Give it up, with all that runs."""

    program_id: str
    tenant: str
    operation: str
    reason: str = "cancelled by the client"


@dataclass(frozen=True, slots=True)
class CancelGraph:
    """Likewise, but only if it runs the graph of the operation `run_by`; else nothing is done.

    A kind of its own: a router of a version that does not know it refuses it, where it would not see a condition of
    CancelProgram and cancel whatever has the name.
    """

    program_id: str
    tenant: str
    operation: str
    reason: str
    run_by: str


@dataclass(frozen=True, slots=True)
class DeliverOutput:
    """The client ran a tool of a declared graph: its output, as JSON, for whoever runs the graph."""

    program_id: str
    tenant: str
    node: str
    output: str


ProgramOp = CreateProgram | BeginCall | EndCall | ExtendProgram | FinishProgram | CancelProgram | CancelGraph
"""What changes a program."""


@dataclass(frozen=True, slots=True)
class CallTicket:
    """The answer to BeginCall: what the call's request needs.

    left_s: seconds until the program's deadline, zero or less once it has passed; None without one.
    is_relegated: the deadline is out of reach. over: how the program has ended, if it has: a begin that is told again
    is answered all the same, but the call cannot be served any more.
    """

    program_id: str
    call_id: str
    attempt: int
    stage: int
    app: str
    left_s: float | None
    is_relegated: bool = False
    over: Literal["", "finished", "cancelled"] = ""
