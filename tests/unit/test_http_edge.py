"""The HTTP edge around a small ASGI application that answers as vLLM's does: what is held, refused, added."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from deployments.http_edge import HttpEdge
from deployments.program_client import ProgramClient
from deployments.request_context import (
    AdmissionRejected,
    AdmissionVerdict,
    RequestContext,
    RequestFailure,
    current_request,
)
from tempo_router.config import IngressConfig, TempoConfig
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.metrics import Outcome
from tempo_router.program_ops import CallTicket
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, ProgramId

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


async def test_a_whole_answer_carries_what_was_applied_and_how_it_ended():
    app, _ = edge()
    response = await post(app, {"slo": {"ttlt_ms": 1500}})
    found = {name: value for name, value in response.headers.items() if name.startswith("x-tempo-")}
    assert found == {
        "x-tempo-class": "deadline",
        "x-tempo-ttlt-ms": "1500",
        "x-tempo-success-probability": "0.900",
        "x-tempo-expected-wait-ms": "250",
        "x-tempo-slo-met": "true",
        "x-tempo-ttft-ms-measured": "100",
        "x-tempo-ttlt-ms-measured": "400",
        "x-tempo-output-tokens": "4",
        "x-tempo-late-tokens": "0",
    }


async def test_vllm_gets_the_body_without_our_fields_and_everything_else_as_it_was():
    app, vllm = edge()
    await post(app, b'{"slo": {"tier": "tool"}, "x": 1.50, "service_tier": "tool", "messages": [ 1,2 ]}')
    assert vllm.bodies == [b'{"x":1.50,"messages":[ 1,2 ]}']
    await post(app, b'{"x" : 1.50}')
    assert vllm.bodies[1] == b'{"x" : 1.50}'


async def test_the_context_holds_the_slo_while_the_application_runs_and_is_gone_after():
    app, vllm = edge()
    await post(app, {"slo": {"tier": "tool"}, "user": "me"}, headers={"x-tempo-app": "agent"})
    found = vllm.contexts[0]
    assert found is not None
    assert (found.slo, found.tier, found.app, found.tenant) == (Deadline(20), "tool", "agent", "me")
    assert not found.is_streaming
    assert current_request() is None


async def test_a_stream_ends_with_a_comment_before_done_and_is_otherwise_untouched():
    app, _ = edge(answer_stream)
    response = await post(app, {"stream": True})
    assert response.headers["x-tempo-tier"] == "chat"
    assert (response.headers["x-tempo-ttft-ms"], response.headers["x-tempo-tbt-ms"]) == ("2000", "100")
    assert "x-tempo-slo-met" not in response.headers
    events = response.text.split("\n\n")
    assert events[:2] == ['data: {"a": 1}', 'data: {"b": 2}']
    assert events[3:] == ["data: [DONE]", ""]
    assert json.loads(events[2].removeprefix(": tempo ")) == {
        "class": "latency",
        "tier": "chat",
        "is_met": True,
        "ttft_ms": 100.0,
        "ttlt_ms": 400.0,
        "output_tokens": 4,
        "late_tokens": 0,
        "relegated": False,
    }


async def test_a_stream_without_done_gets_the_comment_at_its_end():
    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            context().report_relegated()
            for outcome in (MET, MISSED):
                context().report_outcome(outcome)
            yield b"event: message_stop\ndata: {}\n\n"

        await stream(send, chunks())

    app, _ = edge(answer)
    response = await post(app, {"stream": True}, path="/v1/messages")
    assert response.text.startswith("event: message_stop\ndata: {}\n\n: tempo {")
    ended = json.loads(response.text.split(": tempo ")[1])
    assert (ended["is_met"], ended["relegated"], ended["output_tokens"], ended["ttlt_ms"]) == (False, True, 7, 900.0)


async def test_a_stream_of_a_program_tells_when_its_target_is_out_of_reach_and_when_it_is_back():
    moved = ProgramCall(ProgramId("p"), 90.0)

    async def answer(vllm, scope, receive, send):
        async def chunks():
            found = context()
            found.program = CallTicket("p", "c", 0, 1, "", 60.0)
            found.slo = ProgramCall(ProgramId("p"), 60.0)
            found.report_verdict(ADMITTED)
            yield b'data: {"a": 1}\n\n'
            found.report_relegated()
            yield b'data: {"b": 2}\n\n'
            yield b'data: {"c": 3}\n\n'
            found.report_redated(moved)
            yield b'data: {"d": 4}\n\n'
            found.report_outcome(MET)
            yield b"data: [DONE]\n\n"

        await stream(send, chunks())

    app, _ = edge(answer)
    events = (await post(app, {"stream": True})).text.split("\n\n")
    news = [json.loads(one.removeprefix(": tempo ")) for one in events if one.startswith(": tempo ")]
    assert [(one.get("event"), one.get("program")) for one in news] == [
        ("relegated", "p"), ("reinstated", "p"), (None, None)
    ]  # fmt: skip
    assert news[1]["ttlt_ms"] == 90_000
    assert (news[-1]["class"], news[-1]["relegated"]) == ("program", False)
    assert [one for one in events if one.startswith("data")][3] == 'data: {"d": 4}'


@pytest.mark.parametrize(
    ("slo", "is_told"), [(ProgramCall(ProgramId("p"), 90.0), False), (Latency(2.0, 0.1), True), (BestEffort(), True)]
)
async def test_the_header_about_its_program_is_true_whatever_a_call_asks_for(slo, is_told):
    """The program was relegated when the call began; its own deadline moved since, other targets are the call's own."""

    async def answer(vllm, scope, receive, send):
        found = context()
        found.program = CallTicket("p", "c", 0, 1, "", -1.0, is_relegated=True)
        found.slo, found.is_relegated = slo, False
        found.report_verdict(ADMITTED)
        found.report_outcome(MET)
        await whole(send, {})

    app, _ = edge(answer)
    headers = (await post(app, {})).headers
    assert ("x-tempo-program-relegated" in headers) is is_told


