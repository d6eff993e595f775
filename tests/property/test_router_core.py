"""Laws of RouterCore that hold over every history of arrivals, progress, cancels, failures and restarts.

The test plays the world: clients that resubmit what was evicted, replicas that run what they are sent, links that
break. It keeps its own account from the actions alone and compares it with the core's after every event.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tempo_router.actions import Abort, Action, Admit, Dispatch, Evict, Expire, Redate, Reject, Relegate, Retune
from tempo_router.config import SchedulingConfig
from tempo_router.events import (
    Arrived,
    CallFinished,
    Cancelled,
    DrainStarted,
    Event,
    ProgramRelegated,
    ProgramRetargeted,
    Progressed,
    ReplicaAttached,
    ReplicaCapacity,
    ReplicaDraining,
    ReplicaLoad,
    ReplicaLost,
    RunningCall,
    Settled,
    StepReport,
    Ticked,
)
from tempo_router.policies import build_policy
from tempo_router.request import BestEffort, DispatchId, Latency, ReplicaId, RequestId, RequestSpec
from tempo_router.router import RouterCore
from tempo_router.standing import UNRANKED, Standing
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL, request

EPOCH = 7
OTHER_EPOCH = 6
FREE_KV_TOKENS = 100
"""What every engine of the world reports."""
SLOS = (CHAT, TOOL, AGENT, BACKGROUND)
POLICIES = ("fcfs", "edf", "class_priority", "density", "tempo")


@dataclass
class WorldCall:
    """A call as its replica sees it, with what it was told last of how it stands."""

    spec: RequestSpec
    tokens: int = 0
    is_aborted: bool = False
    standing: Standing = UNRANKED


class Place(NamedTuple):
    """Where an attempt runs."""

    replica_id: ReplicaId
    dispatch_id: DispatchId
    spec: RequestSpec


@dataclass
class WorldReplica:
    """A replica as it sees itself."""

    capacity: ReplicaCapacity
    is_draining: bool = False
    engine_waiting: int = 0
    calls: dict[DispatchId, WorldCall] = field(default_factory=dict)


class RouterMachine(RuleBasedStateMachine):
    """Histories of one router and the world around it."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        hopeless=st.sampled_from(("relegate", "refuse")),
        depth=st.integers(0, 2),
        limit=st.sampled_from((3, 10_000)),
    )
    def start(self, policy: str, hopeless: str, depth: int, limit: int) -> None:
        self.config = SchedulingConfig.model_validate(
            {
                "policy": policy,
                "hopeless": hopeless,
                "replica_queue_depth": depth,
                "max_waiting_requests": limit,
                "starvation_s": 5.0,
            }
        )
        self.core = RouterCore(self.config, epoch=EPOCH)
        self.history: list[tuple[Event, list[Action]]] = []
        self.now_s = 0.0
        self.waiting: dict[RequestId, RequestSpec] = {}
        self.running: dict[RequestId, Place] = {}
        self.evicted: dict[RequestId, RequestSpec] = {}
        self.delivered: Counter[RequestId] = Counter()
        self.replicas: dict[ReplicaId, WorldReplica] = {}
        self.missing_siblings: list[RequestSpec] = []
        self.verdict_of_group: dict[str, type[Action]] = {}
        self.seen_dispatches: set[DispatchId] = set()
        self.names = 0
        self.foreign = 0
        self.is_settled = False
        self.is_draining = False

    # ---- rules: clients ----

    @rule(
        slo=st.sampled_from(SLOS),
        prompt=st.sampled_from((1, 20, 60, 150, 400)),
        output=st.sampled_from((1, 10, 100)),
        age_s=st.sampled_from((0.0, 0.5, 30.0)),
    )
    def arrive(self, slo: object, prompt: int, output: int, age_s: float) -> None:
        spec = request(
            self.new_name(), slo=slo, arrival_s=self.now_s - age_s, prompt_tokens=prompt, max_output_tokens=output
        )
        self.submit_first(spec)

    @rule(size=st.integers(2, 3), slo=st.sampled_from(SLOS), prompt=st.sampled_from((20, 150)))
    def arrive_in_group(self, size: int, slo: object, prompt: int) -> None:
        name = self.new_name()
        siblings = [
            request(f"{name}.{i}", slo=slo, arrival_s=self.now_s, prompt_tokens=prompt, group_id=name, group_size=size)
            for i in range(size)
        ]
        self.submit_first(siblings[0])
        self.missing_siblings.extend(siblings[1:])

    @precondition(lambda self: self.missing_siblings)
    @rule()
    def sibling_arrives(self) -> None:
        self.submit_first(self.missing_siblings.pop(0))

    @precondition(lambda self: self.evicted)
    @rule(data=st.data())
    def evicted_comes_again(self, data: st.DataObject) -> None:
        spec = self.evicted.pop(data.draw(st.sampled_from(sorted(self.evicted))))
        again = replace(spec, attempt=spec.attempt + 1, generated_tokens=self.delivered[spec.request_id])
        actions = self.tell(Arrived(self.now_s, again))
        assert isinstance(actions[0], Admit), f"attempt {again.attempt} was answered with {actions[:1]}"

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def live_request_comes_again(self, data: st.DataObject) -> None:
        """The ingress submits what it holds to a restarted router, which heard of it from a replica already."""
        spec = self.spec_of(data.draw(st.sampled_from(self.live())))
        before = (dict(self.waiting), dict(self.running))
        actions = self.tell(Arrived(self.now_s, spec))
        assert isinstance(actions[0], Admit)
        was_expired = any(isinstance(one, Expire) for one in actions)
        assert was_expired or self.spec_of(spec.request_id) == spec
        assert before[1].items() <= self.running.items()

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def live_request_moves_on(self, data: st.DataObject) -> None:
        """The ingress cannot reach the worker: it submits the next attempt while the old one still runs."""
        spec = self.spec_of(data.draw(st.sampled_from(self.live())))
        again = replace(spec, attempt=spec.attempt + 1, generated_tokens=self.delivered[spec.request_id])
        old = self.running.get(spec.request_id)
        actions = self.tell(Arrived(self.now_s, again))
        assert isinstance(actions[0], Admit)
        if old is not None:
            assert Abort(old.dispatch_id, old.replica_id) in actions

    @rule(left_s=st.sampled_from((0.5, 20.0, 600.0)), is_heard=st.booleans())
    def program_deadline_moves(self, left_s: float, is_heard: bool) -> None:
        """All its live requests hear of it. is_heard: their owners do before they say anything of them again."""
        deadline_s = self.now_s + left_s
        program = self.core.ledger.programs.get(AGENT.program_id)
        actions = self.tell(ProgramRetargeted(self.now_s, AGENT.program_id, deadline_s))
        if program is None:
            return
        assert abs(program.deadline_s - deadline_s) < 1e-2
        redates = {one.request_id: one for one in actions if isinstance(one, Redate)}
        if not redates:
            return
        expired = {one.request_id for one in actions if isinstance(one, Expire)}
        assert redates.keys() - expired == program.live.keys()
        for request_id in redates.keys() - expired:
            spec = self.spec_of(request_id)
            assert redates[request_id].deadline_s == deadline_s
            moved = replace(spec, slo=replace(spec.slo, ttlt_s=deadline_s - spec.arrival_s))
            if is_heard and request_id in self.waiting:
                self.waiting[request_id] = moved
            elif is_heard:
                place = self.running[request_id] = self.running[request_id]._replace(spec=moved)
                self.replicas[place.replica_id].calls[place.dispatch_id].spec = moved

    @rule()
    def program_is_relegated(self) -> None:
        program = AGENT.program_id
        self.tell(ProgramRelegated(self.now_s, program))

    @rule(data=st.data(), is_complete=st.booleans())
    def cancel(self, data: st.DataObject, is_complete: bool) -> None:
        known = [*self.live(), *sorted(self.evicted), RequestId("nobody")]
        request_id = data.draw(st.sampled_from(known))
        running = self.running.pop(request_id, None)
        self.waiting.pop(request_id, None)
        self.evicted.pop(request_id, None)
        actions = self.tell(Cancelled(self.now_s, request_id, is_complete))
        assert (running is not None) == any(isinstance(one, Abort) for one in actions)
        assert not self.core.knows(request_id, 0)

    # ---- rules: replicas ----

    @precondition(lambda self: len(self.replicas) < 3)
    @rule(
        kv_tokens=st.sampled_from((120, 300, 1000)),
        slots=st.integers(1, 3),
        is_draining=st.booleans(),
        has_step_planner=st.booleans(),
        data=st.data(),
    )
    def replica_attaches(
        self, kv_tokens: int, slots: int, is_draining: bool, has_step_planner: bool, data: st.DataObject
    ) -> None:
        capacity = ReplicaCapacity(slots, 512, kv_tokens, has_step_planner=has_step_planner)
        replica = WorldReplica(capacity, is_draining=is_draining)
        replica_id = ReplicaId(f"gpu{self.foreign}-{len(self.history)}")
        for spec in data.draw(st.lists(st.sampled_from(self.adoptable()), max_size=2)):
            self.foreign += 1
            replica.calls[DispatchId(OTHER_EPOCH << 32 | self.foreign)] = WorldCall(spec, tokens=self.foreign % 3)
        self.attach(replica_id, replica)

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def replica_attaches_again(self, data: st.DataObject) -> None:
        """Its link broke. Some calls may have gone missing meanwhile, or ended without the router's hearing of it."""
        replica_id = data.draw(st.sampled_from(sorted(self.replicas)))
        replica = self.replicas[replica_id]
        for dispatch_id in list(replica.calls):
            if data.draw(st.booleans()):
                del replica.calls[dispatch_id]
        self.attach(replica_id, replica)

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def replica_is_lost(self, data: st.DataObject) -> None:
        replica_id = data.draw(st.sampled_from(sorted(self.replicas)))
        lost = self.replicas.pop(replica_id)
        expected = [call.spec for call in lost.calls.values() if not call.is_aborted]
        actions = self.tell(ReplicaLost(self.now_s, replica_id))
        evicted = [(one.request_id, one.attempt) for one in actions if isinstance(one, Evict)]
        assert evicted == [(spec.request_id, spec.attempt) for spec in expected]
        assert self.tell(ReplicaLost(self.now_s, replica_id)) == []

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def replica_drains(self, data: st.DataObject) -> None:
        replica_id = data.draw(st.sampled_from(sorted(self.replicas)))
        self.replicas[replica_id].is_draining = True
        self.tell(ReplicaDraining(self.now_s, replica_id))

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), engine_waiting=st.integers(0, 2), duration_s=st.sampled_from((0.001, 0.02, 3.0)))
    def replica_steps(self, data: st.DataObject, engine_waiting: int, duration_s: float) -> None:
        replica_id = data.draw(st.sampled_from(sorted(self.replicas)))
        replica = self.replicas[replica_id]
        fates = {
            dispatch_id: data.draw(
                st.sampled_from(("idle", "tokens", "tokens", "completed", "error", "lost", "cancelled"))
            )
            for dispatch_id in replica.calls
        }
        self.step(replica_id, replica, fates, engine_waiting, duration_s)

    @precondition(lambda self: self.replicas and self.seen_dispatches)
    @rule(data=st.data())
    def late_news_of_an_old_dispatch(self, data: st.DataObject) -> None:
        live = {dispatch_id for replica in self.replicas.values() for dispatch_id in replica.calls}
        over = sorted(self.seen_dispatches - live)
        old = data.draw(st.sampled_from([*over, DispatchId(5 << 32 | 99)]))
        replica_id = min(self.replicas)
        load = ReplicaLoad(0, self.replicas[replica_id].engine_waiting, FREE_KV_TOKENS)
        finished = (CallFinished(old, "completed", 3),)
        self.tell(Progressed(self.now_s, replica_id, load, None, ((old, 3),), finished))

    # ---- rules: time and the application ----

    @rule(seconds=st.sampled_from((0.0, 0.01, 0.7, 4.0, 90.0, -3.0)))
    def time_passes(self, seconds: float) -> None:
        """Or stands still, or steps back: a clock may do what it likes."""
        self.now_s += seconds
        self.tell(Ticked(self.now_s))

    @rule()
    def router_settles(self) -> None:
        self.is_settled = True
        self.tell(Settled(self.now_s))

    @precondition(lambda self: len(self.history) > 20)
    @rule()
    def application_drains(self) -> None:
        self.is_draining = True
        self.tell(DrainStarted(self.now_s))

    # ---- laws ----

    @invariant()
    def core_agrees_with_itself(self) -> None:
        if hasattr(self, "core"):
            self.core.audit()

    @invariant()
    def nothing_is_lost_and_nothing_runs_twice(self) -> None:
        if not hasattr(self, "core"):
            return
        snapshot = self.core.snapshot()
        assert sum(snapshot.waiting.values()) == len(self.waiting)
        assert sum(snapshot.running.values()) == len(self.running)
        for request_id, spec in self.waiting.items():
            assert self.core.knows(request_id, spec.attempt), f"{request_id} was admitted and is unknown"
        wanted: Counter[RequestId] = Counter()
        for replica in self.replicas.values():
            wanted.update(call.spec.request_id for call in replica.calls.values() if not call.is_aborted)
        assert wanted == Counter(self.running.keys()), "what replicas run unaborted is not what runs"
        assert not self.waiting.keys() & self.running.keys()

    @invariant()
    def no_replica_idles_over_work_that_it_could_take(self) -> None:
        if not hasattr(self, "core") or not self.is_settled:
            return
        for replica_id, replica in self.replicas.items():
            if replica.is_draining or replica.calls:
                continue
            could = [spec for spec in self.waiting.values() if self.could_take(spec, replica)]
            assert not could, f"{replica_id} idles while {[spec.request_id for spec in could]} wait"

    # ---- the world's side of it ----

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        self.finish_everything()
        snapshot = self.core.snapshot()
        assert sum(snapshot.waiting.values()) == sum(snapshot.running.values()) == 0
        assert (snapshot.waiting_tokens, snapshot.waiting_cost_s) == (0, 0.0)
        for replica in snapshot.replicas:
            assert (replica.calls, replica.unstarted, replica.committed_kv_tokens, replica.outstanding_s) == (
                0,
                0,
                0,
                0,
            )
        again = RouterCore(self.config, epoch=EPOCH)
        for event, actions in self.history:
            assert again.handle(event) == actions, f"another answer to {event}"

    def finish_everything(self) -> None:
        """Whatever happened, what is left can be run to its end, and then no counter keeps anything."""
        self.router_settles()
        self.attach(ReplicaId("last"), WorldReplica(ReplicaCapacity(8, 512, 100_000)))
        for _ in range(1000):
            for spec in list(self.evicted.values()):
                del self.evicted[spec.request_id]
                self.tell(Arrived(self.now_s, replace(spec, attempt=spec.attempt + 1)))
            busy = [(replica_id, replica) for replica_id, replica in self.replicas.items() if replica.calls]
            if not busy and not self.waiting and not self.evicted:
                return
            for replica_id, replica in busy:
                self.step(replica_id, replica, dict.fromkeys(replica.calls, "completed"), 0, 0.01)
            self.core.audit()
            self.now_s += 2.0
            self.tell(Ticked(self.now_s))
        raise AssertionError(f"{len(self.waiting)} requests still wait, {len(self.running)} run")

    def submit_first(self, spec: RequestSpec) -> None:
        actions = self.tell(Arrived(self.now_s, spec))
        verdicts = [one for one in actions if isinstance(one, Admit | Reject) and one.request_id == spec.request_id]
        assert len(verdicts) == 1, f"{spec.request_id} got {len(verdicts)} answers"
        assert actions[0] is verdicts[0]
        if spec.group_size > 1:
            decided = self.verdict_of_group.setdefault(spec.group_id, type(verdicts[0]))
            assert isinstance(verdicts[0], decided), "siblings were answered differently"
        if isinstance(verdicts[0], Admit):
            assert spec.group_size > 1 or not self.is_draining, "admitted while draining"
            assert 0 <= verdicts[0].expected_wait_s < 1e6
            assert 0 <= verdicts[0].success_probability <= 1

    def attach(self, replica_id: ReplicaId, replica: WorldReplica) -> None:
        self.replicas[replica_id] = replica
        running = tuple(RunningCall(number, call.spec, call.tokens) for number, call in replica.calls.items())
        self.tell(ReplicaAttached(self.now_s, replica_id, replica.capacity, running, replica.is_draining))

    def step(
        self,
        replica_id: ReplicaId,
        replica: WorldReplica,
        fates: dict[DispatchId, str],
        engine_waiting: int,
        duration_s: float,
    ) -> None:
        tokens, finished = [], []
        for dispatch_id, fate in fates.items():
            call = replica.calls[dispatch_id]
            if fate != "idle" and not call.is_aborted:
                count = 1 + dispatch_id % 3
                call.tokens += count
                tokens.append((dispatch_id, count))
                if not call.is_aborted:
                    self.delivered[call.spec.request_id] += count
            if call.is_aborted:
                fate = "cancelled"
            if fate not in ("idle", "tokens"):
                finished.append(CallFinished(dispatch_id, fate, call.tokens))  # type: ignore[arg-type]
        for one in finished:
            call = replica.calls.pop(one.dispatch_id)
            if one.reason != "lost" and not call.is_aborted:
                del self.running[call.spec.request_id]
        replica.engine_waiting = engine_waiting
        step = StepReport(duration_s, 10, len(tokens), 100)
        load = ReplicaLoad(len(replica.calls), engine_waiting, FREE_KV_TOKENS)
        self.tell(Progressed(self.now_s, replica_id, load, step, tuple(tokens), tuple(finished)))

    def tell(self, event: Event) -> list[Action]:
        """Hand the core an event and let the world do what it says."""
        actions = self.core.handle(event)
        self.history.append((event, actions))
        if isinstance(event, ReplicaAttached):
            self.note_attached(event, actions)
        for action in actions:
            self.obey(action, event)
        return actions

    def obey(self, action: Action, event: Event) -> None:
        match action:
            case Admit(request_id=request_id):
                assert isinstance(event, Arrived)
                spec = event.spec
                assert request_id == spec.request_id
                live = self.spec_of(request_id)
                if live is None or spec.attempt > live.attempt:
                    self.running.pop(request_id, None)
                    self.waiting[request_id] = spec
            case Reject(request_id=request_id, attempt=attempt, retry_after_s=retry_after_s):
                assert attempt == 0
                assert retry_after_s is None or retry_after_s >= 1
                assert request_id not in self.waiting
            case Dispatch():
                self.start_call(action)
            case Abort(dispatch_id=dispatch_id, replica_id=replica_id):
                self.replicas[replica_id].calls[dispatch_id].is_aborted = True
            case Relegate(request_id=request_id):
                # Alone only what has not begun is given up; a program is, with all of its calls.
                is_alone = not any(
                    program.is_lost and request_id in program.live for program in self.core.ledger.programs.values()
                )
                assert request_id in self.waiting or not is_alone or self.is_unstarted(self.running[request_id])
            case Expire(request_id=request_id):
                assert self.config.hopeless == "refuse"
                spec = self.waiting.pop(request_id, None)
                if spec is None:
                    # Its abort came before.
                    place = self.running.pop(request_id)
                    assert self.is_unstarted(place)
                    assert self.replicas[place.replica_id].calls[place.dispatch_id].is_aborted
                    spec = place.spec
                assert spec.generated_tokens == 0
            case Evict(request_id=request_id, attempt=attempt):
                lost = self.running.pop(request_id)
                assert lost.spec.attempt == attempt
                self.evicted[request_id] = lost.spec
            case Retune():
                self.note_standings(action, event)

    def start_call(self, dispatch: Dispatch) -> None:
        assert self.is_settled, "dispatched before the router had settled"
        assert dispatch.dispatch_id >> 32 == EPOCH
        assert dispatch.dispatch_id not in self.seen_dispatches, "a dispatch id was used twice"
        assert -(2**63) <= dispatch.priority < 2**63
        self.seen_dispatches.add(dispatch.dispatch_id)
        replica = self.replicas[dispatch.replica_id]
        assert not replica.is_draining, "dispatched to a draining replica"
        spec = self.waiting.pop(dispatch.request_id)
        assert spec.attempt == dispatch.attempt
        depth = self.config.replica_queue_depth
        unstarted = sum(call.tokens == 0 for call in replica.calls.values())
        is_planned = build_policy(self.config).preempts and replica.capacity.has_step_planner
        if replica.calls and replica.engine_waiting and not is_planned:
            prompts = sum(call.spec.context_tokens for call in replica.calls.values() if call.tokens == 0)
            fills_steps = prompts < min(2 * replica.capacity.max_step_tokens, FREE_KV_TOKENS)
            assert unstarted < depth or fills_steps, "sent more than two steps' worth to an engine with calls waiting"
        replica.calls[dispatch.dispatch_id] = WorldCall(spec, standing=dispatch.standing)
        slots = replica.capacity.max_running
        most = max(slots + depth, ceil(1.5 * slots)) if is_planned else slots + depth
        assert len(replica.calls) <= most, "more calls than slots and queue"
        held = sum(call.spec.context_tokens + max(call.tokens, 1) for call in replica.calls.values())
        assert held <= replica.capacity.kv_tokens, "more context than the KV cache holds"
        self.running[dispatch.request_id] = Place(dispatch.replica_id, dispatch.dispatch_id, spec)

    def note_standings(self, retune: Retune, event: Event) -> None:
        """Plans go to replicas with a step planner, about calls that these run, and hold only sane numbers."""
        replica = self.replicas[retune.replica_id]
        assert replica.capacity.has_step_planner
        assert retune.step_cap_s is None or 0 < retune.step_cap_s < 10
        for dispatch_id, standing in retune.standings:
            assert not replica.calls[dispatch_id].is_aborted, "a plan over a call that nobody wants"
            is_forgiven = isinstance(event, ProgramRetargeted) and not standing.is_relegated
            assert self.config.policy == "tempo" or standing.is_relegated or is_forgiven
            assert 0 <= standing.density < inf
            assert 0 <= standing.later_s < inf
            replica.calls[dispatch_id].standing = standing

    def note_attached(self, event: ReplicaAttached, actions: list[Action]) -> None:
        """Calls that the replica runs and that were not stopped are running now."""
        stopped = {one.dispatch_id for one in actions if isinstance(one, Abort)}
        for reported in event.running:
            request_id, dispatch_id = reported.spec.request_id, reported.dispatch_id
            if dispatch_id not in stopped and not self.replicas[event.replica_id].calls[dispatch_id].is_aborted:
                self.waiting.pop(request_id, None)
                self.running[request_id] = Place(event.replica_id, dispatch_id, reported.spec)

    # ---- small questions ----

    def new_name(self) -> str:
        self.names += 1
        return f"r{self.names}"

    def is_unstarted(self, place: Place) -> bool:
        return self.replicas[place.replica_id].calls[place.dispatch_id].tokens == 0

    def live(self) -> list[RequestId]:
        return sorted([*self.waiting, *self.running])

    def spec_of(self, request_id: RequestId) -> RequestSpec | None:
        if request_id in self.waiting:
            return self.waiting[request_id]
        place = self.running.get(request_id)
        return None if place is None else place.spec

    def adoptable(self) -> list[RequestSpec]:
        """Requests that a replica of the epoch before may run: ones that wait here, that run here, or unknown ones."""
        known = [self.spec_of(request_id) for request_id in self.live()]
        return [spec for spec in known if spec is not None] + [
            request(f"stranger{self.foreign}", prompt_tokens=30),
            request(f"stranger{self.foreign}b", slo=BACKGROUND, attempt=1, generated_tokens=4),
        ]

    def could_take(self, spec: RequestSpec, replica: WorldReplica) -> bool:
        is_whole = not isinstance(spec.slo, Latency | BestEffort)
        if self.config.policy == "tempo" and is_whole and not spec.generated_tokens:
            # Commitment: what counts only as a whole waits for the plan to have room for it.
            return False
        if spec.context_tokens + 1 > replica.capacity.kv_tokens:
            return False
        has_running_sibling = any(
            call.spec.group_id == spec.group_id and not call.is_aborted
            for other in self.replicas.values()
            for call in other.calls.values()
        )
        return spec.group_size == 1 or not has_running_sibling


TestRouterCore = RouterMachine.TestCase
TestRouterCore.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
