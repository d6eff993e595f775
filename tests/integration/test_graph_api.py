"""Declared graphs over HTTP, with a real router and Redis; an application of the test's own stands for the model."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.http_edge import HttpEdge
from deployments.program_client import ProgramClient
from tests.fleet import eventually, fleet_over_redis, no_control_stream
from tests.integration.test_transport import CONFIG
from tests.listening import listening

pytestmark = pytest.mark.redis


class Model:
    """Answers a prompt with itself; one that says "hang" never, and one that says "break" as vLLM where it breaks."""

    def __init__(self) -> None:
        self.hanging = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        prompt = json.loads((await receive())["body"])["prompt"]
        if prompt == "hang":
            self.hanging += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.hanging -= 1
        answer = {"choices": [{"text": prompt}], "usage": {"completion_tokens": 1}}
        if prompt == "break":
            await self._send(send, 500, {"error": {"message": "it broke", "code": 500}})
            raise IndexError("handed on for the server to log")
        await self._send(send, 200, answer)

    async def _send(self, send: Any, status: int, answer: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, Model]]:
    model = Model()
    async with fleet_over_redis(CONFIG, tmp_path) as fleet:
        await fleet.start()
        async with served_by(ProgramClient(fleet.clients[0].link.programs), model) as http:
            yield http, model


@asynccontextmanager
async def served_by(programs: ProgramClient, model: Model | None = None) -> AsyncIterator[httpx.AsyncClient]:
    edge = HttpEdge(model or Model(), CONFIG, not_ready_because=lambda: None, programs=programs)
    async with listening(edge) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        yield http


async def events(http: httpx.AsyncClient, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Every stream ends with [DONE], whatever happens."""
    line = ""
    async with http.stream("POST", "/v1/programs", json={"deadline_s": 60, "stream": True, **fields}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])
            if line == "data: [DONE]":
                return
    raise AssertionError(f"the stream ended without [DONE], with {line!r}")


async def status_of(http: httpx.AsyncClient, name: str) -> str:
    return str((await http.get(f"/v1/programs/{name}")).json()["status"])


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_client_that_leaves_cancels_its_graph(served, is_streaming: bool) -> None:
    http, model = served
    fields = {"name": "left", "graph": {"nodes": [{"id": "a", "prompt": "hang"}]}}
    if is_streaming:
        async with aclosing(events(http, fields)) as open_events:
            assert (await anext(open_events))["event"] == "program.created"
            await eventually(lambda: model.hanging == 1, "the node is asked for")
    else:
        asking = asyncio.create_task(http.post("/v1/programs", json={"deadline_s": 60, **fields}))
        await eventually(lambda: model.hanging == 1, "the node is asked for")
        asking.cancel()
    await eventually(lambda: model.hanging == 0, "the node is given up")
    async with asyncio.timeout(10):
        # Asked over HTTP, as a client does.
        while await status_of(http, "left") != "cancelled":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_node_whose_request_raises_fails_with_what_was_answered(served) -> None:
    """vLLM answers 500 and hands the exception on, which nobody but the graph is there to take."""
    http, _ = served
    fields = {"graph": {"nodes": [{"id": "a", "prompt": "A"}, {"id": "b", "prompt": "break", "after": ["a"]}]}}
    async with asyncio.timeout(10):
        happened = [event async for event in events(http, fields)]
        whole = await http.post("/v1/programs", json={"deadline_s": 60, **fields})
    assert [event["event"] for event in happened[-2:]] == ["node.failed", "program.cancelled"]
    told = {"event": "node.failed", "node": "b", "status": 500, "error": {"message": "it broke", "code": 500}}
    assert happened[-2] == told
    assert (whole.status_code, whole.json()["error"]["code"]) == (502, "node_failed")
    assert "it broke" in whole.json()["error"]["message"]
    assert happened[-1]["error"] == whole.json()["error"]


@pytest.mark.parametrize(
    ("tenant", "node_id", "label", "shown"),
    [
        ("é", "a", "Überblick", "Überblick"),
        ("Ünal", "-5", "", ""),
        ("用户", "a", "中文", "中文"),
        ("", "7", "+5", ""),
        ("plain", "a", "x" * 200, "x" * 200),
    ],
)
async def test_a_graph_runs_whatever_its_tenant_and_its_labels_are_called(
    served, tenant: str, node_id: str, label: str, shown: str
) -> None:
    """A number is no label: it would be the number of a stage."""
    http, _ = served
    nodes = [{"id": node_id, "prompt": "A", "label": label}, {"id": "after", "prompt": f"{{{{{node_id}}}}}"}]
    answer = await http.post("/v1/programs", json={"deadline_s": 60, "user": tenant, "graph": {"nodes": nodes}})
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["calls"]
    assert (first["label"], first["stage"], second["stage"], second["parents"]) == (shown, 0, 1, [node_id])


