"""Errors in the shape that OpenAI's clients read, and which status and Retry-After each refusal gets.

| reason | status | Retry-After | why |
| --- | --- | --- | --- |
| queue_full | 429 | from the queue, at least 1 s | the client's rate is what must change |
| deadline_impossible | 503 | from the queue, if the router knows one | this server cannot do it now; another may |
| draining, router_unavailable | 503 | 5 s unless the router says otherwise | a restart or a failover is under way |
| worker_lost | 503 | 1 s | other workers may answer |
| slo_expired (to the router: expired); program_cancelled | 504; 409 | none | ended by the router, admitted or not |
| programs: unknown; over, or there already; too many, not to be stored | 404; 409; 503 | 1 s with 503 | |
| programs: node_failed; answer_too_large | 502; 400 | none | the same would come of it again |
| too_large | 400 | none | no wait makes it fit into any KV cache |
"""

import json
import math
from dataclasses import dataclass

from deployments.request_context import PROGRAM_CANCELLED, SLO_EXPIRED, AdmissionVerdict, RequestFailure
from tempo_router.errors import InvalidSloError, ProgramError, ProgramProblem

_PROGRAM_STATUS: dict[ProgramProblem, tuple[int, str]] = {
    "invalid_program": (400, "invalid_request_error"),
    "unknown_program": (404, "invalid_request_error"),
    "unknown_call": (400, "invalid_request_error"),
    "unknown_request": (404, "invalid_request_error"),
    "program_exists": (409, "invalid_request_error"),
    "program_ended": (409, "invalid_request_error"),
    "program_cancelled": (409, "server_error"),  # As a call that runs then is told.
    "call_ended": (409, "invalid_request_error"),
    "too_many_programs": (503, "server_error"),
    "store_unavailable": (503, "server_error"),
    "node_failed": (502, "server_error"),
    "answer_too_large": (400, "invalid_request_error"),
}
_FAILOVER_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class ApiError:
    """One refusal, ready to be sent.

    type, code: OpenAI's words where it has some, else ours. param: the field at fault. retry_after_s: None: no header.
    """

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None

    def payload(self) -> dict[str, dict[str, str | None]]:
        """The body as an object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The body as JSON in ASCII, so that whatever a client wrote comes back harmless."""
        return json.dumps(self.payload()).encode()

    def anthropic_body(self) -> bytes:
        """The same as an event of Anthropic's streams has it."""
        return json.dumps({"type": "error", "error": {"type": "api_error", "message": self.message}}).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Content headers, and Retry-After in whole seconds, rounded up, where waiting can help."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self.body())).encode())]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        return headers


def invalid_slo(error: InvalidSloError) -> ApiError:
    """A field that makes no sense, named with its value."""
    return ApiError(400, str(error), "invalid_request_error", "invalid_slo", param=error.field)


def no_valid_key() -> ApiError:
    """A key is needed, and none that fits was shown."""
    message = "show an API key of this server (engine.frontend_kwargs.api_key): authorization: Bearer <key>"
    return ApiError(401, message, "invalid_request_error", "invalid_api_key")


def program_refused(error: ProgramError) -> ApiError:
    """What cannot be done with a program, and why."""
    # A router of another version may say what this one has no name for.
    status, kind = _PROGRAM_STATUS.get(error.code, (400, "invalid_request_error"))
    retry_after_s = 1.0 if status == 503 else None
    return ApiError(status, str(error), kind, error.code, error.field or None, retry_after_s)


def no_such_route(method: str, path: str) -> ApiError:
    """A path that nothing is served on."""
    return ApiError(404, f"there is no {method} {path[:200]}", "invalid_request_error", "not_found")


def malformed_json(detail: str) -> ApiError:
    """A body that is not a JSON object."""
    return ApiError(400, f"the request body is not valid: {detail}", "invalid_request_error", "invalid_json")


def body_too_large(limit_bytes: int) -> ApiError:
    """A body beyond the configured limit."""
    message = f"the request body is larger than {limit_bytes} bytes (ingress.max_body_bytes)"
    return ApiError(413, message, "invalid_request_error", "body_too_large")


def too_many_requests_open(limit: int) -> ApiError:
    """This ingress holds as many requests as it may."""
    message = f"this server already holds {limit} open requests; try again later"
    return ApiError(503, message, "server_error", "too_many_open_requests", retry_after_s=1.0)


def not_ready(reason: str) -> ApiError:
    """The answer of the health paths while something is missing."""
    return ApiError(503, reason, "server_error", "not_ready", retry_after_s=1.0)


def internal_error() -> ApiError:
    """Something broke on our side; the log says what."""
    return ApiError(500, "internal server error", "server_error", "internal_error")


def failed(failure: RequestFailure) -> ApiError:
    """An admitted request that ended without a whole answer."""
    retry_after_s = 1.0 if failure.status == 503 else None
    return ApiError(failure.status, failure.message, "server_error", failure.code, retry_after_s=retry_after_s)


def rejected(verdict: AdmissionVerdict) -> ApiError:
    """The answer to a request that the router did not take."""
    retry_after_s = verdict.retry_after_s
    match verdict.reject_reason:
        case "queue_full":
            message = "the queue is full; try again later"
            return ApiError(429, message, "rate_limit_error", "queue_full", retry_after_s=retry_after_s or 1.0)
        case "deadline_impossible":
            message = "the target, or the deadline of the request's program, cannot be met any more"
            return ApiError(503, message, "server_error", "deadline_impossible", retry_after_s=retry_after_s)
        case "too_large":
            message = "the prompt and its answer are larger than the KV cache of any replica"
            return ApiError(400, message, "invalid_request_error", "too_large")
        case "draining":
            message = "the server is stopping; try again, another instance may answer"
            return _failover(message, "draining", retry_after_s)
        case "program_cancelled":
            return failed(PROGRAM_CANCELLED)
        case "expired":
            return failed(SLO_EXPIRED)
        case "router_unavailable":
            return _failover("no router could be reached; try again", "router_unavailable", retry_after_s)
        case _:
            return _failover("the request was not admitted", "not_admitted", retry_after_s)


def no_router() -> ApiError:
    """The answer where no router could be asked at all."""
    return rejected(AdmissionVerdict(False, reject_reason="router_unavailable"))


def _failover(message: str, code: str, retry_after_s: float | None) -> ApiError:
    return ApiError(503, message, "server_error", code, retry_after_s=retry_after_s or _FAILOVER_RETRY_S)