@pytest.mark.parametrize("answer", [answer_refused_stream])
async def test_a_refused_stream_never_starts_with_200(answer):
    app, _ = edge(answer)
    response = await post(app, {"stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == "queue_full"
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize(
    ("reason", "retry_after_s", "status", "retry_after"),
    [
        ("queue_full", 0.2, 429, "1"),
        ("queue_full", None, 429, "1"),
        ("deadline_impossible", 7.0, 503, "7"),
        ("deadline_impossible", None, 503, None),
        ("draining", None, 503, "5"),
        ("router_unavailable", 1.0, 503, "1"),
        ("too_large", None, 400, None),
        ("something\r\nnew", None, 503, "5"),
    ],
)
@pytest.mark.parametrize("is_raised", [True, False])
async def test_each_reason_of_refusal_has_its_status(reason, retry_after_s, status, retry_after, is_raised):
    verdict = AdmissionVerdict(is_admitted=False, reject_reason=reason, retry_after_s=retry_after_s)

    async def answer(vllm, scope, receive, send):
        context().report_verdict(verdict)
        if is_raised:
            raise AdmissionRejected(verdict)
        await whole(send, {"error": {}}, status=500, headers=[(b"access-control-allow-origin", b"*")])

    app, _ = edge(answer)
    response = await post(app, {})
    assert (response.status_code, response.headers.get("retry-after")) == (status, retry_after)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert ("access-control-allow-origin" in response.headers) is not is_raised


async def test_the_start_of_a_stream_is_sent_on_admission_before_any_token():
    """A client that waits long in the queue learns at once that it waits, and for how long."""
    admitted, go_on = asyncio.Event(), asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def answer(vllm, scope, receive, send):
        async def chunks():
            await admitted.wait()
            context().report_verdict(ADMITTED)
            await go_on.wait()
            yield b"data: [DONE]\n\n"

        await stream(send, chunks())

    started = asyncio.Event()

    async def send(message):
        sent.append(message)
        started.set()

    app, _ = edge(answer)
    running = asyncio.create_task(app(*scope_of({"stream": True}), send))
    await turns()
    assert not sent
    admitted.set()
    await asyncio.wait_for(started.wait(), 5)
    assert [message["type"] for message in sent] == ["http.response.start"]
    go_on.set()
    await asyncio.wait_for(running, 5)
    assert b"".join(message.get("body", b"") for message in sent).endswith(b"data: [DONE]\n\n")


async def test_a_stream_of_two_prompts_waits_for_both_verdicts():
    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            yield b'data: {"a": 1}\n\n'
            await turns()
            context().report_verdict(QUEUE_FULL)
            yield b'data: {"error": {}}\n\n'

        await stream(send, chunks())

    app, _ = edge(answer)
    response = await post(app, {"stream": True, "prompt": ["a", "b"]}, path="/v1/completions")
    assert response.status_code == 429


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1], [2], [3]], 3), ([], 1), (None, 1)],
)
async def test_prompts_are_counted(prompt, prompts):
    app, vllm = edge()
    await post(app, {"prompt": prompt}, path="/v1/completions")
    assert vllm.contexts[0] is not None
    assert vllm.contexts[0].expected_groups == prompts


