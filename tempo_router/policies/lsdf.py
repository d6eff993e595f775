"""Largest service density first: the order of Tempo's first version."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import (
    BEST_EFFORT_KEY,
    CHUNKED,
    BatchRule,
    Context,
    Job,
    Policy,
    as_engine_priority,
    best_effort_key,
    goes_last,
    quantile_left,
)
from tempo_router.policies.programs import keys_by_program
from tempo_router.policies.service_gain import LEAST_S, gain, stream_target_s
from tempo_router.request import Deadline, Latency, ProgramCall


@dataclass(frozen=True, slots=True)
class LargestServiceDensity(Policy):
    """Orders by the service gain that can still be had over the service time that it takes, highest first.

    The gain is discounted by (target / expected end) ** alpha, so late work sinks but keeps some worth. The service
    time is the decode time of an upper bound of the rest of the answer; the bound is looked up again as tokens come,
    the "start conservative, then tighten" of the paper. The calls of a program share one density: the sum of their
    gains over the sum of their times (`adds_siblings` False: over the longest). A stream's target is taken at the
    bound of its length; a call's is its program's deadline. Ties by ticket. Starves long prompts never, long answers
    of programs first, and work long past its target. Best effort and relegated work go last.

    share: quantile of the bound. alpha: 1 is the default of the published code, its experiments set 100; between them
    more was met. Simulated (mixed111_poisson30, 600 s, A100, 1.5x, 48 slots), good tokens/s: share 0.95 with alpha 1,
    10, 100: 643, 740, 689; share 0.7: 590 and 622 with 1 and 100; longest instead of summed siblings 542. 128
    slots, alpha 1: 428.
    Source: Tempo (arXiv 2504.20068 v1); the formulas are those of its code (service_gain.py). Unlike that code the
    bound never lies below what was produced, and the true length of a stream is not used.
    """

    share: float = 0.95
    alpha: float = 10.0
    adds_siblings: bool = True
    is_static: ClassVar[bool] = False
    preempts: ClassVar[bool] = True
    frame_s: ClassVar[float] = 0.3
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Minus its density."""
        if goes_last(request):
            return best_effort_key(request.spec)
        program = context.ledger.program(request.spec)
        return self._key(program.live.values() if program is not None and program.live else (request,), context)

    def arrange(self, jobs: Sequence[Job], context: Context) -> list[float]:
        """The key of each; that of a program is computed once."""
        return keys_by_program(self, jobs, context)

    def engine_priority(self, request: Job, context: Context) -> int:
        """Thousandths of the key: densities are below a million tokens per second in practice."""
        return as_engine_priority(self.key(request, context), 1e3)

    def _key(self, jobs: Iterable[Job], context: Context) -> float:
        v = context.pace.tau_s
        known = [(job, self._left(job)) for job in jobs]
        times = [max(v * left, LEAST_S) for _, left in known]
        needed_s = sum(times) if self.adds_siblings else max(times)
        total = 0.0
        for job, left in known:
            length = job.generated_tokens + left
            total += gain(job, length, _target_s(job, length), needed_s, context, self.alpha)
        return max(-total / needed_s, -(BEST_EFFORT_KEY**2))

    def _left(self, job: Job) -> float:
        return quantile_left(job.lengths, self.share, job.generated_tokens, job.spec.max_output_tokens)


def _target_s(job: Job, length: float) -> float:
    match job.spec.slo:
        case Latency() as slo:
            return stream_target_s(slo, length)
        case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
            return ttlt_s
        case _:
            return 0.0
