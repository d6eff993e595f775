"""What never changes about a request, as one row of numbers: plans over thousands of them are made in arrays."""

import math
from typing import assert_never

from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, RequestSpec

STREAM, DEADLINE, PROGRAM, BEST_EFFORT = 0.0, 1.0, 2.0, 3.0

KIND, FIRST_DUE_S, TBT_S, DEADLINE_S, PROMPT, CONTEXT, GENERATED, LIMIT = range(8)
"""Columns of a row of facts."""

Facts = tuple[float, float, float, float, float, float, float, float]


def facts_of(spec: RequestSpec) -> Facts:
    """(kind, due time of token 0, time between tokens, deadline, prompt, context, earlier tokens, limit).

    A time that a request does not have is infinite.
    """
    slo = spec.slo
    due_s, tbt_s, deadline_s = math.inf, 1.0, math.inf
    match slo:
        case Latency():
            kind, due_s, tbt_s = STREAM, spec.arrival_s + slo.ttft_s, slo.tbt_s
        case Deadline():
            kind, deadline_s = DEADLINE, spec.arrival_s + slo.ttlt_s
        case ProgramCall():
            kind, deadline_s = PROGRAM, spec.arrival_s + slo.ttlt_s
        case BestEffort():
            kind = BEST_EFFORT
        case _:
            assert_never(slo)
    return (
        kind,
        due_s,
        tbt_s,
        deadline_s,
        float(spec.prompt_tokens),
        float(spec.context_tokens),
        float(spec.generated_tokens),
        float(spec.max_output_tokens),
    )
