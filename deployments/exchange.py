"""One inference request's response on its way back: honest status codes, and how it ended.

The response's start is held until the router has admitted every prompt, because vLLM starts a stream with 200 before
the engine has seen the request: a refused request gets its 429 or 503, streamed or not, and a prompt that cannot be
served its 400. A token then costs one look at the end of its bytes.

Added to responses: the class and targets applied and what the router expects (`x-tempo-*` headers), and how it ended:
as headers where the answer is whole, as an SSE comment before `data: [DONE]` (or at the end) of a stream. Clients of
SSE ignore comments; everything else in the stream stays as vLLM wrote it.

Nothing that a client wrote is ever put into a header, but for the names of tiers, which are the configuration's.
"""

import asyncio
import json
import re
from typing import Any

from deployments import openai_errors
from deployments.asgi import JSON, AsgiApp, Message, Receive, Scope, Send, send_body, send_error
from deployments.http_bodies import with_echo, with_echo_in_event, with_length
from deployments.logs import log_unforeseen
from deployments.openai_errors import ApiError
from deployments.request_context import AdmissionRejected, RequestContext
from deployments.slo_wire import ParsedSlo, applied_targets_ms
from tempo_router.errors import RouterUnavailableError
from tempo_router.request import ProgramCall, slo_class

MESSAGES_PATH = "/v1/messages"

_DONE = b"data: [DONE]\n\n"
_ERROR_EVENT = b'data: {"error"'
_ANTHROPIC_ERROR_EVENT = b"event: error\n"
_SERVICE_TIER = b'"service_tier":'
_RESPONSE_ID = re.compile(rb'"id":\s*"(resp_[A-Za-z0-9_-]{1,128})"')


