"""Small makers of specs, replicas and events, so that a test names only what it is about."""

from dataclasses import dataclass, replace

from tempo_router.actions import Action, Dispatch
from tempo_router.config import SchedulingConfig
from tempo_router.events import (
    Arrived,
    CallFinished,
    FinishReason,
    Progressed,
    ReplicaAttached,
    ReplicaCapacity,
    ReplicaLoad,
    RunningCall,
    Settled,
    StepReport,
)
from tempo_router.facts import Facts, facts_of
from tempo_router.ledger import Ledger
from tempo_router.policies import Context
from tempo_router.prediction import LengthHistograms, Lengths
from tempo_router.replicas import Call, Replica
from tempo_router.request import (
    BestEffort,
    Deadline,
    DispatchId,
    GroupId,
    Latency,
    ProgramCall,
    ProgramId,
    ReplicaId,
    RequestId,
    RequestSpec,
    Slo,
)
from tempo_router.router import RouterCore
from tempo_router.standing import UNRANKED, Standing
from tempo_router.step_time import Pace, StepTimeModel
from tempo_router.waiting import WaitingRequest

CHAT = Latency(ttft_s=2.0, tbt_s=0.1)
TOOL = Deadline(ttlt_s=20.0)
AGENT = ProgramCall(program_id=ProgramId("program"), ttlt_s=60.0)
BACKGROUND = BestEffort()

PACE = Pace(prefill_token_s=2e-5, share_s=1e-3, decode_s=4e-5, context_token_s=1e-7, tau_s=0.01, alone_s=0.008)


def request(
    request_id: str = "r",
    *,
    slo: Slo = CHAT,
    arrival_s: float = 0.0,
    prompt_tokens: int = 100,
    max_output_tokens: int = 200,
    group_id: str | None = None,
    group_size: int = 1,
    model: str = "m",
    app: str = "",
    attempt: int = 0,
    generated_tokens: int = 0,
) -> RequestSpec:
    """A spec; alone in its group unless told otherwise."""
    return RequestSpec(
        request_id=RequestId(request_id),
        arrival_s=arrival_s,
        slo=slo,
        prompt_tokens=prompt_tokens,
        max_output_tokens=max_output_tokens,
        group_id=GroupId(group_id if group_id is not None else request_id),
        group_size=group_size,
        model=model,
        app=app,
        attempt=attempt,
        generated_tokens=generated_tokens,
    )


def waiting(
    spec: RequestSpec, ticket: int = 1, lengths: Lengths | None = None, *, is_relegated: bool = False
) -> WaitingRequest:
    """A waiting request with the lengths of a fresh router."""
    known = lengths if lengths is not None else LengthHistograms().lookup(spec)
    one = WaitingRequest(spec, ticket, spec.arrival_s, known, cost_s=0.1, hopeless_at_s=float("inf"))
    one.is_given_up = is_relegated
    return one


@dataclass(frozen=True, slots=True)
class LiveJob:
    """A call in an engine, as policies see it."""

    spec: RequestSpec
    ticket: int
    since_s: float
    lengths: Lengths
    generated_tokens: int
    missing_tokens: int
    is_relegated: bool = False
    standing: Standing = UNRANKED

    @property
    def facts(self) -> Facts:
        """Its spec in numbers."""
        return facts_of(self.spec)


def live(
    spec: RequestSpec,
    ticket: int = 1,
    lengths: Lengths | None = None,
    *,
    generated_tokens: int = 0,
    missing_tokens: int = 0,
    since_s: float | None = None,
    is_relegated: bool = False,
    standing: Standing = UNRANKED,
) -> LiveJob:
    """A call that decodes, unless some of its context is missing; it came to the engine when it arrived."""
    known = lengths if lengths is not None else LengthHistograms().lookup(spec)
    came_s = since_s if since_s is not None else spec.arrival_s
    return LiveJob(spec, ticket, came_s, known, generated_tokens, missing_tokens, is_relegated, standing)


def context(
    now_s: float = 0.0,
    pace: Pace = PACE,
    mean_length: float = 230.0,
    *,
    ledger: Ledger | None = None,
    slots: int = 128,
) -> Context:
    """What policies are told."""
    return Context(now_s, pace, mean_length, ledger if ledger is not None else Ledger(), slots)


def capacity(max_running: int = 4, kv_tokens: int = 10_000, max_step_tokens: int = 2048) -> ReplicaCapacity:
    """What a replica can hold."""
    return ReplicaCapacity(max_running, max_step_tokens, kv_tokens)


def attached(
    replica_id: str = "gpu0",
    at_s: float = 0.0,
    running: tuple[RunningCall, ...] = (),
    *,
    max_running: int = 4,
    kv_tokens: int = 10_000,
    is_draining: bool = False,
) -> ReplicaAttached:
    """A replica connects."""
    return ReplicaAttached(at_s, ReplicaId(replica_id), capacity(max_running, kv_tokens), running, is_draining)


def planned_replica(
    replica_id: str = "gpu0", *, running: tuple[RunningCall, ...] = (), max_running: int = 4
) -> ReplicaAttached:
    """A replica connects whose steps Tempo plans."""
    one = attached(replica_id, running=running, max_running=max_running)
    return replace(one, capacity=replace(one.capacity, has_step_planner=True))


def arrived(request_id: str, at_s: float = 0.0, **spec: object) -> Arrived:
    """A request comes, at its arrival unless told otherwise."""
    return Arrived(at_s, request(request_id, **{"arrival_s": at_s, **spec}))  # type: ignore[arg-type]  # see request()


def progressed(
    replica_id: str = "gpu0",
    at_s: float = 0.0,
    tokens: dict[int, int] | None = None,
    finished: dict[int, FinishReason] | None = None,
    *,
    output_tokens: int = 0,
    engine_waiting: int = 0,
    step: StepReport | None = None,
) -> Progressed:
    """News from a replica: {dispatch: new tokens}, {dispatch: why it ended}."""
    return Progressed(
        at_s,
        ReplicaId(replica_id),
        ReplicaLoad(running=1, waiting=engine_waiting, free_kv_tokens=1000),
        step,
        tuple((DispatchId(number), count) for number, count in (tokens or {}).items()),
        tuple(CallFinished(DispatchId(number), why, output_tokens) for number, why in (finished or {}).items()),
    )


def router(*replicas: str, policy: str = "fcfs", epoch: int = 0, max_running: int = 4, **config: object) -> RouterCore:
    """A settled router with these replicas attached; one call at most waits beyond their slots: none."""
    settings = {"policy": policy, "replica_queue_depth": 0, **config}
    core = RouterCore(SchedulingConfig.model_validate(settings), epoch=epoch)
    for replica_id in replicas:
        core.handle(attached(replica_id, max_running=max_running))
    core.handle(Settled(0.0))
    return core


def running(spec: RequestSpec) -> Call:
    """A call of this request that has produced nothing yet, on a replica that nothing else knows."""
    replica = Replica(ReplicaId("gpu0"), 1, capacity(), StepTimeModel(), set())
    return Call(DispatchId(1), spec, replica, LengthHistograms().lookup(spec), 0)


def produced(ledger: Ledger, spec: RequestSpec, tokens: int) -> None:
    """Tell the ledger of output tokens of one request."""
    ledger.progressed([running(spec)], [(DispatchId(1), tokens)])


def dispatched(actions: list[Action]) -> list[tuple[str, str]]:
    """(request, replica) of each dispatch, in order."""
    return [(one.request_id, one.replica_id) for one in actions if isinstance(one, Dispatch)]
