"""The HTTP edge around an application that answers as vLLM's does: what is held, refused, added."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from deployments.http_edge import HttpEdge
from deployments.program_client import ProgramClient
from deployments.request_context import (
    AdmissionRejected,
    AdmissionVerdict,
    RequestFailure,
    current_request,
)
from tempo_router.config import TempoConfig
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.program_ops import CallTicket
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, ProgramId
from tests.http_edge import (
    ADMITTED,
    CHAT,
    MET,
    Vllm,
    answer_whole,
    context,
    edge,
    post,
    scope_of,
    whole,
)


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
        ("program_cancelled", None, 409, None),
        ("expired", None, 504, None),
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


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1], [2], [3]], 3), ([], 1), (None, 1)],
)
async def test_prompts_are_counted(prompt, prompts):
    app, vllm = edge()
    await post(app, {"prompt": prompt}, path="/v1/completions")
    assert vllm.contexts[0] is not None
    assert vllm.contexts[0].expected_groups == prompts


@pytest.mark.parametrize(("code", "status", "retry_after"), [("slo_expired", 504, None), ("worker_lost", 503, "1")])
async def test_a_failure_of_a_whole_answer_gets_its_own_status(code, status, retry_after):
    async def answer(vllm, scope, receive, send):
        context().report_verdict(ADMITTED)
        context().report_failure(RequestFailure(code, "it is over", status))
        await whole(send, {"error": {}}, status=500)

    response = await post(edge(answer)[0], {})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("retry-after") == retry_after


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


async def test_service_tier_is_echoed_where_the_response_has_it():
    app, _ = edge()
    response = await post(app, {"service_tier": "priority"})
    assert response.json() == {"id": "1", "service_tier": "priority", "nested": {"service_tier": None}}
    assert response.headers["x-tempo-tier"] == "interactive"
    assert (await post(app, {})).json()["service_tier"] is None


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
        assert (await http.post(CHAT, json={}, headers={"x-session-id": "s"})).status_code == 200
