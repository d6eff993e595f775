"""What stands between the client and vLLM's own application: limits, SLOs, programs, API keys, health.

Pure ASGI. For every POST on an inference path it reads the body (bounded), takes the SLO out of it, binds a
`RequestContext` for the engine client, and replays the body. What comes back is in exchange.py.
"""

import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

import structlog

from deployments import openai_errors
from deployments.api_keys import ApiKeys
from deployments.asgi import AsgiApp, Receive, Scope, Send, send_error
from deployments.exchange import MESSAGES_PATH, Exchange
from deployments.http_bodies import (
    BodyContent,
    BodyTooLargeError,
    RefusedError,
    decoded,
    is_true,
    messages_of,
    prompts_of,
    read_body,
    replay_body,
    with_length,
    without,
)
from deployments.own_paths import OwnPaths
from deployments.prefix_growth import GrowingChats
from deployments.program_calls import join, leave
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity, ProgramFields, first_answer, grown_chat, identify
from deployments.request_context import RequestContext, bound_request
from deployments.slo_wire import BodyFields, ParsedSlo, parse_slo
from tempo_router.config import TempoConfig
from tempo_router.errors import ConfigError, InvalidSloError, ProgramError, RouterUnavailableError

WhyNot = Callable[[], str | None]
"""Says what is missing; None: nothing is."""

INFERENCE_PATHS = frozenset(
    {
        "/classify",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
        "/rerank",
        "/score",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/embeddings",
        MESSAGES_PATH,
        "/v1/rerank",
        "/v1/responses",
        "/v1/score",
        "/v1/systemone",
        "/v2/embed",
        "/v2/rerank",
    }
)
# Spelled as various clients and probes spell them.
_READINESS_PATHS = frozenset({"/health", "/readiness", "/health/readiness"})
_LIVENESS_PATHS = frozenset({"/liveness", "/health/liveliness", "/health/liveness"})
_METRICS_PATHS = frozenset({"/metrics", "/metrics/"})
# Why a program may not begin although nothing is wrong with the call.
_NO_ROOM = ("too_many_programs", "store_unavailable")
_TOLD_EVERY_S = 60.0

logger = structlog.get_logger(__name__)


