"""What a client is shown of its program. Dates are seconds since the epoch, as the client gave them."""

from dataclasses import asdict, dataclass
from typing import Any

from tempo_router.program_graph import GraphCall, ProgramGraph
from tempo_router.stage_budgets import stage_budgets


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of a program from now on.

    ahead_s: seconds that the current stage still takes, then those of each later stage. left_s: their sum, tools
    included. probability: to make the deadline. calls, tokens: expected calls and output tokens of later stages.
    pattern: how it was foretold.
    """

    ahead_s: tuple[float, ...]
    left_s: float
    probability: float
    calls: float
    tokens: float
    pattern: dict[str, Any]


def program_view(graph: ProgramGraph, now_s: float, outlook: Outlook | None) -> dict[str, Any]:
    """All of a program. outlook: None where nothing is foretold (it is over, or has no deadline)."""
    return {
        **summary(graph),
        "calls": [_call(call) for call in graph.calls.values()],
        "stages": _stages(graph),
        "outline": _outline(graph),
        "stage_budgets_s": budgets(graph, now_s, outlook),
        "prediction": None if outlook is None else _prediction(outlook),
    }


def summary(graph: ProgramGraph) -> dict[str, Any]:
    """A program as lists show it."""
    calls = graph.calls.values()
    return {
        "id": graph.program_id,
        "object": "program",
        "name": graph.name,
        "app": graph.app,
        "tenant": graph.tenant,
        "status": "finishing" if graph.closed_by and not graph.is_over else graph.status,
        "reason": graph.reason,
        "objective": graph.objective,
        "created": graph.created_s,
        "deadline": graph.deadline_s,
        "relegated_at": graph.relegated_s,
        "ended_at": graph.ended_s,
        "deadline_met": graph.is_met,
        "stage": graph.stage,
        "call_count": len(calls),
        "running_calls": len(graph.running),
        "output_tokens": sum(call.output_tokens for call in calls),
    }


def budgets(graph: ProgramGraph, now_s: float, outlook: Outlook | None) -> list[float] | None:
    """The deadline split over the stages: past ones, the current one, those foretold. None without a deadline."""
    if graph.deadline_s is None:
        return None
    start_s, whole_s = graph.created_s, graph.deadline_s - graph.created_s
    if whole_s <= 0.0:
        return None
    past = [
        max(call.ended_s or now_s for call in calls) - start_s
        for stage, calls in graph.stages
        if graph.is_over or stage < graph.stage
    ]
    if graph.is_over:
        return stage_budgets(past, (), now_s - start_s, whole_s)
    ahead = outlook.ahead_s if outlook is not None else (1.0,)
    return stage_budgets(past, ahead, now_s - start_s, whole_s)


def _call(call: GraphCall) -> dict[str, Any]:
    return {
        "id": call.call_id,
        "attempt": call.attempt,
        "stage": call.stage,
        "parents": list(call.parents),
        "label": call.label,
        "agent": call.branch,
        "status": call.status,
        "began_at": call.began_s,
        "ended_at": call.ended_s,
        "prompt_tokens": call.prompt_tokens,
        "output_tokens": call.output_tokens,
    }


def _stages(graph: ProgramGraph) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "calls": len(calls),
            "running": sum(call.status == "running" for call in calls),
            "output_tokens": sum(call.output_tokens for call in calls),
            "began_at": min(call.began_s for call in calls),
            "ended_at": None if any(call.ended_s is None for call in calls) else max(c.ended_s or 0.0 for c in calls),
        }
        for stage, calls in graph.stages
    ]


def _outline(graph: ProgramGraph) -> dict[str, Any] | None:
    """As the client said it, or what its declared graph says; what nobody said is left out."""
    if not graph.outline:
        return None
    stages = [{key: value for key, value in asdict(one).items() if value is not None} for one in graph.outline]
    return {"stages": stages}


def _prediction(outlook: Outlook) -> dict[str, Any]:
    return {
        "left_s": outlook.left_s,
        "probability": outlook.probability,
        "later_stages": max(0, len(outlook.ahead_s) - 1),
        "later_calls": outlook.calls,
        "later_output_tokens": outlook.tokens,
        "pattern": outlook.pattern,
    }
