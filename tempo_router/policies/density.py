"""Tempo's own order: expected value per GPU second still needed."""

import math
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
    best_effort_key,
    goes_last,
)
from tempo_router.value import cost_s, expected_good

BINS_PER_OCTAVE = 16
"""Densities within 4.4 % of each other count as equal and go by arrival: estimates are far coarser than that,
and a queue of a hundred thousand need not be looked through again for every millisecond that passes."""


@dataclass(frozen=True, slots=True)
class ValueDensity(Policy):
    """Orders by expected value over remaining cost, highest first, in bins of a sixteenth of an octave.

    Value = (1 - request_weight) x expected good tokens + request_weight x mean length x P(SLO met). Inside a bin by
    ticket. Best effort and relegated work go last, by arrival. Starves best effort, then long answers and late
    streams, while denser work keeps coming; the router's trickle bounds that.
    Source: the service density of Tempo (arXiv 2504.20068); value and cost as in docs/scheduling.md.
    """

    request_weight: float = 0.75
    is_static: ClassVar[bool] = False
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Minus the bin of its density."""
        spec = request.spec
        if goes_last(request):
            return best_effort_key(spec)
        tokens, probability = expected_good(spec, request.lengths, context.pace, context.now_s)
        weight = self.request_weight
        value = (1 - weight) * tokens + weight * context.mean_length * probability
        if value <= 0:
            return BEST_EFFORT_KEY
        return -float(math.floor(BINS_PER_OCTAVE * math.log2(value / cost_s(spec, request.lengths, context.pace))))

    def engine_priority(self, request: Job, context: Context) -> int:
        """The order of the queue, in bins."""
        return as_engine_priority(self.key(request, context), 1.0)
