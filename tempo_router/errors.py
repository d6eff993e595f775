"""Everything that can go wrong, in one tree.

TempoError
├── ConfigError               the configuration cannot be used
├── InvalidSloError           a client's SLO makes no sense (field and value named)
├── ProgramError              a client asked something of a program that cannot be (field and reason named)
├── InvalidEventError         the shell told the core something impossible
├── InvalidSnapshotError      stored lengths cannot be read back
├── LengthModelError          the process that estimates answer lengths failed
├── StoreUnavailableError     Redis cannot be used now
├── StoreRefusedError         Redis refuses one command for good
├── LeaseLostError            another router owns the application now
├── RouterUnavailableError    no router answered in time
├── RequestTooLargeError      a request does not fit into one message between our processes
├── RequestFailedError        an admitted request cannot be finished
├── EngineStartError          an engine could not start (the reason is in the message)
├── EngineVersionError        the installed engine lacks what serving needs of it
├── TraceError                a workload trace cannot be read (file, line, column, value)
└── ModelError                the model cannot be built or loaded

Refusing a request is not an error: it is a Reject action.
"""

from typing import Any, Literal

ProgramProblem = Literal[
    "invalid_program",
    "unknown_program",
    "unknown_call",
    "unknown_request",
    "program_exists",
    "program_ended",
    "program_cancelled",
    "call_ended",
    "too_many_programs",
    "store_unavailable",
    "node_failed",
    "answer_too_large",
]
"""invalid_program: a field makes no sense. unknown_program, unknown_call, unknown_request: no such thing, or not this
tenant's.
program_exists: one of this name is in progress, with another application or deadline.
program_ended, call_ended: it is over, nothing can be added. program_cancelled: somebody gave up what was asked for.
too_many_programs: no room for another one now.
store_unavailable: Redis is away, and too much waits for it to take a new program. node_failed: a node of a declared
graph could not be answered. answer_too_large: it does not fit into one message between our processes."""


class TempoError(Exception):
    """Root of all errors that this project raises on purpose."""


class ConfigError(TempoError):
    """The configuration cannot be used."""


class InvalidSloError(TempoError):
    """A client's SLO makes no sense.

    field: the body field or header as the client wrote it. value: what it held, as text.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field}={value!r}: {problem}")
        self.field = field
        self.value = value
        self._problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        # Callers of the Python handle are in other processes.
        return InvalidSloError, (self.field, self.value, self._problem)


class ProgramError(TempoError):
    """A client asked something of a program that cannot be; nothing was changed.

    code: see ProgramProblem. field: what was at fault, as the client wrote it; "" for none.
    """

    def __init__(self, code: ProgramProblem, message: str, field: str = "") -> None:
        super().__init__(message)
        self.code: ProgramProblem = code
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        # Callers of the Python handle are in other processes.
        return ProgramError, (self.code, str(self), self.field)


class InvalidEventError(TempoError):
    """The shell told the core something that cannot have happened."""


class InvalidSnapshotError(TempoError):
    """Stored lengths cannot be read back: written by another version, or damaged."""


class LengthModelError(TempoError):
    """The process that estimates answer lengths failed; the histograms go on without it."""


class StoreUnavailableError(TempoError):
    """Redis cannot be reached, or cannot do now what it is asked; a later try may succeed."""


class StoreRefusedError(TempoError):
    """Redis refuses a command whenever it is asked: one that is wrong, or not allowed, or meets what it cannot use.

    code: Redis's own word for the reason (WRONGTYPE, NOPERM); "" if it gave none.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class LeaseLostError(TempoError):
    """Another router owns the application now."""


class RouterUnavailableError(TempoError):
    """No router answered in time."""


class RequestTooLargeError(TempoError, ValueError):
    """A request does not fit into one message between our processes. A ValueError, which vLLM answers with 400."""


class RequestFailedError(TempoError):
    """An admitted request cannot be finished: its SLO expired, or it could not be continued on another worker."""


class EngineStartError(TempoError):
    """An engine could not start."""


class EngineVersionError(TempoError):
    """The installed engine lacks what serving needs of it."""


class ModelError(TempoError):
    """The model cannot be built or loaded."""


class TraceError(TempoError):
    """A workload trace cannot be read.

    problem: what is wrong and what to do about it. path, line (from 1), column and value say where, as far as known.
    """

    def __init__(
        self, problem: str, path: str = "", line: int | None = None, column: str | None = None, value: object = None
    ) -> None:
        place = path if line is None else f"{path}:{line}"
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
        field = "" if column is None else f"{column}: " if value is None else f"{column}={shown}: "
        super().__init__(f"{place}: {field}{problem}" if place else f"{field}{problem}")
        self.path = path
        self.line = line
        self.column = column
        self.value = value
