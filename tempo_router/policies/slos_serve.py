"""Admission by dynamic programming over prefill deadlines (SLOs-Serve)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tempo_router.policies.base import (
    BEST_EFFORT_KEY,
    CHUNKED,
    BatchRule,
    Context,
    Job,
    Policy,
    as_engine_priority,
    best_effort_key,
    bounded_s,
    due_s,
    goes_last,
    prefill_left_s,
    quantile_left,
)
from tempo_router.request import Latency

_Candidate = tuple[float, float, int]
"""(seconds until its prefill must be done, GPU seconds of that prefill, where it is in the list of jobs)"""


@dataclass(frozen=True, slots=True)
class PlannedAdmission(Policy):
    """Admits the largest set of waiting requests whose prefills all fit before their deadlines, beside the decodes.

    A prefill is due at a stream's TTFT, or when an answer must begin to decode to meet its deadline. Over the waiting
    requests in order of these times the program keeps, for each count of admitted ones, the most GPU time that is
    left: time passes at what decoding leaves of it (`least_share` at least), an admitted prefill takes its cost. The
    highest count that never runs short is admitted. Decoding calls go first, by what falls due; then the admitted, by
    prefill deadline; then the declined, by arrival: they take what is left over. Ties by ticket. Starves the declined,
    long prompts first; best effort and relegated work goes last.

    Source: SLOs-Serve (arXiv 2504.08784) and the form in JITServe's artifact: state (index, budget, admitted). Our
    state stays bounded: at most `considered` candidates, at most as many admitted as slots; the decode load that an
    admission brings is that of the mean candidate. Speculative decoding and its choice of pace are left out.
    """

    share: float = 0.7
    considered: int = 128
    least_share: float = 0.2
    is_static: ClassVar[bool] = False
    preempts: ClassVar[bool] = True
    binds_early: ClassVar[bool] = True
    frame_s: ClassVar[float] = 0.3
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Without the others: as if it were admitted."""
        return self._key_of(request, context, is_admitted=True)

    def arrange(self, jobs: Sequence[Job], context: Context) -> list[float]:
        """Decoding, admitted, declined, best effort. O(n log n + considered x slots)."""
        admitted = self._admitted(jobs, context)
        return [self._key_of(job, context, is_admitted=index in admitted) for index, job in enumerate(jobs)]

    def engine_priority(self, request: Job, context: Context) -> int:
        """Milliseconds of the key."""
        return as_engine_priority(self.key(request, context), 1e3)

    def _key_of(self, job: Job, context: Context, *, is_admitted: bool) -> float:
        if goes_last(job):
            return best_effort_key(job.spec)
        if job.missing_tokens == 0:
            return bounded_s(due_s(job)) - 2 * BEST_EFFORT_KEY
        if is_admitted:
            return bounded_s(self._prefill_due_s(job, context)) - BEST_EFFORT_KEY
        return bounded_s(job.spec.arrival_s)

    def _admitted(self, jobs: Sequence[Job], context: Context) -> set[int]:
        candidates: list[_Candidate] = []
        decode_load = 0.0
        decoding = 0
        loads: list[float] = []
        for index, job in enumerate(jobs):
            if goes_last(job):
                continue
            if job.missing_tokens == 0:
                decoding += 1
                decode_load += self._load(job, context)
                continue
            left_s = self._prefill_due_s(job, context) - context.now_s
            cost_s = prefill_left_s(job, context.pace)
            if left_s >= cost_s:
                candidates.append((left_s, cost_s, index))
                loads.append(self._load(job, context))
        candidates.sort(key=lambda candidate: (candidate[0], jobs[candidate[2]].ticket))
        slots = max(context.slots - decoding, 1)
        if not loads:
            return set()
        load = sum(loads) / len(loads)
        return most_that_fit(candidates[: self.considered], slots, decode_load, load, self.least_share)

    def _prefill_due_s(self, job: Job, context: Context) -> float:
        if isinstance(job.spec.slo, Latency):
            return due_s(job) - context.pace.tau_s
        return due_s(job) - self._left(job) * context.pace.tau_s

    def _left(self, job: Job) -> float:
        return quantile_left(job.lengths, self.share, job.generated_tokens, job.spec.max_output_tokens)

    def _load(self, job: Job, context: Context) -> float:
        """GPU seconds per second that decoding it takes at the pace that its target asks for."""
        pace, spec = context.pace, job.spec
        held = spec.prompt_tokens + job.generated_tokens
        token_s = pace.share_s + pace.decode_s + pace.context_token_s * held
        if isinstance(spec.slo, Latency):
            return token_s / max(spec.slo.tbt_s, pace.tau_s)
        left_s = due_s(job) - context.now_s
        return token_s * min(self._left(job) / left_s if left_s > 0 else 1 / pace.tau_s, 1 / pace.tau_s)


def most_that_fit(
    candidates: Sequence[_Candidate], slots: int, decode_load: float, load: float, least_share: float
) -> set[int]:
    """Indices of the largest set that never runs short, of those the one that leaves the most time."""
    count = len(candidates)
    most = min(slots, count)
    # (admitted count,): GPU seconds left at the last deadline looked at; minus infinity where that is impossible.
    left_s = np.full(most + 1, -np.inf)
    left_s[0] = 0.0
    growth = np.maximum(1.0 - decode_load - load * np.arange(most + 1), least_share)
    taken = np.zeros((count, most + 1), dtype=bool)
    before_s = 0.0
    for row, (due_in_s, cost_s, _) in enumerate(candidates):
        left_s += (due_in_s - before_s) * growth
        before_s = due_in_s
        with_it = left_s[:-1] - cost_s
        with_it[with_it < 0] = -np.inf
        is_better = with_it > left_s[1:]
        taken[row, 1:] = is_better
        left_s[1:] = np.where(is_better, with_it, left_s[1:])
    admitted = int(np.flatnonzero(left_s > -np.inf)[-1])
    chosen: set[int] = set()
    for row in range(count - 1, -1, -1):
        if taken[row, admitted]:
            chosen.add(candidates[row][2])
            admitted -= 1
    return chosen
