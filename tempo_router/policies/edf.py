"""Earliest deadline first."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import (
    CHUNKED,
    BatchRule,
    Context,
    Job,
    Policy,
    best_effort_key,
    bounded_s,
    due_s,
    goes_last,
)


@dataclass(frozen=True, slots=True)
class EarliestDeadline(Policy):
    """Orders by what falls due first: a stream's next token, a deadline. Best effort and relegated work go last.

    Ties by ticket. Starves best effort under load. Optimal while everything can be met; past that point it
    spends its time on what is just about to be late. Source: Liu and Layland 1973, applied to due times.
    """

    is_static: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """When it falls due."""
        spec = request.spec
        if goes_last(request):
            return best_effort_key(spec)
        return bounded_s(due_s(request))
