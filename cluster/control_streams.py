"""What peers say to the router: it becomes events, stamped with this process's clock, and news of programs."""

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from cluster import wire_pb2 as wire
from cluster import wire_pb2_grpc
from cluster.codec import (
    capacity_from_facts,
    outcome_from_message,
    progressed_from_message,
    spec_from_header,
    target_news,
)
from cluster.core_runner import CoreRunner
from cluster.length_estimates import LengthEstimates
from cluster.open_requests import OpenRequests
from cluster.peers import IngressSession, Peers, WorkerSession
from cluster.program_desk import STALE_DEADLINE_S, ProgramDesk
from cluster.served_stream import first_message, serve_stream
from tempo_router.actions import Redate, Relegate
from tempo_router.attainment import Attainment
from tempo_router.errors import LeaseLostError
from tempo_router.events import (
    Arrived,
    CallFinished,
    Progressed,
    ReplicaAttached,
    ReplicaDraining,
    ReplicaLoad,
    ReplicaLost,
    RunningCall,
    Settled,
)
from tempo_router.metrics import Outcome
from tempo_router.request import DispatchId, ProgramCall, ReplicaId, RequestId, RequestSpec

log = structlog.get_logger()


class ControlStreams(wire_pb2_grpc.RouterControlServicer):
    """Serves the control streams of ingresses and workers, in one router life. epoch: its number."""

    def __init__(
        self,
        runner: CoreRunner,
        peers: Peers,
        open_requests: OpenRequests,
        programs: ProgramDesk,
        estimates: LengthEstimates | None,
        attainment: Attainment,
        *,
        epoch: int,
    ) -> None:
        self._runner = runner
        self._core = runner.core
        self._peers = peers
        self._open = open_requests
        self._programs = programs
        self._estimates = estimates
        self._attainment = attainment
        self._epoch = epoch

    def settled(self) -> None:
        """All peers had time to attach: from now on who and what is missing is lost."""
        self._peers.settled()
        self._programs.settled()
        for program in list(self._core.ledger.programs.values()):
            self._programs.tell_core(program.program_id, program)
        self._runner.handle(Settled(time.monotonic()))
        self._peers.announce_workers()
        for session in self._peers.ingresses:
            self._compare_streams(session)

    # ---- ingresses ----

    # The stubs know only handlers that yield; gRPC also takes ones that write.
    async def Ingress(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[wire.IngressToRouter], context: Any
    ) -> None:
        """One ingress's control stream, from hello to the end."""
        first = await first_message(requests, "hello", context)
        await self._check_epoch(first.hello.seen_epoch, context)
        session = self._attach_ingress(first.hello)
        outbox = session.outbox
        try:
            await serve_stream(context, outbox, requests, lambda message: self._ingress_said(session, message))
        finally:
            self._peers.detach_ingress(session, outbox, self._ingress_gone)

    def _attach_ingress(self, hello: wire.IngressHello) -> IngressSession:
        session = self._peers.attach_ingress(hello.ingress_id, self._epoch)
        session.streaming = [spec_from_header(header, time.monotonic()) for header in hello.streaming]
        self._cancel_unlisted(session, {header.request_id for header in hello.streaming} | set(hello.waiting))
        for spec in session.streaming:
            self._open.own(spec, session.ingress_id)
        if self._peers.is_settled:
            self._compare_streams(session)
        self._programs.ingress_back(session.ingress_id)
        return session

    def _cancel_unlisted(self, session: IngressSession, listed: set[str]) -> None:
        """What the ingress no longer has, it cancelled or finished while its stream was down."""
        for request_id in self._open.of_ingress(session.ingress_id):
            if request_id not in listed:
                self._runner.cancel(request_id)

    def _compare_streams(self, session: IngressSession) -> None:
        """Streams that no attached worker runs are lost: their ingress must submit them again.

        Of the others it may have missed what became of their targets.
        """
        for spec in session.streaming:
            if self._ends_with_its_program(spec):
                continue
            if not self._evict_unknown(session, spec.request_id, spec.attempt):
                self._tell_owner(spec)
        session.streaming = []

    def _evict_unknown(self, session: IngressSession, request_id: RequestId, attempt: int) -> bool:
        """Have an attempt that neither waits nor runs submitted again. False if it does."""
        if self._core.knows(request_id, attempt):
            return False
        self._runner.tell_evicted(session.ingress_id, request_id, attempt)
        self._forget_if_gone(request_id)
        return True

    def _ingress_said(self, session: IngressSession, message: wire.IngressToRouter) -> None:
        # One message may hold what was sent as several. A worker is reported lost before its requests are submitted
        # again, and a request is cancelled after it was submitted: this order keeps both.
        now_s = time.monotonic()
        for worker_id in message.unreachable_workers:
            self._unreachable(session, ReplicaId(worker_id))
        for op in message.program_ops:
            self._programs.asked(session.ingress_id, op)
        for submit in message.submits:
            self._submit(session, submit, now_s)
        for cancel in message.cancels:
            self._runner.cancel(RequestId(cancel.request_id), is_complete=cancel.is_complete)
        if self._peers.is_settled:
            # Its engine may have ended an answer whose frames broke with the stream: nobody runs it any more.
            for one in message.unserved:
                self._evict_unknown(session, RequestId(one.request_id), one.attempt)
        for outcome in message.outcomes:
            self._ended(RequestId(outcome.request_id), outcome_from_message(outcome), now_s)

    def _ended(self, request_id: RequestId, outcome: Outcome, now_s: float) -> None:
        self._attainment.add(outcome, now_s)
        explanation = self._runner.decisions.ended(request_id, outcome, now_s)
        if explanation is not None and outcome.is_met is False:
            log.info("slo_missed", **{name: value for name, value in explanation.shown().items() if value is not None})

    def _submit(self, session: IngressSession, submit: wire.Submit, now_s: float) -> None:
        spec = said = spec_from_header(submit.header, now_s)
        self._open.own(spec, session.ingress_id)
        if self._ends_with_its_program(spec):
            return
        if self._peers.is_settled:
            # Before, what was asked of programs and not stored may still be said again.
            spec = self._programs.corrected(said)
            self._tell_core(spec)
        if submit.HasField("payload"):
            self._open.keep_payload(spec.request_id, submit.payload)
        is_again = self._core.knows(spec.request_id, spec.attempt)
        lengths = self._core.lengths.lookup(spec)
        self._runner.decisions.arrived(spec, lengths, *self._core.worth_of(spec, lengths), now_s)
        self._runner.handle(Arrived(now_s, spec))
        if is_again or spec is not said:
            self._tell_owner(said)
        if self._estimates is not None and self._core.knows(spec.request_id, spec.attempt):
            self._estimates.arrived(spec, lengths)
        if not self._core.is_waiting(spec.request_id):
            self._open.take_payload(spec.request_id)

    def _tell_owner(self, said: RequestSpec) -> None:
        """What became of a request's target, its ingress may have missed while it was away. said: as it knows it."""
        request_id, known = said.request_id, self._core.spec_of(said.request_id)
        if known is None:
            return
        now_s = time.monotonic()
        if isinstance(known.slo, ProgramCall) and isinstance(said.slo, ProgramCall):
            deadline_s = known.arrival_s + known.slo.ttlt_s
            if abs(deadline_s - said.arrival_s - said.slo.ttlt_s) > STALE_DEADLINE_S:
                redate = Redate(request_id, known.slo.program_id, deadline_s)
                self._runner.decisions.decided(redate, now_s)
                self._peers.tell(request_id, target_news(redate, now_s))
        if self._core.is_relegated(request_id):
            self._peers.tell(request_id, target_news(Relegate(request_id), now_s))

    def _ends_with_its_program(self, spec: RequestSpec) -> bool:
        """Whether a request's program was cancelled while its ingress was away; then that is told now."""
        if not self._programs.is_cancelled(spec.program_id):
            return False
        self._runner.cancel_with_program(spec.request_id)
        return True

    def _unreachable(self, session: IngressSession, worker_id: ReplicaId) -> None:
        """This ingress lost its tokens from that worker: what it had there goes on elsewhere, at once."""
        lost = [
            CallFinished(dispatch_id, "lost", 0)
            for dispatch_id in self._open.dispatches_between(session.ingress_id, worker_id)
        ]
        worker = self._peers.worker(worker_id)
        if lost and worker is not None:
            self._progressed(worker, Progressed(time.monotonic(), worker_id, worker.load, finished=tuple(lost)))

    def _ingress_gone(self, session: IngressSession) -> None:
        log.info("ingress_gone", ingress_id=session.ingress_id)
        self._cancel_unlisted(session, set())
        self._programs.ingress_gone(session.ingress_id)
        self._peers.drop_ingress(session)

    # ---- workers ----

    async def Worker(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[wire.WorkerToRouter], context: Any
    ) -> None:
        """One worker's control stream, from hello to the end."""
        first = await first_message(requests, "hello", context)
        await self._check_epoch(first.hello.seen_epoch, context)
        worker = self._attach_worker(first.hello)
        try:
            await serve_stream(context, worker.outbox, requests, lambda message: self._worker_said(worker, message))
        finally:
            if self._peers.drop_worker(worker):
                self._worker_lost(worker)

    def _attach_worker(self, hello: wire.WorkerHello) -> WorkerSession:
        now_s = time.monotonic()
        load = ReplicaLoad(running=0, waiting=0, free_kv_tokens=hello.facts.kv_tokens)
        worker = WorkerSession(ReplicaId(hello.worker_id), hello.address, hello.facts, load)
        self._peers.attach_worker(worker, self._epoch)
        self._open.end_dispatches(worker.worker_id)
        running = []
        for call in hello.running:
            dispatch_id = DispatchId(call.dispatch_id)
            spec = spec_from_header(call.header, now_s)
            self._open.own(spec, self._open.owner(spec.request_id) or call.ingress_id)
            self._open.dispatched(dispatch_id, spec.request_id, worker.worker_id)
            running.append(RunningCall(dispatch_id, spec, call.new_tokens))
        self._runner.handle(ReplicaAttached(now_s, worker.worker_id, capacity_from_facts(hello.facts), tuple(running)))
        if self._peers.is_settled:
            for one in running:
                self._tell_core(one.spec)
        if hello.is_draining:
            self._runner.handle(ReplicaDraining(now_s, worker.worker_id))
        log.info("worker_attached", worker_id=worker.worker_id, address=worker.address, running=len(running))
        self._peers.announce_workers()
        return worker

    def _worker_lost(self, worker: WorkerSession) -> None:
        log.warning("worker_lost", worker_id=worker.worker_id)
        self._peers.announce_workers()
        self._runner.handle(ReplicaLost(time.monotonic(), worker.worker_id))
        self._open.end_dispatches(worker.worker_id)

    def _worker_said(self, worker: WorkerSession, message: wire.WorkerToRouter) -> None:
        now_s = time.monotonic()
        for progress in message.progress:
            for dispatch_id in progress.preempted:
                self._runner.decisions.preempted(DispatchId(dispatch_id), worker.worker_id, now_s)
            self._progressed(worker, progressed_from_message(progress, worker.worker_id, now_s))
        if message.is_draining:
            log.info("worker_draining", worker_id=worker.worker_id)
            self._runner.handle(ReplicaDraining(now_s, worker.worker_id))

    def _progressed(self, worker: WorkerSession, event: Progressed) -> None:
        worker.load = event.load
        answered = [
            (spec, finished.output_tokens)
            for finished in event.finished
            if finished.reason == "completed" and (spec := self._call_of_program(finished.dispatch_id)) is not None
        ]
        self._runner.handle(event)
        for spec, tokens in answered:
            self._programs.answered(spec.program_id, spec.call_id, spec.prompt_tokens, spec.generated_tokens + tokens)
        for finished in event.finished:
            request_id = self._open.end_dispatch(finished.dispatch_id)
            if request_id is not None:
                self._forget_if_gone(request_id)

    def _call_of_program(self, dispatch_id: DispatchId) -> RequestSpec | None:
        """The request of a dispatch, if it is all of a program's call; siblings (`n` > 1) are each a part."""
        request_id = self._open.dispatched_as(dispatch_id)
        spec = self._core.spec_of(request_id) if request_id is not None else None
        return spec if spec is not None and spec.call_id and spec.group_size == 1 else None

    # ---- both ----

    async def _check_epoch(self, seen_epoch: int, context: Any) -> None:
        """A peer that met a newer router tells us that we are not the one any more."""
        if seen_epoch > self._epoch:
            error = LeaseLostError(f"a peer has seen epoch {seen_epoch}, this router has {self._epoch}")
            self._runner.fail(error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    def _forget_if_gone(self, request_id: RequestId) -> None:
        if self._core.spec_of(request_id) is None:
            self._open.forget(request_id)

    def _tell_core(self, spec: RequestSpec) -> None:
        """What became of a request's program, a core that is newer may not know."""
        if isinstance(spec.slo, ProgramCall):
            name = spec.slo.program_id
            self._programs.tell_core(name, self._core.ledger.programs.get(name))
