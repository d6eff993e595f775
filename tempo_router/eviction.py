"""Whose KV cache a prompt may take by choice, and when that is worth it. A full cache asks nobody (step_planner.py)."""

from collections.abc import Iterable

from tempo_router.policies.base import Job, goes_last, remaining_s
from tempo_router.request import Latency
from tempo_router.step_time import Pace

MOST_TAKEN = 2
"""How often one call loses its cache by choice; then it keeps it, and so comes to its end."""

WORTH = 2.0
"""How many times what is lost must be gained: both are estimates, and whoever waits is served later, not never."""


def may_lose(job: Job, times_taken: int) -> bool:
    """Its cache can be taken by choice: not that of a stream that someone reads, nor of one taken from too often.

    times_taken: how often that has happened. A stream that is relegated has lost its reader's target already.
    """
    is_read = isinstance(job.spec.slo, Latency) and job.generated_tokens > 0 and not job.is_relegated
    return not is_read and times_taken < MOST_TAKEN


def is_worth(asker: Job, victims: Iterable[tuple[Job, int]], pace: Pace) -> bool:
    """Whether the asker gains enough for what the victims lose. victims: (job, tokens of its context in the cache).

    Gained is the value that the asker can still have: its density times the GPU seconds that it needs. Lost are the
    GPU seconds in which the victims' context is computed again, each second at the density of its victim. Densities
    have any scale, but it is the same on both sides. Best effort and what is beyond help lose nothing. Who has no
    density yet counts as the asker does: then seconds are compared with seconds.
    """
    density = asker.standing.density or 1.0
    lost = 0.0
    for victim, tokens in victims:
        if not goes_last(victim):
            lost += (victim.standing.density or density) * pace.prefill_s(tokens)
    return density * remaining_s(asker, pace) >= WORTH * lost
