"""The scheduling core: events in, actions out. It never waits, never looks at a clock and never touches a network.

The life of a request here: Arrived -> waiting (in the queue, or unplaceable while no replica could hold it)
-> running (dispatched to a replica) -> gone. A dispatch that nobody wants any longer stays with its replica,
aborted, until the replica says that it ended, because until then it holds a slot and KV cache.
"""

import heapq
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, replace
from typing import assert_never, get_args

from tempo_router.actions import Abort, Action, Admit, Dispatch, Evict, Expire, Reject, RejectReason, Relegate, Retune
from tempo_router.backlog import Backlog, expected_wait_s
from tempo_router.config import SchedulingConfig
from tempo_router.errors import InvalidEventError
from tempo_router.events import (
    Arrived,
    CallFinished,
    Cancelled,
    DrainStarted,
    Event,
    Predicted,
    ProgramFinished,
    Progressed,
    ReplicaAttached,
    ReplicaDraining,
    ReplicaLost,
    RunningCall,
    Settled,
    Ticked,
)
from tempo_router.groups import GroupBook
from tempo_router.ledger import Ledger
from tempo_router.placement import choose, kv_needed
from tempo_router.policies import Context, build_policy
from tempo_router.prediction import LengthHistograms, Lengths, LengthSample
from tempo_router.program_history import ProgramHistory
from tempo_router.replicas import Call, Replica
from tempo_router.request import (
    BestEffort,
    DispatchId,
    GroupId,
    Latency,
    ProgramCall,
    ProgramId,
    ReplicaId,
    RequestId,
    RequestSpec,
    SloClass,
    slo_class,
)
from tempo_router.slo_queue import SloQueue
from tempo_router.standing import Standing
from tempo_router.step_time import StepTimeModel
from tempo_router.tempo_plan import TempoPlan
from tempo_router.value import cost_s, expected_good, hopeless_at_s
from tempo_router.waiting import WaitingRequest

_LOOK_AHEAD = 16
_LOOK_AHEAD_FOR_EMPTY = 256
"""Requests that may be passed over in one go because there is no room for them; bounds the work per event.
More of them while a replica stands empty: with replicas of several sizes it may take only small requests."""

_HOLD_AFTER_S = 1.0
"""How long smaller requests may overtake one that lacks KV cache, before a replica is kept free for it. Guessed."""

_TRICKLE = 16
"""One dispatch in so many may go to the oldest starving request."""

_TIMERS_PER_EVENT = 64
_REFRESHED_PER_TICK = 32
_TIMER_SLACK = 64
_MIN_RECHECK_S = 0.05
_MAX_ENDED_EARLY = 1024
_MAX_SAMPLES = 4096
_MAX_PREFIXES = 65_536
_LEAST_PLAN_S = 0.2
_OVERCOMMIT = 1.5
"""Live calls of a replica with a step planner, at most, over its slots."""

