"""First come, first served: the baseline."""

from dataclasses import dataclass

from tempo_router.policies.base import Context, as_engine_priority, bounded_s
from tempo_router.waiting import WaitingRequest

_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class FirstCome:
    """Orders by arrival at the ingress, whatever the class; relegation changes nothing.

    Ties by ticket. Starves nobody; under overload everybody waits past the target. An evicted request keeps its
    arrival and so goes ahead of newer ones. Source: the default of most engines.
    """

    is_static: bool = True

    def key(self, request: WaitingRequest, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """Its arrival."""
        return bounded_s(request.spec.arrival_s)

    def engine_priority(self, request: WaitingRequest, context: Context) -> int:
        """The order of the queue, to the microsecond."""
        return as_engine_priority(self.key(request, context), _MICROSECONDS)