class Exchange:
    """One inference request and its response: holds the start back, then lets the bytes flow.

    Held, until every prompt is admitted or the response is whole; then flowing; or refused, and whatever vLLM still
    sends is dropped.
    """

    def __init__(self, context: RequestContext, parsed: ParsedSlo, path: str, send: Send) -> None:
        self._context = context
        self._parsed = parsed
        self._path = path
        self._send_to_client = send
        self._start: Message | None = None
        self._held: list[Message] = []
        self._is_flowing = False
        self._is_closed = False
        self._is_sse = False
        self._has_summary = False
        self._opening = asyncio.Lock()
        self._opener: asyncio.Task[None] | None = None
        self._is_anthropic = path == MESSAGES_PATH
        self._echo = parsed.service_tier is not None and path == "/v1/responses"
        self._may_continue = path == "/v1/responses" and context.program is not None
        self._is_told_relegated = False
        self.response_id = ""

    async def run(self, app: AsgiApp, scope: Scope, receive: Receive) -> None:
        """Let the application answer; what it raises becomes an answer too, as far as one can still be given."""
        self._context.on_verdict = self._on_verdict
        try:
            await app(scope, receive, self.send)
        except AdmissionRejected as error:
            await self._close_with(openai_errors.rejected(error.verdict))
        except RouterUnavailableError:
            await self._close_with(openai_errors.no_router())
        except Exception as error:
            if self._is_closed:
                raise  # vLLM has answered 500 and hands the exception on for the server to log.
            await self._close_with(self._why(error))
        finally:
            self._context.on_verdict = None
            if self._opener is not None:
                self._opener.cancel()

    def _why(self, error: Exception) -> ApiError:
        if self._context.rejection is not None:
            return openai_errors.rejected(self._context.rejection)
        if self._context.failure is not None:
            return openai_errors.failed(self._context.failure)
        log_unforeseen("request_failed", error, path=self._path)
        return openai_errors.internal_error()

    async def send(self, message: Message) -> None:
        """The application's `send`."""
        if self._is_flowing:
            await self._forward(message)
        elif self._is_closed:
            return
        elif message["type"] == "http.response.start":
            await self._hold_start(message)
        elif message["type"] == "http.response.body":
            await self._hold_body(message)
        else:
            await self._send_to_client(message)

    async def _hold_start(self, message: Message) -> None:
        self._start = message
        self._is_sse = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in message["headers"]
        )
        if self._is_sse and self._context.is_admitted:
            await self._open()

    async def _hold_body(self, message: Message) -> None:
        self._held.append(message)
        rejection = self._context.rejection
        if rejection is not None:
            await self._close_with(openai_errors.rejected(rejection))
        elif not message.get("more_body", False):
            await self._open_complete()
        elif not self._is_sse or self._context.is_admitted:
            await self._open()

    def _on_verdict(self) -> None:
        """Send the start of a stream as soon as it is admitted: the first token may be long in coming."""
        if self._is_sse and not self._is_flowing and self._opener is None and self._context.is_admitted:
            self._opener = asyncio.create_task(self._open())
            self._opener.add_done_callback(_retrieve)

    async def _open_complete(self) -> None:
        """Send a response that came before any verdict, or whole."""
        failure = self._context.failure
        streamed_status = _status_of(self._held[0].get("body", b"")) if self._is_sse else None
        status = streamed_status or (self._start["status"] if self._start is not None else 0)
        if failure is not None and status >= 500:
            await self._close_with(openai_errors.failed(failure))
            return
        if streamed_status is not None:
            await self._close_unstreamed(streamed_status)
            return
        if self._parsed.service_tier is not None and not self._is_sse and len(self._held) == 1:
            self._put_echo_into_whole_body(self._parsed.service_tier)
        await self._open()

    async def _open(self) -> None:
        """Send the start and what was held behind it. Both the application's send and a verdict may come here."""
        async with self._opening:
            if self._is_flowing or self._is_closed or self._start is None:
                return
            failure = self._context.failure if self._is_sse else None
            if failure is None:
                await self._begin_flowing(self._start)
                return
        # It ended with the message that admitted it, or before the others of its prompts were: a status can say so.
        # Whoever comes between sees the failure too, and begins nothing.
        await self._close_with(openai_errors.failed(failure))

    async def _begin_flowing(self, start: Message) -> None:
        start["headers"] = [*start["headers"], *self._response_headers()]
        # Of a call with targets of its own the headers say nothing of these.
        self._is_told_relegated = self._context.is_relegated and isinstance(self._context.slo, ProgramCall)
        await self._send_to_client(start)
        while self._held:
            await self._forward(self._held.pop(0))
        self._is_flowing = not self._is_closed

    async def _forward(self, message: Message) -> None:
        """The hot path: every token of every stream passes here."""
        if self._may_continue and not self.response_id:
            self._note_response(message.get("body", b""))
        if message.get("more_body", False):
            if self._is_sse:
                body = message["body"]
                if body.endswith(_DONE):
                    message["body"] = body[: -len(_DONE)] + self._summary() + _DONE
                elif self._echo or self._context.failure is not None:
                    message["body"] = self._rewritten(body)
                if self._context.is_relegated != self._is_told_relegated and self._context.program is not None:
                    self._is_told_relegated = self._context.is_relegated
                    message["body"] = self._news_of_target() + message["body"]
            await self._send_to_client(message)
            return
        self._is_flowing = False
        self._is_closed = True
        if self._is_sse:
            message["body"] = message.get("body", b"") + self._summary()
        await self._send_to_client(message)

    def _note_response(self, body: bytes) -> None:
        """OpenAI's name of the answer: a later call that continues it belongs to the same program."""
        found = _RESPONSE_ID.search(body)
        if found is not None:
            self.response_id = found.group(1).decode()

    def _news_of_target(self) -> bytes:
        """The event that tells a call of a program at once that its target is out of reach, or is no longer."""
        context = self._context
        event: dict[str, Any] = {
            "event": "relegated" if context.is_relegated else "reinstated", "class": slo_class(context.slo),
        }  # fmt: skip
        if isinstance(context.slo, ProgramCall):
            event["program"] = context.slo.program_id
        if not context.is_relegated:
            event |= applied_targets_ms(context.slo)
        return b": tempo " + json.dumps(event).encode() + b"\n\n"

    def _rewritten(self, body: bytes) -> bytes:
        failure = self._context.failure
        if failure is not None and body.startswith(_ANTHROPIC_ERROR_EVENT if self._is_anthropic else _ERROR_EVENT):
            return self._error_event(openai_errors.failed(failure))
        if self._echo and _SERVICE_TIER in body:
            return with_echo_in_event(body, str(self._parsed.service_tier))
        return body

    def _error_event(self, error: ApiError) -> bytes:
        if self._is_anthropic:
            return _ANTHROPIC_ERROR_EVENT + b"data: " + error.anthropic_body() + b"\n\n"
        return b"data: " + error.body() + b"\n\n"

    def _put_echo_into_whole_body(self, service_tier: str) -> None:
        """Replace `service_tier` where the response has such a field; OpenAI's shapes have it at the top."""
        body = self._held[0].get("body", b"")
        if self._start is None or self._start["status"] != 200 or _SERVICE_TIER not in body:
            return
        changed = with_echo(body, service_tier)
        if changed is not body:
            self._held[0]["body"] = changed
            self._start = with_length(self._start, len(changed))

    async def _close_with(self, error: ApiError) -> None:
        """Answer with an error: as a status if nothing was sent, else as the last event of the stream."""
        async with self._opening:
            if self._is_closed:
                return
            was_flowing, self._is_flowing, self._is_closed = self._is_flowing, False, True
            self._held.clear()
            if not was_flowing:
                await send_error(self._send_to_client, error, [*self._kept_headers(), *self._applied_headers()])
                return
            last = b""
            if self._is_sse:
                last = self._error_event(error) + self._summary() + (b"" if self._is_anthropic else _DONE)
            await self._send_to_client({"type": "http.response.body", "body": last, "more_body": False})

    async def _close_unstreamed(self, status: int) -> None:
        """Answer with the error that is all a stream holds as if none had been asked for."""
        async with self._opening:
            if self._is_flowing or self._is_closed:
                return
            self._is_closed = True
            body = self._held[0]["body"].removeprefix(b"data: ").strip()
            self._held.clear()
            await send_body(
                self._send_to_client, body, [JSON, *self._kept_headers(), *self._applied_headers()], status
            )  # fmt: skip

    def _kept_headers(self) -> list[tuple[bytes, bytes]]:
        """Of the response that is replaced, what a browser needs to be allowed to read the new one."""
        headers = self._start["headers"] if self._start is not None else ()
        return [(name, value) for name, value in headers if name.lower().startswith((b"access-control-", b"vary"))]

    def _applied_headers(self) -> list[tuple[bytes, bytes]]:
        context = self._context
        headers: list[tuple[str, str]] = [("class", slo_class(context.slo))]
        if context.tier:
            headers.append(("tier", context.tier))
        headers += [(name.replace("_", "-"), _milliseconds(ms)) for name, ms in applied_targets_ms(context.slo).items()]
        ticket = context.program
        if ticket is not None:
            headers += [("program", ticket.program_id), ("call", ticket.call_id), ("stage", str(ticket.stage))]
            if context.is_of_late_program:
                headers.append(("program-relegated", "true"))
        return [(f"x-tempo-{name}".encode(), value.encode()) for name, value in headers]

    def _response_headers(self) -> list[tuple[bytes, bytes]]:
        context = self._context
        headers: list[tuple[str, str]] = []
        if context.is_admitted:
            probability = min(verdict.success_probability for verdict in context.verdicts)
            wait_s = max(verdict.expected_wait_s for verdict in context.verdicts)
            headers.append(("success-probability", f"{probability:.3f}"))
            headers.append(("expected-wait-ms", _milliseconds(wait_s * 1000)))
        if not self._is_sse and context.outcomes:
            headers += self._outcome_headers()
        applied = self._applied_headers()
        return [*applied, *((f"x-tempo-{name}".encode(), value.encode()) for name, value in headers)]

    def _outcome_headers(self) -> list[tuple[str, str]]:
        ended = _ended(self._context)
        headers = [
            ("slo-met", None if ended["is_met"] is None else str(ended["is_met"]).lower()),
            ("ttft-ms-measured", None if ended["ttft_ms"] is None else _milliseconds(ended["ttft_ms"])),
            ("ttlt-ms-measured", None if ended["ttlt_ms"] is None else _milliseconds(ended["ttlt_ms"])),
            ("output-tokens", str(ended["output_tokens"])),
            ("late-tokens", str(ended["late_tokens"])),
            ("relegated", "true" if ended["relegated"] else None),
        ]
        return [(name, value) for name, value in headers if value is not None]

    def _summary(self) -> bytes:
        """The comment that ends a stream, once; nothing for a stream that never reached the router."""
        if self._has_summary or not self._context.verdicts:
            return b""
        self._has_summary = True
        context = self._context
        summary = {"class": slo_class(context.slo), "tier": context.tier, **_ended(context)}
        return b": tempo " + json.dumps(summary).encode() + b"\n\n"