async def test_a_tool_with_a_label_gets_its_output(served) -> None:
    http, _ = served
    nodes = [{"id": "t", "tool": "web search", "label": "look it up"}]
    async with asyncio.timeout(10):
        async for event in events(http, {"name": "p", "graph": {"nodes": nodes}}):
            last = event
            if event["event"] == "tool.waiting":
                assert event["tool"] == "web search"
                delivered = await http.post("/v1/programs/p/nodes/t/output", json={"output": 1})
                assert delivered.status_code == 200, delivered.text
    assert last["event"] == "program.finished"
    assert [one["label"] for one in last["program"]["calls"]] == ["tool: look it up"]


@pytest.mark.parametrize("in_header", [False, True])
async def test_a_tool_of_a_tenant_gets_its_output_from_that_tenant_alone(served, in_header: bool) -> None:
    """The body may say who posts it, as with every other path of programs; the header wins."""
    http, _ = served
    path = "/v1/programs/p/nodes/t/output"
    headers, said = ({"x-tenant-id": "Ada"}, {"user": "Bob"}) if in_header else ({}, {"user": "Ada"})
    async with asyncio.timeout(10):
        async for event in events(http, {"name": "p", "user": "Ada", "graph": {"nodes": [{"id": "t", "tool": "x"}]}}):
            last = event
            if event["event"] == "tool.waiting":
                assert (await http.post(path, json={"output": 1, "user": "Bob"})).status_code == 404
                delivered = await http.post(path, json={"output": 2, **said}, headers=headers)
                assert delivered.status_code == 200, delivered.text
            if event["event"] == "node.finished":
                assert event["output"] == 2
    assert last["event"] == "program.finished"


@pytest.mark.parametrize("is_router_new", [False, True])
async def test_an_output_for_an_ingress_that_is_away_is_taken_when_it_is_back(
    tmp_path: Path, is_router_new: bool
) -> None:
    """It may be posted to any; the one that runs the graph misses what is sent meanwhile."""
    async with fleet_over_redis(CONFIG, tmp_path) as fleet, AsyncExitStack() as stack:
        await fleet.start(clients=2)
        here, there = [
            await stack.enter_async_context(served_by(ProgramClient(client.link.programs))) for client in fleet.clients
        ]
        graph = {"nodes": [{"id": "t", "tool": "x"}]}
        async with asyncio.timeout(20):
            async for event in events(here, {"name": "p", "graph": graph}):
                last = event
                if event["event"] == "tool.waiting":
                    async with no_control_stream(fleet.clients[0].link):
                        delivered = await there.post("/v1/programs/p/nodes/t/output", json={"output": 1})
                        assert delivered.status_code == 200, delivered.text
                        if is_router_new:
                            await fleet.replace_router()
        assert last["event"] == "program.finished"
        for client in fleet.clients:
            await eventually(lambda link=client.link: link.programs.unstored == 0, "nothing is to be told again")


async def test_a_graph_that_is_cancelled_while_its_ingress_is_away_ends_when_that_is_back(tmp_path: Path) -> None:
    """Its tool runs, so it asks the router nothing by which it would hear of it."""
    async with fleet_over_redis(CONFIG, tmp_path) as fleet, AsyncExitStack() as stack:
        await fleet.start(clients=2)
        here, there = [
            await stack.enter_async_context(served_by(ProgramClient(client.link.programs))) for client in fleet.clients
        ]
        async with asyncio.timeout(20):
            async for event in events(here, {"name": "p", "graph": {"nodes": [{"id": "t", "tool": "x"}]}}):
                last = event
                if event["event"] == "tool.waiting":
                    async with no_control_stream(fleet.clients[0].link):
                        await cancel(there)
        assert (last["event"], last["program"]["reason"]) == ("program.cancelled", "enough")


