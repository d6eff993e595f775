"""The SLO-deadline order of llm-d's flow control."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import CHUNKED, BatchRule, Context, Job, Policy, best_effort_key, bounded_s, goes_last
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall


@dataclass(frozen=True, slots=True)
class SloDeadline(Policy):
    """The gateway dispatches what was received plus its stated target first; the engine then serves in that order.

    The target is what the client's header says: TTFT of a stream, and for whole answers the time to their deadline, as
    llm-d's own batch gateway fills that header in. Without a target a request goes behind all that have one, by
    arrival. Ties by ticket. Nothing that was dispatched is preempted, and the engine is vLLM: first come, first
    served. Starves requests without a target; past saturation it spends its time on what is just about to be late.
    Source: the plugin slo-deadline-ordering-policy of llm-d's router (gateway-api-inference-extension, pkg/epp). That
    one drops what outlives a time limit in the queue; the nearest that a policy has is to put relegated work last.
    """

    is_static: ClassVar[bool] = True
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """When its first token or its whole answer was asked for."""
        spec = request.spec
        if goes_last(request):
            return best_effort_key(spec)
        match spec.slo:
            case Latency(ttft_s=target_s) | Deadline(ttlt_s=target_s) | ProgramCall(ttlt_s=target_s):
                return bounded_s(spec.arrival_s + target_s)
            case BestEffort():
                return best_effort_key(spec)

    def arrange(self, jobs: Sequence[Job], context: Context) -> list[float]:  # noqa: ARG002  # the protocol passes it
        """Inside the engine: by arrival there."""
        return [bounded_s(job.since_s) for job in jobs]
