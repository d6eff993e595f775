"""What clients may say of their program's shape, what is refused and where, and what a declared graph tells."""

import pytest

from deployments.declared_graph import parse_graph
from deployments.program_outline import outline_of, parse_outline
from tempo_router.errors import ProgramError
from tempo_router.known_stages import KnownStage
from tempo_router.program_graph import NewCall, ProgramGraph
from tempo_router.request import ProgramId

DIAMOND = {
    "nodes": [
        {"id": "plan", "prompt": "Plan.", "max_tokens": 50},
        {"id": "left", "prompt": "{{plan}}", "max_tokens": 30},
        {"id": "lookup", "tool": "web search", "after": ["plan"]},
        {"id": "right", "prompt": "{{lookup}}", "max_tokens": 70},
        {"id": "sum", "prompt": "{{left}} {{right}}"},
        {"id": "check", "tool": "tests", "after": ["sum"]},
    ]
}


def test_stages_follow_one_another_unless_they_are_numbered():
    told = {"stages": [{}, {"calls": 4, "prompt_tokens": 1500, "max_tokens": 800, "gap_s": 5}, {"stage": 4}, {}]}
    assert parse_outline(told) == (
        KnownStage(0),
        KnownStage(1, 4, prompt_tokens=1500, max_tokens=800, gap_s=5.0),
        KnownStage(4),
        KnownStage(5),
    )


def test_the_largest_outline_is_taken():
    assert len(parse_outline({"stages": [{}] * 100})) == 100
    assert parse_outline({"stages": [{"calls": 1000}]})[0].calls == 1000


@pytest.mark.parametrize(
    ("stages", "field", "problem"),
    [
        (5, "outline", "list of stages"),
        ([], "outline.stages", "0 stages; there may be 1 to 100"),
        ([{"gap_s": 10**400}], "outline.stages[0].gap_s", "is no number of seconds from 0 to a year"),
        ([{}] * 101, "outline.stages", "101 stages"),
        ([{"calls": 600}, {"calls": 401}], "outline.stages", "1001 calls in all; there may be 1000"),
        ([7], "outline.stages[0]", "must be an object"),
        ([{"calls": 0}], "outline.stages[0].calls", "0 is no whole number from 1"),
        ([{"calls": -1}], "outline.stages[0].calls", "-1 is no whole number"),
        ([{"calls": True}], "outline.stages[0].calls", "True is no whole number"),
        ([{}, {"output_tokens": -5}], "outline.stages[1].output_tokens", "-5 is no whole number"),
        ([{"prompt_tokens": 1.5}], "outline.stages[0].prompt_tokens", "1.5 is no whole number"),
        ([{"max_tokens": "many"}], "outline.stages[0].max_tokens", "many is no whole number"),
        ([{"gap_s": -1}], "outline.stages[0].gap_s", "-1 is no number of seconds"),
        ([{"gap_s": float("nan")}], "outline.stages[0].gap_s", "nan is no number of seconds"),
        ([{"gap_s": 1e300}], "outline.stages[0].gap_s", "is no number of seconds from 0 to a year"),
        ([{"stage": 2}, {"stage": 1}], "outline.stages[1].stage", "stage 1 is out of order: it stands after stage 2"),
        ([{"stage": 2}, {"stage": 2}], "outline.stages[1].stage", "out of order"),
        ([{"stage": 1001}], "outline.stages[0].stage", "1001 is no whole number from 0 to 1000"),
        ([{"stage": 1000}, {}], "outline.stages[1]", "would be stage 1001"),
        ([{"call": 1}], "outline.stages[0].call", "calls"),
    ],
)
def test_nonsense_is_refused_where_it_stands(stages, field, problem):
    with pytest.raises(ProgramError) as refused:
        parse_outline({"stages": stages})
    assert (refused.value.code, refused.value.field) == ("invalid_program", field)
    assert problem in str(refused.value)


def test_a_declared_graph_tells_its_stages():
    assert outline_of(parse_graph(DIAMOND)) == (
        KnownStage(0, 1, max_tokens=50, gap_s=0.0),
        KnownStage(1, 2, max_tokens=70),
        KnownStage(2, 1, gap_s=0.0),
    )


def test_its_stages_are_those_of_the_calls_when_it_runs():
    """Tools stand first, in a row and last."""
    nodes = [
        {"id": "fetch", "tool": "x"},
        {"id": "read", "prompt": "{{fetch}}"},
        {"id": "one", "tool": "x", "after": ["read"]},
        {"id": "two", "tool": "x", "after": ["one"]},
        {"id": "write", "prompt": "{{two}}"},
    ]
    for declared in (DIAMOND, {"nodes": nodes}):
        graph = parse_graph(declared)
        program = ProgramGraph(ProgramId("p"), "", "", 0.0, 60.0)
        for node in graph.nodes:
            program.begin(NewCall(node.node_id, parents=node.after, is_tool=bool(node.tool)), 1.0)
            program.end(node.node_id, 0, "completed", 2.0, prompt_tokens=0, output_tokens=0)
        tools = {node.node_id for node in graph.nodes if node.tool}
        ran = {stage: sum(call.call_id not in tools for call in calls) for stage, calls in program.stages}
        assert {one.stage: one.calls for one in outline_of(graph)} == {stage: n for stage, n in ran.items() if n}
