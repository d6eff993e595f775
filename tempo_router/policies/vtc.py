"""Fair shares of tokens among tenants (virtual token counter)."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import CHUNKED, BatchRule, Context, Job, Policy, as_engine_priority


@dataclass(frozen=True, slots=True)
class VirtualTokenCounter(Policy):
    """Admits from the tenant with the least service so far; inside a tenant first come, first served.

    Service is counted in the ledger as tokens of prompts (weight 1) and of answers (weight 2), and a tenant that was
    idle is lifted to the least active counter. Nothing that runs is preempted. Ties by ticket. Starves nobody beyond
    its share; knows no targets, so under overload everybody may be late together.
    Source: VTC (Sheng et al., OSDI 2024), counters without weights or predictions.
    """

    is_static: ClassVar[bool] = False
    is_class_blind: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Its tenant's counter."""
        tenant = context.ledger.tenant(request.spec)
        return 0.0 if tenant is None else tenant.counter

    def engine_priority(self, request: Job, context: Context) -> int:
        """The counter in whole tokens."""
        return as_engine_priority(self.key(request, context), 1.0)