_DISPLACED_PER_FRAME = 8
_FIRST_MEAN_LENGTH = 230.0
_MEAN_LENGTH_SMOOTHING = 0.002


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica as the router sees it. calls: dispatched and not ended, aborted ones included."""

    replica_id: ReplicaId
    calls: int
    running: dict[SloClass, int]
    unstarted: int
    engine_waiting: int
    committed_kv_tokens: int
    free_kv_tokens: int
    kv_tokens: int
    outstanding_s: float
    tau_s: float
    step_error: float
    is_draining: bool


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """Counts for dashboards. waiting includes unplaceable, requests that no attached replica could hold."""

    waiting: dict[SloClass, int]
    running: dict[SloClass, int]
    waiting_tokens: int
    waiting_cost_s: float
    unplaceable: int
    is_settled: bool
    is_draining: bool
    replicas: tuple[ReplicaSnapshot, ...]


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
        self._epoch = epoch
        self._policy = build_policy(config)
        self._lengths = lengths if lengths is not None else LengthHistograms()
        self._queue = SloQueue(self._policy)
        self._waiting: dict[RequestId, WaitingRequest] = {}
        self._unplaceable: dict[RequestId, WaitingRequest] = {}
        self._running: dict[RequestId, Call] = {}
        self._calls: dict[DispatchId, Call] = {}
        self._replicas: dict[ReplicaId, Replica] = {}
        self._kv_sizes: list[int] = []
        self._slots = 128
        self._groups = GroupBook()
        self._ledger = Ledger()
        self._history = history if history is not None else ProgramHistory()
        self._plan = TempoPlan(config) if config.policy == "tempo" else None
        self._plan_at_s = float("-inf")
        self._displace_at_s = float("-inf")
        self._prefixes: OrderedDict[str, tuple[ReplicaId, int]] = OrderedDict()
        self._samples: deque[LengthSample] = deque(maxlen=_MAX_SAMPLES)
        self._backlog = Backlog()
        self._steps = StepTimeModel()
        self._timers: list[tuple[float, int, WaitingRequest]] = []
        self._ended_early: dict[RequestId, tuple[RequestSpec, int]] = {}
        self._mean_length = _FIRST_MEAN_LENGTH
        self._now_s = float("-inf")
        self._next_ticket = 0
        self._next_dispatch = 1
        self._next_replica = 0
        self._since_trickle = 0
        self._hold: tuple[WaitingRequest, Replica] | None = None
        self._blocked_kv: int | None = None
        self._was_all_blocked = False
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
                self._queue.refresh(_REFRESHED_PER_TICK, self._context())
                self._blocked_kv = None
            case Predicted():
                self._on_predicted(event)
            case ProgramFinished(program_id=program_id, is_complete=is_complete):
                self._on_program_finished(program_id, is_complete)
            case Settled():
                self._is_settled = True
            case DrainStarted():
                self._is_draining = True
            case _:
                assert_never(event)
        self._fire_timers(actions)
        self._plan_if_due(actions)
        self._dispatch_while_possible(actions)
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

    def lengths_of(self, request_id: RequestId) -> Lengths:
        """What is known of the answer's length of a request that waits or runs. Raises KeyError for others."""
        live = self._waiting.get(request_id)
        return live.lengths if live is not None else self._running[request_id].lengths

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
        live = self._waiting.get(request_id) or self._running.get(request_id)
        return None if live is None else live.spec

    def is_waiting(self, request_id: RequestId) -> bool:
        """Whether the request waits, on no replica yet."""
        return request_id in self._waiting

    def snapshot(self) -> RouterSnapshot:
        """Counts as of the last event. O(running calls)."""
        running = dict.fromkeys(get_args(SloClass), 0)
        for call in self._running.values():
            running[slo_class(call.spec.slo)] += 1
        return RouterSnapshot(
            waiting=dict(self._backlog.requests),
            running=running,
            waiting_tokens=self._backlog.prompt_tokens,
            waiting_cost_s=sum(self._backlog.cost_s.values()),
            unplaceable=len(self._unplaceable),
            is_settled=self._is_settled,
            is_draining=self._is_draining,
            replicas=tuple(_replica_snapshot(replica) for replica in self._replicas.values()),
        )

    # ---- arrivals ----

    def _on_arrived(self, spec: RequestSpec, actions: list[Action]) -> None:
        live = self._waiting.get(spec.request_id) or self._running.get(spec.request_id)
        if live is not None and spec.attempt <= live.spec.attempt:
            # A resubmission after a router's restart crossed with what the replica told; or late news.
            actions.append(Admit(spec.request_id, spec.attempt, 0.0, 1.0))
            return
        request = self._new_waiting(spec)
        if spec.attempt == 0:
            refusal = self._refusal(request)
            self._groups.note_arrival(spec, refusal)
            if refusal is not None:
                actions.append(Reject(spec.request_id, spec.attempt, *refusal))
                return
        actions.append(self._admission(request))
        self._retire(spec.request_id, actions)
        self._begin_waiting(request)

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
        if self._kv_sizes and spec.context_tokens + 1 > self._kv_sizes[-1]:
            return "too_large", None
        if self._config.hopeless == "refuse" and request.hopeless_at_s <= self._now_s:
            return "deadline_impossible", None
        config = self._config
        is_full = (
            len(self._waiting) + spec.group_size > config.max_waiting_requests
            or self._backlog.prompt_tokens + spec.group_size * spec.prompt_tokens > config.max_waiting_tokens
        )
        return ("queue_full", self._backlog.retry_after_s(len(self._kv_sizes))) if is_full else None

    def _admission(self, request: WaitingRequest) -> Admit:
        spec = request.spec
        pace = self._steps.pace()
        is_class_blind = self._config.policy in ("fcfs", "vllm_fcfs", "ltr", "srpt", "vtc")
        ahead_s = self._backlog.ahead_s(slo_class(spec.slo), is_class_blind)
        takers = [replica for replica in self._replicas.values() if not replica.is_draining]
        wait_s = expected_wait_s(request, ahead_s, takers, self._config.replica_queue_depth, pace)
        if request.hopeless_at_s <= self._now_s:
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

    def _begin_waiting(self, request: WaitingRequest) -> None:
        spec = request.spec
        self._waiting[spec.request_id] = request
        self._backlog.add(request)
        self._groups.entered(spec)
        self._ledger.arrived(request)
        program = self._ledger.program(spec)
        is_new = program is None or (program.done_calls == 0 and len(program.live) == 1)
        if program is not None:
            self._history.call_came(program, spec.stage, spec.prompt_tokens, self._now_s)
        request.cached_tokens = self._cached_tokens(spec)
        if self._plan is not None:
            self._plan.arrived(request, is_new=is_new)
            self._plan_at_s = min(self._plan_at_s, self._now_s)
        self._queue.push(request, self._context())
        self._set_timer(request)
        needed = kv_needed(request, self._kv_sizes)
        if self._blocked_kv is not None and needed is not None and needed < self._blocked_kv:
            self._blocked_kv = None

    def _end_waiting(self, request: WaitingRequest) -> None:
        """The request leaves the waiting ones, wherever among them it is."""
        del self._waiting[request.spec.request_id]
        self._backlog.remove(request)
        self._queue.forget(request)
        self._unplaceable.pop(request.spec.request_id, None)
        if self._hold is not None and self._hold[0] is request:
            self._hold = None
            self._blocked_kv = None

    def _retire(self, request_id: RequestId, actions: list[Action]) -> None:
        """The owner gave this request up, or its attempt was overtaken: it neither waits nor runs from now on."""
        request = self._waiting.get(request_id)
        if request is not None:
            self._end_waiting(request)
            self._groups.left(request.spec, was_running=False)
            self._ledger.left(request.spec)
        call = self._running.pop(request_id, None)
        if call is not None:
            self._groups.left(call.spec, was_running=True)
            self._ledger.left(call.spec)
            self._abort(call, actions)

    def _abort(self, call: Call, actions: list[Action]) -> None:
        call.is_aborted = True
        actions.append(Abort(call.dispatch_id, call.replica.replica_id))

    def _on_cancelled(self, request_id: RequestId, is_complete: bool, actions: list[Action]) -> None:
        ended_early = self._ended_early.pop(request_id, None)
        if ended_early is not None:
            # The replica told first: whether the answer was cut off is known only now.
            self._learn_length(*ended_early, is_complete=is_complete)
        request, call = self._waiting.get(request_id), self._running.get(request_id)
        if request is not None and request.spec.generated_tokens:
            self._learn_length(request.spec, request.spec.generated_tokens, is_complete=is_complete)
        if call is not None:
            self._learn_length(call.spec, call.generated_tokens, is_complete=is_complete)
        self._retire(request_id, actions)

    def _on_predicted(self, event: Predicted) -> None:
        """A better guess of the length; it is late, or about an older attempt, more often than not."""
        request = self._waiting.get(event.request_id)
        if request is None or request.spec.attempt != event.attempt:
            return
        request.lengths = event.lengths
        if request.is_queued:
            self._queue.rekey(request, self._context())

    def _on_program_finished(self, program_id: ProgramId, is_complete: bool) -> None:
        program = self._ledger.program_ended(program_id, is_complete=is_complete)
        if program is not None:
            self._history.program_ended(program, is_complete=is_complete)

    # ---- replicas ----

    def _on_attached(self, event: ReplicaAttached, actions: list[Action]) -> None:
        for reported in event.running:
            self._check_reported(reported, event.replica_id)
        replica = self._replicas.get(event.replica_id)
        if replica is None:
            self._next_replica += 1
            prior = self._steps.coefficients if self._steps.observed else None
            steps = StepTimeModel(prior) if prior is not None else StepTimeModel()
            replica = Replica(event.replica_id, self._next_replica, event.capacity, steps)
            self._replicas[event.replica_id] = replica
        replica.capacity = event.capacity
        replica.is_draining = replica.is_draining or event.is_draining
        reported_ids = {reported.dispatch_id for reported in event.running}
        for call in list(replica.calls.values()):
            if call.dispatch_id not in reported_ids:
                self._lose(call, actions)
        for reported in event.running:
            self._adopt(reported, replica, actions)
        self._replicas_changed()

    def _check_reported(self, reported: RunningCall, replica_id: ReplicaId) -> None:
        self._check_made(reported.dispatch_id)
        call = self._calls.get(reported.dispatch_id)
        if call is not None and call.replica.replica_id != replica_id:
            raise InvalidEventError(
                f"replica {replica_id!r} reports dispatch {reported.dispatch_id} of {call.spec.attempt_id!r}, "
                f"which runs on {call.replica.replica_id!r}"
            )

    def _adopt(self, reported: RunningCall, replica: Replica, actions: list[Action]) -> None:
        """A replica says that it runs this call. Keep it, take it over, or stop it."""
        call = self._calls.get(reported.dispatch_id)
        if call is not None:
            unheard = max(0, reported.new_tokens - call.new_tokens)
            replica.progress([call], [(call.dispatch_id, unheard)])
            if call.is_aborted:
                self._abort(call, actions)  # The first word may have been lost with the link.
            return
        spec = reported.spec
        call = Call(reported.dispatch_id, spec, replica, self._lengths.lookup(spec), reported.new_tokens)
        self._calls[call.dispatch_id] = call
        replica.add(call)
        if not self._is_wanted(call):
            self._abort(call, actions)
            return
        self._retire(spec.request_id, actions)
        self._running[spec.request_id] = call
        self._groups.entered(spec)
        self._groups.started(spec, replica.replica_id)
        self._ledger.arrived(call)
        self._ledger.started(call, replica.replica_id, 0.0)

    def _is_wanted(self, newcomer: Call) -> bool:
        """Whether an unknown call that a replica runs is to go on."""
        if newcomer.dispatch_id >> 32 == self._epoch:
            # Made in this life and given up since: evicted, cancelled or ended while the link was down.
            return False
        spec = newcomer.spec
        running, waiting = self._running.get(spec.request_id), self._waiting.get(spec.request_id)
        if running is not None:
            return spec.attempt > running.spec.attempt
        return waiting is None or spec.attempt >= waiting.spec.attempt

    def _on_replica_draining(self, replica_id: ReplicaId) -> None:
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.is_draining = True
            self._replicas_changed()

    def _on_replica_lost(self, replica_id: ReplicaId, actions: list[Action]) -> None:
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return  # Told twice: by its link and by an ingress.
        for call in list(replica.calls.values()):
            self._lose(call, actions)
        self._replicas_changed()

    def _lose(self, call: Call, actions: list[Action]) -> None:
        """A call is gone without an end. Its owner submits the request again."""
        self._release(call)
        if not call.is_aborted:
            del self._running[call.spec.request_id]
            self._groups.left(call.spec, was_running=True)
            self._ledger.left(call.spec)
            actions.append(Evict(call.spec.request_id, call.spec.attempt))

    def _release(self, call: Call) -> None:
        del self._calls[call.dispatch_id]
        call.replica.remove(call)

    def _replicas_changed(self) -> None:
        """The set of replicas that take work, or their capacities, changed."""
        takers = [replica for replica in self._replicas.values() if not replica.is_draining]
        self._kv_sizes = sorted(replica.capacity.kv_tokens for replica in takers)
        self._slots = max((replica.capacity.max_running for replica in takers), default=128)
        self._blocked_kv = None
        self._hold = None
        context = self._context()
        for request in list(self._unplaceable.values()):
            if kv_needed(request, self._kv_sizes) is not None:
                del self._unplaceable[request.spec.request_id]
                self._queue.push_back(request, context)

    # ---- progress ----

    def _on_progressed(self, event: Progressed, actions: list[Action]) -> None:
        replica = self._replicas.get(event.replica_id)
        on_replica = replica.calls if replica is not None else {}
        calls = [on_replica.get(dispatch_id) for dispatch_id, _ in event.tokens]
        ended = [on_replica.get(finished.dispatch_id) for finished in event.finished]
        if not (all(calls) and all(ended)):
            self._check_over(event)
        if replica is None:
            return  # Late news from a replica already given up for lost.
        replica.load = event.load
        if event.step is not None:
            replica.steps.observe(event.step)
            self._steps.observe(event.step)
        replica.progress(calls, event.tokens)
        for call, (_, tokens) in zip(calls, event.tokens, strict=True):
            if call is not None and not call.is_aborted:
                self._ledger.progressed(call.spec, tokens)
                if call.new_tokens == tokens and isinstance(call.spec.slo, ProgramCall):
                    self._history.call_started(self._now_s - call.spec.arrival_s)
        for call, finished in zip(ended, event.finished, strict=True):
            if call is not None and call.dispatch_id in self._calls:
                self._on_call_finished(call, finished, actions)

    def _check_over(self, event: Progressed) -> None:
        """Dispatches that the replica does not have may be over; they cannot be another's, or never made."""
        reported = [dispatch_id for dispatch_id, _ in event.tokens]
        for dispatch_id in (*reported, *(finished.dispatch_id for finished in event.finished)):
            call = self._calls.get(dispatch_id)
            if call is None:
                self._check_made(dispatch_id)
            elif call.replica.replica_id != event.replica_id:
                raise InvalidEventError(
                    f"replica {event.replica_id!r} reports on dispatch {dispatch_id} of {call.spec.attempt_id!r}, "
                    f"which runs on {call.replica.replica_id!r}"
                )

    def _check_made(self, dispatch_id: DispatchId) -> None:
        epoch, number = dispatch_id >> 32, dispatch_id & 0xFFFFFFFF
        if epoch == self._epoch and not 0 < number < self._next_dispatch:
            raise InvalidEventError(
                f"dispatch {dispatch_id} (number {number} of epoch {epoch}) was never made; "
                f"the last number is {self._next_dispatch - 1}"
            )

    def _on_call_finished(self, call: Call, finished: CallFinished, actions: list[Action]) -> None:
        if finished.reason == "lost":
            self._lose(call, actions)
            return
        self._release(call)
        if call.is_aborted:
            return
        spec = call.spec
        del self._running[spec.request_id]
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
        if spec.prefix_id:
            self._prefixes.pop(spec.prefix_id, None)
            self._prefixes[spec.prefix_id] = (call.replica.replica_id, spec.context_tokens + call.new_tokens)
            if len(self._prefixes) > _MAX_PREFIXES:
                self._prefixes.popitem(last=False)

    def _cached_tokens(self, spec: RequestSpec) -> int:
        """Leading tokens that some replica is believed to have cached."""
        known = self._prefixes.get(spec.prefix_id) if spec.prefix_tokens else None
        return min(spec.prefix_tokens, known[1], spec.context_tokens - 1) if known is not None else 0

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

    # ---- hopeless work ----

    def _is_hopeless(self, request: WaitingRequest) -> bool:
        return self._now_s >= hopeless_at_s(request.spec, request.lengths, self._steps.pace())

    def _set_timer(self, request: WaitingRequest) -> None:
        if request.hopeless_at_s < float("inf"):
            heapq.heappush(self._timers, (request.hopeless_at_s, request.ticket, request))
        if len(self._timers) > 2 * len(self._waiting) + _TIMER_SLACK:
            self._timers = [timer for timer in self._timers if self._is_timed(timer[2])]
            heapq.heapify(self._timers)

    def _is_timed(self, request: WaitingRequest) -> bool:
        return self._waiting.get(request.spec.request_id) is request and not request.is_relegated

    def _fire_timers(self, actions: list[Action]) -> None:
        timers = self._timers
        for _ in range(_TIMERS_PER_EVENT):
            if not timers or timers[0][0] > self._now_s:
                return
            _, ticket, request = heapq.heappop(timers)
            if not self._is_timed(request):
                continue
            # Estimates move on: only what is still beyond help goes.
            at_s = hopeless_at_s(request.spec, request.lengths, self._steps.pace())
            if at_s <= self._now_s:
                self._give_up(request, actions)
            elif at_s < float("inf"):
                heapq.heappush(timers, (max(at_s, self._now_s + _MIN_RECHECK_S), ticket, request))

    def _give_up(self, request: WaitingRequest, actions: list[Action]) -> None:
        """A waiting request can no longer meet its SLO."""
        spec = request.spec
        # An answer that has begun is not broken off, whatever the setting: its client already reads it.
        if self._config.hopeless == "refuse" and not spec.generated_tokens:
            self._end_waiting(request)
            self._groups.left(spec, was_running=False)
            self._ledger.left(spec)
            actions.append(Expire(spec.request_id))
            return
        request.is_relegated = True
        request.standing = replace(request.standing, is_relegated=True)
        actions.append(Relegate(spec.request_id))
        if request.is_queued:
            self._queue.rekey(request, self._context())

    # ---- dispatch ----

    def _context(self) -> Context:
        pace = self._steps.pace()
        produced_per_s = max(1.0, self._steps.mean_decodes / max(pace.tau_s, 1e-6))
        return Context(self._now_s, pace, self._mean_length, self._ledger, self._slots, produced_per_s)

    # ---- the plan over everything, for policies that make one ----

    def _plan_if_due(self, actions: list[Action]) -> None:
        plan = self._plan
        if plan is None or self._now_s < self._plan_at_s or not self._replicas or not self._is_settled:
            return
        if self._now_s < plan.last_s + _LEAST_PLAN_S:
            self._plan_at_s = plan.last_s + _LEAST_PLAN_S
            return
        self._plan_at_s = self._now_s + self._config.plan_s
        context = self._context()
        takers = sum(not replica.is_draining for replica in self._replicas.values())
        waiting = list(self._waiting.values())
        running = [call for call in self._running.values() if not call.is_aborted]
        plan.make(waiting, running, context, self._history, replicas=max(takers, 1))
        for request in waiting:
            if request.is_queued:
                self._queue.rekey(request, context)
        retuned: dict[ReplicaId, list[tuple[DispatchId, Standing]]] = {}
        for call in running:
            if call.replica.capacity.has_step_planner:
                retuned.setdefault(call.replica.replica_id, []).append((call.dispatch_id, call.standing))
        cap_s = plan.step_cap_s
        actions.extend(Retune(replica_id, tuple(standings), cap_s) for replica_id, standings in retuned.items())

    def _dispatch_while_possible(self, actions: list[Action]) -> None:
        if not self._is_settled or not self._waiting:
            return
        self._serve_hold(actions)
        if self._policy.binds_early:
            self._bind_all(self._context(), actions)
            return
        if self._plan is not None:
            self._start_admitted(self._context(), actions)
        if self._is_worth_looking():
            self._fill(self._context(), actions)
        if self._policy.preempts and self._plan is None and self._now_s >= self._displace_at_s:
            self._displace_at_s = self._now_s + self._policy.frame_s
            self._displace(self._context(), actions)

    def _bind_all(self, context: Context, actions: list[Action]) -> None:
        """Everything goes to a replica at once, to the one with the least work."""
        takers = [replica for replica in self._replicas.values() if not replica.is_draining]
        while takers:
            request = self._queue.pop(context)
            if request is None:
                return
            if self._turns_out_hopeless(request, context, actions):
                continue
            if kv_needed(request, self._kv_sizes) is None:
                self._unplaceable[request.spec.request_id] = request
                continue
            fitting = [one for one in takers if one.capacity.kv_tokens > request.spec.context_tokens]
            self._start(request, min(fitting, key=lambda one: (one.outstanding_s(), one.number)), context, actions)

    def _start_admitted(self, context: Context, actions: list[Action]) -> None:
        """What the plan has admitted goes to a replica at once, beyond its slots if need be.

        The step planner there holds what is less urgent.
        """
        takers = [one for one in self._replicas.values() if not one.is_draining and one.capacity.has_step_planner]
        passed_over: list[WaitingRequest] = []
        while takers and len(passed_over) < _LOOK_AHEAD:
            request = self._queue.pop(context)
            if request is None:
                break
            if not request.standing.is_admitted or request.standing.density <= 0.0 or request.is_relegated:
                passed_over.append(request)
                break
            if self._turns_out_hopeless(request, context, actions):
                continue
            needed = kv_needed(request, self._kv_sizes)
            if needed is None:
                self._unplaceable[request.spec.request_id] = request
                continue
            room = [one for one in takers if len(one.calls) < _OVERCOMMIT * one.capacity.max_running]
            replica = choose(self._allowed(request, needed, room), needed, self._home(request))
            if replica is None:
                passed_over.append(request)
                continue
            self._start(request, replica, context, actions)
        for request in passed_over:
            self._queue.push_back(request, context)

    def _displace(self, context: Context, actions: list[Action]) -> None:
        """Send what outranks the worst live call of a full replica there: its step planner holds that one."""
        for _ in range(_DISPLACED_PER_FRAME):
            full = [
                one
                for one in self._replicas.values()
                if not one.is_draining
                and one.capacity.has_step_planner
                and one.capacity.max_running <= len(one.calls) < _OVERCOMMIT * one.capacity.max_running
            ]
            request = self._queue.pop(context) if full else None
            if request is None:
                return
            key = self._policy.key(request, context)
            needed = kv_needed(request, self._kv_sizes)
            target = None
            if needed is not None:
                large = (one for one in full if one.capacity.kv_tokens >= needed)
                target = max(large, key=lambda one: (self._rank_of_last(one, context), -one.number), default=None)
            if target is None or self._rank_of_last(target, context) <= key:
                self._queue.push_back(request, context)
                return
            self._start(request, target, context, actions)

    def _rank_of_last(self, replica: Replica, context: Context) -> float:
        """Key of the call that would be the last of so many as the replica has slots."""
        keys = sorted(self._policy.key(call, context) for call in replica.calls.values() if not call.is_aborted)
        slots = replica.capacity.max_running
        return keys[slots - 1] if len(keys) >= slots else float("inf")

    def _home(self, request: WaitingRequest) -> Replica | None:
        """The replica that has the request's prefix, as far as is known."""
        spec = request.spec
        if not self._config.switches.affinity:
            return None
        known = self._prefixes.get(spec.prefix_id) if spec.prefix_tokens else None
        return self._replicas.get(known[0]) if known is not None else None

    def _fill(self, context: Context, actions: list[Action]) -> None:
        """Give requests to replicas, best first, until no slot or no request is left, or nothing seen has room."""
        passed_over: list[WaitingRequest] = []
        gambles: list[WaitingRequest] = []
        lacking: list[int] = []
        may_trickle = self._since_trickle >= _TRICKLE - 1
        has_seen_all = has_seen_enough = False
        while candidates := self._open_replicas():
            has_seen_enough = len(lacking) >= _look_ahead(candidates)
            if has_seen_enough:
                break
            starving = self._starving() if may_trickle else None
            may_trickle = False
            request = starving or self._queue.pop(context)
            if request is None:
                has_seen_all = True
                break
            if self._turns_out_hopeless(request, context, actions):
                continue
            needed = kv_needed(request, self._kv_sizes)
            if needed is None:
                self._unplaceable[request.spec.request_id] = request
                continue
            if starving is None and self._is_gamble(request):
                gambles.append(request)
                continue
            replica = choose(self._allowed(request, needed, candidates), needed, self._home(request))
            if replica is not None:
                self._start(request, replica, context, actions)
                self._since_trickle = 0 if starving is not None else self._since_trickle + 1
                continue
            passed_over.append(request)
            lacking.append(needed)
            self._note_blocked(request, needed, is_urgent=starving is not None)
        for request in (*passed_over, *gambles):
            self._queue.push_back(request, context)
        self._blocked_kv = min(lacking) if lacking and (has_seen_all or has_seen_enough) else None
        self._was_all_blocked = has_seen_all

    def _is_gamble(self, request: WaitingRequest) -> bool:
        """It counts as a whole or not at all, nothing of it is done, and the plan has no room for it."""
        if self._plan is None or not self._config.switches.commitment:
            return False
        standing, spec = request.standing, request.spec
        if standing.is_admitted or standing.density <= 0.0 or request.is_relegated:
            return False
        if isinstance(spec.slo, Latency) or spec.generated_tokens:
            return False
        program = self._ledger.program(spec)
        return program is None or (program.done_calls == 0 and program.attained_tokens == 0)

    def _is_worth_looking(self) -> bool:
        """Some replica takes a call and, where the last look found too little KV cache, has as much as was lacking."""
        candidates = self._open_replicas()
        if not candidates:
            return False
        if self._blocked_kv is None:
            return True
        if not self._was_all_blocked and not all(replica.calls for replica in candidates):
            return True
        return any(replica.free_kv >= self._blocked_kv for replica in candidates)

    def _open_replicas(self) -> list[Replica]:
        """Replicas that take a call now, in order of attaching; not the one that is kept for a held request."""
        depth = self._config.replica_queue_depth
        held = self._hold[1] if self._hold is not None else None
        is_deep = self._policy.preempts
        return [one for one in self._replicas.values() if one is not held and one.is_open(depth, is_deep=is_deep)]

    def _starving(self) -> WaitingRequest | None:
        """The oldest request, taken from the queue, if it has waited too long."""
        request = self._queue.oldest()
        if request is None or self._now_s - request.since_s < self._config.starvation_s:
            return None
        self._queue.take(request)
        return request

    def _turns_out_hopeless(self, request: WaitingRequest, context: Context, actions: list[Action]) -> bool:
        if request.is_relegated or not self._is_hopeless(request):
            return False
        self._give_up(request, actions)
        if request.is_in_line:
            self._queue.push_back(request, context)
        return True

    def _allowed(self, request: WaitingRequest, needed_kv: int, candidates: list[Replica]) -> list[Replica]:
        """The candidates, or the one of them that the request's siblings went to."""
        replica = self._replica_of_siblings(request.spec, needed_kv)
        if replica is None:
            return candidates
        return [replica] if replica in candidates else []

    def _replica_of_siblings(self, spec: RequestSpec, needed_kv: int) -> Replica | None:
        group = self._groups.find(spec)
        replica = self._replicas.get(group.replica_id) if group is not None and group.replica_id is not None else None
        if replica is None or replica.is_draining or replica.capacity.kv_tokens < needed_kv:
            return None
        return replica

    def _start(self, request: WaitingRequest, replica: Replica, context: Context, actions: list[Action]) -> None:
        spec = request.spec
        priority = self._policy.engine_priority(request, context)
        self._end_waiting(request)
        dispatch_id = DispatchId(self._epoch << 32 | self._next_dispatch)
        self._next_dispatch += 1
        call = Call(
            dispatch_id,
            spec,
            replica,
            request.lengths,
            new_tokens=0,
            ticket=self._next_dispatch,
            since_s=self._now_s,
            standing=request.standing,
        )
        call.cached_tokens = request.cached_tokens
        self._calls[dispatch_id] = call
        self._running[spec.request_id] = call
        replica.add(call)
        self._groups.started(spec, replica.replica_id)
        self._ledger.started(call, replica.replica_id, self._now_s - request.since_s)
        actions.append(
            Dispatch(dispatch_id, spec.request_id, spec.attempt, replica.replica_id, priority, request.standing)
        )

    # ---- keeping a replica free for what is too large to find room by chance ----

    def _note_blocked(self, request: WaitingRequest, needed_kv: int, *, is_urgent: bool) -> None:
        if request.blocked_since_s is None:
            request.blocked_since_s = self._now_s
        has_waited = self._now_s - request.blocked_since_s >= _HOLD_AFTER_S
        if self._hold is not None or not (is_urgent or has_waited):
            return
        replica = self._replica_of_siblings(request.spec, needed_kv)
        if replica is None:
            takers = (one for one in self._replicas.values() if not one.is_draining)
            large = [one for one in takers if one.capacity.kv_tokens >= needed_kv]
            replica = max(large, key=lambda one: (one.free_kv, -one.number))
        self._hold = (request, replica)

    def _serve_hold(self, actions: list[Action]) -> None:
        if self._hold is None:
            return
        request, replica = self._hold
        needed = kv_needed(request, self._kv_sizes)
        is_room = needed is not None and needed <= replica.free_kv
        if is_room and replica.is_open(self._config.replica_queue_depth):
            self._start(request, replica, self._context(), actions)

    # ---- self-check ----

    def audit(self) -> None:
        """Check all invariants at once, in O(everything). Raises AssertionError with the story."""
        both = self._waiting.keys() & self._running.keys()
        assert not both, f"waiting and running at once: {sorted(both)}"
        self._audit_waiting()
        self._audit_calls()
        siblings: Counter[GroupId] = Counter()
        specs = [request.spec for request in self._waiting.values()] + [call.spec for call in self._running.values()]
        siblings.update(spec.group_id for spec in specs if spec.group_size > 1)
        self._groups.audit(dict(siblings))
        if self._hold is not None:
            request, replica = self._hold
            assert self._waiting.get(request.spec.request_id) is request, "a replica is held for nobody"
            assert self._replicas.get(replica.replica_id) is replica, "a lost replica is held"
            assert replica.calls, f"{replica.replica_id} is empty and still held for {request.spec.request_id!r}"

    def _audit_waiting(self) -> None:
        self._queue.audit()
        queued = sum(request.is_queued for request in self._waiting.values())
        assert queued == len(self._queue), f"{queued} waiting requests are queued, the queue holds {len(self._queue)}"
        for request_id, request in self._waiting.items():
            assert request.is_queued != (request_id in self._unplaceable), f"{request_id!r} is in no place or in two"
        assert not self._unplaceable.keys() - self._waiting.keys(), "an unplaceable request does not wait"
        counted = Counter(slo_class(request.spec.slo) for request in self._waiting.values())
        backlog = {name: count for name, count in self._backlog.requests.items() if count}
        assert backlog == dict(counted), f"backlog says {backlog}, {dict(counted)} wait"
        tokens = sum(request.spec.prompt_tokens for request in self._waiting.values())
        assert tokens == self._backlog.prompt_tokens, f"backlog says {self._backlog.prompt_tokens} tokens, not {tokens}"
        bound = 2 * len(self._waiting) + _TIMER_SLACK + _TIMERS_PER_EVENT
        assert len(self._timers) <= bound, f"{len(self._timers)} timers for {len(self._waiting)} waiting requests"

    def _audit_calls(self) -> None:
        on_replicas = 0
        for replica in self._replicas.values():
            replica.audit()
            on_replicas += len(replica.calls)
            for dispatch_id, call in replica.calls.items():
                assert self._calls.get(dispatch_id) is call, f"dispatch {dispatch_id} is unknown to the router"
        assert on_replicas == len(self._calls), f"{len(self._calls)} calls, {on_replicas} on replicas"
        wanted = {call.spec.request_id: call for call in self._calls.values() if not call.is_aborted}
        assert wanted == self._running, f"calls {sorted(wanted)} but running {sorted(self._running)}"


def _look_ahead(candidates: list[Replica]) -> int:
    return _LOOK_AHEAD if all(replica.calls for replica in candidates) else _LOOK_AHEAD_FOR_EMPTY


def _replica_snapshot(replica: Replica) -> ReplicaSnapshot:
    running = dict.fromkeys(get_args(SloClass), 0)
    for call in replica.calls.values():
        if not call.is_aborted:
            running[slo_class(call.spec.slo)] += 1
    return ReplicaSnapshot(
        replica_id=replica.replica_id,
        calls=len(replica.calls),
        running=running,
        unstarted=replica.unstarted,
        engine_waiting=replica.load.waiting,
        committed_kv_tokens=replica.committed_kv,
        free_kv_tokens=replica.load.free_kv_tokens,
        kv_tokens=replica.capacity.kv_tokens,
        outstanding_s=replica.outstanding_s(),
        tau_s=replica.steps.tau_s,
        step_error=replica.steps.relative_error,
        is_draining=replica.is_draining,
    )
