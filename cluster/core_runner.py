"""Runs the router's core: gives it events and tells its peers what it decides."""

import time
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
from cluster.event_recorder import EventRecorder
from cluster.open_requests import OpenRequests
from cluster.peers import Peers
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
from tempo_router.errors import InvalidEventError
from tempo_router.event_log import Asked
from tempo_router.events import Cancelled, Event
from tempo_router.explain import DecisionLog
from tempo_router.program_graph import ProgramGraph
from tempo_router.program_view import Outlook
from tempo_router.request import ProgramId, RequestId
from tempo_router.router import RouterCore


class CoreRunner:
    """The core of one router life and those who hear of its decisions."""

    def __init__(self, core: RouterCore, peers: Peers, open_requests: OpenRequests, decisions: DecisionLog) -> None:
        self.core = core
        self.decisions = decisions
        self._failure: Exception | None = None
        self._recorder: EventRecorder | None = None
        self._peers = peers
        self._open = open_requests

    @property
    def failure(self) -> Exception | None:
        """Why this router can no longer be relied on, by whoever found out first; None while it can."""
        return self._failure

    def fail(self, error: Exception) -> None:
        """This router can no longer be relied on. What comes after the first cause may follow from it."""
        self._failure = self._failure or error

    @property
    def recorder(self) -> EventRecorder | None:
        """What `record` was given; whoever gave it closes it."""
        return self._recorder

    def record(self, recorder: EventRecorder) -> None:
        """Record all that the core is told and asked; to be called before the first event."""
        self._recorder = recorder

    def handle(self, event: Event) -> None:
        """Give the core one event and carry out what it decides.

        Raises InvalidEventError, with nothing changed. Any other error leaves an event half done, a request perhaps
        nowhere: the router has failed, and a new one learns from its peers what is true.
        """
        try:
            actions = self.core.handle(event)
            if self._recorder is not None:
                self._recorder.told(event, actions)
            for action in actions:
                self.decisions.decided(action, event.at_s)
                self._carry_out(action)
        except InvalidEventError:
            raise
        except Exception as error:
            self.fail(error)
            raise

    def cancel(self, request_id: RequestId, *, is_complete: bool = False) -> None:
        """End a request. is_complete: its client has all that it wanted."""
        self.handle(Cancelled(time.monotonic(), request_id, is_complete))
        self._open.forget(request_id)

    def cancel_program(self, program_id: ProgramId) -> None:
        """End all requests of a program; their ingresses tell the clients."""
        for request_id in self._open.of_program(program_id):
            self.cancel_with_program(request_id)

    def cancel_with_program(self, request_id: RequestId) -> None:
        """End a request whose program was cancelled; its ingress tells the client."""
        self._peers.tell(request_id, wire.RouterToIngress(cancelled=[request_id]))
        self.cancel(request_id)

    def tell_evicted(self, ingress_id: str, request_id: RequestId, attempt: int) -> None:
        """Have an ingress submit a request again: this attempt neither waits nor runs any more."""
        eviction = wire.Eviction(request_id=request_id, attempt=attempt)
        self._peers.tell_ingress(ingress_id, wire.RouterToIngress(evictions=[eviction]))

    def least_left_s(self, program_id: ProgramId) -> float:
        """What a program still needs even if all goes well."""
        if self._recorder is not None:
            self._recorder.asked(Asked("least_left_s", program_id))
        return self.core.least_left_s(program_id)

    def outlook(self, graph: ProgramGraph, now_s: float) -> Outlook | None:
        """What is foretold of a program. now_s: since the Unix epoch, as the dates of the graph."""
        if self._recorder is not None:
            self._recorder.asked(Asked("outlook", graph.program_id))
        return self.core.outlook(graph.program_id, None if graph.deadline_s is None else graph.deadline_s - now_s)

    def _carry_out(self, action: Action) -> None:
        """Tell whom an action is for."""
        match action:
            case Admit():
                self._peers.tell(action.request_id, verdict_message(action))
            case Reject():
                self._peers.tell(action.request_id, verdict_message(action))
                self._open.forget(action.request_id)
            case Dispatch():
                self._dispatch(action)
            case Abort(dispatch_id=dispatch_id, replica_id=replica_id):
                self._peers.tell_worker(replica_id, wire.RouterToWorker(aborts=[dispatch_id]))
            case Relegate() | Redate():
                self._peers.tell(action.request_id, target_news(action, time.monotonic()))
            case Expire(request_id=request_id):
                self._peers.tell(request_id, wire.RouterToIngress(expired=[request_id]))
                self._open.forget(request_id)
            case Evict(request_id=request_id, attempt=attempt):
                self.tell_evicted(self._open.owner(request_id) or "", request_id, attempt)
                self._open.forget(request_id)
            case Retune(replica_id=replica_id):
                self._peers.tell_worker(replica_id, wire.RouterToWorker(retunes=[message_from_retune(action)]))
            case Retarget(replica_id=replica_id, dispatch_id=dispatch_id, slo=slo):
                self._peers.tell_worker(replica_id, wire.RouterToWorker(retargets=[retarget_message(dispatch_id, slo)]))
            case Defer() | Readmit():
                pass  # Told to who asks why (explain.py); nobody has to act.
            case _:
                assert_never(action)

    def _dispatch(self, action: Dispatch) -> None:
        worker = self._peers.worker(action.replica_id)
        spec, owner = self.core.spec_of(action.request_id), self._open.owner(action.request_id)
        if worker is None or spec is None or owner is None:
            raise RuntimeError(
                f"the core dispatched {action.request_id!r} to {action.replica_id!r}, one of which is not known here"
            )
        message = wire.Dispatch(
            dispatch_id=action.dispatch_id,
            header=header_from_spec(spec, time.monotonic()),
            ingress_id=owner,
            priority=action.priority,
        )
        if worker.facts.has_step_planner:
            message.standing.CopyFrom(message_from_standing(action.standing))
            message.length_atoms.extend(self.core.lengths_of(action.request_id).atoms)
        payload = self._open.take_payload(action.request_id)
        if payload is not None:
            message.payload.CopyFrom(payload)
        self._open.dispatched(action.dispatch_id, action.request_id, action.replica_id)
        worker.outbox.merge(wire.RouterToWorker(dispatches=[message]))
