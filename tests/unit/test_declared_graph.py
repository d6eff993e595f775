"""What may be declared, what is refused and where, and how prompts are filled in."""

import datetime as dt
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from deployments.declared_graph import (
    MAX_DEPTH,
    MAX_FILLED_CHARS,
    MAX_NODES,
    Node,
    Unanswered,
    filled,
    json_value,
    parse_graph,
    parse_output,
    request_body,
)
from tempo_router.errors import ProgramError

DIAMOND = {
    "nodes": [
        {"id": "sum", "prompt": "Join {{left}} and {{ right }}."},
        {"id": "left", "prompt": "L: {{plan}}"},
        {"id": "right", "messages": [{"role": "user", "content": [{"type": "text", "text": "R: {{plan}}"}]}]},
        {"id": "plan", "prompt": "Plan.", "max_tokens": 5},
    ]
}


def names(nodes: Iterable[Node]) -> list[str]:
    return [node.node_id for node in nodes]


def test_a_node_waits_for_what_its_templates_name():
    graph = parse_graph(DIAMOND)
    unanswered = Unanswered(graph.nodes)
    assert names(unanswered.ready) == ["plan"]
    assert names(unanswered.answered("plan")) == ["left", "right"]
    assert names(unanswered.answered("left")) == []
    assert names(unanswered.answered("right")) == ["sum"]
    assert [node.node_id for node in graph.nodes] == ["plan", "left", "right", "sum"]
    assert graph.nodes[-1].after == ("left", "right")


class Counted(tuple[str, ...]):
    """Notes how often anyone goes through it."""

    __slots__ = ()
    walks = 0

    def __iter__(self) -> Iterator[str]:
        Counted.walks += 1
        return super().__iter__()


def test_the_end_of_a_node_costs_what_waits_for_it_and_not_the_whole_graph():
    """Each event went through all that has not begun: milliseconds of an ingress that does nothing else meanwhile."""
    layers = [[f"{layer}.{number}" for number in range(20)] for layer in range(10)]
    nodes = [Node(name, Counted(before)) for before, layer in itertools.pairwise([[], *layers]) for name in layer]
    Counted.walks = 0
    unanswered = Unanswered(nodes)
    begun = list(unanswered.ready)
    for node in begun:
        begun += unanswered.answered(node.node_id)
    assert names(begun) == names(nodes)
    assert Counted.walks <= len(nodes)


def test_prompts_are_filled_with_outputs_as_they_are():
    graph = parse_graph(DIAMOND)
    outputs = {"plan": "{{left}}", "left": [1, {"a": None}]}
    by_id = {node.node_id: node for node in graph.nodes}
    assert request_body(by_id["left"], outputs, "m") == ("/v1/completions", {"model": "m", "prompt": "L: {{left}}"})
    path, body = request_body(by_id["right"], outputs, "m")
    assert (path, body["messages"][0]["content"][0]["text"]) == ("/v1/chat/completions", "R: {{left}}")
    assert filled("{{left}}", outputs) == '[1,{"a":null}]'
    assert request_body(by_id["plan"], {}, "m")[1]["max_tokens"] == 5


def test_a_template_is_searched_in_time_that_grows_as_it_does():
    """Spaces were each tried as the end of what stands before a name: a minute for these, hours for a million."""
    began_s = time.process_time()
    parse_graph({"nodes": [{"id": "a", "prompt": "{{" + " " * 20_000}]})
    assert time.process_time() - began_s < 5


def nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def test_what_is_nested_as_deep_as_it_may_be_is_taken():
    message, schema = {"role": "user", "content": nested(MAX_DEPTH - 3)}, nested(MAX_DEPTH - 2)
    graph = parse_graph({"nodes": [{"id": "a", "messages": [message], "sampling": {"schema": schema}}]})
    assert request_body(graph.nodes[0], {}, "m")[1]["messages"] == [message]
    assert parse_output(json.dumps({"output": nested(MAX_DEPTH - 1)}).encode()) == (nested(MAX_DEPTH - 1), "")


@pytest.mark.parametrize("levels", [MAX_DEPTH, 900])
def test_what_is_nested_deeper_is_refused(levels: int):
    """Whatever reads it later would raise, at a depth that nobody knows."""
    deep = nested(levels)
    for fields, field in (
        ({"messages": [{"role": "user", "content": deep}]}, "messages"),
        ({"prompt": "x", "sampling": {"schema": deep}}, "sampling"),
    ):
        with pytest.raises(ProgramError, match="nested more than 100 deep") as refused:
            parse_graph({"nodes": [{"id": "a", **fields}]})
        assert refused.value.field == f"graph.nodes[0].{field}"
    with pytest.raises(ProgramError, match="nested more than 100 deep"):
        parse_output(json.dumps({"output": deep}).encode())


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_a_short_template_does_not_become_a_prompt_without_end(kind: str):
    template = "{{t}}" * 100
    asked = template if kind == "prompt" else [{"role": "user", "content": template}]
    node = parse_graph({"nodes": [{"id": "t", "tool": "x"}, {"id": "a", kind: asked}]}).nodes[1]
    assert len(json.dumps(request_body(node, {"t": "x" * 1000}, "m")[1])) > 100_000
    with pytest.raises(ProgramError, match=f"has 10000[0-9]{{3}} characters .* there may be {MAX_FILLED_CHARS}"):
        request_body(node, {"t": "x" * 100_000}, "m")


