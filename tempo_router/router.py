"""The scheduling core: events in, actions out. It never waits, never looks at a clock and never touches a network.

The life of a request here: Arrived -> waiting (in the queue, or unplaceable while no replica could hold it)
-> running (dispatched to a replica) -> gone. A dispatch that nobody wants any longer stays with its replica,
aborted, until the replica says that it ended, because until then it holds a slot and KV cache.

Who waits is in `waiting_line`, who runs in `fleet`; `dispatcher` moves requests from the one to the other.
"""

from collections import Counter, deque
from typing import assert_never

from tempo_router.actions import Abort, Action, Admit, Evict, Expire, Reject, RejectReason, Relegate, Retune
from tempo_router.backlog import expected_wait_s
from tempo_router.commitment import HoldingBack, held_back
from tempo_router.config import SchedulingConfig
from tempo_router.deferrals import note_deferrals
from tempo_router.dispatcher import Dispatcher
from tempo_router.events import (
    Arrived,
    CallFinished,
    Cancelled,
    DrainStarted,
    Event,
    Predicted,
    ProgramFinished,
    ProgramOutlined,
    ProgramRelegated,
    ProgramRetargeted,
    Progressed,
    ReplicaAttached,
    ReplicaDraining,
    ReplicaLost,
    RunningCall,
    Settled,
    Ticked,
)
from tempo_router.fleet import Fleet
from tempo_router.groups import GroupBook
from tempo_router.hopeless import HopelessTimers
from tempo_router.ledger import Ledger, Program
from tempo_router.moved_deadlines import MovedDeadlines
from tempo_router.outlook import least_s, outlook
from tempo_router.plan_turns import PlanTurns
from tempo_router.policies import Context, build_policy
from tempo_router.policies.base import ColumnPolicy
from tempo_router.prediction import LengthHistograms, Lengths, LengthSample
from tempo_router.prefixes import PrefixMemory
from tempo_router.program_history import ProgramHistory
from tempo_router.program_view import Outlook
from tempo_router.replicas import Call, Replica
from tempo_router.request import (
    BestEffort,
    DispatchId,
    Latency,
    ProgramCall,
    ProgramId,
    ReplicaId,
    RequestId,
    RequestSpec,
    slo_class,
)
from tempo_router.snapshot import RouterSnapshot, router_snapshot
from tempo_router.standing import Standing
from tempo_router.step_time import StepTimeModel
from tempo_router.tempo_plan import TempoPlan
from tempo_router.value import cost_s, expected_good, hopeless_at_s
from tempo_router.waiting import WaitingRequest
from tempo_router.waiting_line import WaitingLine

_REFRESHED_PER_TICK = 32
_MAX_ENDED_EARLY = 1024
_MAX_SAMPLES = 4096
_MAX_LOST_UNSEEN = 10_000
_LEAST_PLAN_S = 0.02
_PLAN_S_PER_JOB = 4e-5
"""An arrival waits no longer for its plan than this times what the last one looked at, ten times what that takes: a
plan over 250 requests comes at most every 0.02 s, over 2,500 every 0.1 s. On an H100 at its saturated throughput the
P95 of the time to first token was 0.35 s with plans at most every 0.1 s, and is 0.30 s, at equal goodput."""
_MOST_PLANNED = 1024
"""Waiting requests in one plan, at most, and twice the slots of the fleet: some 5 ms (docs/benchmarks.md)."""
_SURE = 0.1
"""A program needs more than this quantile of what programs like it needed, nine times in ten."""
_FIRST_MEAN_LENGTH = 230.0
_MEAN_LENGTH_SMOOTHING = 0.002


