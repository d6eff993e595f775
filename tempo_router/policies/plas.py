"""Least attained service of the program first (Autellix)."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import (
    BEST_EFFORT_KEY,
    CHUNKED,
    BatchRule,
    Context,
    Job,
    Policy,
    as_engine_priority,
    bounded_s,
)

BOUNDS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Service in seconds from which a call belongs to the next queue. The paper gives none; doubling, as is usual."""


@dataclass(frozen=True, slots=True)
class LeastAttainedProgram(Policy):
    """Orders by the service that a call's program has had, in queues that double; inside a queue by arrival.

    Service: summed run time of the program's ended calls, plus the decode time of this call so far, so that a call
    that outlives its quantum is demoted; a request alone is a program of one call. A program that waited `beta`
    times as long as it ran goes back to the first queue. Ties by ticket. Starves long programs, up to beta; knows
    no targets, so what is late or relegated keeps its place.

    Source: PLAS of Autellix (arXiv 2502.13965). Queue bounds and beta are not published; beta is that of a public
    simulator. The paper resets both times after such a promotion; a policy that remembers nothing cannot, so a
    program stays promoted until its service has caught up.
    """

    bounds_s: tuple[float, ...] = BOUNDS_S
    beta: float = 8.0
    is_static: ClassVar[bool] = False
    is_class_blind: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    frame_s: ClassVar[float] = 0.3
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Its queue, then its arrival."""
        program = context.ledger.program(request.spec)
        before_s, waited_s = (0.0, 0.0) if program is None else (program.attained_s, program.waited_s)
        return queue_key(request, context, before_s, waited_s, before_s, self.bounds_s, self.beta)

    def engine_priority(self, request: Job, context: Context) -> int:
        """Milliseconds of the key."""
        return as_engine_priority(self.key(request, context), 1e3)


def queue_key(
    job: Job,
    context: Context,
    service_s: float,
    waited_s: float,
    ran_s: float,
    bounds_s: tuple[float, ...],
    beta: float,
) -> float:
    """The queue of a call whose program had `service_s` before it, then its arrival.

    waited_s, ran_s: of the program's calls before this one.
    """
    own_s = job.generated_tokens * context.pace.tau_s
    own_wait_s = max(context.now_s - job.spec.arrival_s - own_s, 0.0)
    is_starved = ran_s > 0 and waited_s + own_wait_s >= beta * (ran_s + own_s)
    queue = 0 if is_starved else bisect_right(bounds_s, service_s + own_s)
    return queue * BEST_EFFORT_KEY + bounded_s(job.spec.arrival_s)