def _status_of(event: bytes) -> int | None:
    """Of an error event of vLLM's, the status that the error has where no stream was asked for."""
    if not event.startswith(_ERROR_EVENT):
        return None
    try:
        code = json.loads(event.removeprefix(b"data: "))["error"]["code"]
    except (ValueError, TypeError, KeyError):
        return None
    return code if isinstance(code, int) and 400 <= code <= 599 else None


def _retrieve(opener: asyncio.Task[None]) -> None:
    """A send that failed because the client left fails again in the application's next send, which handles it."""
    if not opener.cancelled():
        opener.exception()


def _ended(context: RequestContext) -> dict[str, Any]:
    """How the engine requests of one HTTP request ended, taken together: the worst of each, tokens summed."""
    outcomes = context.outcomes
    met = [outcome.is_met for outcome in outcomes if outcome.is_met is not None]
    ttft_s = [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]
    ttlt_s = [outcome.ttlt_s for outcome in outcomes if outcome.ttlt_s is not None]
    return {
        "is_met": False if context.failure is not None else all(met) if met else None,
        "ttft_ms": round(max(ttft_s) * 1000, 1) if ttft_s else None,
        "ttlt_ms": round(max(ttlt_s) * 1000, 1) if ttlt_s else None,
        "output_tokens": sum(outcome.output_tokens for outcome in outcomes),
        "late_tokens": sum(outcome.late_tokens for outcome in outcomes),
        "relegated": context.is_relegated,
    }


def _milliseconds(value_ms: float) -> str:
    """Without an exponent and without digits that mean nothing."""
    return f"{value_ms:.3f}".rstrip("0").rstrip(".")
