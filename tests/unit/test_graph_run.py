"""A declared graph on its way, without a server: what it asks, and what becomes of the answers."""

import asyncio
import json
from typing import Any

from cluster.ingress_programs import IngressPrograms
from deployments.declared_graph import parse_graph
from deployments.graph_run import Ask, Event, GraphRun
from deployments.program_client import ProgramClient


def run_of(nodes: list[dict[str, Any]], ask: Ask, tenant: str = "") -> GraphRun:
    """A run without tools: it has nothing to say to a router."""
    programs = ProgramClient(IngressPrograms("ingress", send=lambda message: None, wait_s=1.0))
    return GraphRun("p", parse_graph({"nodes": nodes}), model="m", tenant=tenant, ask=ask, programs=programs)


async def events_of(run: GraphRun) -> list[Event]:
    async with asyncio.timeout(10):
        return [event async for event in run.events()]


async def test_a_node_that_cannot_be_asked_for_fails_and_tells_nothing_of_its_prompt():
    async def ask(path: str, body: bytes) -> tuple[int, bytes]:
        raise RecursionError(body.decode())

    (event,) = await events_of(run_of([{"id": "a", "prompt": "secret"}], ask))
    assert (event["event"], event["node"], event["status"]) == ("node.failed", "a", 500)
    assert event["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(event)


async def test_a_node_whose_prompt_becomes_too_large_fails_and_is_not_asked_for():
    asked = []

    async def ask(path: str, body: bytes) -> tuple[int, bytes]:
        asked.append(path)
        return 200, json.dumps({"choices": [{"text": "x" * 100_000}]}).encode()

    events = await events_of(run_of([{"id": "a", "prompt": "A"}, {"id": "b", "prompt": "{{a}}" * 100}], ask))
    assert [event["event"] for event in events] == ["node.finished", "node.failed"]
    assert (events[1]["status"], events[1]["error"]["param"]) == (400, "graph.nodes.b")
    assert asked == ["/v1/completions"]
