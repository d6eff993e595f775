"""Streams through the HTTP edge: when they start, how they end, and who leaves before."""

import asyncio
import json
from typing import Any

import pytest

from deployments.request_context import PROGRAM_CANCELLED, RequestFailure
from tempo_router.program_ops import CallTicket
from tempo_router.request import Latency, ProgramCall, ProgramId
from tests.http_edge import (
    ADMITTED,
    MET,
    MISSED,
    QUEUE_FULL,
    answer_refused_stream,
    answer_stream,
    context,
    edge,
    ignore,
    post,
    scope_of,
    stream,
    turns,
)


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


@pytest.mark.parametrize("answer", [answer_refused_stream])
async def test_a_refused_stream_never_starts_with_200(answer):
    app, _ = edge(answer)
    response = await post(app, {"stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == "queue_full"
    assert int(response.headers["content-length"]) == len(response.content)


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


@pytest.mark.parametrize(("code", "status"), [(400, 400), (500, 500), (None, 200), ("x", 200), (200, 200), (True, 200)])
async def test_a_stream_that_is_but_an_error_has_its_status(code, status):
    """vLLM looks at the prompts of a completion after it has begun the stream."""
    error = {"error": {"message": "no such token", "code": code}}

    async def answer(vllm, scope, receive, send):
        async def chunks():
            yield b"data: " + json.dumps(error).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        await stream(send, chunks())

    response = await post(edge(answer)[0], {"stream": True, "prompt": [1000000]}, path="/v1/completions")
    assert response.status_code == status
    if status == 200:
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert (response.headers["content-type"], response.json()) == ("application/json", error)
        assert response.headers["x-tempo-class"] == "latency"


async def test_a_failure_before_a_stream_began_has_its_own_status():
    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)  # of one prompt; the other never got that far
            context().report_failure(RequestFailure("worker_lost", "the worker was lost", 503))
            yield b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
            yield b"data: [DONE]\n\n"

        await stream(send, chunks())

    response = await post(edge(answer)[0], {"stream": True, "prompt": ["a", "b"]}, path="/v1/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")


@pytest.mark.parametrize("is_started_before", [True, False])
async def test_a_stream_that_is_cancelled_with_the_message_that_admits_it_has_its_own_status(is_started_before: bool):
    """The engine client hears of the end first: the verdict only wakes who waits for it."""

    async def answer(vllm, scope, receive, send):
        def both():
            context().report_failure(PROGRAM_CANCELLED)
            context().report_verdict(ADMITTED)

        async def chunks():
            if is_started_before:
                both()
                await turns()
            yield b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
            yield b"data: [DONE]\n\n"

        if not is_started_before:
            both()
        await stream(send, chunks())

    response = await post(edge(answer)[0], {"stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "program_cancelled")


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


async def test_a_failure_that_comes_while_the_start_of_a_stream_is_being_sent_is_told_once():
    """A client that reads slowly holds the start up; what vLLM says meanwhile goes out behind it."""
    may_go_on = asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.start":
            await may_go_on.wait()

    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            await turns()
            context().report_failure(RequestFailure("worker_lost", "the worker was lost", 503))
            yield b'data: {"error": {"message": "Internal server error"}}\n\n'
            yield b"data: [DONE]\n\n"

        await stream(send, chunks())

    running = asyncio.create_task(edge(answer)[0](*scope_of({"stream": True}), send))
    await turns()
    assert [message["type"] for message in sent] == ["http.response.start"]
    may_go_on.set()
    await asyncio.wait_for(running, 5)
    events = b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")
    assert [json.loads(one[6:])["error"]["code"] for one in events if "error" in one] == ["worker_lost"]
    assert events[-2] == "data: [DONE]"
    assert [message.get("more_body") for message in sent].count(False) == 1


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


async def test_an_exception_in_a_running_stream_of_anthropics_ends_it_in_its_words():
    async def answer(vllm, scope, receive, send):
        async def chunks():
            context().report_verdict(ADMITTED)
            yield b'event: message_start\ndata: {"a": 1}\n\n'
            raise RuntimeError("boom")

        await stream(send, chunks())

    events = (await post(edge(answer)[0], {"stream": True}, path="/v1/messages")).text.split("\n\n")
    name, said = events[1].split("\n")
    assert name == "event: error"
    error = json.loads(said.removeprefix("data: "))
    assert error == {"type": "error", "error": {"type": "api_error", "message": "internal server error"}}
    assert events[2].startswith(": tempo ")
    assert events[3:] == [""]


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


@pytest.mark.parametrize("stream_value", [True, 1, "true", "on"])
async def test_a_stream_is_what_vllm_takes_for_one(stream_value):
    app, vllm = edge()
    await post(app, {"stream": stream_value, "slo": {"ttft_ms": 300}})
    assert vllm.contexts[0] is not None
    assert vllm.contexts[0].slo == Latency(0.3, 0.1)
