"""Shortest remaining processing time."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import BEST_EFFORT_KEY, CHUNKED, BatchRule, Context, Job, Policy, remaining_s


@dataclass(frozen=True, slots=True)
class ShortestRemaining(Policy):
    """Orders waiting and running calls by the GPU seconds that they still need, least first.

    Ties by ticket. Starves long prompts and long answers for as long as shorter ones come. Classes, deadlines and
    relegation do not exist for it. With true lengths (the simulator then gives distributions of one value) it is the
    textbook's rule and no system could run it; with learnt ones it is SJF with sunk work left out.
    Source: Schrage 1968. The work is counted in GPU seconds, prompt included, and not in tokens: a token of a prompt
    costs a tenth of one that is decoded, and counted alike, prompts would decide the order.
    """

    is_static: ClassVar[bool] = False
    is_class_blind: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """GPU seconds still needed."""
        return min(remaining_s(request, context.pace), BEST_EFFORT_KEY)