def test_the_largest_graph_is_taken_and_a_larger_one_is_not():
    nodes = [
        {"id": str(number), "prompt": "x", "after": [str(number - 1)] if number else []} for number in range(MAX_NODES)
    ]
    assert len(parse_graph({"nodes": nodes}).nodes) == MAX_NODES
    with pytest.raises(ProgramError, match="10000 nodes; there may be 1 to 1000"):
        parse_graph({"nodes": [{"id": str(number), "prompt": "x"} for number in range(10_000)]})
    first = [str(number) for number in range(500)]
    wide = [{"id": f"after-{number}", "prompt": "x", "after": first} for number in range(201)]
    nodes = [*({"id": name, "prompt": "x"} for name in first), *wide]
    assert len(parse_graph({"nodes": nodes[:-1]}).nodes) == 700
    with pytest.raises(ProgramError, match="wait for 100500 others in all; that may be 100000"):
        parse_graph({"nodes": nodes})


@pytest.mark.parametrize(
    ("nodes", "field", "problem"),
    [
        (5, "graph", "list of nodes"),
        ([], "graph.nodes", "0 nodes"),
        ([{"prompt": "x"}], "graph.nodes[0].id", "must be"),
        ([{"id": "a b", "prompt": "x"}], "graph.nodes[0].id", "must be"),
        ([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "x"}], "graph.nodes[1].id", "also node 0"),
        ([{"id": "a", "prompt": "{{nobody}}"}], "graph.nodes[0].prompt", "names 'nobody'"),
        ([{"id": "a", "prompt": "x", "after": ["nobody"]}], "graph.nodes[0].after", "no node 'nobody'"),
        ([{"id": "a", "prompt": "{{a}}"}], "graph.nodes[0].after", "wait for itself"),
        ([{"id": "a", "prompt": "{{b}}"}, {"id": "b", "prompt": "{{a}}"}], "graph.nodes[0].after", "waits"),
        ([{"id": "a"}], "graph.nodes[0]", "exactly one"),
        ([{"id": "a", "prompt": "x", "tool": "t"}], "graph.nodes[0]", "exactly one"),
        ([{"id": "a", "tool": "t", "max_tokens": 5}], "graph.nodes[0]", "neither"),
        ([{"id": "a", "prompt": "x", "max_tokens": 0}], "graph.nodes[0].max_tokens", "above zero"),
        ([{"id": "a", "prompt": "x", "max_tokens": 10**400}], "graph.nodes[0].max_tokens", "at most"),
        ([{"id": "a", "prompt": "x", "promt": "y"}], "graph.nodes[0].promt", "did you mean"),
        ([{"id": "a", "prompt": "x", "sampling": {"stream": True}}], "graph.nodes[0].sampling.stream", "set by"),
        ([{"id": "a", "prompt": "x", "sampling": {"user": "bob"}}], "graph.nodes[0].sampling.user", "set by"),
        ([{"id": "a", "prompt": "x", "sampling": {"metadata": {}}}], "graph.nodes[0].sampling.metadata", "set by"),
        ([{"id": "a", "prompt": "x", "label": "a\nb"}], "graph.nodes[0].label", "printable"),
        ([{"id": "a", "prompt": "x", "label": "x" * 201}], "graph.nodes[0].label", "at most 200"),
        ([{"id": "a", "prompt": "x", "label": "tool: x"}], "graph.nodes[0].label", "is that of a tool"),
        ([{"id": "a", "tool": "x" * 201}], "graph.nodes[0].tool", "at most 200"),
        ([{"id": "a", "prompt": "x", "label": " "}], "graph.nodes[0].label", "printable"),
        ([{"id": "a", "messages": []}], "graph.nodes[0].messages", "list of chat"),
        ([{"id": "a", "prompt": 5}], "graph.nodes[0].prompt", "must be text"),
    ],
)
def test_what_makes_no_sense_is_named(nodes, field, problem):
    with pytest.raises(ProgramError, match=problem) as refused:
        parse_graph({"nodes": nodes} if isinstance(nodes, list) else nodes)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"out": 1}', b'{"output": NaN}', b'{"output": "' + b"x" * 300_000 + b'"}']
)
def test_an_output_that_is_none_is_refused(body):
    with pytest.raises(ProgramError) as refused:
        parse_output(body)
    assert refused.value.field == "output"


def test_a_tenant_of_an_output_that_is_no_text_is_refused():
    with pytest.raises(ProgramError, match="must be text", check=lambda error: error.field == "user"):
        parse_output(b'{"output": 1, "user": ["me"]}')


def test_any_json_is_an_output():
    assert parse_output(b'{"output": {"a": [1, null]}}') == ({"a": [1, None]}, "")
    assert parse_output(b'{"output": null, "user": "me"}') == (None, "me")


def test_what_python_gives_becomes_what_json_holds():
    given = {"a": (1, 2.5, None, True), 7: {dt.date(2030, 1, 2)}, "b": b"ab"}
    assert json_value(given, "output") == {"a": [1, 2.5, None, True], "7": ["2030-01-02"], "b": "YWI="}


def holding_itself() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize(
    ("value", "where", "said"),
    [
        ({"a": [1, object()]}, "output.a[1]", "object cannot be JSON"),
        ({"a": {"b": math.nan}}, "output.a.b", "is nan"),
        ((1.0, -math.inf), "output[1]", "is -inf"),
        ([{math.nan}], "output[0][0]", "is nan"),
        ({"a": {(1, 2): 3}}, "output.a", "is tuple; keys must be text"),
        ("\ud800", "output", "str cannot be JSON"),
        (holding_itself(), "output", "holds itself"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_place(value: object, where: str, said: str):
    with pytest.raises(ProgramError, match=said, check=lambda error: error.field == where):
        json_value(value, "output")
