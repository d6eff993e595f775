"""A fixed order of the classes, arrival inside: what operators configure by hand."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import BEST_EFFORT_KEY, CHUNKED, BatchRule, Context, Job, Policy, bounded_s, class_rank


@dataclass(frozen=True, slots=True)
class ClassArrival(Policy):
    """Streams, then deadline requests, then program calls, then best effort; inside a class by arrival.

    Ties by ticket. Relegation changes nothing: a static order does not know that a request is late. Preempts, as
    vLLM's priority policy does. Starves every class by the ones above it. Source: the priority policy of vLLM and the
    strict priority bands of inference gateways, with the class as the priority.
    """

    is_static: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """Its class, then its arrival."""
        spec = request.spec
        return bounded_s(spec.arrival_s) - (3 - class_rank(spec)) * BEST_EFFORT_KEY
