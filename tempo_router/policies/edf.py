"""Earliest deadline first."""

from dataclasses import dataclass

from tempo_router.policies.base import Context, as_engine_priority, best_effort_key, bounded_s, due_s
from tempo_router.request import BestEffort
from tempo_router.waiting import WaitingRequest

_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class EarliestDeadline:
    """Orders by what falls due first: a stream's next token, a deadline. Best effort and relegated work go last.

    Ties by ticket. Starves best effort under load. Optimal while everything can be met; past that point it
    spends its time on what is just about to be late. Source: Liu and Layland 1973, applied to due times.
    """

    is_static: bool = True

    def key(self, request: WaitingRequest, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """When it falls due."""
        spec = request.spec
        if request.is_relegated or isinstance(spec.slo, BestEffort):
            return best_effort_key(spec)
        return bounded_s(due_s(spec))

    def engine_priority(self, request: WaitingRequest, context: Context) -> int:
        """The order of the queue, to the microsecond."""
        return as_engine_priority(self.key(request, context), _MICROSECONDS)
