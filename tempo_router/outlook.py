"""What is expected of one program from now on, from what is foretold of it and how fast the replicas are."""

from collections.abc import Iterable, Sequence

import numpy as np

from tempo_router.policies.base import Job
from tempo_router.program_history import Forecast
from tempo_router.program_time import chances, deviations, margin_of, serial_s, unseen
from tempo_router.program_view import Outlook
from tempo_router.step_time import Pace
from tempo_router.value import PREFILL_WALL_RATIO


def live_s(jobs: Iterable[Job], pace: Pace) -> float:
    """Seconds until the slowest of a program's live calls ends, once it is served."""
    needed_s = 0.0
    for job in jobs:
        rest = job.lengths.upper_left(job.generated_tokens, job.spec.max_output_tokens)
        past = max(job.spec.context_tokens - job.missing_tokens, 0.0)
        needed_s = max(needed_s, PREFILL_WALL_RATIO * pace.prefill_s(job.missing_tokens, past) + rest * pace.tau_s)
    return margin_of(pace) * needed_s


def least_s(jobs: Iterable[Job], later_chain_tokens: float, pace: Pace) -> float:
    """Seconds that a program needs at least: its live calls at their shortest, then that chain, on an idle replica."""
    needed_s = 0.0
    for job in jobs:
        rest = job.lengths.shortest_left(job.generated_tokens, job.spec.max_output_tokens)
        needed_s = max(needed_s, pace.prefill_s(job.missing_tokens) + rest * pace.alone_s)
    return needed_s + later_chain_tokens * pace.alone_s


def later_s(forecast: Forecast, pace: Pace, wait_s: float) -> float:
    """Serial seconds of the stages to come: their longest calls, prompts, tools, and waiting."""
    return serial_s(forecast.chain_tokens, forecast.chain_prompt_tokens, forecast.gaps_s, forecast.stages, pace, wait_s)


def outlook(
    jobs: Iterable[Job],
    forecast: Forecast,
    stages: Sequence[Forecast],
    pace: Pace,
    *,
    wait_s: float,
    left_s: float | None,
    pattern: dict[str, object],
) -> Outlook:
    """The outlook of a program. stages: each of the later ones that are expected; they share the time that all take.

    left_s: time to the deadline; None without one, and then it is certainly made.
    """
    current_s = live_s(jobs, pace)
    tau_s = margin_of(pace) * pace.tau_s
    unseen_tokens, unseen_gaps_s = unseen(forecast.unknown, max(left_s or 0.0, 0.0), tau_s)
    rest_s = later_s(forecast, pace, wait_s) + unseen_tokens * tau_s + unseen_gaps_s
    shares = [later_s(one, pace, wait_s) for one in stages]
    whole = sum(shares)
    ahead = (current_s, *(rest_s * share / whole for share in shares)) if whole > 0.0 else (current_s + rest_s,)
    needed_s = current_s + rest_s
    probability = 1.0
    if left_s is not None:
        longer_s = deviations([forecast], [0]) * tau_s
        probability = float(chances(np.array([left_s]), np.array([needed_s]), longer_s)[0])
    return Outlook(
        ahead_s=ahead,
        left_s=needed_s,
        probability=probability,
        calls=forecast.calls,
        tokens=forecast.output_tokens,
        pattern=pattern,
    )
