"""Virtual time: a trace of clients, the production RouterCore, and replicas that run the production step planner.

Event-driven and deterministic: the same trace and setup give the same report, to the last digit. Clients behave as
real ones: a program's call is sent when the calls before it have been answered and its tool has run; when one of its
calls is refused or given up, the rest of the program is withdrawn.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Literal

import numpy as np

from tempo_router.actions import (
    Abort,
    Action,
    Admit,
    Defer,
    Dispatch,
    Evict,
    Expire,
    Readmit,
    Redate,
    Reject,
    Relegate,
    Retarget,
    Retune,
)
from tempo_router.config import SchedulingConfig
from tempo_router.errors import ConfigError, TempoError
from tempo_router.events import (
    Arrived,
    CallFinished,
    Cancelled,
    Event,
    Predicted,
    ProgramFinished,
    Progressed,
    ReplicaAttached,
    Settled,
    Ticked,
)
from tempo_router.pattern_history import PatternHistory
from tempo_router.policies import build_policy
from tempo_router.prediction import ATOMS, LengthHistograms, Lengths
from tempo_router.program_history import KnownGraphs, ProgramHistory
from tempo_router.request import (
    Deadline,
    DispatchId,
    GroupId,
    ProgramCall,
    ProgramId,
    ReplicaId,
    RequestId,
    RequestSpec,
    slo_class,
)
from tempo_router.router import RouterCore
from tempo_router.simulation.foretelling import FORETOLD_S, Foretelling
from tempo_router.simulation.replica import Answer, SimulatedReplica
from tempo_router.simulation.report import CallDelivery, Report, Status, UnitOutcome, unit_outcome
from tempo_router.simulation.step_profiles import StepProfile
from tempo_router.simulation.trace import Trace, Unit

Knowledge = Literal["learned", "regressor", "none", "graphs", "true"]

_TICK_S = 0.1
_RETRY_S = 1.0
_MODEL = "simulated"


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated.

    profiles: one per replica; they may differ. scheduling: objective and switches; its `policy` and `hopeless` are
        overridden, and the line is endless unless max_waiting_requests or max_waiting_tokens are set in it.
    max_running: slots per replica. sheds: hopeless waiting work is dropped; otherwise it goes on as best effort.
    knowledge: "learned" while the run goes on; "regressor": so, and by a forest beside the histograms, as a service
        has it; "none": lengths by class alone; "graphs": lengths are learned, the programs' graphs known; "true": both
        are known. seed: of the forest.
    patience: clients leave after so many times their TTFT, or time to last token; None: they stay.
    retries: how often a refused unit is sent again. max_output_tokens: the bound that clients state.
    backlog: all units come at once at the start, whatever their arrivals; deadlines count from there.
    """

    policy: str
    profiles: tuple[StepProfile, ...]
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    seed: int = 0
    max_running: int = 128
    sheds: bool = True
    knowledge: Knowledge = "learned"
    patience: float | None = None
    retries: int = 0
    max_output_tokens: int = 4096
    backlog: bool = False

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ConfigError("profiles=(): a simulation needs at least one replica; name a profile")
        if self.max_running < 1:
            raise ConfigError(f"max_running={self.max_running}: a replica needs at least one slot")
        if self.patience is not None and not (isfinite(self.patience) and self.patience > 0):
            raise ConfigError(f"patience={self.patience}: must be above zero, in multiples of a unit's target")
        if self.retries < 0:
            raise ConfigError(f"retries={self.retries}: must not be below zero")


def simulate(trace: Trace, setup: Setup, *, on_progress: Callable[[float], None] | None = None) -> Report:
    """Run the trace to its end. on_progress: told now and then which share of the units is decided, 0 to 1.

    Raises ConfigError for a setup that cannot run.
    """
    return _Run(trace, setup, on_progress).run()


class TrueLengths(LengthHistograms):
    """A clairvoyant's predictor: each call's own length."""

    def __init__(self, lengths: dict[RequestId, int]) -> None:
        super().__init__()
        self._true = {request_id: Lengths((float(tokens),) * ATOMS) for request_id, tokens in lengths.items()}

    def lookup(self, spec: RequestSpec) -> Lengths:
        """Its length, at every quantile."""
        return self._true[spec.request_id]

    def observe(self, spec: RequestSpec, output_tokens: int, *, is_complete: bool) -> None:
        """There is nothing to learn."""


class ClassLengths(LengthHistograms):
    """No predictor: one running histogram per class."""

    def lookup(self, spec: RequestSpec) -> Lengths:
        """That of the class."""
        return super().lookup(_by_class(spec))

    def observe(self, spec: RequestSpec, output_tokens: int, *, is_complete: bool) -> None:
        """Counts for the class alone."""
        super().observe(_by_class(spec), output_tokens, is_complete=is_complete)


