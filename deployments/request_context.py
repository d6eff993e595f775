"""What one HTTP request carries to the engine client and back: its SLO one way, verdicts and outcomes the other.

vLLM's application lies between the HTTP edge, which knows the SLO, and the engine client, which talks to the
router. It has no parameter for either, so they meet in a context variable: the edge binds a `RequestContext`, and
whatever runs on behalf of that request, in its task or in tasks started by it, finds it with `current_request`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tempo_router.errors import TempoError
from tempo_router.metrics import Outcome
from tempo_router.program_graph import CallStatus
from tempo_router.program_ops import CallTicket
from tempo_router.request import ProgramCall, Slo


@dataclass(frozen=True, slots=True)
class AdmissionVerdict:
    """The router's answer to one engine request.

    expected_wait_s: time until the first token, predicted. success_probability: chance to meet the SLO, 0 to 1.
    reject_reason: None when admitted; else one of actions.RejectReason, "router_unavailable", or how the router ended
    the request before it had answered: "expired", "program_cancelled".
    retry_after_s: when trying again may help; None: not known, or never (see openai_errors).
    """

    is_admitted: bool
    expected_wait_s: float = 0.0
    success_probability: float = 1.0
    reject_reason: str | None = None
    retry_after_s: float | None = None


class AdmissionRejected(TempoError):  # noqa: N818 - an answer, not an error; it reads as one where it is raised
    """The router did not take the request. Raised by the engine client, turned into an answer by the HTTP edge."""

    def __init__(self, verdict: AdmissionVerdict) -> None:
        super().__init__(f"request not admitted: {verdict.reject_reason}")
        self.verdict = verdict

    def __reduce__(self) -> tuple[Any, ...]:
        # Callers of the Python handle are in other processes, and need none of vLLM's terms.
        return AdmissionRejected, (self.verdict,)


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why an admitted request ended without a whole answer, for the client to read.

    code: closed set of lower-case words, such as "expired" or "worker_lost". status: HTTP status when none was sent.
    """

    code: str
    message: str
    status: int = 500


PROGRAM_CANCELLED = RequestFailure("program_cancelled", "the program of this call was cancelled", 409)
SLO_EXPIRED = RequestFailure(
    "slo_expired", "the request waited so long that its SLO can no longer be met; the server is overloaded", 504
)


@dataclass(slots=True, eq=False)
class RequestContext:
    """One HTTP request on its way through the ingress.

    It can stand for several engine requests: siblings of `n` > 1, or the prompts of one completions call.
    Reports may come after the response has ended (a background response, an abort); they are then only recorded.

    arrival_s: time.monotonic() of this process when the request line and headers were there.
    tier: name of the tier in the configuration; "" when the client gave targets of its own.
    expected_groups: how many prompts the body holds, so how many admissions must be known before a stream may start.
    program: what it is in its program; None for a request alone. prompt_tokens: of all its engine requests.
    on_outcome: called whenever an engine request ended.
    """

    slo: Slo
    tier: str
    app: str
    tenant: str
    arrival_s: float
    is_streaming: bool
    expected_groups: int = 1
    verdicts: list[AdmissionVerdict] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    is_relegated: bool = False
    failure: RequestFailure | None = None
    on_verdict: Callable[[], None] | None = None
    program: CallTicket | None = None
    prompt_tokens: int = 0
    incomplete: int = 0
    on_outcome: Callable[[], None] | None = None

    def report_verdict(self, verdict: AdmissionVerdict) -> None:
        """Record the router's answer to one engine request of this HTTP request; called on the event loop."""
        self.verdicts.append(verdict)
        if self.on_verdict is not None:
            self.on_verdict()

    def report_relegated(self) -> None:
        """The SLO can no longer be met; the request goes on as best effort."""
        self.is_relegated = True

    def report_redated(self, slo: ProgramCall) -> None:
        """The deadline of its program moved; the request counts again if it had been given up."""
        self.slo = slo
        self.is_relegated = False

    def report_failure(self, failure: RequestFailure) -> None:
        """Say why the request will end early, before the engine client ends it. The first reason is kept."""
        if self.failure is None:
            self.failure = failure

    def report_outcome(self, outcome: Outcome, *, completed: bool = True) -> None:
        """Record how one engine request ended; must come before the engine client hands out its last output.

        completed: the answer came to its own end; nobody left and nothing failed.
        """
        self.outcomes.append(outcome)
        self.incomplete += not completed
        if self.on_outcome is not None:
            self.on_outcome()

    def report_prompt(self, tokens: int) -> None:
        """Count the prompt of an engine request, when it is known."""
        self.prompt_tokens += tokens

    @property
    def is_of_late_program(self) -> bool:
        """Whether the program cannot make its deadline; for own targets, as it was when the call began."""
        if isinstance(self.slo, ProgramCall):
            return self.is_relegated
        return self.program is not None and self.program.is_relegated

    @property
    def has_ended(self) -> bool:
        """Every engine request that was admitted has ended."""
        return len(self.outcomes) >= sum(verdict.is_admitted for verdict in self.verdicts)

    @property
    def call_status(self) -> CallStatus:
        """How this call of a program ended, once the response has."""
        if self.failure is not None or self.rejection is not None or not self.verdicts:
            return "failed"
        return "completed" if self.has_ended and not self.incomplete else "cancelled"

    @property
    def rejection(self) -> AdmissionVerdict | None:
        """The first verdict that refuses; one refused part refuses the whole HTTP request."""
        return next((verdict for verdict in self.verdicts if not verdict.is_admitted), None)

    @property
    def is_admitted(self) -> bool:
        """Every prompt has been admitted."""
        return len(self.verdicts) >= self.expected_groups and self.rejection is None


_current: ContextVar[RequestContext | None] = ContextVar("tempo_request", default=None)


def current_request() -> RequestContext | None:
    """The HTTP request on whose behalf this code runs; None outside one (start-up, the Python handle)."""
    return _current.get()


@contextmanager
def bound_request(context: RequestContext) -> Iterator[RequestContext]:
    """Make `context` the current request of this task, and of tasks started inside the block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
