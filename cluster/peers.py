"""The peers of a router: who is connected, and how to reach them.

All that is remembered here comes back from the peers' hellos when the router is new.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster import wire_pb2 as wire
from cluster.open_requests import OpenRequests
from cluster.outbox import Outbox
from tempo_router.events import ReplicaLoad
from tempo_router.request import ReplicaId, RequestId, RequestSpec

INGRESS_GRACE_S = 5.0
"""How long the requests of an ingress live after its control stream broke. A killed ingress loses them sooner: its
token streams break too, and the workers abort. This covers a broken control stream alone."""


@dataclass(slots=True)
class IngressSession:
    """One ingress. `outbox` belongs to its current stream; gone: the timer that runs while there is none.

    streaming: what it said to be streaming and nobody has compared yet with what workers run.
    """

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
    """Ingresses and workers by id, and how to reach them."""

    def __init__(self, open_requests: OpenRequests) -> None:
        self._open = open_requests
        self._ingresses: dict[str, IngressSession] = {}
        self._workers: dict[ReplicaId, WorkerSession] = {}
        self._is_settled = False
        self._is_closed = False

    @property
    def is_settled(self) -> bool:
        """Whether all had time to attach. Before, ingresses are not told the workers: who is missing is dropped."""
        return self._is_settled

    def settled(self) -> None:
        """All had time to attach."""
        self._is_settled = True

    def close(self) -> None:
        """The router stops: that streams end from now on means nothing."""
        self._is_closed = True

    # ---- ingresses ----

    @property
    def ingresses(self) -> list[IngressSession]:
        """Those that have a stream, or had one less than INGRESS_GRACE_S ago."""
        return list(self._ingresses.values())

    @property
    def connected_ingresses(self) -> list[IngressSession]:
        """Those that have a stream now."""
        return [session for session in self._ingresses.values() if session.is_connected]

    def attach_ingress(self, ingress_id: str, epoch: int) -> IngressSession:
        """A stream began: the ingress is told the epoch and the workers. One that is known keeps its session."""
        session = self._ingresses.setdefault(ingress_id, IngressSession(ingress_id))
        if session.gone is not None:
            session.gone.cancel()
            session.gone = None
        session.outbox = Outbox()
        session.is_connected = True
        session.outbox.put(wire.RouterToIngress(hello=wire.RouterHello(epoch=epoch)))
        if self._is_settled:
            session.outbox.put(wire.RouterToIngress(workers=self._worker_set()))
        return session

    def detach_ingress(
        self, session: IngressSession, stream: Outbox[wire.RouterToIngress], on_gone: Callable[[IngressSession], None]
    ) -> None:
        """A stream ended. on_gone: called if no other begins in time; never if one has begun, or after `close`."""
        if session.outbox is stream and not self._is_closed:
            session.is_connected = False
            session.gone = asyncio.get_running_loop().call_later(INGRESS_GRACE_S, on_gone, session)

    def drop_ingress(self, session: IngressSession) -> None:
        """It is gone for good."""
        del self._ingresses[session.ingress_id]

    # ---- workers ----

    @property
    def worker_ids(self) -> list[ReplicaId]:
        """Those that are attached."""
        return list(self._workers)

    def worker(self, worker_id: ReplicaId) -> WorkerSession | None:
        """A worker, if it is attached."""
        return self._workers.get(worker_id)

    def attach_worker(self, worker: WorkerSession, epoch: int) -> None:
        """A stream began; its worker is told the epoch. Replaces an earlier stream of the same worker."""
        worker.outbox.put(wire.RouterToWorker(hello=wire.RouterHello(epoch=epoch)))
        self._workers[worker.worker_id] = worker

    def drop_worker(self, worker: WorkerSession) -> bool:
        """A stream ended. False if that means nothing: there is another one, or it is after `close`."""
        if self._workers.get(worker.worker_id) is not worker or self._is_closed:
            return False
        del self._workers[worker.worker_id]
        return True

    def announce_workers(self) -> None:
        """Tell every ingress the set of workers, once all had time to attach."""
        if not self._is_settled:
            return
        workers = self._worker_set()
        for session in self.connected_ingresses:
            session.outbox.put(wire.RouterToIngress(workers=workers))

    def _worker_set(self) -> wire.WorkerSet:
        return wire.WorkerSet(
            workers=[
                wire.WorkerAddress(worker_id=worker.worker_id, address=worker.address, facts=worker.facts)
                for worker in self._workers.values()
            ]
        )

    # ---- news for them ----

    def tell(self, request_id: RequestId, message: wire.RouterToIngress) -> None:
        """Send to the owner. One that is away learns from the comparison of its next hello with what we know."""
        self.tell_ingress(self._open.owner(request_id) or "", message)

    def tell_ingress(self, ingress_id: str, message: wire.RouterToIngress) -> None:
        """Send to an ingress, if it is connected."""
        session = self._ingresses.get(ingress_id)
        if session is not None and session.is_connected:
            session.outbox.merge(message)

    def tell_worker(self, worker_id: ReplicaId, message: wire.RouterToWorker) -> None:
        """Send to a worker, if it is attached."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.outbox.merge(message)
