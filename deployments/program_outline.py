"""What a client knows of its program's shape: stage by stage, or as the graph that it has declared.

{"stages": [
    {"calls": 1, "output_tokens": 200},
    {"calls": 4, "prompt_tokens": 1500, "max_tokens": 800, "gap_s": 5},
    {"stage": 3, "output_tokens": 600}
]}

Everything may be left out: a stage comes after the one before and has one call; lengths are of each call. All is
checked before the program is made.
"""

from collections.abc import Mapping
from typing import Any

from deployments.declared_graph import DeclaredGraph
from tempo_router.config import unknown_key_message
from tempo_router.errors import ProgramError
from tempo_router.known_stages import KnownStage
from tempo_router.program_graph import MAX_STAGE

MAX_KNOWN_CALLS = 1000
MAX_KNOWN_STAGES = 100
"""Each is kept with its program, and looked at when it moves."""
_MAX_TOKENS = 10_000_000
_MAX_GAP_S = 366 * 24 * 3600.0
_KEYS = ("stage", "calls", "prompt_tokens", "output_tokens", "max_tokens", "gap_s")


def parse_outline(value: object) -> tuple[KnownStage, ...]:
    """Check an outline. Raises ProgramError that says which stage and field is wrong."""
    if not isinstance(value, dict) or set(value) != {"stages"} or not isinstance(value["stages"], list):
        raise _wrong("outline", "must be an object with a list of stages")
    given = value["stages"]
    if not 1 <= len(given) <= MAX_KNOWN_STAGES:
        raise _wrong("outline.stages", f"{len(given)} stages; there may be 1 to {MAX_KNOWN_STAGES}")
    stages: list[KnownStage] = []
    for number, one in enumerate(given):
        stages.append(_stage(one, f"outline.stages[{number}]", stages[-1].stage if stages else -1))
    calls = sum(one.calls for one in stages)
    if calls > MAX_KNOWN_CALLS:
        raise _wrong("outline.stages", f"{calls} calls in all; there may be {MAX_KNOWN_CALLS}")
    return tuple(stages)


def outline_of(graph: DeclaredGraph) -> tuple[KnownStage, ...]:
    """What a declared graph tells of its first stages, MAX_KNOWN_STAGES at most.

    A stage waits for tools where a call of it does; how long, nobody knows.
    """
    stage_of: dict[str, int] = {}
    caps: dict[int, list[int | None]] = {}
    after_tools: set[int] = set()
    tools = {node.node_id for node in graph.nodes if node.tool}
    for node in graph.nodes:
        # As ProgramGraph places calls: a tool stands in the stage of what it follows.
        stage = 1 + max((stage_of[name] for name in node.after), default=-1)
        stage_of[node.node_id] = max(stage - 1, 0) if node.tool else stage
        if not node.tool:
            caps.setdefault(stage, []).append(node.max_tokens)
            if not tools.isdisjoint(node.after):
                after_tools.add(stage)
    return tuple(
        KnownStage(
            stage,
            len(of_calls),
            max_tokens=None if None in of_calls else max(cap for cap in of_calls if cap is not None),
            gap_s=None if stage in after_tools else 0.0,
        )
        for stage, of_calls in sorted(caps.items())[:MAX_KNOWN_STAGES]
    )


def _stage(one: object, where: str, before: int) -> KnownStage:
    if not isinstance(one, dict):
        raise _wrong(where, "must be an object")
    for key in one:
        if key not in _KEYS:
            raise _wrong(f"{where}.{str(key)[:64]}", unknown_key_message(str(key)[:64], _KEYS))
    stage = _whole(one, "stage", where, 0, MAX_STAGE)
    if stage is not None and stage <= before:
        raise _wrong(f"{where}.stage", f"stage {stage} is out of order: it stands after stage {before}")
    if stage is None and before == MAX_STAGE:
        raise _wrong(where, f"would be stage {before + 1}; the last possible one is {MAX_STAGE}")
    calls = _whole(one, "calls", where, 1, MAX_KNOWN_CALLS)
    return KnownStage(
        before + 1 if stage is None else stage,
        1 if calls is None else calls,
        _whole(one, "prompt_tokens", where, 1, _MAX_TOKENS),
        _whole(one, "output_tokens", where, 1, _MAX_TOKENS),
        _whole(one, "max_tokens", where, 1, _MAX_TOKENS),
        _gap(one, where),
    )


def _whole(one: Mapping[str, Any], name: str, where: str, least: int, most: int) -> int | None:
    value = one.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _wrong(f"{where}.{name}", f"{str(value)[:64]} is no whole number from {least} to {most}")
    return value


def _gap(one: Mapping[str, Any], where: str) -> float | None:
    value = one.get("gap_s")
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _MAX_GAP_S:
        raise _wrong(f"{where}.gap_s", f"{str(value)[:64]} is no number of seconds from 0 to a year")
    return float(value)


def _wrong(where: str, problem: str) -> ProgramError:
    return ProgramError("invalid_program", f"{where}: {problem}", where)