async def test_a_failure_after_admission_is_named_in_a_stream_and_the_stream_ends_properly():
    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            yield b'data: {"a": 1}\n\n'
            context().report_failure(RequestFailure("worker_lost", "the worker was lost", 503))
            yield b'data: {"error": {"message": "Internal server error"}}\n\n'
            yield b"data: [DONE]\n\n"

        await stream(send, chunks())

    app, _ = edge(answer)
    events = (await post(app, {"stream": True})).text.split("\n\n")
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert json.loads(events[2].removeprefix(": tempo "))["is_met"] is False
    assert events[3] == "data: [DONE]"


async def test_a_failure_of_a_whole_answer_gets_its_own_status():
    async def answer(vllm, scope, receive, send):
        context().report_verdict(ADMITTED)
        context().report_failure(RequestFailure("slo_expired", "it waited too long", 504))
        await whole(send, {"error": {}}, status=500)

    response = await post(edge(answer)[0], {})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "slo_expired")


async def test_an_exception_in_a_running_stream_ends_it_with_an_error_event():
    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            yield b'data: {"a": 1}\n\n'
            raise RuntimeError("boom")

        await stream(send, chunks())

    events = (await post(edge(answer)[0], {"stream": True})).text.split("\n\n")
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert events[-2] == "data: [DONE]"


async def test_an_exception_before_any_answer_is_a_500_in_openais_shape():
    async def answer(vllm, scope, receive, send):
        raise RuntimeError("boom /etc/secret")

    response = await post(edge(answer)[0], {})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text


async def test_an_error_of_vllm_passes_as_it_is():
    async def answer(vllm, scope, receive, send):
        await whole(send, {"error": {"message": "too long", "code": 400}}, status=400)

    response = await post(edge(answer)[0], {"stream": True})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "too long")


@pytest.mark.parametrize(
    ("body", "headers", "param", "words"),
    [
        (b"{", {}, None, "not valid"),
        (b"", {}, None, "not valid"),
        (b"[1]", {}, None, "JSON object"),
        (b'"text"', {}, None, "JSON object"),
        (b'{"user": "\xff"}', {}, None, "not valid"),
        (b'{"text": "\xff"}', {}, None, "not valid"),
        (b"[" * 100_000, {}, None, "not valid"),
        (b'{"a":' * 100_000, {}, None, "not valid"),
        (b'{"stream": true, "slo": {"ttft_ms": NaN}}', {}, "slo.ttft_ms", "nan"),
        (b'{"slo": {"ttlt_ms": -Infinity}}', {}, "slo.ttlt_ms", "-inf"),
        (b'{"slo": {"ttlt_ms": 1e999}}', {}, "slo.ttlt_ms", "inf"),
        (b'{"slo": {"ttft_ms": 5}}', {}, "slo.ttft_ms", "streaming"),
        (b'{"service_tier": "gold"}', {}, "service_tier", "gold"),
        (b"{}", {"x-slo-ttlt-ms": "-1"}, "x-slo-ttlt-ms", "-1"),
        (b"{}", {"x-slo-tier": "a\x01b"}, "x-slo-tier", "no such tier"),
    ],
)
async def test_bad_input_is_refused_before_vllm_sees_it(body, headers, param, words):
    app, vllm = edge()
    response = await post(app, body, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]
    assert vllm.bodies == []


