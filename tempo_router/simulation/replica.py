"""A replica in virtual time: the production step planner, and an engine that only takes time."""

import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from tempo_router.events import CallFinished, Progressed, ReplicaCapacity, ReplicaLoad, StepReport
from tempo_router.kv_blocks import KvBlocks
from tempo_router.ledger import Ledger
from tempo_router.live_call import LiveCall, StepPlan
from tempo_router.policies.base import Policy
from tempo_router.prediction import Lengths
from tempo_router.request import DispatchId, ReplicaId, RequestSpec
from tempo_router.simulation.step_profiles import Prefill, StepProfile
from tempo_router.standing import Standing
from tempo_router.step_planner import StepPlanner
from tempo_router.step_time import StepTimeModel

_REPORT_S = 0.1
"""Tokens of calls that only decode are reported to the router at most so often; what starts or ends, at once."""

_OBSERVE_EVERY = 4
_OBSERVE_ALL = 200
"""The step-time model sees the first steps and then every fourth: it converges as well, at a quarter of the cost."""


@dataclass(slots=True)
class Answer:
    """One dispatched call in the engine: the truth about it, and what was delivered.

    target: tokens that this attempt will produce. reported: tokens that the router knows of.
    prompts_done_s: when its prompt was completed, once more after each eviction; each gave a token.
    """

    call: LiveCall
    target: int
    reported: int = 0
    prompts_done_s: list[float] = field(default_factory=list)
    is_over: bool = False


