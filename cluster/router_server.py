"""The router's shell: RouterCore behind gRPC.

What peers say becomes events, stamped with this process's clock; what the core decides is told them (peers.py).
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
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
from cluster.event_recorder import EventRecorder
from cluster.learnt_lengths import LearntLengths
from cluster.length_estimates import LengthEstimates
from cluster.link import channel_options
from cluster.open_requests import OpenRequests
from cluster.peers import INGRESS_GRACE_S, IngressSession, Peers, WorkerSession
from cluster.program_desk import STALE_DEADLINE_S, ExplainRequest, ProgramDesk, ViewConsole
from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from cluster.served_stream import first_message, serve_stream
from tempo_router.actions import Redate, Relegate
from tempo_router.attainment import Attainment
from tempo_router.config import TempoConfig
from tempo_router.errors import InvalidEventError, LeaseLostError, StoreRefusedError, StoreUnavailableError, TempoError
from tempo_router.event_log import Beginning
from tempo_router.events import (
    Arrived,
    CallFinished,
    DrainStarted,
    Progressed,
    ReplicaAttached,
    ReplicaDraining,
    ReplicaLoad,
    ReplicaLost,
    RunningCall,
    Settled,
    Ticked,
)
from tempo_router.explain import DecisionLog
from tempo_router.metrics import Outcome
from tempo_router.pattern_history import PatternHistory
from tempo_router.prediction import LengthHistograms
from tempo_router.program_history import ProgramHistory
from tempo_router.request import DispatchId, ProgramCall, ReplicaId, RequestId, RequestSpec
from tempo_router.router import RouterCore

log = structlog.get_logger()

REDIS_RETRY_S = 0.2


class RouterServer:
    """Serves the control streams of one application under one epoch. host: the address that peers can reach."""

    def __init__(self, config: TempoConfig, store: RedisStore, *, owner: str, host: str) -> None:
        self.epoch = 0
        self.address = ""
        self._config = config
        self._store = store
        self._owner = owner
        self._host = host
        self._learnt: LearntLengths | None = None
        self._estimates: LengthEstimates | None = None
        self._open = OpenRequests()
        self._peers = Peers(self._open)
        self._decisions = DecisionLog(config.ingress.explained_requests)
        self._attainment = Attainment()
        self._runner = CoreRunner(RouterCore(config.scheduling), self._peers, self._open, self._decisions)
        self._redis_restarted = asyncio.Event()
        self._programs: ProgramDesk | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._server = grpc.aio.server(options=channel_options(config.transport))

    # ---- life ----

    async def start(self) -> str:
        """Take the lease, restore what was learnt, serve. Returns host:port.

        Raises StoreUnavailableError, StoreRefusedError.
        """
        self._store.on_restart = self._redis_restarted.set
        self.epoch = await self._store.acquire_lease(self._owner, self._config.transport.lease_s)
        history = self.make_history()
        learnt = self._learnt = LearntLengths(self._store, self.epoch)
        lengths, beginning = await learnt.histograms()
        core = RouterCore(self._config.scheduling, epoch=self.epoch, lengths=lengths, history=history)
        self._runner = CoreRunner(core, self._peers, self._open, self._decisions)
        if self._config.scheduling.length_model == "auto":
            self._estimates = LengthEstimates(
                self._config.scheduling, drain=core.drain_samples, on_predicted=self._runner.handle
            )
            await learnt.restore_answers(self._estimates)
        self._programs = self._open_desk(history)
        known = await self._programs.restore()
        if self._config.record_events is not None:
            kept = self._config.programs
            self._runner.recorder = EventRecorder(
                Path(self._config.record_events),
                Beginning(
                    self._config.scheduling, self.epoch, beginning,
                    most_patterns=kept.max_patterns, pattern_age_s=kept.pattern_age_s, programs=known,
                ),
            )  # fmt: skip
        wire_pb2_grpc.add_RouterControlServicer_to_server(_Control(self), self._server)
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        self.address = f"{self._host}:{port}"
        loops = (self._settle, self._tick, self._keep_lease, self._forget_lost_owners)
        for loop in (*loops, self._programs.writer.run, self._programs.sweep):
            self._tasks.append(asyncio.create_task(loop(), name=loop.__qualname__))
        keeping = learnt.keep(lengths, self._estimates, self._config.transport.snapshot_s)
        self._tasks.append(asyncio.create_task(keeping, name="memory of lengths"))
        if self._estimates is not None:
            self._tasks.append(asyncio.create_task(self._estimates.run(), name="estimates of lengths"))
        log.info("router_started", address=self.address, epoch=self.epoch)
        return self.address

    def make_history(self) -> ProgramHistory:
        """What programs are foretold by, empty."""
        if self._config.scheduling.program_model == "patterns":
            return PatternHistory(self._config.programs.max_patterns, self._config.programs.pattern_age_s)
        return ProgramHistory()

    async def stop(self) -> None:
        """Close the streams, write what was learnt, give the lease back."""
        self._peers.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._estimates is not None:
            self._estimates.close()
        await self._server.stop(grace=0.2)
        if self._runner.recorder is not None:
            self._runner.recorder.close()
        try:
            await self._save_lengths()
            if self._programs is not None:
                await self._programs.stop()
            await self._store.release(self._owner, self.epoch)
        except (StoreUnavailableError, StoreRefusedError, LeaseLostError) as error:
            log.warning("last_snapshot_not_written", problem=str(error))

    async def _save_lengths(self) -> None:
        if self._learnt is not None:
            await self._learnt.save(self._runner.core.lengths, self._estimates)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until all open ones have ended. Returns whether they have, in time."""
        self._runner.handle(DrainStarted(time.monotonic()))
        try:
            async with asyncio.timeout(timeout_s):
                await self._open.until_empty()
        except TimeoutError:
            log.warning("drain_timed_out", open_requests=len(self._open), timeout_s=timeout_s)
            return False
        return True

    def failure(self) -> BaseException | None:
        """Why this router can no longer be relied on: a background task ended, or an event failed halfway; or None."""
        if self._runner.failure is not None:
            return self._runner.failure
        for task in self._tasks:
            is_once = task.get_name().endswith(("_settle", "_forget_lost_owners"))
            if task.done() and not task.cancelled() and (not is_once or task.exception() is not None):
                return task.exception() or RuntimeError(f"the router's {task.get_name()} ended")
        return None

    @property
    def has_peers(self) -> bool:
        """Whether any ingress or worker is connected."""
        return bool(self._peers.worker_ids or self._peers.connected_ingresses)

    @property
    def lengths(self) -> LengthHistograms:
        """What was learnt about the lengths of answers."""
        return self._runner.core.lengths

    @property
    def estimates(self) -> LengthEstimates | None:
        """The second opinion on lengths; None where the histograms are all."""
        return self._estimates

    def snapshot(self) -> dict[str, Any]:
        """Counts for logs, status pages and tests."""
        return {
            "epoch": self.epoch,
            **self._open.counts(),
            "ingresses": [session.ingress_id for session in self._peers.connected_ingresses],
            "workers": self._peers.worker_ids,
            "programs": self._programs_snapshot(),
            "core": self._runner.core.snapshot(),
            "length_estimates": None if self._estimates is None else self._estimates.snapshot(),
        }

    @property
    def programs(self) -> ProgramDesk:
        """Programs in progress; there once `start` has returned."""
        if self._programs is None:
            raise InvalidEventError("the router has not started: it knows no programs yet")
        return self._programs

    def _programs_snapshot(self) -> dict[str, Any]:
        desk = self._programs
        if desk is None:
            return {"live": 0, "unwritten": 0, "refused": 0, "is_store_away": False}
        writer = desk.writer
        return {
            "live": len(desk.book),
            "unwritten": writer.waiting,
            "refused": writer.refused,
            "is_store_away": writer.is_away,
            "written": writer.written,
            "round_trips": writer.round_trips,
        }

    # ---- background ----

    async def _settle(self) -> None:
        """Only listen at first: or the first worker to attach would get everything that waits."""
        await asyncio.sleep(self._config.scheduling.settle_s)
        self._peers.settle()
        self.programs.settled()
        for program in list(self._runner.core.ledger.programs.values()):
            self.programs.tell_core(program.program_id, program)
        self._runner.handle(Settled(time.monotonic()))
        self._peers.announce_workers()
        for session in self._peers.ingresses:
            self._compare_streams(session)

    async def _forget_lost_owners(self) -> None:
        """Ingresses that went while there was no router never come back: what they served is over."""
        await asyncio.sleep(self._config.scheduling.settle_s + INGRESS_GRACE_S)
        self.programs.owners_gone(session.ingress_id for session in self._peers.ingresses)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.scheduling.tick_s)
            self._runner.handle(Ticked(time.monotonic()))

    async def _keep_lease(self) -> None:
        """Renew the lease. Redis being away, or refusing, stops nothing: only a newer router does."""
        trouble: type[TempoError] | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.transport.lease_s / 3):
                    await self._redis_restarted.wait()
            try:
                if self._redis_restarted.is_set():
                    await self._store.reconnect()
                await self._store.renew(self._owner, self.epoch, self._config.transport.lease_s)
                # Only now: the fence may be among what was lost, and an older router may think that it still counts.
                if self._redis_restarted.is_set():
                    self._redis_restarted.clear()
                    self.programs.store_again()
                if trouble is not None:
                    log.warning("redis_back", epoch=self.epoch)
                trouble = None
            except (StoreUnavailableError, StoreRefusedError) as error:
                if type(error) is not trouble:
                    _say_not_renewed(error)
                trouble = type(error)
                await asyncio.sleep(REDIS_RETRY_S)

    def _open_desk(self, history: ProgramHistory) -> ProgramDesk:
        config, runner = self._config.programs, self._runner
        store = ProgramStore(self._store, keep_s=config.keep_s, most_patterns=config.max_patterns)
        return ProgramDesk(
            config, store, fence=self.epoch, handle=runner.handle, send=self._peers.tell_ingress,
            cancel_calls=runner.cancel_program, outlook=runner.outlook, least_left_s=runner.least_left_s,
            patterns=history if isinstance(history, PatternHistory) else None,
            questions={ExplainRequest: self._explain, ViewConsole: self._console},
        )  # fmt: skip

    # ---- ingresses ----

    async def serve_ingress(self, requests: AsyncIterator[wire.IngressToRouter], context: Any) -> None:
        """One ingress's control stream, from hello to the end."""
        hello = await first_message(requests, "hello", context)
        await self._check_epoch(hello.hello.seen_epoch, context)
        session = self._attach_ingress(hello.hello)
        outbox = session.outbox
        try:
            await serve_stream(context, outbox, requests, lambda message: self._ingress_said(session, message))
        finally:
            self._peers.detach_ingress(session, outbox, self._ingress_gone)

    def _attach_ingress(self, hello: wire.IngressHello) -> IngressSession:
        session = self._peers.attach_ingress(hello.ingress_id, self.epoch)
        session.streaming = [spec_from_header(header, time.monotonic()) for header in hello.streaming]
        self._cancel_unlisted(session, {header.request_id for header in hello.streaming} | set(hello.waiting))
        for spec in session.streaming:
            self._open.own(spec, session.ingress_id)
        if self._peers.is_settled:
            self._compare_streams(session)
        return session

    def _forget_if_gone(self, request_id: RequestId) -> None:
        if self._runner.core.spec_of(request_id) is None:
            self._open.forget(request_id)

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
        if self._runner.core.knows(request_id, attempt):
            return False
        eviction = wire.Eviction(request_id=request_id, attempt=attempt)
        session.outbox.merge(wire.RouterToIngress(evictions=[eviction]))
        self._forget_if_gone(request_id)
        return True

    def _ingress_said(self, session: IngressSession, message: wire.IngressToRouter) -> None:
        # One message may hold what was sent as several. A worker is reported lost before its requests are submitted
        # again, and a request is cancelled after it was submitted: this order keeps both.
        now_s = time.monotonic()
        for worker_id in message.unreachable_workers:
            self._unreachable(session, ReplicaId(worker_id))
        for op in message.program_ops:
            self.programs.asked(session.ingress_id, op)
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
        explanation = self._decisions.ended(request_id, outcome, now_s)
        if explanation is not None and outcome.is_met is False:
            log.info("slo_missed", **{name: value for name, value in explanation.shown().items() if value is not None})

    def _explain(self, asked: ExplainRequest) -> list[dict[str, Any]]:
        return [one.shown() for one in self._decisions.find(asked.name, asked.tenant)]

    def _console(self, asked: ViewConsole) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "ingresses": len(self._peers.connected_ingresses),
            "service": self._attainment.shown(time.monotonic()),
            "queue": dataclasses.asdict(self._runner.core.snapshot()),
            "store": self._programs_snapshot(),
            "programs": self.programs.newest(asked.most, asked.tenant),
        }

    def _submit(self, session: IngressSession, submit: wire.Submit, now_s: float) -> None:
        spec = said = spec_from_header(submit.header, now_s)
        self._open.own(spec, session.ingress_id)
        if self._ends_with_its_program(spec):
            return
        if self._peers.is_settled:
            # Before, what was asked of programs and not stored may still be said again.
            spec = self.programs.corrected(said)
            self._tell_core(spec)
        if submit.HasField("payload"):
            self._open.keep_payload(spec.request_id, submit.payload)
        is_again = self._runner.core.knows(spec.request_id, spec.attempt)
        lengths = self._runner.core.lengths.lookup(spec)
        self._decisions.arrived(spec, lengths, *self._runner.core.worth_of(spec, lengths), now_s)
        self._runner.handle(Arrived(now_s, spec))
        if is_again or spec is not said:
            self._tell_owner(said)
        if self._estimates is not None and self._runner.core.knows(spec.request_id, spec.attempt):
            self._estimates.arrived(spec, lengths)
        if not self._runner.core.is_waiting(spec.request_id):
            self._open.take_payload(spec.request_id)

    def _tell_core(self, spec: RequestSpec) -> None:
        """What became of a request's program, a core that is newer may not know."""
        if isinstance(spec.slo, ProgramCall):
            name = spec.slo.program_id
            self.programs.tell_core(name, self._runner.core.ledger.programs.get(name))

    def _tell_owner(self, said: RequestSpec) -> None:
        """What became of a request's target, its ingress may have missed while it was away. said: as it knows it."""
        request_id, known = said.request_id, self._runner.core.spec_of(said.request_id)
        if known is None:
            return
        now_s = time.monotonic()
        if isinstance(known.slo, ProgramCall) and isinstance(said.slo, ProgramCall):
            deadline_s = known.arrival_s + known.slo.ttlt_s
            if abs(deadline_s - said.arrival_s - said.slo.ttlt_s) > STALE_DEADLINE_S:
                redate = Redate(request_id, known.slo.program_id, deadline_s)
                self._decisions.decided(redate, now_s)
                self._peers.tell(request_id, target_news(redate, now_s))
        if self._runner.core.is_relegated(request_id):
            self._peers.tell(request_id, target_news(Relegate(request_id), now_s))

    def _ends_with_its_program(self, spec: RequestSpec) -> bool:
        """Whether a request's program was cancelled while its ingress was away; then that is told now."""
        if not self.programs.is_cancelled(spec.program_id):
            return False
        self._peers.tell(spec.request_id, wire.RouterToIngress(cancelled=[spec.request_id]))
        self._runner.cancel(spec.request_id)
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
        self.programs.ingress_gone(session.ingress_id)
        self._peers.drop_ingress(session)

    # ---- workers ----

    async def serve_worker(self, requests: AsyncIterator[wire.WorkerToRouter], context: Any) -> None:
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
        self._peers.attach_worker(worker, self.epoch)
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
                self._decisions.preempted(DispatchId(dispatch_id), worker.worker_id, now_s)
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
            self.programs.answered(spec.program_id, spec.call_id, spec.prompt_tokens, spec.generated_tokens + tokens)
        for finished in event.finished:
            request_id = self._open.end_dispatch(finished.dispatch_id)
            if request_id is not None:
                self._forget_if_gone(request_id)

    def _call_of_program(self, dispatch_id: DispatchId) -> RequestSpec | None:
        """The request of a dispatch, if it is all of a program's call; siblings (`n` > 1) are each a part."""
        request_id = self._open.dispatched_as(dispatch_id)
        spec = self._runner.core.spec_of(request_id) if request_id is not None else None
        return spec if spec is not None and spec.call_id and spec.group_size == 1 else None

    async def _check_epoch(self, seen_epoch: int, context: Any) -> None:
        """A peer that met a newer router tells us that we are not the one any more."""
        if seen_epoch > self.epoch:
            error = LeaseLostError(f"a peer has seen epoch {seen_epoch}, this router has {self.epoch}")
            self._tasks.append(asyncio.create_task(_fail(error), name="epoch check"))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))


class _Control(wire_pb2_grpc.RouterControlServicer):
    def __init__(self, server: RouterServer) -> None:
        self._server = server

    # The stubs know only handlers that yield; gRPC also takes ones that write.
    async def Ingress(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[wire.IngressToRouter], context: Any
    ) -> None:
        await self._server.serve_ingress(requests, context)

    async def Worker(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[wire.WorkerToRouter], context: Any
    ) -> None:
        await self._server.serve_worker(requests, context)


def _say_not_renewed(error: StoreUnavailableError | StoreRefusedError) -> None:
    if isinstance(error, StoreRefusedError):
        effect = "serving goes on; what a Redis that is restarted has lost is not written again"
        log.error("lease_not_renewed", problem=str(error), effect=effect)
    else:
        log.warning("redis_away", problem=str(error), effect="serving goes on; nothing learnt is stored")


async def _fail(error: Exception) -> None:
    raise error