async def test_nan_outside_the_slo_is_left_to_vllm():
    app, vllm = edge()
    await post(app, b'{"temperature": NaN, "slo": {"ttlt_ms": 5}}')
    assert vllm.bodies == [b'{"temperature": NaN}']


async def test_nothing_of_a_client_gets_into_a_header():
    app, _ = edge()
    response = await post(app, {"slo": {"tier": "chat\r\nx-evil: 1"}, "user": "x"})
    assert response.status_code == 400
    assert "x-evil" not in response.headers
    assert all("evil" not in value for value in response.headers.values())


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_a_large_body_gets_413_whether_it_says_its_length_or_not(is_chunked, path):
    app, vllm = edge(max_body_bytes=1000)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 500

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post(path, content=chunks() if is_chunked else b"x" * 1500)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert "1000" in response.json()["error"]["message"]
    assert vllm.bodies == []
    assert app.open_requests == 0


async def test_a_body_far_beyond_the_limit_is_not_read_at_all():
    app, _ = edge(max_body_bytes=10)
    sent: list[dict[str, Any]] = []

    async def receive():
        raise AssertionError("read")

    async def send(message):
        sent.append(message)

    scope, _ = scope_of({})
    await app({**scope, "headers": [(b"content-length", b"1000")]}, receive, send)
    assert sent[0]["status"] == 413


async def test_more_requests_than_allowed_get_503():
    is_open, go_on = asyncio.Event(), asyncio.Event()

    async def answer(vllm, scope, receive, send):
        is_open.set()
        await go_on.wait()
        await whole(send, {})

    app, _ = edge(answer, max_open_requests=1)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        first = asyncio.create_task(client.post(CHAT, json={}))
        await asyncio.wait_for(is_open.wait(), 5)
        assert app.open_requests == 1
        second = await client.post(CHAT, json={})
        assert (second.status_code, second.headers["retry-after"]) == (503, "1")
        go_on.set()
        assert (await first).status_code == 200
    assert app.open_requests == 0


async def test_the_disconnect_of_a_client_reaches_the_application_and_the_count_returns_to_zero():
    async def answer(vllm, scope, receive, send):
        vllm.was_disconnected = (await receive())["type"] == "http.disconnect"

    app, vllm = edge(answer)
    scope, receive = scope_of({"stream": True})
    await app(scope, receive, ignore)
    assert vllm.was_disconnected
    assert app.open_requests == 0


