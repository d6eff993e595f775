"""A declared graph on its way, without a server: what it asks, and what becomes of the answers."""

import asyncio
import json
import re
from typing import Any

import pytest

from cluster.ingress_programs import IngressPrograms
from deployments.declared_graph import MAX_FILLED_CHARS, parse_graph
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


async def test_a_tool_whose_inputs_become_too_large_fails_and_is_not_begun():
    """Each output is small enough by itself; it may be an object, of which no text is told."""
    large = {"content": "x" * (MAX_FILLED_CHARS // 2), "tool_calls": [{}]}

    async def ask(path: str, body: bytes) -> tuple[int, bytes]:
        return 200, json.dumps({"choices": [{"message": large}]}).encode()

    nodes = [{"id": "a", "prompt": "A"}, {"id": "b", "prompt": "B"}, {"id": "t", "tool": "x", "after": ["a", "b"]}]
    *answered, failed = await events_of(run_of(nodes, ask))
    assert [event["node"] for event in answered] == ["a", "b"]
    assert (failed["event"], failed["node"], failed["status"]) == ("node.failed", "t", 400)
    assert failed["error"]["param"] == "graph.nodes.t"
    assert re.search(rf"have \d+ characters; there may be {MAX_FILLED_CHARS}: let it wait", failed["error"]["message"])


async def test_a_node_that_calls_tools_gives_the_calls_to_those_that_name_it():
    """Its text is null: the next one would be asked as if nothing had been said."""
    calls = [{"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}]
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
    bodies = []

    async def ask(path: str, body: bytes) -> tuple[int, bytes]:
        bodies.append(json.loads(body))
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode()

    nodes = [{"id": "a", "prompt": "A"}, {"id": "b", "prompt": "{{a}}"}]
    first, _ = await events_of(run_of(nodes, ask))
    assert first["output"] == {"content": None, "tool_calls": calls}
    assert json.loads(bodies[1]["prompt"]) == first["output"]


@pytest.mark.parametrize(
    ("choice", "output"),
    [
        ({"message": {"content": "said", "tool_calls": []}}, "said"),
        ({"message": {"content": None, "tool_calls": []}, "finish_reason": "length"}, ""),
        ({"text": "said"}, "said"),
        ({"text": ""}, ""),
    ],
)
async def test_the_output_of_any_other_node_is_its_text(choice: dict[str, Any], output: str):
    async def ask(path: str, body: bytes) -> tuple[int, bytes]:
        return 200, json.dumps({"choices": [choice]}).encode()

    (event,) = await events_of(run_of([{"id": "a", "prompt": "A"}], ask))
    assert (event["event"], event["output"]) == ("node.finished", output)
