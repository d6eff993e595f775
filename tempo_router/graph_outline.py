"""The outline of a program's graph: what a new router must know to go on foretelling it."""

from tempo_router.patterns import StageOutline
from tempo_router.program_graph import ProgramGraph


def ended_stages(graph: ProgramGraph) -> list[tuple[int, StageOutline]]:
    """(stage, outline of those of its calls that were answered), ascending."""
    found: list[tuple[int, StageOutline]] = []
    last_end_s: float | None = None
    for stage, calls in graph.stages:
        ended = [call for call in calls if call.status == "completed"]
        if not ended:
            continue
        began_s = min(call.began_s for call in ended)
        outline = StageOutline(
            len(ended),
            sum(call.prompt_tokens for call in ended),
            float(sum(call.prompt_tokens**2 for call in ended)),
            sum(call.output_tokens for call in ended),
            max(call.output_tokens for call in ended),
            max(call.prompt_tokens for call in ended),
            0.0 if last_end_s is None else max(0.0, began_s - last_end_s),
        )
        found.append((stage, outline))
        last_end_s = max(call.ended_s or began_s for call in ended)
    return found
