"""An application that answers as vLLM's does, and the HTTP edge around it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from deployments.http_edge import HttpEdge
from deployments.request_context import (
    AdmissionVerdict,
    RequestContext,
    current_request,
)
from tempo_router.config import IngressConfig, TempoConfig
from tempo_router.metrics import Outcome

CHAT = "/v1/chat/completions"
ADMITTED = AdmissionVerdict(is_admitted=True, expected_wait_s=0.25, success_probability=0.9)
QUEUE_FULL = AdmissionVerdict(is_admitted=False, reject_reason="queue_full", retry_after_s=2.3)
MET = Outcome("latency", 0.1, 0.4, 4, 4, 0, 0.1, is_met=True)
MISSED = Outcome("latency", 0.2, 0.9, 3, 1, 2, 0.5, is_met=False)

Answer = Callable[["Vllm", dict[str, Any], Any, Any], Awaitable[None]]


class Vllm:
    """Stands for vLLM's application: remembers what reached it and answers as the test says."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[Any] = []
        self.contexts: list[RequestContext | None] = []
        self.was_disconnected = False

    async def __call__(self, scope, receive, send):
        if scope["method"] == "POST":
            message = await receive()
            assert not message["more_body"]
            declared = dict(scope["headers"]).get(b"content-length")
            assert declared is None or int(declared) == len(message["body"])
            self.bodies.append(message["body"])
        self.contexts.append(current_request())
        await self.answer(self, scope, receive, send)


def context() -> RequestContext:
    found = current_request()
    assert found is not None
    return found


async def whole(send, fields: dict[str, Any], status: int = 200, headers=()) -> None:
    body = json.dumps(fields).encode()
    length = (b"content-length", str(len(body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), length, *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def stream(send, chunks: AsyncIterator[bytes]) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for chunk in chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def answer_whole(vllm, scope, receive, send) -> None:
    context().report_verdict(ADMITTED)
    context().report_outcome(MET)
    await whole(send, {"id": "1", "service_tier": None, "nested": {"service_tier": None}})


async def answer_stream(vllm, scope, receive, send) -> None:
    async def chunks():
        context().report_verdict(ADMITTED)
        yield b'data: {"a": 1}\n\n'
        context().report_outcome(MET)
        yield b'data: {"b": 2}\n\n'
        yield b"data: [DONE]\n\n"

    await stream(send, chunks())


async def answer_refused_stream(vllm, scope, receive, send) -> None:
    """As vLLM does: the stream has begun when the engine client raises, and the error becomes an event."""

    async def chunks():
        context().report_verdict(QUEUE_FULL)
        yield b'data: {"error": {}}\n\n'
        yield b"data: [DONE]\n\n"

    await stream(send, chunks())


def edge(answer: Answer = answer_whole, **ingress: Any) -> tuple[HttpEdge, Vllm]:
    vllm = Vllm(answer)
    config = TempoConfig(ingress=IngressConfig(**ingress))
    return HttpEdge(vllm, config, not_ready_because=lambda: None, epoch_s=lambda: 1_800_000_000.0), vllm


async def post(app: HttpEdge, fields: Any, path: str = CHAT, headers=None) -> httpx.Response:
    content = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post(path, content=content, headers=headers)
    assert app.open_requests == 0
    return response


def scope_of(fields: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Awaitable[dict[str, Any]]]]:
    messages = iter([{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}])

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"content-type", b"application/json")]}
    return scope, receive


async def ignore(message) -> None:
    pass


async def turns() -> None:
    """Let every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)
