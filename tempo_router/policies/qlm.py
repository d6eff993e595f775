"""Groups of requests ordered by the violation that their waiting time predicts (QLM)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, assert_never

from tempo_router.policies.base import (
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
)
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, Slo
from tempo_router.value import PREFILL_WALL_RATIO

_GroupKey = tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class _Group:
    """jobs: in order of arrival. is_streaming: streams that have begun; their target is met or missed.

    latest_s: when the most pressing of them must begin. work, spread: mean and variance of the tokens that they still
    produce, prefill included at what it costs in tokens.
    """

    jobs: list[tuple[Job, int]]
    is_streaming: bool
    latest_s: float
    work: float
    spread: float


@dataclass(frozen=True, slots=True)
class RequestGroups(Policy):
    """Orders groups of like requests so that few of them wait too long; inside a group first come, first served.

    A group is a model, a class, a power of two of the target, begun or not, in runs of at most `group_size`. By the
    central limit theorem the wait for the tokens ahead is normal with mean (tokens ahead) / rate; `z` of its
    deviations are added. Groups are placed one after another: those that would still be in time at their place, what
    must begin first going first, then those that are predicted to be late, in the same order. A group at the head
    takes the place of a running one. Ties by arrival, then ticket. Starves groups that are late, and best effort and
    relegated work, which goes last.

    Source: QLM (Patke et al., SoCC 2024). Its linear program over several queues becomes greedy list scheduling on
    each replica: with one model there is nothing to swap, and a program solved at each arrival costs seconds.
    """

    group_size: int = 16
    z: float = 1.0
    is_static: ClassVar[bool] = False
    preempts: ClassVar[bool] = True
    binds_early: ClassVar[bool] = True
    frame_s: ClassVar[float] = 0.3
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Without the others: when it must begin."""
        if goes_last(request):
            return best_effort_key(request.spec)
        return bounded_s(_latest_s(request, context))

    def arrange(self, jobs: Sequence[Job], context: Context) -> list[float]:
        """The place of each in the order of groups. O(n log n + groups^2), groups = n / group_size."""
        keys = [0.0] * len(jobs)
        grouped: dict[_GroupKey, list[tuple[Job, int]]] = {}
        for index, job in enumerate(jobs):
            if goes_last(job):
                keys[index] = best_effort_key(job.spec)
            else:
                grouped.setdefault(_group_key(job), []).append((job, index))
        groups = [group for _, members in sorted(grouped.items()) for group in self._split(members, context)]
        place = 0.0
        for group in self._ordered(groups, context):
            for _, index in group.jobs:
                keys[index] = place
                place += 1.0
        return keys

    def engine_priority(self, request: Job, context: Context) -> int:
        """Milliseconds of the key."""
        return as_engine_priority(self.key(request, context), 1e3)

    def _split(self, members: list[tuple[Job, int]], context: Context) -> list[_Group]:
        members.sort(key=lambda member: (member[0].spec.arrival_s, member[0].ticket))
        groups: list[_Group] = []
        for start in range(0, len(members), self.group_size):
            part = members[start : start + self.group_size]
            latest_s = min(_latest_s(job, context) for job, _ in part)
            work = spread = 0.0
            for job, _ in part:
                left = job.lengths.mean_left(job.generated_tokens, job.spec.max_output_tokens)
                upper = job.lengths.upper_left(job.generated_tokens, job.spec.max_output_tokens)
                work += left + prefill_left_s(job, context.pace) * context.produced_per_s
                spread += (max(upper - left, 0.0) / _Z_OF_UPPER) ** 2
            is_streaming = isinstance(part[0][0].spec.slo, Latency) and part[0][0].generated_tokens > 0
            groups.append(_Group(part, is_streaming, latest_s, work, spread))
        return groups

    def _ordered(self, groups: list[_Group], context: Context) -> list[_Group]:
        """Greedy: at each place the most pressing of those that the predicted wait leaves in time."""
        pressing = sorted(groups, key=lambda group: (group.latest_s, group.jobs[0][0].ticket))
        late: list[_Group] = []
        ordered: list[_Group] = []
        work = spread = 0.0
        free = context.slots
        for group in pressing:
            wait_s = (work + self.z * math.sqrt(spread)) / context.produced_per_s
            if group.latest_s < context.now_s + wait_s and not group.is_streaming:
                late.append(group)
                continue
            ordered.append(group)
            free -= len(group.jobs)
            # Whoever has a slot runs at once; the next in line waits for the tokens of those in line before it.
            if free < 0:
                work += group.work
                spread += group.spread
        return ordered + late


_Z_OF_UPPER = 0.524
"""Deviations above the mean of the 0.7-quantile of a normal distribution."""


def _latest_s(job: Job, context: Context) -> float:
    """When it must begin to be in time; infinity never, since only what has a target is asked about."""
    pace, spec = context.pace, job.spec
    prefill_s = PREFILL_WALL_RATIO * prefill_left_s(job, pace)
    if isinstance(spec.slo, Latency):
        return due_s(job) - prefill_s - pace.tau_s
    return due_s(job) - prefill_s - pace.tau_s * job.lengths.upper_left(job.generated_tokens, spec.max_output_tokens)


def _group_key(job: Job) -> _GroupKey:
    rank, target_s = _class_and_target(job.spec.slo)
    return (job.spec.model, rank, math.frexp(target_s)[1], int(job.generated_tokens > 0))


def _class_and_target(slo: Slo) -> tuple[int, float]:
    match slo:
        case Latency(ttft_s=ttft_s):
            return 0, ttft_s
        case Deadline(ttlt_s=ttlt_s):
            return 1, ttlt_s
        case ProgramCall(ttlt_s=ttlt_s):
            return 2, ttlt_s
        case BestEffort():
            return 3, 0.0
        case _:
            assert_never(slo)
