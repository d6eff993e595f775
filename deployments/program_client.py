"""The ingress's side of programs: asks the router, in the types of `tempo_router.program_ops`."""

import uuid
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from cluster.ingress_programs import GraphRunner
from cluster.program_desk import ContinueResponse
from deployments.program_identity import Identity
from tempo_router.errors import ProgramError
from tempo_router.program_graph import NewCall
from tempo_router.program_ops import BeginCall, CallTicket, EndCall, ProgramOp

_tickets = msgspec.json.Decoder(CallTicket)
_continued = msgspec.json.Decoder(tuple[str, str] | None)


class ProgramLink(Protocol):
    """What carries operations to the router (cluster.ingress_programs.IngressPrograms).

    graphs: who runs declared graphs here.
    """

    graphs: GraphRunner

    @property
    def ingress_id(self) -> str:
        """Who asks."""
        ...

    async def ask(self, kind: str, body: bytes) -> bytes:
        """Carry out and wait for the result. Raises ProgramError, RouterUnavailableError."""
        ...

    def tell(self, kind: str, body: bytes) -> None:
        """Carry out, whenever."""
        ...


class ProgramClient:
    """Programs as an ingress uses them."""

    def __init__(self, link: ProgramLink) -> None:
        self._link = link

    def run_graphs(self, runner: GraphRunner) -> None:
        """From now on this one hears of tools and cancelled programs."""
        self._link.graphs = runner

    @property
    def ingress_id(self) -> str:
        """Who asks."""
        return self._link.ingress_id

    async def ask(self, op: Any) -> Any:
        """The result of an operation, decoded. Raises ProgramError, RouterUnavailableError."""
        return msgspec.json.decode(await self._link.ask(type(op).__name__, msgspec.json.encode(op)))

    async def begin(self, identity: Identity, *, tenant: str, app: str, now_epoch_s: float) -> CallTicket:
        """A call begins: its place in its program. Raises ProgramError, RouterUnavailableError.

        When it raises after it was sent (the client left, no router answered), the call is ended, should it begin yet.
        """
        parent = await self._parent_of(identity, tenant) if identity.continues else None
        if parent is not None:
            identity = replace(identity, program_id=parent[0], parents=identity.parents or (parent[1],))
        deadline_s = identity.deadline_epoch_s
        if identity.deadline_s is not None:
            deadline_s = now_epoch_s + identity.deadline_s
        call = NewCall(
            call_id=identity.call_id or f"call_{uuid.uuid4().hex}",
            attempt=identity.attempt,
            stage=identity.stage,
            parents=identity.parents,
            label=identity.label,
            branch=identity.agent,
            parent_branch=identity.parent_agent,
            owner=self._link.ingress_id,
            is_tool=identity.is_tool,
        )
        op = BeginCall(
            program_id=identity.parent_id or identity.program_id,
            tenant=tenant,
            call=call,
            is_new_allowed=identity.is_new_allowed,
            may_restart=identity.may_restart,
            alias=identity.program_id if identity.parent_id else "",
            app=app,
            name=identity.name,
            deadline_s=deadline_s,
        )
        try:
            ticket = _tickets.decode(await self._link.ask("BeginCall", msgspec.json.encode(op)))
        except ProgramError:
            raise
        except BaseException:
            self.end(EndCall(op.program_id, call.call_id, call.attempt, "cancelled"))
            raise
        _refuse_if_over(ticket, may_restart=op.may_restart)
        return ticket

    def end(self, op: EndCall) -> None:
        """A call ended; this is carried out even if the router is away now."""
        self.tell(op)

    def tell(self, op: ProgramOp) -> None:
        """Have an operation carried out that nobody waits for, even if the router is away now."""
        self._link.tell(type(op).__name__, msgspec.json.encode(op))

    async def _parent_of(self, identity: Identity, tenant: str) -> tuple[str, str] | None:
        op = ContinueResponse(tenant, identity.continues)
        found: tuple[str, str] | None = _continued.decode(
            await self._link.ask("ContinueResponse", msgspec.json.encode(op))
        )
        return found


def _refuse_if_over(ticket: CallTicket, *, may_restart: bool) -> None:
    """A call that its program knows, though that is over: new calls get an error then, but where a session goes on."""
    if ticket.over == "cancelled":
        message = f"call {ticket.call_id!r}: program {ticket.program_id!r} was cancelled, and this call with it"
        raise ProgramError("program_cancelled", message, "program")
    if ticket.over == "finished" and not may_restart:
        message = f"call {ticket.call_id!r}: program {ticket.program_id!r} is finished"
        raise ProgramError("program_ended", message, "program")
