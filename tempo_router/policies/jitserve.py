"""JITServe as its published code runs."""

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
    quantile_left,
)
from tempo_router.policies.programs import keys_by_program
from tempo_router.policies.service_gain import LEAST_S, gain, stream_target_s
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall


@dataclass(frozen=True, slots=True)
class JitServe(Policy):
    """Orders by discounted service gain over remaining decode time, highest first, then by that time.

    As in the code: alpha = 100, so anything past its target is worth nothing; the length is a 0.95-quantile that is
    drawn once, at arrival; the calls of a program share the sum of their gains over the sum of their times; the
    target of a call is the part of its program's deadline that earlier programs of the app had used by then. Ties by
    ticket. Starves what its pessimistic length makes hopeless, and late work for ever.

    Of the defects that we know of the code, these are kept: only the best `slots` candidates are looked at, so no
    window over input lengths is ever chosen; no minimum share is served to programs; the length is not refined, and
    calls of programs count `program_length` tokens; an answer longer than its bound has a remaining time of 1e-6 s,
    which puts a whole answer first and a stream last; the first stage of a program gets no time
    (`counts_own_stage`), so it goes last; nothing is preempted by value; late work is not dropped.
    These are not: it saw true lengths in a stream's target (here: the bound); its batch could grow while others'
    could not, and injected calls went ahead in reverse order (here: the slots and the queue of everybody); matching
    of graphs by similarity of lengths within a token (here: mean shares per app); errors in the measurement, the
    transport and the swapping, which belong to no policy. Best effort, which it does not know, goes last.
    Simulated (mixed111_poisson30, 600 s, A100, 1.5x), good tokens/s at 32, 48, 128 slots: 766, 748, 453 (its scripts
    use 32). At 128: 476 with its own stage counted, 459 with predicted lengths for calls of programs.
    Source: the artifact of JITServe (NSDI 2026, arXiv 2504.20068 v3), jitserve/scheduler.
    """

    share: float = 0.95
    alpha: float = 100.0
    program_length: int = 1024
    counts_own_stage: bool = False
    is_static: ClassVar[bool] = False
    frame_s: ClassVar[float] = 1.0
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Minus its density, or, where it is worth nothing, the time it would take."""
        spec = request.spec
        if isinstance(spec.slo, BestEffort):
            return best_effort_key(spec)
        program = context.ledger.program(spec)
        return self._key(program.live.values() if program is not None and program.live else (request,), context)

    def arrange(self, jobs: Sequence[Job], context: Context) -> list[float]:
        """The key of each; that of a program is computed once."""
        return keys_by_program(self, jobs, context, are_relegated_apart=False)

    def engine_priority(self, request: Job, context: Context) -> int:
        """Thousandths of the key."""
        return as_engine_priority(self.key(request, context), 1e3)

    def _key(self, jobs: Iterable[Job], context: Context) -> float:
        v = context.pace.tau_s
        known = [(job, self._length(job)) for job in jobs]
        needed_s = sum(max(v * (length - job.generated_tokens), LEAST_S) for job, length in known)
        total = sum(
            gain(job, length, self._target_s(job, length, context), needed_s, context, self.alpha)
            for job, length in known
        )
        density = total / needed_s
        if density > 1e-9:
            return -min(density, BEST_EFFORT_KEY**2)
        return min(max(needed_s, -density), BEST_EFFORT_KEY / 2)

    def _length(self, job: Job) -> float:
        spec = job.spec
        if isinstance(spec.slo, ProgramCall) and self.program_length:
            return float(min(self.program_length, spec.max_output_tokens))
        return quantile_left(job.lengths, self.share, 0, spec.max_output_tokens)

    def _target_s(self, job: Job, length: float, context: Context) -> float:
        spec = job.spec
        match spec.slo:
            case Latency() as slo:
                return stream_target_s(slo, length)
            case Deadline(ttlt_s=ttlt_s):
                return ttlt_s
            case ProgramCall(ttlt_s=ttlt_s):
                return ttlt_s - self._reserved_s(job, context)
            case _:
                return 0.0

    def _reserved_s(self, job: Job, context: Context) -> float:
        """Time of its program's deadline that is not for this stage or those before it."""
        spec = job.spec
        program = context.ledger.program(spec)
        if program is None:
            return 0.0
        stage = spec.stage if self.counts_own_stage else spec.stage - 1
        used = 0.0 if stage < 0 else context.ledger.share_through(spec.app, stage)
        if used is None:
            return 0.0
        return (1.0 - used) * (program.deadline_s - program.arrival_s)
