"""A fixed order of the classes: the strong simple rival (docs/scheduling.md)."""

from dataclasses import dataclass
from typing import assert_never

from tempo_router.policies.base import BEST_EFFORT_KEY, Context, as_engine_priority, best_effort_key, bounded_s, due_s
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, RequestSpec
from tempo_router.waiting import WaitingRequest

_MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class ClassPriority:
    """Streams, then deadline requests, then program calls, then best effort and what was relegated.

    Inside a class by what falls due first, ties by ticket. Starves every class by the ones above it: under
    overload programs go first to nothing. Hard to beat where best effort absorbs the overload.
    """

    is_static: bool = True

    def key(self, request: WaitingRequest, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """Its class, then when it falls due."""
        spec = request.spec
        if request.is_relegated or isinstance(spec.slo, BestEffort):
            return best_effort_key(spec)
        return bounded_s(due_s(spec)) - (3 - _rank(spec)) * BEST_EFFORT_KEY

    def engine_priority(self, request: WaitingRequest, context: Context) -> int:
        """The order of the queue, to the microsecond."""
        return as_engine_priority(self.key(request, context), _MICROSECONDS)


def _rank(spec: RequestSpec) -> int:
    match spec.slo:
        case Latency():
            return 0
        case Deadline():
            return 1
        case ProgramCall():
            return 2
        case BestEffort():
            return 3
        case _:
            assert_never(spec.slo)
