"""The peers of a router, whose the open requests are, and how each of them is told what the core decided.

What is remembered here beside the core is what the core has no use for. All of it comes back from the peers' hellos
when the router is new.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import assert_never

from cluster import wire_pb2 as wire
from cluster.codec import (
    header_from_spec,
    message_from_retune,
    message_from_standing,
    retarget_message,
    target_news,
    verdict_message,
)
from cluster.open_requests import OpenRequests
from cluster.outbox import Outbox
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
from tempo_router.events import ReplicaLoad
from tempo_router.request import ReplicaId, RequestId, RequestSpec
from tempo_router.router import RouterCore


@dataclass(slots=True)
class IngressSession:
    """One ingress. `outbox` belongs to its current stream; gone: the timer that runs while there is none."""

    ingress_id: str
    outbox: Outbox[wire.RouterToIngress] = field(default_factory=Outbox)
    is_connected: bool = False
    gone: asyncio.TimerHandle | None = None
    streaming: list[RequestSpec] = field(default_factory=list)


@dataclass(slots=True)
class WorkerSession:
    """One attached worker."""

    worker_id: ReplicaId
    address: str
    facts: wire.EngineFacts
    load: ReplicaLoad
    outbox: Outbox[wire.RouterToWorker] = field(default_factory=Outbox)


class Peers:
    """Ingresses and workers by id, and the open requests."""

    def __init__(self) -> None:
        self.ingresses: dict[str, IngressSession] = {}
        self.workers: dict[ReplicaId, WorkerSession] = {}
        self.open = OpenRequests()

    @property
    def connected_ingresses(self) -> list[IngressSession]:
        """Those that have a stream now."""
        return [session for session in self.ingresses.values() if session.is_connected]

    def tell(self, request_id: RequestId, message: wire.RouterToIngress) -> None:
        """Send to the owner. One that is away learns from the comparison of its next hello with what we know."""
        self.tell_ingress(self.open.owner(request_id) or "", message)

    def tell_ingress(self, ingress_id: str, message: wire.RouterToIngress) -> None:
        """Send to an ingress, if it is connected."""
        session = self.ingresses.get(ingress_id)
        if session is not None and session.is_connected:
            session.outbox.merge(message)

    def tell_worker(self, worker_id: ReplicaId, message: wire.RouterToWorker) -> None:
        """Send to a worker, if it is attached."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.outbox.merge(message)

    def worker_set(self) -> wire.WorkerSet:
        """All attached workers, as ingresses are told."""
        return wire.WorkerSet(
            workers=[
                wire.WorkerAddress(worker_id=worker.worker_id, address=worker.address, facts=worker.facts)
                for worker in self.workers.values()
            ]
        )

    def carry_out(self, action: Action, core: RouterCore) -> None:
        """Tell whom an action is for. core: which decided it, and knows its request."""
        match action:
            case Admit():
                self.tell(action.request_id, verdict_message(action))
            case Reject():
                self.tell(action.request_id, verdict_message(action))
                self.open.forget(action.request_id)
            case Dispatch():
                self._dispatch(action, core)
            case Abort(dispatch_id=dispatch_id, replica_id=replica_id):
                self.tell_worker(replica_id, wire.RouterToWorker(aborts=[dispatch_id]))
            case Relegate() | Redate():
                self.tell(action.request_id, target_news(action, time.monotonic()))
            case Expire(request_id=request_id):
                self.tell(request_id, wire.RouterToIngress(expired=[request_id]))
                self.open.forget(request_id)
            case Evict(request_id=request_id, attempt=attempt):
                eviction = wire.Eviction(request_id=request_id, attempt=attempt)
                self.tell(request_id, wire.RouterToIngress(evictions=[eviction]))
                self.open.forget(request_id)
            case Retune(replica_id=replica_id):
                self.tell_worker(replica_id, wire.RouterToWorker(retunes=[message_from_retune(action)]))
            case Retarget(replica_id=replica_id, dispatch_id=dispatch_id, slo=slo):
                self.tell_worker(replica_id, wire.RouterToWorker(retargets=[retarget_message(dispatch_id, slo)]))
            case Defer() | Readmit():
                pass  # Told to who asks why (explain.py); nobody has to act.
            case _:
                assert_never(action)

    def _dispatch(self, action: Dispatch, core: RouterCore) -> None:
        worker = self.workers[action.replica_id]
        spec, owner = core.spec_of(action.request_id), self.open.owner(action.request_id)
        if spec is None or owner is None:
            raise RuntimeError(f"the core dispatched {action.request_id!r}, which is not open here")
        message = wire.Dispatch(
            dispatch_id=action.dispatch_id,
            header=header_from_spec(spec, time.monotonic()),
            ingress_id=owner,
            priority=action.priority,
        )
        if worker.facts.has_step_planner:
            message.standing.CopyFrom(message_from_standing(action.standing))
            message.length_atoms.extend(core.lengths_of(action.request_id).atoms)
        payload = self.open.take_payload(action.request_id)
        if payload is not None:
            message.payload.CopyFrom(payload)
        self.open.dispatched(action.dispatch_id, action.request_id, action.replica_id)
        worker.outbox.merge(wire.RouterToWorker(dispatches=[message]))