class SimulatedReplica:
    """One engine. `submit` and `abort` at any time; `begin_step` when it is idle; `end_step` when its time is over."""

    def __init__(
        self, replica_id: ReplicaId, profile: StepProfile, policy: Policy, *, slots: int, ledger: Ledger
    ) -> None:
        shape = profile.shape
        self.replica_id = replica_id
        self._profile = profile
        self.kv = KvBlocks(shape.kv_tokens // shape.block_size, shape.block_size)
        self.steps = StepTimeModel()
        self.planner = StepPlanner(
            policy, slots=slots, max_step_tokens=shape.max_step_tokens, kv=self.kv, steps=self.steps, ledger=ledger
        )
        self.capacity = ReplicaCapacity(
            slots, shape.max_step_tokens, self.kv.blocks * shape.block_size, has_step_planner=True
        )
        self.step_count = 0
        self.produced_tokens = 0
        self._answers: dict[DispatchId, Answer] = {}
        self._step: tuple[StepPlan, float] | None = None
        self._step_ends = array("d")
        self._ends: list[tuple[int, int, Answer]] = []
        self._cancelled: list[Answer] = []
        self._report_at_s = 0.0

    @property
    def is_idle(self) -> bool:
        """No step is being computed."""
        return self._step is None

    def submit(
        self,
        dispatch_id: DispatchId,
        spec: RequestSpec,
        lengths: Lengths,
        standing: Standing,
        output_tokens: int,
        now_s: float,
    ) -> Answer:
        """Queue a call; it will produce output_tokens, which only this engine knows."""
        answer = Answer(self.planner.add(dispatch_id, spec, lengths, standing, now_s), output_tokens)
        self._answers[dispatch_id] = answer
        return answer

    def abort(self, dispatch_id: DispatchId) -> None:
        """Stop a call. It ends between two steps, as in an engine."""
        answer = self._answers.get(dispatch_id)
        if answer is not None and not answer.is_over:
            answer.is_over = True
            self._cancelled.append(answer)

    def retune(self, standings: Iterable[tuple[DispatchId, Standing]], step_cap_s: float | None) -> None:
        """How calls stand was planned anew."""
        self.planner.step_cap_s = step_cap_s
        for dispatch_id, standing in standings:
            self.planner.retune(dispatch_id, standing)

    def begin_step(self, now_s: float) -> float | None:
        """Start the next step; its duration in seconds, or None if there is nothing to compute."""
        plan = self.planner.plan(now_s)
        for call in self.planner.resumed:
            self._expect_end(self._answers[call.call_id])
        if plan is None:
            return None
        shapes = [Prefill(tokens, call.computed) for call, tokens in plan.prefills]
        duration_s = self._profile.step_time.duration_s(shapes, plan.decodes, plan.context_tokens)
        if self._profile.drift is not None:
            duration_s *= self._profile.drift(now_s)
        self._step = (plan, duration_s)
        return duration_s

    def end_step(self, now_s: float) -> Progressed | None:
        """The step is over: what the router hears of it, if there is something to tell."""
        assert self._step is not None
        plan, duration_s = self._step
        self._step = None
        self.step_count += 1
        report = StepReport(duration_s, plan.prefill_tokens, plan.decodes, plan.context_tokens, plan.attention_tokens)
        if self.step_count % _OBSERVE_EVERY == 0 or self.step_count < _OBSERVE_ALL:
            self.planner.measured(report)
        completed = self.planner.stepped(plan)
        if plan.decodes:
            self._step_ends.append(now_s)
        self.produced_tokens += plan.decodes + len(completed)
        tokens: list[tuple[DispatchId, int]] = []
        finished: list[CallFinished] = []
        for call in completed:
            answer = self._answers[call.call_id]
            answer.prompts_done_s.append(now_s)
            self._expect_end(answer)
            if call.new_tokens < answer.target:
                self._tell(answer, tokens)
        self._end_answers(tokens, finished)
        finished.extend(self.take_cancelled())
        if now_s >= self._report_at_s:
            self._report_at_s = now_s + _REPORT_S
            for call in self.planner.decoding:
                self._tell(self._answers[call.call_id], tokens)
        elif not (tokens or finished):
            return None
        return Progressed(now_s, self.replica_id, self.load(), report, tuple(tokens), tuple(finished))

    def take_cancelled(self) -> list[CallFinished]:
        """Aborted calls leave; to be called between steps."""
        cancelled, self._cancelled = self._cancelled, []
        for answer in cancelled:
            self._leave(answer)
        return [CallFinished(one.call.call_id, "cancelled", one.call.produced) for one in cancelled]

    def load(self) -> ReplicaLoad:
        """What the engine holds now."""
        waiting = self.planner.waiting
        return ReplicaLoad(
            len(self.planner) - waiting, waiting, self.kv.free_tokens, preemptions=self.planner.evictions
        )

    def token_times_s(self, answer: Answer) -> list[float]:
        """When each token of an answer was delivered, in order."""
        call = answer.call
        times = list(answer.prompts_done_s)
        segments = [*call.segments, (call.joined, self.planner.steps_done)] if call.is_decoding else call.segments
        for first, last in segments:
            times.extend(self._step_ends[first:last])
        times.sort()
        return times

    def _expect_end(self, answer: Answer) -> None:
        call = answer.call
        heapq.heappush(self._ends, (call.joined + answer.target - call.produced, call.ticket, answer))

    def _end_answers(self, tokens: list[tuple[DispatchId, int]], finished: list[CallFinished]) -> None:
        """Finish the answers that have reached their length."""
        ends, steps = self._ends, self.planner.steps_done
        while ends and ends[0][0] <= steps:
            _, _, answer = heapq.heappop(ends)
            # Entries from before a hold or an eviction are stale: the call is not there yet.
            if answer.is_over or answer.call.new_tokens < answer.target:
                continue
            answer.is_over = True
            self._tell(answer, tokens)
            finished.append(CallFinished(answer.call.call_id, "completed", answer.target))
            self._leave(answer)

    def _tell(self, answer: Answer, tokens: list[tuple[DispatchId, int]]) -> None:
        unheard = answer.call.new_tokens - answer.reported
        if unheard:
            answer.reported += unheard
            tokens.append((answer.call.call_id, unheard))

    def _leave(self, answer: Answer) -> None:
        self.planner.remove(answer.call)
        del self._answers[answer.call.call_id]
