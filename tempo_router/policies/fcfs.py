"""First come, first served: the baseline."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import CHUNKED, BatchRule, Context, Job, Policy, bounded_s


@dataclass(frozen=True, slots=True)
class FirstCome(Policy):
    """Orders by arrival at the ingress, whatever the class; relegation changes nothing.

    Ties by ticket. Starves nobody; under overload everybody waits past the target. An evicted request keeps its
    arrival and so goes ahead of newer ones. Decodes go on in every step and prompts come in chunks beside them.
    Source: Sarathi-Serve (Agrawal et al., OSDI 2024) and the default of most engines since; loads are stated relative
    to what this policy saturates at.
    """

    is_static: ClassVar[bool] = True
    is_class_blind: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """Its arrival."""
        return bounded_s(request.spec.arrival_s)