async def test_a_cancelled_request_leaves_nothing_behind():
    entered = asyncio.Event()

    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            entered.set()
            await asyncio.Event().wait()
            yield b""

        await stream(send, chunks())

    app, _ = edge(answer)
    before = asyncio.all_tasks()
    running = asyncio.create_task(app(*scope_of({"stream": True}), ignore))
    await asyncio.wait_for(entered.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await turns()
    assert (app.open_requests, asyncio.all_tasks()) == (0, before)


async def test_a_client_that_leaves_while_sending_never_reaches_the_application():
    app, vllm = edge()
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    await app(scope_of({})[0], receive, ignore)
    assert (vllm.bodies, app.open_requests) == ([], 0)


async def test_service_tier_is_echoed_where_the_response_has_it():
    app, _ = edge()
    response = await post(app, {"service_tier": "priority"})
    assert response.json() == {"id": "1", "service_tier": "priority", "nested": {"service_tier": None}}
    assert response.headers["x-tempo-tier"] == "interactive"
    assert (await post(app, {})).json()["service_tier"] is None


async def test_service_tier_is_echoed_in_the_events_of_the_responses_api():
    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            yield b'event: response.created\ndata: {"response":{"service_tier":"auto","id":"r"},"n":1}\n\n'
            yield b'event: delta\ndata: {"delta":"\\"service_tier\\":"}\n\n'

        await stream(send, chunks())

    response = await post(edge(answer)[0], {"stream": True, "service_tier": "tool"}, path="/v1/responses")
    events = response.text.split("\n\n")
    assert events[0] == 'event: response.created\ndata: {"response":{"service_tier":"tool","id":"r"},"n":1}'
    assert events[1] == 'event: delta\ndata: {"delta":"\\"service_tier\\":"}'


async def test_other_paths_pass_untouched():
    async def answer(vllm, scope, receive, send):
        await whole(send, {"data": []})

    app, vllm = edge(answer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        models = await client.get("/v1/models")
        tokenize = await client.post("/tokenize", content=b"not json", headers={"x-slo-ttft-ms": "bad"})
    assert (models.status_code, tokenize.status_code, vllm.bodies) == (200, 200, [b"not json"])
    assert vllm.contexts == [None, None]
    assert not any(name.startswith("x-tempo") for name in models.headers)


@pytest.mark.parametrize(
    ("path", "ready", "alive", "status"),
    [
        ("/health", None, None, 200),
        ("/readiness", "no worker is attached", None, 503),
        ("/health/readiness", None, "a task died", 503),
        ("/liveness", "no worker is attached", None, 200),
        ("/health/liveliness", None, "a task died", 503),
    ],
)
async def test_health_says_what_is_missing(path, ready, alive, status):
    app = HttpEdge(Vllm(answer_whole), TempoConfig(), not_ready_because=lambda: ready, not_alive_because=lambda: alive)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.get(path)
    assert response.status_code == status
    if status == 503:
        assert response.json()["error"]["message"] == (alive or ready)


async def test_the_class_of_work_without_a_target_is_told_too():
    app, vllm = edge()
    response = await post(app, {"slo": {"tier": "background"}})
    assert (response.headers["x-tempo-class"], response.headers["x-tempo-tier"]) == ("best_effort", "background")
    assert vllm.contexts[0] is not None
    assert vllm.contexts[0].slo == BestEffort()


@pytest.mark.parametrize("stream_value", [True, 1, "true", "on"])
async def test_a_stream_is_what_vllm_takes_for_one(stream_value):
    app, vllm = edge()
    await post(app, {"stream": stream_value, "slo": {"ttft_ms": 300}})
    assert vllm.contexts[0] is not None
    assert vllm.contexts[0].slo == Latency(0.3, 0.1)


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


async def test_what_is_no_http_reaches_the_application():
    """The server's lifespan has neither path nor method."""
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    edge = HttpEdge(app, TempoConfig(), not_ready_because=lambda: None, programs=ProgramClient(NoRouter()))
    await edge({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]


class NoRouter:
    """Nobody answers."""

    ingress_id = "ingress"
    graphs: Any = None

    async def ask(self, kind: str, body: bytes) -> bytes:
        raise RouterUnavailableError("no router answered")

    def tell(self, kind: str, body: bytes) -> None:
        raise AssertionError("nothing began, so nothing ends")


async def test_without_a_router_a_call_of_a_program_is_refused_as_any_other():
    vllm = Vllm(answer_whole)
    edge = HttpEdge(vllm, TempoConfig(), not_ready_because=lambda: None, programs=ProgramClient(Silent()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://test") as http:
        for answer in (
            await http.post(CHAT, json={}, headers={"x-tempo-program": "p"}),
            await http.get("/v1/programs"),
            await http.get("/console/state"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "router_unavailable")
            assert answer.headers["retry-after"] == "5"
    assert vllm.bodies == []


class Silent(NoRouter):
    """Nobody answers; what was asked may still be carried out, so its end is told, too."""

    def tell(self, kind: str, body: bytes) -> None:
        assert kind == "EndCall"


class StoreAway(NoRouter):
    """Redis is away and too much waits for it."""

    async def ask(self, kind: str, body: bytes) -> bytes:
        raise ProgramError("store_unavailable", "programs cannot be stored at the moment")


async def test_a_new_program_that_cannot_be_stored_is_to_be_tried_again():
    vllm = Vllm(answer_whole)
    edge = HttpEdge(vllm, TempoConfig(), not_ready_because=lambda: None, programs=ProgramClient(StoreAway()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://test") as http:
        for answer in (
            await http.post("/v1/programs", json={"deadline_s": 60}),
            await http.post(CHAT, json={}, headers={"x-tempo-program": "p"}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"] == "1"
    assert vllm.bodies == []
