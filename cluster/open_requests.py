"""Whose the router's open requests are, where they run, and their payloads on the way to a worker.

What the shell of the router remembers beside RouterCore, which has no use for it. Nothing of it is stored: a new
router has it again from the hellos of its peers and from what they submit again.
"""

import asyncio

from cluster import wire_pb2 as wire
from tempo_router.request import DispatchId, ReplicaId, RequestId, RequestSpec


class OpenRequests:
    """Requests from their submission to their end, each with its ingress; and the dispatches of those that run.

    Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._owners: dict[RequestId, str] = {}
        self._payloads: dict[RequestId, wire.Payload] = {}
        self._dispatches: dict[DispatchId, tuple[RequestId, ReplicaId]] = {}
        self._program_of: dict[RequestId, str] = {}
        self._of_program: dict[str, set[RequestId]] = {}
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._owners)

    async def until_empty(self) -> None:
        """Wait until every request has ended."""
        while self._owners:
            self._empty.clear()
            await self._empty.wait()

    # ---- requests ----

    def own(self, spec: RequestSpec, ingress_id: str) -> None:
        """A request belongs to this ingress; a known one may change hands."""
        self._owners[spec.request_id] = ingress_id
        if spec.program_id:
            self._program_of[spec.request_id] = spec.program_id
            self._of_program.setdefault(spec.program_id, set()).add(spec.request_id)

    def owner(self, request_id: RequestId) -> str | None:
        """The ingress of a request; None if it is not open."""
        return self._owners.get(request_id)

    def of_ingress(self, ingress_id: str) -> list[RequestId]:
        """The open requests of an ingress. O(open requests)."""
        return [request_id for request_id, owner in self._owners.items() if owner == ingress_id]

    def of_program(self, program_id: str) -> list[RequestId]:
        """The open requests of a program, siblings included."""
        return list(self._of_program.get(program_id, ()))

    def keep_payload(self, request_id: RequestId, payload: wire.Payload) -> None:
        """Keep what a worker needs, until the request is dispatched."""
        self._payloads[request_id] = payload

    def take_payload(self, request_id: RequestId) -> wire.Payload | None:
        """The payload, which is kept no longer; None if there is none, as after a dispatch."""
        return self._payloads.pop(request_id, None)

    def forget(self, request_id: RequestId) -> None:
        """A request has ended. Its dispatch stays until its worker says that it is over."""
        self._owners.pop(request_id, None)
        self._payloads.pop(request_id, None)
        program_id = self._program_of.pop(request_id, None)
        if program_id is not None:
            members = self._of_program[program_id]
            members.discard(request_id)
            if not members:
                del self._of_program[program_id]
        if not self._owners:
            self._empty.set()

    # ---- dispatches ----

    def dispatched(self, dispatch_id: DispatchId, request_id: RequestId, worker_id: ReplicaId) -> None:
        """A request runs on this worker under this number."""
        self._dispatches[dispatch_id] = (request_id, worker_id)

    def dispatched_as(self, dispatch_id: DispatchId) -> RequestId | None:
        """The request that runs under this number; None if none does."""
        known = self._dispatches.get(dispatch_id)
        return None if known is None else known[0]

    def end_dispatch(self, dispatch_id: DispatchId) -> RequestId | None:
        """A worker is done with a dispatch. Returns its request; None if it was not known."""
        known = self._dispatches.pop(dispatch_id, None)
        return None if known is None else known[0]

    def end_dispatches(self, worker_id: ReplicaId) -> None:
        """Nothing runs on this worker any more. O(dispatches)."""
        for dispatch_id in [known for known, (_, where) in self._dispatches.items() if where == worker_id]:
            del self._dispatches[dispatch_id]

    def dispatches_between(self, ingress_id: str, worker_id: ReplicaId) -> list[DispatchId]:
        """The dispatches of an ingress's requests on one worker. O(dispatches)."""
        return [
            dispatch_id
            for dispatch_id, (request_id, where) in self._dispatches.items()
            if where == worker_id and self._owners.get(request_id) == ingress_id
        ]

    def counts(self) -> dict[str, int]:
        """For logs, status pages and tests."""
        return {
            "open_requests": len(self._owners),
            "payloads": len(self._payloads),
            "dispatched": len(self._dispatches),
        }