async def cancel(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/programs/p/cancel", json={"reason": "enough"})).status_code == 200


async def test_cancelling_a_program_ends_its_graph(served) -> None:
    http, _ = served
    happened, last = [], {}
    fields = {"name": "p", "graph": {"nodes": [{"id": "a", "prompt": "A"}, {"id": "t", "tool": "x", "after": ["a"]}]}}
    async for event in events(http, fields):
        last = event
        happened.append(event["event"])
        if event["event"] == "tool.waiting":
            await cancel(http)
    assert happened == ["program.created", "node.finished", "tool.waiting", "program.cancelled"]
    assert (last["program"]["reason"], last["error"]["code"]) == ("enough", "program_cancelled")


@pytest.mark.parametrize("node", [{"prompt": "hang"}, {"tool": "x"}], ids=["a call", "a tool"])
async def test_who_waits_for_a_graph_hears_that_its_program_was_cancelled(served, node: dict[str, str]) -> None:
    """As the clients of the program's calls do; its own failure would be a 502."""
    http, _ = served
    fields = {"deadline_s": 60, "name": "p", "graph": {"nodes": [{"id": "a", **node}]}}
    asking = asyncio.create_task(http.post("/v1/programs", json=fields))
    async with asyncio.timeout(10):
        # Asked over HTTP, as a client does.
        while (await http.get("/v1/programs/p")).json().get("running_calls") != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await cancel(http)
        answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "program_cancelled")
    assert "enough" in answer.json()["error"]["message"]


TWO_TOOLS = {"nodes": [{"id": "t1", "tool": "x"}, {"id": "t2", "tool": "x", "after": ["t1"]}]}


async def test_a_graph_whose_program_is_finished_too_early_says_so(served) -> None:
    http, _ = served
    happened = []
    async with asyncio.timeout(10):
        async for event in events(http, {"name": "p", "graph": TWO_TOOLS}):
            happened.append(event)
            if event["event"] == "tool.waiting":
                assert (await http.post("/v1/programs/p/finish")).status_code == 200
                assert (await http.post("/v1/programs/p/nodes/t1/output", json={"output": 1})).status_code == 200
    told = ["program.created", "tool.waiting", "node.finished", "node.failed", "error"]
    assert [event["event"] for event in happened] == told
    assert (happened[-2]["node"], happened[-2]["status"]) == ("t2", 409)
    assert happened[-1]["error"]["code"] == "program_ended"
    assert await status_of(http, "p") == "finished"


async def test_a_graph_whose_program_is_finished_while_its_last_node_runs_is_whole(served) -> None:
    http, _ = served
    async with asyncio.timeout(10):
        async for event in events(http, {"name": "p", "graph": {"nodes": [{"id": "t", "tool": "x"}]}}):
            last = event
            if event["event"] == "tool.waiting":
                assert (await http.post("/v1/programs/p/finish")).status_code == 200
                assert (await http.post("/v1/programs/p/nodes/t/output", json={"output": 1})).status_code == 200
    assert (last["event"], last["program"]["status"]) == ("program.finished", "finished")


async def test_a_graph_out_of_time_says_so_and_says_when_it_has_time_again(served) -> None:
    """Nothing runs but the client's tool, so that no answer of a node could tell."""
    http, _ = served
    happened, last = [], {}
    graph = {"nodes": [{"id": "t", "tool": "x"}, {"id": "a", "prompt": "A {{t}}"}]}
    async for event in events(http, {"name": "late", "deadline_s": 0.2, "graph": graph}):
        last = event
        happened.append(event["event"])
        if event["event"] == "program.relegated":
            assert await status_of(http, event["program_id"]) == "relegated"
            assert (await http.post("/v1/programs/late/extend", json={"deadline_s": 600})).status_code == 200
        if {"tool.waiting", "program.reinstated"} <= set(happened) and "node.finished" not in happened:
            assert (await http.post("/v1/programs/late/nodes/t/output", json={"output": 1})).status_code == 200
    told = ["program.relegated", "program.reinstated"]
    assert [one for one in happened if one in told] == told
    assert happened[-3:] == ["node.finished", "node.finished", "program.finished"]
    assert last["program"]["deadline_met"] is True


async def test_a_graph_whose_program_was_relegated_before_its_first_node_says_so(served) -> None:
    http, _ = served
    fields = {"name": "early", "deadline_s": 0.2}
    assert (await http.post("/v1/programs", json=fields)).status_code == 200
    async with asyncio.timeout(10):
        # Asked over HTTP, as a client does.
        while await status_of(http, "early") != "relegated":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    graph = {"nodes": [{"id": "a", "prompt": "A"}, {"id": "b", "prompt": "{{a}}"}]}
    happened = [event["event"] async for event in events(http, {**fields, "graph": graph})]
    assert happened == ["program.created", "program.relegated", "node.finished", "node.finished", "program.finished"]
