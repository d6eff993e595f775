"""A fixed order of the classes: the strong simple rival (docs/scheduling.md)."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import (
    BEST_EFFORT_KEY,
    CHUNKED,
    BatchRule,
    Context,
    Job,
    Policy,
    best_effort_key,
    bounded_s,
    class_rank,
    due_s,
    goes_last,
)


@dataclass(frozen=True, slots=True)
class ClassPriority(Policy):
    """Streams, then deadline requests, then program calls, then best effort and what was relegated.

    Inside a class by what falls due first, ties by ticket. Starves every class by the ones above it: under overload
    programs go first to nothing. Preempts, which costs no goodput and brings first tokens sooner. Hard to beat where
    best effort absorbs the overload.
    Source: the priority policies of vLLM and of inference gateways, with deadline order inside a priority.
    """

    is_static: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """Its class, then when it falls due."""
        spec = request.spec
        if goes_last(request):
            return best_effort_key(spec)
        return bounded_s(due_s(request)) - (3 - class_rank(spec)) * BEST_EFFORT_KEY