def _by_class(spec: RequestSpec) -> RequestSpec:
    return replace(spec, app=slo_class(spec.slo), prompt_tokens=1, stage=0)


def _overrides(setup: Setup) -> dict[str, Any]:
    """What a set-up says beside its scheduling, and lines without end unless that limits them."""
    endless = {"max_waiting_requests": 10_000_000, "max_waiting_tokens": 10**12}
    return {
        "policy": setup.policy,
        "hopeless": "refuse" if setup.sheds else "relegate",
        **{name: most for name, most in endless.items() if name not in setup.scheduling.model_fields_set},
    }


class _UnitRun:
    """A unit that has arrived: which calls wait for which, and what was delivered."""

    __slots__ = ("answers", "ended", "is_over", "live", "missing", "number", "retries", "status", "unit")

    def __init__(self, number: int, unit: Unit, retries: int) -> None:
        self.number = number
        self.unit = unit
        self.missing = [len(call.parents) for call in unit.calls]
        self.answers: dict[int, tuple[Answer, SimulatedReplica]] = {}
        self.ended: set[int] = set()
        self.live: set[int] = set()
        self.is_over = False
        self.status: Status = "cut"
        self.retries = retries


class _Run:
    def __init__(self, trace: Trace, setup: Setup, on_progress: Callable[[float], None] | None) -> None:
        self._trace = trace
        self._setup = setup
        self._on_progress = on_progress
        self._now_s = 0.0
        self._sequence = 0
        self.events = 0
        self._agenda: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._untold: deque[Event] = deque()
        self._calls: dict[RequestId, tuple[_UnitRun, int]] = {}
        self._specs: dict[RequestId, RequestSpec] = {}
        self._dispatches: dict[DispatchId, tuple[_UnitRun, int]] = {}
        self._decided = 0
        self._runs: list[_UnitRun | None] = [None] * len(trace.units)
        config = SchedulingConfig.model_validate({**setup.scheduling.model_dump(), **_overrides(setup)})
        self._core = RouterCore(config, lengths=self._lengths(), history=self._history())
        self._foretelling: Foretelling | None = None
        if setup.knowledge == "regressor":
            self._foretelling = Foretelling(
                training_s=config.length_training_s, window=config.length_window, seed=setup.seed
            )
        policy = build_policy(config)
        self._replicas: dict[ReplicaId, SimulatedReplica] = {}
        for number, profile in enumerate(setup.profiles):
            replica_id = ReplicaId(f"gpu{number}")
            self._replicas[replica_id] = SimulatedReplica(
                replica_id, profile, policy, slots=setup.max_running, ledger=self._core.ledger
            )

    def _lengths(self) -> LengthHistograms:
        match self._setup.knowledge:
            case "learned" | "regressor" | "graphs":
                return LengthHistograms()
            case "none":
                return ClassLengths()
            case _:
                units = self._trace.units
                return TrueLengths(
                    {RequestId(call.request_id): call.output_tokens for unit in units for call in unit.calls}
                )

    def _history(self) -> ProgramHistory:
        if self._setup.knowledge not in ("true", "graphs"):
            return PatternHistory() if self._setup.scheduling.program_model == "patterns" else ProgramHistory()
        programs = (unit for unit in self._trace.units if unit.is_program)
        return KnownGraphs({ProgramId(unit.unit_id): _stages(unit) for unit in programs})

    def run(self) -> Report:
        for replica in self._replicas.values():
            self._tell(ReplicaAttached(0.0, replica.replica_id, replica.capacity))
        self._tell(Settled(0.0))
        for number, unit in enumerate(self._trace.units):
            self._at(0.0 if self._setup.backlog else unit.arrival_s, self._unit_arrives, number)
        self._at(_TICK_S, self._tick, None)
        units = len(self._trace.units)
        while self._agenda and self._decided < units:
            at_s, _, action, argument = heapq.heappop(self._agenda)
            self._now_s = at_s
            action(argument)
            self.events += 1
            if self._on_progress is not None and self.events % 4096 == 0:
                self._on_progress(self._decided / units)
        if self._on_progress is not None:
            self._on_progress(1.0)
        return self._report()

    def _at(self, at_s: float, action: Callable[[Any], None], argument: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._agenda, (at_s, self._sequence, action, argument))

    # ---- clients ----

    def _unit_arrives(self, number: int) -> None:
        unit = self._trace.units[number]
        before = self._runs[number]
        run = _UnitRun(number, unit, 0 if before is None else before.retries + 1)
        self._runs[number] = run
        if self._setup.patience is not None:
            target_s = getattr(unit.slo, "ttft_s", None) or getattr(unit.slo, "ttlt_s", None)
            if target_s is not None:
                self._at(self._now_s + self._setup.patience * target_s, self._patience_ends, run)
        for position, missing in enumerate(run.missing):
            if not missing and not run.is_over:
                self._release((run, position))

    def _release(self, at: tuple[_UnitRun, int]) -> None:
        run, position = at
        if run.is_over:
            return
        unit, call = run.unit, run.unit.calls[position]
        request_id = RequestId(call.request_id)
        arrival_s = self._now_s if unit.is_program or self._setup.backlog else unit.arrival_s
        slo: Any = unit.slo
        if unit.is_program:
            assert isinstance(unit.slo, Deadline)
            left_s = unit.arrival_s + unit.slo.ttlt_s - self._now_s
            if self._setup.backlog:
                left_s = unit.slo.ttlt_s
            slo = ProgramCall(ProgramId(unit.unit_id), left_s)
        spec = RequestSpec(
            request_id=request_id,
            arrival_s=arrival_s,
            slo=slo,
            prompt_tokens=call.prompt_tokens,
            max_output_tokens=max(self._setup.max_output_tokens, call.output_tokens),
            group_id=GroupId(request_id),
            model=_MODEL,
            app=unit.app,
            tenant=unit.tenant,
            stage=call.stage,
            prefix_id=call.prefix_id,
            prefix_tokens=call.prefix_tokens,
        )
        run.live.add(position)
        self._calls[request_id] = (run, position)
        self._specs[request_id] = spec
        self._tell(Arrived(self._now_s, spec))
        if self._foretelling is not None and self._core.knows(request_id, 0):
            lengths = self._foretelling.foretell(spec, self._core.lengths_of(request_id))
            if lengths is not None:
                self._at(self._now_s + FORETOLD_S, self._foretold, (request_id, lengths))

    def _foretold(self, at: tuple[RequestId, Lengths]) -> None:
        request_id, lengths = at
        self._tell(Predicted(self._now_s, request_id, 0, lengths))

    def _patience_ends(self, run: _UnitRun) -> None:
        if run.is_over:
            return
        started = any(answer.prompts_done_s for answer, _ in run.answers.values())
        if not (started and hasattr(run.unit.slo, "ttft_s")):
            self._end_unit(run, "abandoned")

    def _call_refused(self, request_id: RequestId, status: Status, retry_after_s: float | None) -> None:
        run, position = self._calls[request_id]
        run.live.discard(position)
        if self._foretelling is not None:
            self._foretelling.forget(request_id)
        if run.is_over:
            return
        if run.retries < self._setup.retries and not run.answers and len(run.unit.calls) == 1:
            run.is_over = True
            self._at(self._now_s + (retry_after_s or _RETRY_S), self._unit_arrives, run.number)
            return
        self._end_unit(run, status)

    def _call_ended(self, run: _UnitRun, position: int) -> None:
        run.live.discard(position)
        run.ended.add(position)
        if run.is_over:
            return
        unit = run.unit
        if len(run.ended) == len(unit.calls):
            self._end_unit(run, "finished")
            return
        for later, call in enumerate(unit.calls):
            if position in call.parents:
                run.missing[later] -= 1
                if run.missing[later] == 0:
                    self._at(self._now_s + call.gap_s, self._release, (run, later))

    def _end_unit(self, run: _UnitRun, status: Status) -> None:
        run.is_over = True
        run.status = status
        self._decided += 1
        for position in sorted(run.live):
            request_id = RequestId(run.unit.calls[position].request_id)
            self._tell(Cancelled(self._now_s, request_id))
        if run.unit.is_program:
            self._tell(ProgramFinished(self._now_s, ProgramId(run.unit.unit_id), is_complete=status == "finished"))

    # ---- router and replicas ----

    def _tick(self, _: None) -> None:
        ticks = 1
        if self._core.is_idle and self._agenda:
            # Nothing happens before the next arrival, which may be hours away.
            ticks = max(1, int((self._agenda[0][0] - self._now_s) / _TICK_S))
        self._at(self._now_s + ticks * _TICK_S, self._tick, None)
        if self._foretelling is not None:
            self._foretelling.learn(self._core.drain_samples(), self._now_s)
        self._tell(Ticked(self._now_s))

    def _tell(self, event: Event) -> None:
        """Give the core an event and carry out what it decides.

        What that leads to, such as the rest of a program being cancelled, is told once all of it is carried out: one
        of the later actions may be about the same calls.
        """
        self._untold.append(event)
        if len(self._untold) > 1:
            return
        while self._untold:
            for action in self._core.handle(self._untold[0]):
                self._carry_out(action)
            self._untold.popleft()

    def _carry_out(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case Retune(replica_id=replica_id, standings=standings, step_cap_s=step_cap_s):
                self._replicas[replica_id].retune(standings, step_cap_s)
            case Retarget(replica_id=replica_id, dispatch_id=dispatch_id, slo=slo):
                self._replicas[replica_id].planner.retarget(dispatch_id, slo)
            case Abort(dispatch_id=dispatch_id, replica_id=replica_id):
                self._replicas[replica_id].abort(dispatch_id)
                self._at(self._now_s, self._wake, self._replicas[replica_id])
            case Reject(request_id=request_id, retry_after_s=retry_after_s):
                self._call_refused(request_id, "refused", retry_after_s)
            case Expire(request_id=request_id):
                self._call_refused(request_id, "expired", None)
            case Evict(request_id=request_id):
                raise TempoError(f"{request_id!r} was evicted, but no simulated replica is ever lost")
            case Redate(request_id=request_id):
                raise TempoError(f"{request_id!r} has another deadline, but those of simulated programs stay")
            case Admit() | Relegate() | Defer() | Readmit():
                pass

    def _dispatch(self, action: Dispatch) -> None:
        run, position = self._calls[action.request_id]
        replica = self._replicas[action.replica_id]
        spec = self._specs[action.request_id]
        lengths = self._core.lengths_of(action.request_id)
        answer = replica.submit(
            action.dispatch_id, spec, lengths, action.standing, run.unit.calls[position].output_tokens, self._now_s
        )
        run.answers[position] = (answer, replica)
        self._dispatches[action.dispatch_id] = (run, position)
        # After all that happens at this moment: what is dispatched together runs together.
        self._at(self._now_s, self._wake, replica)

    def _wake(self, replica: SimulatedReplica) -> None:
        if not replica.is_idle:
            return
        cancelled = replica.take_cancelled()
        if cancelled:
            self._tell(Progressed(self._now_s, replica.replica_id, replica.load(), finished=tuple(cancelled)))
        duration_s = replica.begin_step(self._now_s)
        if duration_s is not None:
            self._at(self._now_s + duration_s, self._step_ends, replica)

    def _step_ends(self, replica: SimulatedReplica) -> None:
        news = replica.end_step(self._now_s)
        if news is not None:
            self._tell(news)
            for finished in news.finished:
                self._note_finished(finished)
        self._wake(replica)

    def _note_finished(self, finished: CallFinished) -> None:
        run, position = self._dispatches.pop(finished.dispatch_id)
        if finished.reason == "completed":
            self._call_ended(run, position)

    # ---- the end ----

    def _report(self) -> Report:
        outcomes: list[UnitOutcome] = []
        gaps: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        for unit, run in zip(self._trace.units, self._runs, strict=True):
            deliveries = self._deliveries(run) if run is not None else []
            name = "program" if unit.is_program else slo_class(unit.slo)
            outcomes.append(unit_outcome(unit, name, run.status if run is not None else "cut", deliveries))
            if name == "latency":
                gaps.extend(np.diff(delivery.times_s) for delivery in deliveries if len(delivery.times_s) > 1)
        replicas = list(self._replicas.values())
        return Report(
            units=outcomes,
            stream_gaps_s=np.concatenate(gaps) if gaps else np.zeros(0),
            duration_s=self._now_s,
            arrival_span_s=self._trace.span_s,
            steps=sum(replica.step_count for replica in replicas),
            preemptions=sum(replica.planner.evictions for replica in replicas),
            recomputed_tokens=sum(replica.planner.recomputed_tokens for replica in replicas),
            produced_tokens=sum(replica.produced_tokens for replica in replicas),
            prefix_hit_tokens=sum(replica.planner.prefix_hit_tokens for replica in replicas),
        )

    def _deliveries(self, run: _UnitRun) -> list[CallDelivery]:
        deliveries = []
        for position in sorted(run.answers):
            answer, replica = run.answers[position]
            times = replica.token_times_s(answer)
            if hasattr(run.unit.slo, "ttlt_s") and len(times) > 2:
                times = [times[0], times[-1]]
            tokens = answer.call.new_tokens
            prompt = run.unit.calls[position].prompt_tokens
            deliveries.append(CallDelivery(prompt, tokens, times, position in run.ended))
        return deliveries


def _stages(unit: Unit) -> list[list[tuple[int, int, float]]]:
    """Per stage its calls as (missing prompt tokens, output tokens, gap before it)."""
    stages: list[list[tuple[int, int, float]]] = [[] for _ in range(1 + max(call.stage for call in unit.calls))]
    for call in unit.calls:
        stages[call.stage].append((call.prompt_tokens - call.prefix_tokens, call.output_tokens, call.gap_s))
    return stages
