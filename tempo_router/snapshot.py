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


def router_snapshot(line: WaitingLine, fleet: Fleet, *, is_settled: bool, is_draining: bool) -> RouterSnapshot:
    """What waits and what runs, as counted now. O(running calls)."""
    running = dict.fromkeys(get_args(SloClass), 0)
    for call in fleet.running.values():
        running[slo_class(call.spec.slo)] += 1
    return RouterSnapshot(
        waiting=dict(line.backlog.requests),
        running=running,
        waiting_tokens=line.backlog.prompt_tokens,
        waiting_cost_s=sum(line.backlog.cost_s.values()),
        unplaceable=len(line.unplaceable),
        is_settled=is_settled,
        is_draining=is_draining,
        replicas=tuple(_replica_snapshot(replica) for replica in fleet.replicas.values()),
    )


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
