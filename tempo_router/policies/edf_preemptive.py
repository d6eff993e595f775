"""Earliest deadline first, running calls included."""

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
class PreemptiveEarliestDeadline(Policy):
    """Orders waiting and running calls alike by what falls due first; a running one is held for one that is due sooner.

    A stream that is ahead of its schedule falls due late and so yields. Best effort and relegated work go last. Ties
    by ticket. Starves best effort under load; past saturation it spends its time on what is just about to be late.
    Source: Liu and Layland 1973, in its original, preemptive form, applied to due times.
    """

    is_static: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """When it falls due."""
        return best_effort_key(request.spec) if goes_last(request) else bounded_s(due_s(request))
