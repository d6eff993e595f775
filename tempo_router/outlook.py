"""What is expected of one program from now on, from what is foretold of it and how fast the replicas are."""

import math
from collections.abc import Iterable, Sequence

from tempo_router.policies.base import Job
from tempo_router.program_history import Forecast
from tempo_router.program_view import Outlook
from tempo_router.step_time import Pace
from tempo_router.value import PREFILL_WALL_RATIO

_SPREAD = 0.25
_SPREAD_S = 0.3
"""Deviation of the time left, as the plan has it (tempo_plan.py)."""


def live_s(jobs: Iterable[Job], pace: Pace) -> float:
    """Seconds until the slowest of a program's live calls ends, once it is served."""
    needed_s = 0.0
    for job in jobs:
        rest = job.lengths.upper_left(job.generated_tokens, job.spec.max_output_tokens)
        needed_s = max(needed_s, PREFILL_WALL_RATIO * pace.prefill_s(job.missing_tokens) + rest * pace.tau_s)
    return needed_s


def least_s(jobs: Iterable[Job], later_chain_tokens: float, pace: Pace) -> float:
    """Seconds that a program needs at least: its live calls at their shortest, then that chain, on an idle replica."""
    needed_s = 0.0
    for job in jobs:
        rest = job.lengths.shortest_left(job.generated_tokens, job.spec.max_output_tokens)
        needed_s = max(needed_s, pace.prefill_s(job.missing_tokens) + rest * pace.alone_s)
    return needed_s + later_chain_tokens * pace.alone_s


def later_s(forecast: Forecast, pace: Pace, wait_s: float) -> float:
    """Serial seconds of the stages to come: their longest calls, prompts, tools, and waiting."""
    prefill_s = PREFILL_WALL_RATIO * forecast.chain_prompt_tokens * pace.prefill_token_s
    waits_s = forecast.stages * (wait_s + pace.tau_s)
    return forecast.chain_tokens * pace.tau_s + prefill_s + forecast.gaps_s + waits_s


def outlook(
    jobs: Iterable[Job],
    forecast: Forecast,
    shares: Sequence[float],
    pace: Pace,
    *,
    wait_s: float,
    left_s: float | None,
    pattern: dict[str, object],
) -> Outlook:
    """The outlook of a program. shares: how later stages share the time that they take, in order.

    left_s: time to the deadline; None without one, and then it is certainly made.
    """
    current_s = live_s(jobs, pace)
    rest_s = later_s(forecast, pace, wait_s)
    whole = sum(shares)
    ahead = (current_s, *(rest_s * share / whole for share in shares)) if whole > 0.0 else (current_s + rest_s,)
    needed_s = current_s + rest_s
    return Outlook(
        ahead_s=ahead,
        left_s=needed_s,
        probability=1.0 if left_s is None else _chance(left_s, needed_s),
        calls=forecast.calls,
        tokens=forecast.output_tokens,
        pattern=pattern,
    )


def _chance(left_s: float, needed_s: float) -> float:
    z = (left_s - needed_s) / (_SPREAD * needed_s + _SPREAD_S)
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))