class HttpEdge:
    """The outermost ASGI application of an ingress.

    not_ready_because: why no request can be served now. not_alive_because: why this process should be replaced.
    programs: asks the router about programs; None: calls belong to none, and there is no /v1/programs.
    before_scrape: gets what /metrics is to tell of the router.
    api_keys: one of them must be shown; none: everybody may ask.
    keeps_answers: an answer of /v1/responses can be continued by its id, as vLLM stores it.
    monotonic_s, epoch_s: clocks, to be held still in tests.
    """

    def __init__(
        self,
        app: AsgiApp,
        config: TempoConfig,
        *,
        not_ready_because: WhyNot,
        not_alive_because: WhyNot = lambda: None,
        programs: ProgramClient | None = None,
        before_scrape: Callable[[], Awaitable[None]] | None = None,
        api_keys: Sequence[str] = (),
        keeps_answers: bool = False,
        monotonic_s: Callable[[], float] = time.monotonic,
        epoch_s: Callable[[], float] = time.time,
    ) -> None:
        self.open_requests = 0
        self._app = app
        self._tiers = config.tiers
        self._default_tier = config.default_tier
        self._limits = config.ingress
        self._not_ready_because = not_ready_because
        self._not_alive_because = not_alive_because
        self._monotonic_s = monotonic_s
        self._epoch_s = epoch_s
        self._identify_by = config.programs.identify_by
        self._chats = GrowingChats()
        self._programs = programs
        self._before_scrape = before_scrape
        self._keys = ApiKeys(api_keys, INFERENCE_PATHS)
        self._keeps_answers = keeps_answers
        self._alone = 0
        self._told_alone_s = -math.inf
        self._own: OwnPaths | None = None
        if programs is not None:
            self._own = OwnPaths(
                programs,
                self._from_ourselves,
                model=config.model_name,
                has_console=config.ingress.console,
                epoch_s=epoch_s,
            )

    @property
    def own(self) -> OwnPaths:
        """Programs and declared graphs, for those who come another way."""
        if self._own is None:
            raise ConfigError("this edge was built without programs")
        return self._own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope, as ASGI says."""
        path = _path(scope) if scope["type"] == "http" else ""
        if path and self._keys.refuses(scope["method"], path, scope["headers"]):
            await send_error(send, openai_errors.no_valid_key())
        elif path and scope["method"] == "POST":
            await self._post(path, scope, receive, send)
        elif path in _READINESS_PATHS and scope["method"] in ("GET", "HEAD"):
            await _send_health(send, self._not_alive_because() or self._not_ready_because())
        elif path in _LIVENESS_PATHS and scope["method"] in ("GET", "HEAD"):
            await _send_health(send, self._not_alive_because())
        elif path and self._own is not None and self._own.answers(own_path := _encoded_path(scope)):
            await self._own.get(own_path, scope, send)
        else:
            if path in _METRICS_PATHS and self._before_scrape is not None:
                await self._before_scrape()
            await self._app(scope, receive, send)

    async def _from_ourselves(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A node of a declared graph: whoever declared it has shown a key."""
        await self({**scope, "headers": [*scope["headers"], *self._keys.of_ourselves()]}, receive, send)

    async def _post(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        arrival_s = self._monotonic_s()
        if self.open_requests >= self._limits.max_open_requests:
            await send_error(send, openai_errors.too_many_requests_open(self._limits.max_open_requests))
            return
        self.open_requests += 1
        try:
            await self._bounded_post(path, arrival_s, scope, receive, send)
        finally:
            self.open_requests -= 1

    async def _bounded_post(self, path: str, arrival_s: float, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._limits.max_body_bytes
        try:
            body = await read_body(scope["headers"], receive, limit)
        except BodyTooLargeError:
            await send_error(send, openai_errors.body_too_large(limit))
            return
        if body is None:
            return  # The client left before it had sent everything.
        if self._own is not None and self._own.answers(own_path := _encoded_path(scope)):
            await self._own.post(own_path, scope, body, receive, send)
            return
        if path not in INFERENCE_PATHS:
            await self._app(scope, replay_body(body, receive), send)
            return
        try:
            parsed, context, body, program_call = self._understand(path, arrival_s, scope["headers"], body)
            if program_call is not None:
                await self._join(program_call, parsed, context)
        except RefusedError as refused:
            await send_error(send, refused.error)
            return
        exchange = Exchange(context, parsed, path, send)
        try:
            with bound_request(context):
                await exchange.run(self._app, with_length(scope, len(body)), replay_body(body, receive))
        finally:
            if program_call is not None and self._programs is not None and context.program is not None:
                leave(
                    self._programs, context, is_last=program_call.identity.is_last, response_id=exchange.response_id,
                    is_background=program_call.is_background,
                )  # fmt: skip

    async def _join(self, call: "_ProgramCall", parsed: ParsedSlo, context: RequestContext) -> None:
        assert self._programs is not None
        try:
            await join(self._programs, call.identity, context, has_own_slo=parsed.is_own, now_epoch_s=self._epoch_s())
        except ProgramError as error:
            if error.code not in _NO_ROOM or call.identity.is_asked_for:
                raise RefusedError(openai_errors.program_refused(error)) from error
            self._note_alone(error)
        except RouterUnavailableError as error:
            raise RefusedError(openai_errors.no_router()) from error

    def _note_alone(self, error: ProgramError) -> None:
        """A call of a program that nobody asked for is served without one: it has lost nothing that it knew of."""
        self._alone += 1
        now_s = self._monotonic_s()
        if now_s - self._told_alone_s >= _TOLD_EVERY_S:
            logger.warning("calls_without_their_programs", reason=error.code, why=str(error), calls=self._alone)
            self._alone, self._told_alone_s = 0, now_s

    def _understand(
        self, path: str, arrival_s: float, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> "tuple[ParsedSlo, RequestContext, bytes, _ProgramCall | None]":
        """The request's SLO, context and place, and the body without the fields that vLLM does not know."""
        fields = decoded(body)
        is_streaming = is_true(fields.stream)
        try:
            parsed = parse_slo(
                BodyFields(fields.slo, fields.service_tier, fields.user, is_streaming),
                headers,
                self._tiers,
                self._default_tier,
                self._epoch_s(),
            )
        except InvalidSloError as error:
            raise RefusedError(openai_errors.invalid_slo(error)) from error
        context = RequestContext(
            slo=parsed.slo,
            tier=parsed.tier,
            app=parsed.app,
            tenant=parsed.tenant,
            arrival_s=arrival_s,
            is_streaming=is_streaming,
            expected_groups=prompts_of(fields.prompt) if path == "/v1/completions" else 1,
        )
        if fields.slo is not None or fields.service_tier is not None or fields.program is not None:
            body = without(body, "slo", "service_tier", "program")
        return parsed, context, body, self._place(path, headers, fields, parsed.tenant)

    def _place(
        self, path: str, headers: Iterable[tuple[bytes, bytes]], fields: BodyContent, tenant: str
    ) -> "_ProgramCall | None":
        if self._programs is None:
            return None
        said = ProgramFields(fields.program, fields.metadata, fields.conversation, fields.previous_response_id)
        try:
            identity = identify(headers, said, tenant, self._identify_by)
        except ProgramError as error:
            raise RefusedError(openai_errors.program_refused(error)) from error
        if identity is None and "prefix" in self._identify_by and path == "/v1/chat/completions":
            identity = grown_chat(tenant, self._chats.name(tenant, messages_of(fields.messages)))
        if identity is None and path == "/v1/responses" and self._keeps_answers and fields.store is not False:
            # The first answer of what may become a conversation: the next one will name it, and nothing else.
            identity = first_answer(tenant, self._identify_by)
        return None if identity is None else _ProgramCall(identity, is_true(fields.background))


@dataclass(frozen=True, slots=True)
class _ProgramCall:
    """A request that belongs to a program. is_background: its response ends before its answer."""

    identity: Identity
    is_background: bool


def _path(scope: Scope) -> str:
    return _below_root(str(scope["path"]), str(scope.get("root_path", "")))


def _encoded_path(scope: Scope) -> str:
    """The path as it was sent: a name in it may hold "/" and "%", which are told from the path's own only there."""
    raw: bytes | None = scope.get("raw_path")
    path = raw.decode("latin-1") if raw is not None else quote(str(scope["path"]))
    return _below_root(_spelled(path), _spelled(quote(str(scope.get("root_path", "")))))


def _spelled(path: str) -> str:
    """Whatever a client needlessly encoded, or left out: every path has one spelling."""
    return "/".join(quote(unquote(part), safe="") for part in path.split("/"))


def _below_root(path: str, root: str) -> str:
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def _send_health(send: Send, problem: str | None) -> None:
    if problem is not None:
        await send_error(send, openai_errors.not_ready(problem))
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
