"""What tests of the live replay share: a small trace, and a server that answers as vLLM's does, over real HTTP."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn

from deployments.http_edge import HttpEdge
from deployments.program_client import ProgramClient
from deployments.request_context import AdmissionVerdict, RequestContext, current_request
from tempo_router.config import TempoConfig
from tempo_router.metrics import Outcome
from tempo_router.program_book import ProgramBook
from tempo_router.program_graph import ProgramGraph
from tempo_router.program_ops import BeginCall, CancelProgram, EndCall, FinishProgram
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.trace import Trace, TraceCall, Unit

RESEARCH = Unit(
    "research/1",
    0.0,
    Deadline(60.0),
    (
        TraceCall("plan", 8, 3),
        TraceCall("search-a", 100, 2, stage=1, parents=(0,), prefix_id="notes", prefix_tokens=64),
        TraceCall("search-b", 5, 4, stage=1, parents=(0,)),
        TraceCall("report", 120, 5, stage=2, parents=(1, 2), prefix_id="notes", prefix_tokens=64),
    ),
    app="research",
    tenant="ann",
    is_program=True,
)
CHAT = Unit("chat", 0.0, Latency(30.0, 10.0), (TraceCall("hello", 9, 6),), app="chat", tenant="bob")
MAIL = Unit("mail", 0.0, Deadline(40.0), (TraceCall("sort", 7, 2),), tenant="ann")
IDLE = Unit("idle", 0.0, BestEffort(), (TraceCall("night", 6, 2),))
ALL = Trace("all", (RESEARCH, CHAT, MAIL, IDLE))


def is_as_in_trace(graph: ProgramGraph, unit: Unit) -> None:
    """Assert that the service knows of a program what the trace says of it, and that it has ended well."""
    assert [(call.stage, call.output_tokens, call.status) for call in graph.calls.values()] == [
        (call.stage, call.output_tokens, "completed") for call in by_name(graph, unit)
    ]
    names = list(graph.calls)
    order = [unit.calls.index(call) for call in by_name(graph, unit)]
    for name, call in zip(names, by_name(graph, unit), strict=True):
        assert set(graph.calls[name].parents) == {names[order.index(parent)] for parent in call.parents}
    assert (graph.tenant, graph.app, graph.status) == (unit.tenant, unit.app, "finished")


def by_name(graph: ProgramGraph, unit: Unit) -> list[TraceCall]:
    """The trace's calls in the order in which the service heard of them."""
    return [unit.calls[int(name.removeprefix("call-"))] for name in graph.calls]


_OPS: dict[str, Any] = {kind.__name__: kind for kind in (BeginCall, FinishProgram, CancelProgram)}


class BookLink:
    """A router's programs, without the router: what an edge asks is carried out at once."""

    ingress_id = "ingress"
    graphs: Any = None

    def __init__(self) -> None:
        self.book = ProgramBook()

    async def ask(self, kind: str, body: bytes) -> bytes:
        op = msgspec.json.decode(body, type=_OPS[kind])
        graph, _ = self.book.apply(op, time.time())
        assert graph is not None
        if isinstance(op, BeginCall):
            return msgspec.json.encode(self.book.ticket(graph, graph.calls[op.call.call_id], time.time()))
        return b"{}"

    def tell(self, kind: str, body: bytes) -> None:
        assert kind == "EndCall"
        self.book.apply(msgspec.json.decode(body, type=EndCall), time.time())


@dataclass
class Received:
    """One request as it reached the server. context: what the edge before it made of it, None without one."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    context: RequestContext | None


@dataclass
class FakeVllm:
    """Answers each completion with as many tokens as it asks for; nothing to those of which `stays_silent` is true."""

    stays_silent: Callable[[Received], bool] = lambda _: False
    refuses: Callable[[Received], bool] = lambda _: False
    received: list[Received] = field(default_factory=list)
    left: int = 0
    has_received: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body", False):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        one = Received(scope["path"], headers, json.loads(body), current_request())
        self.received.append(one)
        self.has_received.set()
        if self.stays_silent(one):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left += 1
            return
        if one.context is not None:
            is_admitted = not self.refuses(one)
            reason = None if is_admitted else "queue_full"
            one.context.report_verdict(AdmissionVerdict(is_admitted, reject_reason=reason))
            one.context.report_outcome(Outcome("deadline", 0.1, 0.4, one.body["max_tokens"], 0, 0, 0.1, is_met=True))
        await (self._stream if one.body["stream"] else self._whole)(one.body["max_tokens"], send)

    async def _stream(self, tokens: int, send: Any) -> None:
        await _start(send, b"text/event-stream")
        for token in range(tokens):
            event = {"choices": [{"token_ids": [token]}]}
            await _body(send, f"data: {json.dumps(event)}\n\n".encode(), is_last=False)
        await _body(send, b"data: [DONE]\n\n", is_last=True)

    async def _whole(self, tokens: int, send: Any) -> None:
        await _start(send, b"application/json")
        await _body(send, json.dumps({"usage": {"completion_tokens": tokens}}).encode(), is_last=True)


async def _start(send: Any, kind: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})


async def _body(send: Any, body: bytes, *, is_last: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def edge_before(vllm: FakeVllm, link: BookLink) -> HttpEdge:
    """Our HTTP edge, as an ingress has it."""
    return HttpEdge(vllm, TempoConfig(), not_ready_because=lambda: None, programs=ProgramClient(link))


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """Serve an ASGI application on a free port until the block ends. Yields its URL."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        serving = asyncio.create_task(server.serve(sockets=[own]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.001)
        try:
            yield f"http://127.0.0.1:{own.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
