"""The router in numbers, for dashboards: copies that nothing changes later."""

from dataclasses import dataclass
from typing import get_args

from tempo_router.fleet import Fleet
from tempo_router.replicas import Replica
from tempo_router.request import ReplicaId, SloClass, slo_class
from tempo_router.waiting_line import WaitingLine


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica as the router sees it. calls: dispatched and not ended, aborted ones included.

    has_step_planner: Tempo composes its steps, not the engine itself. step_error: mean error of estimated step times;
    is_unsure: it was above 30 % for a minute, and costs and steps keep a margin.
    """

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
    is_unsure: bool
    has_step_planner: bool
    is_draining: bool


@dataclass(slots=True)
class QueueStates:
    """Requests of one class; each is counted once.

    Of those that wait at the router: in_turn, and beside them deferred by the plan, relegated, and unplaceable ones
    that no attached replica could hold. The same of dispatched ones; those neither deferred nor relegated are begun
    once their first token came, else unbegun: their engine queues, computes or holds them.
    """

    in_turn: int = 0
    deferred: int = 0
    relegated: int = 0
    unplaceable: int = 0
    begun: int = 0
    unbegun: int = 0
    deferred_in_engine: int = 0
    relegated_in_engine: int = 0


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """Counts for dashboards. waiting includes unplaceable, requests that no attached replica could hold."""

    waiting: dict[SloClass, int]
    running: dict[SloClass, int]
    states: dict[SloClass, QueueStates]
    waiting_tokens: int
    waiting_cost_s: float
    unplaceable: int
    is_settled: bool
    is_draining: bool
    replicas: tuple[ReplicaSnapshot, ...]


def router_snapshot(line: WaitingLine, fleet: Fleet, *, is_settled: bool, is_draining: bool) -> RouterSnapshot:
    """What waits and what runs, as counted now. O(waiting requests and running calls)."""
    running = dict.fromkeys(get_args(SloClass), 0)
    for call in fleet.running.values():
        running[slo_class(call.spec.slo)] += 1
    return RouterSnapshot(
        waiting=dict(line.backlog.requests),
        running=running,
        states=_queue_states(line, fleet),
        waiting_tokens=line.backlog.prompt_tokens,
        waiting_cost_s=sum(line.backlog.cost_s.values()),
        unplaceable=len(line.unplaceable),
        is_settled=is_settled,
        is_draining=is_draining,
        replicas=tuple(_replica_snapshot(replica) for replica in fleet.replicas.values()),
    )


def _queue_states(line: WaitingLine, fleet: Fleet) -> dict[SloClass, QueueStates]:
    states: dict[SloClass, QueueStates] = {name: QueueStates() for name in get_args(SloClass)}
    for request_id, request in line.requests.items():
        counted = states[slo_class(request.spec.slo)]
        if request_id in line.unplaceable:
            counted.unplaceable += 1
        elif request.is_relegated:
            counted.relegated += 1
        elif request.is_deferred:
            counted.deferred += 1
        else:
            counted.in_turn += 1
    for call in fleet.running.values():
        counted = states[slo_class(call.spec.slo)]
        if call.is_relegated:
            counted.relegated_in_engine += 1
        elif call.is_deferred:
            counted.deferred_in_engine += 1
        elif call.new_tokens:
            counted.begun += 1
        else:
            counted.unbegun += 1
    return states


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
        is_unsure=replica.steps.is_unsure,
        has_step_planner=replica.capacity.has_step_planner,
        is_draining=replica.is_draining,
    )