class RouterCore:
    """Turns events into actions. `handle` is the only way the state changes; equal events give equal actions.

    epoch: number of this router's life; part of every dispatch id. lengths, history: what was learnt earlier of
    answer lengths and of programs.
    """

    def __init__(
        self,
        config: SchedulingConfig,
        *,
        epoch: int = 0,
        lengths: LengthHistograms | None = None,
        history: ProgramHistory | None = None,
    ) -> None:
        self._config = config
        self._policy = build_policy(config)
        self._lengths = lengths if lengths is not None else LengthHistograms()
        self._is_committed = config.policy == "tempo" and config.switches.commitment
        self._line = WaitingLine(HoldingBack(self._policy) if self._is_committed else self._policy)
        self._groups = GroupBook()
        self._ledger = Ledger()
        self._history = history if history is not None else ProgramHistory()
        self._history.lengths = self._lengths
        self._plan = TempoPlan(config) if config.policy == "tempo" else None
        # What a plan has no room for would only crowd the engine's queue.
        is_deep = self._policy.preempts and self._plan is None
        self._fleet = Fleet(epoch, config.replica_queue_depth, is_deep=is_deep)
        self._by_columns = self._policy if isinstance(self._policy, ColumnPolicy) else None
        self._turns = PlanTurns()
        self._plan_at_s = float("-inf")
        self._least_plan_s = _LEAST_PLAN_S
        self._prefixes = PrefixMemory()
        self._timers = HopelessTimers()
        self._dispatcher = Dispatcher(
            config,
            self._policy,
            self._line,
            self._fleet,
            self._groups,
            self._ledger,
            self._prefixes,
            self._timers,
            has_plan=self._plan is not None,
        )
        self._moved = MovedDeadlines(self._ledger, self._line, self._timers, self._plan)
        self._samples: deque[LengthSample] = deque(maxlen=_MAX_SAMPLES)
        self._steps = StepTimeModel()
        self._ended_early: dict[RequestId, tuple[RequestSpec, int]] = {}
        self._lost_unseen: dict[ProgramId, None] = {}
        self._mean_length = _FIRST_MEAN_LENGTH
        self._now_s = float("-inf")
        self._next_ticket = 0
        self._is_settled = False
        self._is_draining = False

    # ---- the door, and what can be asked ----

    def handle(self, event: Event) -> list[Action]:  # noqa: C901  # one case per event
        """Take note of one event and say what to do about it, in order.

        Times may repeat or step back; the core's own time never does. Raises InvalidEventError, with nothing
        changed, for what cannot have happened.
        """
        actions: list[Action] = []
        if event.at_s > self._now_s:
            self._now_s = event.at_s
        match event:
            case Progressed():
                self._on_progressed(event, actions)
            case Arrived(spec=spec):
                self._on_arrived(spec, actions)
            case Cancelled(request_id=request_id, is_complete=is_complete):
                self._on_cancelled(request_id, is_complete, actions)
            case ReplicaAttached():
                self._on_attached(event, actions)
            case ReplicaDraining(replica_id=replica_id):
                self._on_replica_draining(replica_id)
            case ReplicaLost(replica_id=replica_id):
                self._on_replica_lost(replica_id, actions)
            case Ticked():
                self._line.queue.refresh(_REFRESHED_PER_TICK, self._context())
                self._dispatcher.look_again()
            case Predicted():
                self._on_predicted(event)
            case ProgramFinished(program_id=program_id, is_complete=is_complete):
                self._on_program_finished(program_id, is_complete)
            case ProgramOutlined(program_id=program_id, stages=stages):
                self._history.outlined(program_id, stages)
                if program_id in self._ledger.programs:
                    self._plan_at_s = min(self._plan_at_s, self._now_s)
            case ProgramRelegated(program_id=program_id):
                self._on_program_relegated(program_id, actions)
            case ProgramRetargeted(program_id=program_id, deadline_s=deadline_s):
                self._on_program_retargeted(program_id, deadline_s, actions)
            case Settled():
                self._is_settled = True
            case DrainStarted():
                self._is_draining = True
            case _:
                assert_never(event)
        for request in self._timers.due(self._steps, self._now_s):
            if isinstance(request, Call):
                self._take_back(request, actions)
            else:
                self._dispatcher.give_up(request, self._context(), actions)
        self._plan_if_due(actions)
        if self._is_settled and self._dispatcher.may_dispatch(self._now_s):
            self._dispatcher.dispatch(self._context(), actions)
        self._timers.sweep(len(self._line.requests) + len(self._fleet.calls))
        return actions

    @property
    def lengths(self) -> LengthHistograms:
        """What has been learnt about answer lengths; the shell stores its snapshot."""
        return self._lengths

    @property
    def steps(self) -> StepTimeModel:
        """The step-time model over all replicas."""
        return self._steps

    @property
    def ledger(self) -> Ledger:
        """Programs in progress and tenants."""
        return self._ledger

    def outlook(self, program_id: ProgramId, left_s: float | None) -> Outlook | None:
        """What is expected of a program whose calls came here; None for others. left_s: until its deadline."""
        program = self._ledger.programs.get(program_id)
        if program is None:
            return None
        history = self._history
        return outlook(
            list(program.live.values()), history.forecast(program), history.stages_ahead(program), self._steps.pace(),
            wait_s=history.wait_s(self._now_s), left_s=left_s, pattern=history.match(program),
        )  # fmt: skip

    def least_left_s(self, program_id: ProgramId) -> float:
        """Seconds that a program still needs even if all goes well; 0 where nothing is known of it."""
        program = self._ledger.programs.get(program_id)
        if program is None:
            return 0.0
        chain = self._history.least_chain_tokens(program, _SURE)
        return least_s(list(program.live.values()), chain, self._steps.pace())

    def worth_of(self, spec: RequestSpec, lengths: Lengths) -> tuple[float, float]:
        """(GPU seconds, value per GPU second) of a request by itself, as estimated now."""
        pace = self._steps.pace()
        cost = cost_s(spec, lengths, pace)
        tokens, chance = expected_good(spec, lengths, pace, self._now_s)
        weight = self._config.request_weight
        return cost, ((1 - weight) * tokens + weight * self._mean_length * chance) / cost

    def lengths_of(self, request_id: RequestId) -> Lengths:
        """What is known of the answer's length of a request that waits or runs. Raises KeyError for others."""
        live = self._line.requests.get(request_id)
        return live.lengths if live is not None else self._fleet.running[request_id].lengths

    def drain_samples(self) -> list[LengthSample]:
        """Lengths of answers that ended since the last question, the newest few thousand, for a trainer."""
        samples = list(self._samples)
        self._samples.clear()
        return samples

    def knows(self, request_id: RequestId, attempt: int) -> bool:
        """Whether this very attempt waits or runs."""
        spec = self.spec_of(request_id)
        return spec is not None and spec.attempt == attempt

    def spec_of(self, request_id: RequestId) -> RequestSpec | None:
        """The spec of a request that waits or runs; None for all others."""
        live = self._line.requests.get(request_id) or self._fleet.running.get(request_id)
        return None if live is None else live.spec

    def is_relegated(self, request_id: RequestId) -> bool:
        """Whether the request waits or runs, and can no longer meet its SLO."""
        live = self._line.requests.get(request_id) or self._fleet.running.get(request_id)
        return live is not None and live.is_relegated

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._line.requests and not self._fleet.calls

    def is_waiting(self, request_id: RequestId) -> bool:
        """Whether the request waits, on no replica yet."""
        return request_id in self._line.requests

    def snapshot(self) -> RouterSnapshot:
        """Counts as of the last event. O(waiting requests and running calls)."""
        return router_snapshot(self._line, self._fleet, is_settled=self._is_settled, is_draining=self._is_draining)

    # ---- arrivals ----

    def _on_arrived(self, spec: RequestSpec, actions: list[Action]) -> None:
        live = self._line.requests.get(spec.request_id) or self._fleet.running.get(spec.request_id)
        if live is not None and spec.attempt <= live.spec.attempt:
            # A resubmission after a router's restart crossed with what the replica told; or late news.
            actions.append(Admit(spec.request_id, spec.attempt, 0.0, 1.0))
            return
        spec = self._moved.of(spec)
        request = self._new_waiting(spec)
        if spec.attempt == 0:
            refusal = self._refusal(request)
            self._groups.note_arrival(spec, refusal)
            if refusal is not None:
                actions.append(Reject(spec.request_id, spec.attempt, *refusal))
                return
        actions.append(self._admission(request))
        self._retire(spec.request_id, actions)
        self._begin_waiting(request, actions)

    def _new_waiting(self, spec: RequestSpec) -> WaitingRequest:
        lengths = self._lengths.lookup(spec)
        self._next_ticket += 1
        pace = self._steps.pace()
        hopeless_s = hopeless_at_s(spec, lengths, pace)
        return WaitingRequest(spec, self._next_ticket, self._now_s, lengths, cost_s(spec, lengths, pace), hopeless_s)

    def _refusal(self, request: WaitingRequest) -> tuple[RejectReason, float | None] | None:
        """Why a first attempt is not taken, and when to try again; None if it is."""
        spec = request.spec
        group = self._groups.find(spec)
        if group is not None and (group.arrived or group.live):
            return group.refusal
        if self._is_draining:
            return "draining", None
        if self._fleet.kv_sizes and spec.context_tokens + 1 > self._fleet.kv_sizes[-1]:
            return "too_large", None
        if self._config.hopeless == "refuse" and self._is_beyond_help(request):
            return "deadline_impossible", None
        config = self._config
        is_full = (
            len(self._line.requests) + spec.group_size > config.max_waiting_requests
            or self._line.backlog.prompt_tokens + spec.group_size * spec.prompt_tokens > config.max_waiting_tokens
        )
        return ("queue_full", self._line.backlog.retry_after_s(len(self._fleet.kv_sizes))) if is_full else None

    def _admission(self, request: WaitingRequest) -> Admit:
        spec = request.spec
        pace = self._steps.pace()
        ahead_s = self._line.backlog.ahead_s(slo_class(spec.slo), self._policy.is_class_blind)
        wait_s = expected_wait_s(request, ahead_s, self._fleet.next_slot_s(), len(self._fleet.takers), pace)
        if self._is_beyond_help(request):
            return Admit(spec.request_id, spec.attempt, wait_s, 0.0)
        if isinstance(spec.slo, BestEffort):
            return Admit(spec.request_id, spec.attempt, wait_s, 1.0)
        if isinstance(spec.slo, Latency):
            # The wait is a mean: a target of half of it is met about half the time.
            left_s = spec.arrival_s + spec.slo.ttft_s + spec.generated_tokens * spec.slo.tbt_s - self._now_s
            probability = min(1.0, max(0.0, left_s / wait_s))
        else:
            _, probability = expected_good(spec, request.lengths, pace, self._now_s + wait_s)
        return Admit(spec.request_id, spec.attempt, wait_s, probability)

    def _is_beyond_help(self, request: WaitingRequest) -> bool:
        return request.hopeless_at_s <= self._now_s or self._is_of_lost_program(request.spec)

    def _is_of_lost_program(self, spec: RequestSpec) -> bool:
        if not isinstance(spec.slo, ProgramCall):
            return False
        program = self._ledger.program(spec)
        return program.is_lost if program is not None else spec.slo.program_id in self._lost_unseen

    def _came(self, spec: RequestSpec) -> Program | None:
        """The program of a call that the ledger has just been told of; its fate may have been told before it came."""
        program = self._ledger.program(spec)
        if program is not None:
            if program.program_id in self._lost_unseen:
                del self._lost_unseen[program.program_id]
                program.is_lost = True
            self._history.call_came(program, spec.stage, spec.prompt_tokens, self._now_s)
        return program

    def _begin_waiting(self, request: WaitingRequest, actions: list[Action]) -> None:
        spec = request.spec
        self._groups.entered(spec)
        before = self._ledger.program(spec)
        known_s = before.deadline_s if before is not None else None
        self._ledger.arrived(request)
        program = self._came(spec)
        if program is not None and known_s is not None:
            self._moved.stated(program, known_s, actions)
        is_new = program is None or (program.done_calls == 0 and len(program.live) == 1)
        request.cached_tokens = self._prefixes.cached_tokens(spec)
        if self._plan is not None:
            self._turns.enter(request, is_new=is_new)
            self._plan_at_s = min(self._plan_at_s, self._now_s)
        self._dispatcher.enter(request, self._context())
        self._timers.set(request)
        if program is not None and program.is_lost:
            self._dispatcher.give_up(request, self._context(), actions)

    def _retire(self, request_id: RequestId, actions: list[Action]) -> None:
        """The owner gave this request up, or its attempt was overtaken: it neither waits nor runs from now on."""
        request = self._line.requests.get(request_id)
        if request is not None:
            self._dispatcher.withdraw(request)
            self._groups.left(request.spec, was_running=False)
            self._ledger.left(request.spec)
        call = self._fleet.abandon(request_id)
        if call is not None:
            self._groups.left(call.spec, was_running=True)
            self._ledger.left(call.spec)
            actions.append(Abort(call.dispatch_id, call.replica.replica_id))

    def _take_back(self, call: Call, actions: list[Action]) -> None:
        """A call that waits in its engine can no longer meet its SLO: it ends, or goes on as best effort."""
        spec = call.spec
        if self._config.hopeless == "refuse" and not call.generated_tokens:
            self._retire(spec.request_id, actions)
            actions.append(Expire(spec.request_id))
            return
        call.is_given_up = True
        call.standing = call.standing._replace(is_relegated=True)
        actions.append(Relegate(spec.request_id))
        if call.replica.capacity.has_step_planner:
            actions.append(Retune(call.replica.replica_id, ((call.dispatch_id, call.standing),), self._step_cap_s()))

    def _abort(self, call: Call, actions: list[Action]) -> None:
        call.is_aborted = True
        actions.append(Abort(call.dispatch_id, call.replica.replica_id))

    def _on_cancelled(self, request_id: RequestId, is_complete: bool, actions: list[Action]) -> None:
        ended_early = self._ended_early.pop(request_id, None)
        if ended_early is not None:
            # The replica told first: whether the answer was cut off is known only now.
            self._learn_length(*ended_early, is_complete=is_complete)
        request, call = self._line.requests.get(request_id), self._fleet.running.get(request_id)
        if request is not None and request.spec.generated_tokens:
            self._learn_length(request.spec, request.spec.generated_tokens, is_complete=is_complete)
        if call is not None:
            self._learn_length(call.spec, call.generated_tokens, is_complete=is_complete)
        self._retire(request_id, actions)

    def _on_predicted(self, event: Predicted) -> None:
        """A better guess of the length; it is late, or about an older attempt, more often than not."""
        request = self._line.requests.get(event.request_id)
        if request is None or request.spec.attempt != event.attempt:
            return
        request.lengths = event.lengths
        if request.is_queued:
            self._line.queue.rekey(request, self._context())

    def _on_program_finished(self, program_id: ProgramId, is_complete: bool) -> None:
        self._lost_unseen.pop(program_id, None)
        program = self._ledger.program_ended(program_id, is_complete=is_complete)
        if program is not None:
            self._history.program_ended(program, self._now_s, is_complete=is_complete)
        self._history.outlined(program_id, ())

    def _on_program_relegated(self, program_id: ProgramId, actions: list[Action]) -> None:
        program = self._ledger.programs.get(program_id)
        if program is None:
            self._lost_unseen[program_id] = None
            if len(self._lost_unseen) > _MAX_LOST_UNSEEN:
                del self._lost_unseen[next(iter(self._lost_unseen))]
            return
        if program.is_lost:
            return
        program.is_lost = True
        for job in list(program.live.values()):
            if isinstance(job, WaitingRequest):
                if not job.is_relegated:
                    self._dispatcher.give_up(job, self._context(), actions)
            elif isinstance(job, Call) and not job.is_aborted:
                # A plan may have put it last already; its client has not been told.
                self._take_back(job, actions)

    def _on_program_retargeted(self, program_id: ProgramId, deadline_s: float, actions: list[Action]) -> None:
        self._lost_unseen.pop(program_id, None)
        program = self._ledger.programs.get(program_id)
        if program is not None and self._moved.move(program, deadline_s, self._context(), actions):
            self._plan_at_s = self._now_s

    # ---- replicas ----

    def _on_attached(self, event: ReplicaAttached, actions: list[Action]) -> None:
        for reported in event.running:
            self._fleet.check_reported(reported, event.replica_id)
        replica = self._fleet.attach(event.replica_id, event.capacity, self._steps)
        replica.is_draining = replica.is_draining or event.is_draining
        reported_ids = {reported.dispatch_id for reported in event.running}
        for call in list(replica.calls.values()):
            if call.dispatch_id not in reported_ids:
                self._lose(call, actions)
        for reported in event.running:
            self._adopt(reported, replica, actions)
        self._replicas_changed()

    def _adopt(self, reported: RunningCall, replica: Replica, actions: list[Action]) -> None:
        """A replica says that it runs this call. Keep it, take it over, or stop it."""
        call = self._fleet.calls.get(reported.dispatch_id)
        if call is not None:
            unheard = max(0, reported.new_tokens - call.new_tokens)
            replica.progress([call], [(call.dispatch_id, unheard)])
            if call.is_aborted:
                self._abort(call, actions)  # The first word may have been lost with the link.
            return
        spec = self._moved.of(reported.spec)
        call = Call(reported.dispatch_id, spec, replica, self._lengths.lookup(spec), reported.new_tokens)
        self._fleet.add(call)
        if not self._is_wanted(call):
            self._abort(call, actions)
            return
        self._retire(spec.request_id, actions)
        self._fleet.keep(call)
        self._groups.entered(spec)
        self._groups.started(spec, replica.replica_id)
        self._ledger.arrived(call)
        program = self._came(spec)
        self._ledger.started(call, replica.replica_id, 0.0)
        if program is not None and program.is_lost:
            self._take_back(call, actions)

    def _is_wanted(self, newcomer: Call) -> bool:
        """Whether an unknown call that a replica runs is to go on."""
        if self._fleet.is_of_this_life(newcomer.dispatch_id):
            # Made in this life and given up since: evicted, cancelled or ended while the link was down.
            return False
        spec = newcomer.spec
        running, waiting = self._fleet.running.get(spec.request_id), self._line.requests.get(spec.request_id)
        if running is not None:
            return spec.attempt > running.spec.attempt
        return waiting is None or spec.attempt >= waiting.spec.attempt

    def _on_replica_draining(self, replica_id: ReplicaId) -> None:
        replica = self._fleet.replicas.get(replica_id)
        if replica is not None:
            replica.is_draining = True
            self._replicas_changed()

    def _on_replica_lost(self, replica_id: ReplicaId, actions: list[Action]) -> None:
        replica = self._fleet.replicas.pop(replica_id, None)
        if replica is None:
            return  # Told twice: by its link and by an ingress.
        for call in list(replica.calls.values()):
            self._lose(call, actions)
        self._replicas_changed()

    def _lose(self, call: Call, actions: list[Action]) -> None:
        """A call is gone without an end. Its owner submits the request again."""
        self._fleet.release(call)
        if not call.is_aborted:
            self._groups.left(call.spec, was_running=True)
            self._ledger.left(call.spec)
            actions.append(Evict(call.spec.request_id, call.spec.attempt))

    def _replicas_changed(self) -> None:
        """The set of replicas that take work, or their capacities, changed."""
        self._fleet.recount()
        self._dispatcher.replicas_changed(self._context())

    # ---- progress ----

    def _on_progressed(self, event: Progressed, actions: list[Action]) -> None:
        replica = self._fleet.replicas.get(event.replica_id)
        on_replica = replica.calls if replica is not None else {}
        calls = [on_replica.get(dispatch_id) for dispatch_id, _ in event.tokens]
        ended = [on_replica.get(finished.dispatch_id) for finished in event.finished]
        if not (all(calls) and all(ended)):
            self._fleet.check_over(event)
        if replica is None:
            return  # Late news from a replica already given up for lost.
        replica.load = event.load
        if event.step is not None:
            tau_at_most_s = self._dispatcher.hurried_step_s(replica, event.step.duration_s)
            replica.steps.observe(event.step, tau_at_most_s=tau_at_most_s)
            self._steps.observe(event.step, tau_at_most_s=tau_at_most_s)
        begun = replica.progress(calls, event.tokens)
        self._ledger.progressed(calls, event.tokens)
        for one in begun:
            if isinstance(one.spec.slo, ProgramCall) and not one.is_aborted:
                if not one.is_relegated:
                    self._history.call_started(self._now_s - one.spec.arrival_s, self._now_s)
                self._program_progressed(one.spec)
        for call, finished in zip(ended, event.finished, strict=True):
            if call is not None and call.dispatch_id in self._fleet.calls:
                self._on_call_finished(call, finished, actions)

    def _program_progressed(self, spec: RequestSpec) -> None:
        """A call of a program got its first token: those of its calls that wait are gambles no longer."""
        program = self._ledger.program(spec)
        if program is None or not self._is_committed:
            return
        for job in program.live.values():
            if isinstance(job, WaitingRequest) and job.is_queued:
                self._line.queue.rekey(job, self._context())

    def _on_call_finished(self, call: Call, finished: CallFinished, actions: list[Action]) -> None:
        if finished.reason == "lost":
            self._lose(call, actions)
            return
        self._fleet.release(call)
        if call.is_aborted:
            return
        spec = call.spec
        self._groups.left(spec, was_running=True)
        self._note_end(call, finished)
        tokens = spec.generated_tokens + max(finished.output_tokens, call.new_tokens)
        match finished.reason:
            case "completed":
                self._learn_length(spec, tokens, is_complete=True)
            case "error":
                self._learn_length(spec, tokens, is_complete=False)
            case "cancelled":
                self._remember_ended_early(spec, tokens)
            case _:
                assert_never(finished.reason)

    def _note_end(self, call: Call, finished: CallFinished) -> None:
        spec = call.spec
        is_answered = finished.reason in ("completed", "cancelled")
        program = self._ledger.program(spec)
        if program is not None and is_answered:
            self._history.call_ended(program, spec.stage, call.generated_tokens, self._now_s)
        tokens = call.generated_tokens if is_answered else None
        self._ledger.left(spec, run_s=max(0.0, self._now_s - call.since_s), output_tokens=tokens)
        self._prefixes.remember(spec, call.replica.replica_id, call.new_tokens)

    def _remember_ended_early(self, spec: RequestSpec, tokens: int) -> None:
        """Its ingress stopped it at the replica; whether the answer was complete comes with Cancelled."""
        self._ended_early[spec.request_id] = (spec, tokens)
        if len(self._ended_early) > _MAX_ENDED_EARLY:
            oldest = self._ended_early.pop(next(iter(self._ended_early)))
            self._learn_length(*oldest, is_complete=False)

    def _learn_length(self, spec: RequestSpec, tokens: int, *, is_complete: bool) -> None:
        self._lengths.observe(spec, tokens, is_complete=is_complete)
        self._samples.append(LengthSample(spec, tokens, is_complete))
        if is_complete:
            self._mean_length += _MEAN_LENGTH_SMOOTHING * (max(tokens, 1) - self._mean_length)

    # ---- the plan over everything, for policies that make one ----

    def _context(self) -> Context:
        pace = self._steps.pace()
        produced_per_s = max(1.0, self._steps.mean_decodes / max(pace.tau_s, 1e-6))
        return Context(self._now_s, pace, self._mean_length, self._ledger, self._fleet.slots, produced_per_s)

    def _plan_if_due(self, actions: list[Action]) -> None:
        plan = self._plan
        if plan is None or self._now_s < self._plan_at_s or not self._fleet.replicas or not self._is_settled:
            return
        if self._now_s < plan.last_s + self._least_plan_s:
            self._plan_at_s = plan.last_s + self._least_plan_s
            return
        self._plan_at_s = self._now_s + self._config.plan_s
        context = self._context()
        most = _MOST_PLANNED + 2 * sum(replica.capacity.max_running for replica in self._fleet.takers)
        waiting, newcomers = self._turns.next(self._line.requests.values(), most, self._ledger)
        for request, is_new in newcomers:
            plan.arrived(request, is_new=is_new)
        running = [call for call in self._fleet.running.values() if not call.is_aborted]
        self._least_plan_s = max(_LEAST_PLAN_S, _PLAN_S_PER_JOB * (len(waiting) + len(running)))
        plan.make(waiting, running, context, self._history, replicas=max(len(self._fleet.takers), 1))
        queue, columns = self._line.queue, plan.columns(waiting)
        assert self._by_columns is not None, "the policy that makes plans orders by columns"
        keys = self._by_columns.arrange_columns(columns, context)
        if self._is_committed:
            keys = held_back(keys, columns, waiting, self._ledger)
        queue.rekey_many(waiting, keys.tolist())
        for request in self._turns.settle(waiting, len(self._line.requests), most):
            if request.standing.is_admitted:
                # No later plan counts with the room that this one has kept for it.
                request.standing = request.standing._replace(is_admitted=False)
                if request.is_queued:
                    queue.rekey(request, context)
        note_deferrals(waiting, actions)
        note_deferrals(running, actions)
        retuned: dict[ReplicaId, list[tuple[DispatchId, Standing]]] = {}
        for call in running:
            if call.replica.capacity.has_step_planner:
                retuned.setdefault(call.replica.replica_id, []).append((call.dispatch_id, call.standing))
        cap_s = self._step_cap_s()
        if cap_s is not None:
            self._dispatcher.step_cap_s = cap_s
        actions.extend(Retune(replica_id, tuple(standings), cap_s) for replica_id, standings in retuned.items())

    def _step_cap_s(self) -> float | None:
        return self._plan.step_cap_s if self._plan is not None else None

    # ---- self-check ----

    def audit(self) -> None:
        """Check all invariants at once, in O(everything). Raises AssertionError with the story."""
        both = self._line.requests.keys() & self._fleet.running.keys()
        assert not both, f"waiting and running at once: {sorted(both)}"
        self._line.audit()
        self._timers.audit(len(self._line.requests) + len(self._fleet.calls))
        self._fleet.audit()
        specs = [request.spec for request in self._line.requests.values()]
        specs += [call.spec for call in self._fleet.running.values()]
        self._groups.audit(dict(Counter(spec.group_id for spec in specs if spec.group_size > 1)))
        self._dispatcher.audit()
