"""Declared graphs over HTTP, from the request to the desk: refused, cut short, left by clients, asked for twice."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from cluster import program_desk
from cluster import wire_pb2 as wire
from deployments.handle_api import NewProgram
from deployments.ingress import IngressReplica
from tempo_router.config import TempoConfig
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.program_ops import CancelProgram, DeliverOutput
from tests.fleet import eventually
from tests.http_edge import Vllm
from tests.program_edge import PROGRAMS, Desk, answer, error_of, served_by


@pytest.fixture
async def served() -> AsyncIterator[tuple[httpx.AsyncClient, Desk]]:
    async with served_by(Vllm(answer), TempoConfig()) as (http, desk):
        yield http, desk


# ---- declared graphs that make no sense ----


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize(
    ("nodes", "field", "said"),
    [
        ([{"id": "a", "prompt": "{{b}}"}, {"id": "b", "prompt": "{{a}}"}], "graph.nodes[0].after", "for itself"),
        ([{"id": "a", "prompt": "A", "after": ["a"]}], "graph.nodes[0].after", "for itself"),
        ([{"id": str(one), "prompt": "A"} for one in range(10_000)], "graph.nodes", "10000 nodes"),
        ([{"id": "a", "prompt": "A", "after": ["b"]}], "graph.nodes[0].after", "no node 'b'"),
        ([{"id": "a", "prompt": "{{b}}"}], "graph.nodes[0].prompt", "names 'b'"),
    ],
    ids=["a cycle", "itself", "10,000 nodes", "an unknown parent", "an unknown reference"],
)
async def test_a_graph_that_is_refused_leaves_no_program_behind(served, nodes, field, said, is_streaming) -> None:
    http, desk = served
    fields = {"name": "graph", "deadline_s": 60, "stream": is_streaming, "graph": {"nodes": nodes}}
    refused = await http.post(PROGRAMS, json=fields)
    assert error_of(refused) == (400, "invalid_program", field)
    assert said in refused.json()["error"]["message"]
    assert (await http.get(f"{PROGRAMS}/graph")).status_code == 404
    assert (await http.get(PROGRAMS)).json()["data"] == []
    assert len(desk.desk.book) == 0


# ---- declared graphs that cannot go on ----


def events_in(answer: httpx.Response) -> list[dict[str, Any]]:
    """All of a stream that has ended as it should."""
    assert answer.status_code == 200
    *events, done = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


MODEL, TOOL = {"id": "a", "prompt": "A"}, {"id": "a", "tool": "x"}


@pytest.mark.parametrize(
    ("away", "node", "told"),
    [
        (("FinishProgram",), MODEL, ["node.finished", "error"]),
        (("BeginCall",), TOOL, ["node.failed", "program.cancelled"]),
        (("BeginCall", "CancelProgram", "ViewProgram"), TOOL, ["node.failed", "error"]),
    ],
)
async def test_a_graph_whose_router_goes_away_says_so(
    served, monkeypatch, away: tuple[str, ...], node: dict[str, str], told: list[str]
) -> None:
    """Streamed, it is told by the last events; the status was sent long before."""
    http, desk = served
    ask = desk.ingress.ask

    async def unless_away(kind: str, body: bytes) -> bytes:
        if kind in away:
            raise RouterUnavailableError("no router answered")
        return await ask(kind, body)

    monkeypatch.setattr(desk.ingress, "ask", unless_away)
    fields = {"deadline_s": 60, "stream": True, "graph": {"nodes": [node]}}
    events = events_in(await http.post(PROGRAMS, json=fields))
    assert [event["event"] for event in events] == ["program.created", *told]
    errors = [event["error"]["code"] for event in events if event["event"] in ("error", "node.failed")]
    assert set(errors) == {"router_unavailable"}


async def test_what_nobody_foresaw_ends_a_stream_of_a_graph_too(served, monkeypatch) -> None:
    http, desk = served
    ask = desk.ingress.ask

    async def broken(kind: str, body: bytes) -> bytes:
        if kind == "FinishProgram":
            raise OSError("with something secret")
        return await ask(kind, body)

    monkeypatch.setattr(desk.ingress, "ask", broken)
    fields = {"deadline_s": 60, "stream": True, "graph": {"nodes": [MODEL]}}
    events = events_in(await http.post(PROGRAMS, json=fields))
    assert (events[-1]["event"], events[-1]["error"]["code"]) == ("error", "internal_error")
    assert "secret" not in json.dumps(events)


@pytest.mark.parametrize("node", [MODEL, TOOL], ids=["a call", "a tool"])
@pytest.mark.parametrize("is_last", [False, True])
async def test_a_program_cancelled_between_the_nodes_of_its_graph_is_told_as_such(
    served, monkeypatch, node: dict[str, str], is_last: bool
) -> None:
    """Nothing of it runs, so the ingress hears of it when it begins the next node, or when it has ended the last."""
    http, desk = served
    tell = desk.ingress.tell

    def then_cancelled(kind: str, body: bytes) -> None:
        tell(kind, body)
        if kind == "EndCall":
            graph = next(iter(desk.desk.book.live))
            op = CancelProgram(graph.program_id, "", "somebody", "enough")
            desk.desk.asked("nobody", wire.ProgramOp(op_id="1", kind="CancelProgram", body=msgspec.json.encode(op)))

    monkeypatch.setattr(desk.ingress, "tell", then_cancelled)
    monkeypatch.setattr(desk.ingress.graphs, "program_over", lambda program_id: None)
    nodes = [{"id": "first", "prompt": "A"}, {**node, "after": ["first"]}]
    fields = {"deadline_s": 60, "graph": {"nodes": nodes[: 1 if is_last else 2]}}
    whole = await http.post(PROGRAMS, json=fields)
    assert error_of(whole) == (409, "program_cancelled", None)
    assert whole.json()["error"]["type"] == "server_error"
    assert "enough" in whole.json()["error"]["message"]
    events = events_in(await http.post(PROGRAMS, json={**fields, "stream": True}))
    told = ["program.created", "node.finished", *([] if is_last else ["node.failed"]), "program.cancelled"]
    assert [event["event"] for event in events] == told
    assert events[-1]["error"] == {**whole.json()["error"], "message": events[-1]["error"]["message"]}


async def test_an_output_that_is_posted_before_its_tool_is_known_to_have_begun_is_taken(served, monkeypatch) -> None:
    """The router knows of the call before its graph does, and shows it to whoever asks."""
    http, desk = served
    to_router = desk.ingress._send

    def then_posted(message: wire.IngressToRouter) -> None:
        to_router(message)
        if [op.kind for op in message.program_ops] == ["BeginCall"]:
            graph = next(iter(desk.desk.book.live))
            op = DeliverOutput(graph.program_id, "", "a", "null")
            desk.desk.asked("other", wire.ProgramOp(op_id="1", kind="DeliverOutput", body=msgspec.json.encode(op)))

    monkeypatch.setattr(desk.ingress, "_send", then_posted)
    fields = {"deadline_s": 60, "stream": True, "graph": {"nodes": [TOOL]}}
    async with asyncio.timeout(10):
        events = events_in(await http.post(PROGRAMS, json=fields))
    assert [event["event"] for event in events] == [
        "program.created",
        "tool.waiting",
        "node.finished",
        "program.finished",
    ]
    assert events[2]["output"] is None


async def ask_and_leave(http: Any, fields: dict[str, Any]) -> list[str]:
    """Ask for a program, read no event, and be gone when the body has been read. What was sent, by type."""
    messages = iter([{"type": "http.request", "body": json.dumps(fields).encode()}])
    sent = []

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message.get("more_body"):
            await asyncio.Event().wait()

    async with asyncio.timeout(10):
        await http._transport.app({"type": "http", "method": "POST", "path": PROGRAMS, "headers": []}, receive, send)
    return sent


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_client_that_leaves_while_its_graph_is_made_cancels_it(served, is_streaming: bool) -> None:
    http, desk = served
    await ask_and_leave(http, {"deadline_s": 60, "stream": is_streaming, "graph": {"nodes": [TOOL]}})
    (program,) = [*desk.desk.book.live, *desk.desk.book.ended]
    assert (program.status, program.reason) == ("cancelled", "its client left")


async def test_who_stops_reading_the_events_of_the_python_handle_cancels_the_graph_at_once(served) -> None:
    http, desk = served
    replica: Any = SimpleNamespace(_edge=http._transport.app)
    events: Any = IngressReplica.run_program(replica, NewProgram(deadline_s=60, graph={"nodes": [TOOL]}))
    assert (await anext(events))["event"] == "program.created"
    (graph,) = desk.desk.book.live
    await events.aclose()
    assert (graph.status, graph.reason) == ("cancelled", "its client left")


async def test_a_graph_that_ends_early_while_its_client_waits_does_not_say_that_it_left(served) -> None:
    http, desk = served
    waiting = asyncio.create_task(http.post(PROGRAMS, json={"deadline_s": 60, "graph": {"nodes": [TOOL]}}))
    await eventually(lambda: any(graph.running for graph in desk.desk.book.live), "its tool waits")
    (graph,) = desk.desk.book.live
    desk.ingress.graphs.program_over(graph.program_id)
    refused = await waiting
    assert error_of(refused) == (409, "program_cancelled", None)
    assert (graph.status, graph.reason) == ("cancelled", "its graph could not go on")


@pytest.mark.parametrize("error", [ProgramError("unknown_program", "forgotten"), RouterUnavailableError("away")])
async def test_a_graph_that_cannot_be_cancelled_does_not_answer_who_has_left(served, monkeypatch, error) -> None:
    """An error after the start of a stream would be a second start."""
    http, desk = served
    ask = desk.ingress.ask

    async def refused(kind: str, body: bytes) -> bytes:
        if kind == "CancelProgram":
            raise error
        return await ask(kind, body)

    monkeypatch.setattr(desk.ingress, "ask", refused)
    sent = await ask_and_leave(http, {"deadline_s": 60, "stream": True, "graph": {"nodes": [TOOL]}})
    assert sent.count("http.response.start") == 1


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_graph_that_is_asked_for_twice_at_once_runs_once(served, is_streaming: bool) -> None:
    http, _ = served
    fields = {"name": "p", "deadline_s": 60, "stream": is_streaming, "graph": {"nodes": [MODEL]}}
    first, second = await asyncio.gather(*(http.post(PROGRAMS, json=fields) for _ in range(2)))
    assert first.status_code == 200
    assert error_of(second) == (400, "invalid_program", "graph")


async def test_a_graph_that_comes_before_a_cancelled_one_of_its_name_has_ended_leaves_no_program_behind(
    served, monkeypatch
) -> None:
    http, desk = served
    ask, may_begin = desk.ingress.ask, asyncio.Event()

    async def held_up(kind: str, body: bytes) -> bytes:
        if kind == "BeginCall":
            await may_begin.wait()
        return await ask(kind, body)

    monkeypatch.setattr(desk.ingress, "ask", held_up)
    fields = {"name": "p", "deadline_s": 60, "graph": {"nodes": [TOOL]}}
    first = asyncio.create_task(http.post(PROGRAMS, json=fields))
    await eventually(lambda: len(desk.desk.book) == 1, "it is made")
    assert (await http.post(f"{PROGRAMS}/p/cancel")).status_code == 200
    again = await http.post(PROGRAMS, json=fields)
    assert error_of(again) == (400, "invalid_program", "graph")
    assert "has not ended here yet: try again" in again.json()["error"]["message"]
    assert not list(desk.desk.book.live)
    may_begin.set()
    assert error_of(await first) == (409, "program_cancelled", None)
    last = await http.post(PROGRAMS, json={**fields, "graph": {"nodes": [MODEL]}})
    assert (last.status_code, last.json()["outputs"]) == (200, {"a": "yes"})


@pytest.mark.parametrize("lost", ["the question", "the answer"])
async def test_a_named_graph_that_was_answered_503_runs_when_it_is_asked_for_again(
    served, monkeypatch, lost: str
) -> None:
    """The first one is cancelled before, whether it had been made or is made when a router is back."""
    http, desk = served
    to_router, kept = desk.ingress._send, []

    def send(message: wire.IngressToRouter) -> None:
        kept.append(message)
        if lost == "the answer":
            to_router(message)

    monkeypatch.setattr(desk.ingress, "_send", send)
    monkeypatch.setattr(desk.ingress, "router_said", lambda message: None)
    monkeypatch.setattr(desk.ingress, "_wait_s", 0.01)
    fields = {"name": "p", "deadline_s": 60, "graph": {"nodes": [MODEL]}}
    assert error_of(await http.post(PROGRAMS, json=fields)) == (503, "router_unavailable", None)
    monkeypatch.undo()
    desk.ingress.repeat()
    assert [op.kind for message in kept for op in message.program_ops] == ["CreateProgram", "CancelGraph"]
    (unrun,) = desk.desk.book.ended
    assert (unrun.status, unrun.reason) == ("cancelled", "its graph was never run: nobody waited when it was made")
    again = await http.post(PROGRAMS, json=fields)
    assert (again.status_code, again.json()["status"], again.json()["outputs"]) == (200, "finished", {"a": "yes"})
    desk.ingress.repeat()
    assert [one.status for one in (*desk.desk.book.live, *desk.desk.book.ended)] == ["finished"]


@pytest.mark.parametrize("is_router_older", [False, True])
async def test_a_graph_that_was_answered_503_does_not_cancel_another_of_its_name(
    served, monkeypatch, is_router_older: bool
) -> None:
    """It was refused by the router that it did not hear, which may know nothing of cancelling one graph alone."""
    http, desk = served
    if is_router_older:
        monkeypatch.delitem(program_desk._decoders, "CancelGraph")
    other = {"name": "p", "deadline_s": 60, "app": "other", "graph": {"nodes": [TOOL]}}
    running = asyncio.create_task(http.post(PROGRAMS, json=other))
    await eventually(lambda: any(graph.running for graph in desk.desk.book.live), "its tool waits")
    mistaken = {"name": "p", "deadline_s": 60, "graph": {"nodes": [MODEL]}}
    with monkeypatch.context() as deaf:
        deaf.setattr(desk.ingress, "router_said", lambda message: None)
        deaf.setattr(desk.ingress, "_wait_s", 0.01)
        assert (await http.post(PROGRAMS, json=mistaken)).status_code == 503
    desk.ingress.repeat()
    (graph,) = desk.desk.book.live
    assert (graph.status, graph.app) == ("running", "other")
    assert (await http.post(f"{PROGRAMS}/p/nodes/a/output", json={"output": 1})).status_code == 200
    assert (await running).json()["status"] == "finished"
