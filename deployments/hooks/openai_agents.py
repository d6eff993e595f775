"""OpenAI Agents SDK: a trace is a program, an agent its step, without a change to the agents.

    calls = ProgramCalls("http://127.0.0.1:8000/v1", deadline_s=60)
    client = AsyncOpenAI(base_url=..., api_key=..., http_client=calls.http_client())
    set_default_openai_client(client, use_for_tracing=False)
    set_trace_processors([calls])            # or add_trace_processor, to keep OpenAI's own

The SDK's traces stay on the client. While a request is sent its trace and span are current, so the client's hook reads
them; as a trace processor this also says when a task is over, which closes the program.
"""

import threading
from collections.abc import Mapping
from typing import Any

import httpx
from agents.tracing import AgentSpanData, Span, Trace, TracingProcessor, get_current_span, get_current_trace

from deployments.hooks import headers
from deployments.hooks.ending import Endings


class ProgramCalls(TracingProcessor):
    """base_url: of the server, with `/v1`. deadline_s: for a whole trace; None: no deadline. extra: more headers."""

    def __init__(
        self, base_url: str, *, deadline_s: float | None = None, app: str = "", extra: Mapping[str, str] | None = None
    ) -> None:
        self._endings = Endings(base_url, extra or {})
        self._deadline_s = deadline_s
        self._app = app
        self._extra = dict(extra or {})
        self._agents: dict[str, str] = {}
        self._called: set[str] = set()
        self._lock = threading.Lock()

    def http_client(self, **options: Any) -> httpx.AsyncClient:
        """For `AsyncOpenAI(http_client=...)`."""
        return headers.async_http_client(self._sent, **options)

    def on_trace_start(self, trace: Trace) -> None:
        """A task begins; its program begins with its first call."""

    def on_trace_end(self, trace: Trace) -> None:
        """The task is over: no further call will come."""
        with self._lock:
            was_called = trace.trace_id in self._called
            self._called.discard(trace.trace_id)
        if was_called:
            self._endings.finish(headers.clean(trace.trace_id))

    def on_span_start(self, span: Span[Any]) -> None:
        """Remember which agent a span belongs to."""
        name = span.span_data.name if isinstance(span.span_data, AgentSpanData) else None
        with self._lock:
            self._agents[span.span_id] = name or self._agents.get(span.parent_id or "", "")

    def on_span_end(self, span: Span[Any]) -> None:
        """Forget it."""
        with self._lock:
            self._agents.pop(span.span_id, None)

    def shutdown(self) -> None:
        """Wait until the ends of all tasks are told."""
        self._endings.close()

    def force_flush(self) -> None:
        """Nothing waits here."""

    def _sent(self) -> Mapping[str, str]:
        trace, span = get_current_trace(), get_current_span()
        if trace is None:
            return self._extra
        with self._lock:
            self._called.add(trace.trace_id)
            agent = self._agents.get(span.span_id, "") if span is not None else ""
        return {
            **self._extra,
            "x-tempo-program": headers.clean(trace.trace_id),
            "x-tempo-stage": headers.clean(agent),
            "x-tempo-app": self._app or headers.clean(trace.name),
            "x-tempo-deadline-s": "" if self._deadline_s is None else str(self._deadline_s),
        }
