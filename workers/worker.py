"""One worker: an engine, a control stream to the router, and a token stream to every ingress.

Dispatches come from the router, tokens go straight to the ingress that owns the request, and the router hears of each
step what it needs for its decisions. Losing the router changes nothing for what runs; losing an ingress aborts what
that ingress had asked for.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio
import structlog

from cluster import wire_pb2 as wire
from cluster import wire_pb2_grpc
from cluster.codec import (
    header_from_spec,
    message_from_step,
    slo_from_retarget,
    spec_from_header,
    standing_from_message,
    standings_from_message,
)
from cluster.link import Link, RefusedError, channel_options
from cluster.outbox import Outbox, OutboxFullError
from cluster.served_stream import first_message, until_first_ends
from tempo_router.config import TransportConfig
from tempo_router.errors import TempoError
from tempo_router.events import FinishReason, ReplicaLoad
from tempo_router.prediction import Lengths
from tempo_router.request import DispatchId, RequestSpec
from tempo_router.standing import UNRANKED, Standing
from workers.call_facts import CallFacts, CallUpdate, News
from workers.engine import ClientOutputs, Engine, EngineCall, EngineFacts, EngineStep

log = structlog.get_logger()


@dataclass(slots=True)
class Call:
    """A dispatch that this worker answers for, from its arrival here until its last token."""

    dispatch_id: int
    spec: RequestSpec
    ingress_id: str
    priority: int
    standing: Standing = UNRANKED
    lengths: Lengths | None = None
    new_tokens: int = 0
    is_in_engine: bool = False


@dataclass(slots=True)
class TokenSession:
    """The token stream of one ingress, or the frames that wait for it to attach."""

    outbox: Outbox[wire.WorkerToIngress]
    is_attached: bool = False
    give_up: asyncio.TimerHandle | None = None
    broken: asyncio.Event = field(default_factory=asyncio.Event)


class Worker:
    """Joins an engine to the streams. Build it, give `on_step` and `on_death` to the engine, then `start`.

    locate_router: host:port of the current router. host: the address under which ingresses reach this worker.
    """

    def __init__(
        self, worker_id: str, *, locate_router: Callable[[], Awaitable[str]], host: str, transport: TransportConfig
    ) -> None:
        self.worker_id = worker_id
        self.address = ""
        self.is_draining = False
        self.death: str | None = None
        self._host = host
        self._transport = transport
        self._engine: Engine | None = None
        self._epoch = 0
        self._calls: dict[str, Call] = {}
        self._by_dispatch: dict[int, str] = {}
        self._lost: set[str] = set()
        self._step_cap_s: float | None = None
        self._sessions: dict[str, TokenSession] = {}
        self._utility_tasks: set[asyncio.Task[None]] = set()
        self._load = ReplicaLoad(running=0, waiting=0, free_kv_tokens=0)
        self._idle = asyncio.Event()
        self._idle.set()
        self._server = grpc.aio.server(options=channel_options(transport))
        self._router: Link[wire.WorkerToRouter, wire.RouterToWorker] = Link(
            "router",
            locate=locate_router,
            open_stream=lambda channel: wire_pb2_grpc.RouterControlStub(channel).Worker,
            ends=self,
            transport=transport,
        )
        self._router_task: asyncio.Task[None] | None = None

    # ---- life ----

    async def start(self, engine: Engine) -> None:
        """Serve token streams and announce the engine to the router."""
        self._engine = engine
        self._load = ReplicaLoad(running=0, waiting=0, free_kv_tokens=engine.facts.kv_tokens)
        wire_pb2_grpc.add_TokenPlaneServicer_to_server(_TokenPlane(self), self._server)
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        self.address = f"{self._host}:{port}"
        self._router_task = asyncio.create_task(self._router.run(), name="router link")

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait until all that runs has ended. Returns whether it has, within timeout_s."""
        self.is_draining = True
        self._router.send(wire.WorkerToRouter(is_draining=True))
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("drain_timed_out", worker_id=self.worker_id, running=len(self._calls), timeout_s=timeout_s)
            return False
        return True

    async def stop(self) -> None:
        """Close the streams, then the engine."""
        if self._router_task is not None:
            self._router_task.cancel()
            await asyncio.gather(self._router_task, return_exceptions=True)
        for session in self._sessions.values():
            session.broken.set()
        await self._server.stop(grace=0.2)
        if self._engine is not None:
            await self._engine.shutdown()

    def failure(self) -> str | None:
        """Why this worker can no longer work, or None."""
        if self.death is not None:
            return f"the engine died: {self.death}"
        if self._router_task is not None and self._router_task.done():
            return f"the router link ended: {self._router_task}"
        return None

    @property
    def live_calls(self) -> int:
        """Dispatches that have not ended."""
        return len(self._calls)

    @property
    def facts(self) -> wire.EngineFacts:
        """The engine's facts as a message."""
        return _facts_message(self._live_engine.facts)

    @property
    def _live_engine(self) -> Engine:
        if self._engine is None:
            raise TempoError("the worker was not started; call start(engine) first")
        return self._engine

    # ---- the router's end ----

    def hello(self) -> wire.WorkerToRouter:
        """All that a router must know of us."""
        now_s = time.monotonic()
        hello = wire.WorkerHello(
            worker_id=self.worker_id,
            address=self.address,
            seen_epoch=self._epoch,
            facts=self.facts,
            is_draining=self.is_draining,
        )
        for call in self._calls.values():
            hello.running.add(
                dispatch_id=call.dispatch_id,
                header=header_from_spec(call.spec, now_s),
                new_tokens=call.new_tokens,
                ingress_id=call.ingress_id,
            )
        return wire.WorkerToRouter(hello=hello)

    def opened(self, answer: wire.RouterToWorker) -> None:
        """Accept the router unless a newer one was seen."""
        if answer.hello.epoch < self._epoch:
            raise RefusedError(f"the router has epoch {answer.hello.epoch}, but {self._epoch} was seen: it is outdated")
        self._epoch = answer.hello.epoch

    def ready(self) -> None:
        """The hello said everything."""

    def received(self, message: wire.RouterToWorker) -> None:
        """Run what was dispatched, stop what was aborted."""
        now_s = time.monotonic()
        for dispatch in message.dispatches:
            self._accept(dispatch, now_s)
        aborts = [self._by_dispatch[dispatch_id] for dispatch_id in message.aborts if dispatch_id in self._by_dispatch]
        self._abort(aborts, "cancelled")
        if message.retunes or message.retargets:
            self._retune(message)

    def closed(self) -> None:
        """What runs goes on; the next hello tells the router what that is."""

    def _accept(self, dispatch: wire.Dispatch, now_s: float) -> None:
        spec = spec_from_header(dispatch.header, now_s)
        attempt_id = spec.attempt_id
        if attempt_id in self._calls:
            # The router forgot (it restarted) and dispatched again what already runs here.
            self._report_finished(dispatch.dispatch_id, "cancelled", 0)
            return
        call = Call(dispatch.dispatch_id, spec, dispatch.ingress_id, dispatch.priority)
        if dispatch.HasField("standing"):
            call.standing = standing_from_message(dispatch.standing)
        if dispatch.length_atoms:
            call.lengths = Lengths(tuple(dispatch.length_atoms))
        self._calls[attempt_id] = call
        self._by_dispatch[call.dispatch_id] = attempt_id
        self._idle.clear()
        session = self._session(call.ingress_id)
        if dispatch.HasField("payload"):
            self._submit(attempt_id, call, tuple(dispatch.payload.buffers))
        else:
            fetch = wire.PayloadFetch(request_id=spec.request_id, attempt=spec.attempt)
            self._to_ingress(call.ingress_id, session, wire.WorkerToIngress(fetches=[fetch]))

    def _retune(self, message: wire.RouterToWorker) -> None:
        """How calls stand was planned anew. What is still on its way here stands so when it comes."""
        updates = []
        for retune in message.retunes:
            updates += [
                CallUpdate(self._by_dispatch[dispatch_id], standing=standing)
                for dispatch_id, standing in standings_from_message(retune)
                if dispatch_id in self._by_dispatch
            ]
            self._step_cap_s = retune.step_cap_s if retune.HasField("step_cap_s") else None
        updates += [
            CallUpdate(self._by_dispatch[retarget.dispatch_id], slo=slo_from_retarget(retarget))
            for retarget in message.retargets
            if retarget.dispatch_id in self._by_dispatch
        ]
        for update in updates:
            call = self._calls[update.request_id]
            if update.standing is not None:
                call.standing = update.standing
            if update.slo is not None:
                call.spec = replace(call.spec, slo=update.slo)
        live = tuple(update for update in updates if self._calls[update.request_id].is_in_engine)
        self._live_engine.tell(News(live, self._step_cap_s))

    def _submit(self, attempt_id: str, call: Call, payload: tuple[bytes, ...]) -> None:
        call.is_in_engine = True
        self._live_engine.submit(
            EngineCall(
                request_id=attempt_id,
                client=call.ingress_id,
                priority=call.priority,
                payload=payload,
                prompt_tokens=call.spec.context_tokens,
                max_output_tokens=max(1, call.spec.max_output_tokens - call.spec.generated_tokens),
                facts=CallFacts(DispatchId(call.dispatch_id), call.spec, call.lengths, call.standing),
            )
        )

    def _abort(self, attempt_ids: list[str], reason: FinishReason) -> None:
        """End calls early. Those in the engine are reported when the engine confirms, the others now."""
        in_engine = []
        for attempt_id in attempt_ids:
            call = self._calls.get(attempt_id)
            if call is None:
                continue
            if call.is_in_engine:
                if reason == "lost":
                    self._lost.add(attempt_id)
                in_engine.append(attempt_id)
            else:
                self._forget(attempt_id)
                self._report_finished(call.dispatch_id, reason, 0)
        if in_engine:
            self._live_engine.abort(in_engine)

    def _forget(self, attempt_id: str) -> Call | None:
        call = self._calls.pop(attempt_id, None)
        if call is not None:
            del self._by_dispatch[call.dispatch_id]
            if not self._calls:
                self._idle.set()
        return call

    def _report_finished(self, dispatch_id: int, reason: FinishReason, output_tokens: int) -> None:
        if self._router.is_live:
            finished = wire.CallFinished(dispatch_id=dispatch_id, reason=reason, output_tokens=output_tokens)
            progress = _load_message(self._load)
            progress.finished.append(finished)
            self._router.send(wire.WorkerToRouter(progress=[progress]))

    # ---- the engine's end ----

    def on_step(self, step: EngineStep) -> None:
        """Send outputs to their ingresses and the news to the router."""
        for ingress_id, outputs in step.outputs.items():
            session = self._sessions.get(ingress_id)
            if session is not None:
                self._to_ingress(ingress_id, session, _frame(outputs))
        self._load = step.load
        progress = _load_message(step.load)
        if step.step is not None:
            progress.step.CopyFrom(message_from_step(step.step))
        self._count_tokens(step, progress)
        progress.preempted.extend(
            self._calls[attempt_id].dispatch_id for attempt_id in step.preempted if attempt_id in self._calls
        )
        self._count_finished(step, progress)
        if self._router.is_live:
            self._router.send(wire.WorkerToRouter(progress=[progress]))

    def _count_tokens(self, step: EngineStep, progress: wire.Progress) -> None:
        dispatch_ids, counts = [], []
        for attempt_id, tokens in step.tokens:
            call = self._calls.get(attempt_id)
            if call is not None:
                call.new_tokens += tokens
                dispatch_ids.append(call.dispatch_id)
                counts.append(tokens)
        progress.token_dispatch_ids.extend(dispatch_ids)
        progress.token_counts.extend(counts)

    def _count_finished(self, step: EngineStep, progress: wire.Progress) -> None:
        for finished in step.finished:
            call = self._forget(finished.request_id)
            if call is None:
                continue
            reason: FinishReason = finished.reason
            if finished.request_id in self._lost:
                self._lost.discard(finished.request_id)
                reason = "lost"
            progress.finished.add(dispatch_id=call.dispatch_id, reason=reason, output_tokens=call.new_tokens)

    def on_death(self, reason: str) -> None:
        """The engine is gone. Every stream is closed at once, so that the requests go on elsewhere."""
        self.death = reason
        log.error("engine_died", worker_id=self.worker_id, reason=reason)
        if self._router_task is not None:
            self._router_task.cancel()
        # The engine will report no end any more, and may not be called: nothing is left to wait for or to abort.
        self._calls.clear()
        self._by_dispatch.clear()
        self._lost.clear()
        self._idle.set()
        for session in self._sessions.values():
            session.broken.set()

    # ---- the ingresses' end ----

    def _session(self, ingress_id: str) -> TokenSession:
        session = self._sessions.get(ingress_id)
        if session is None:
            session = TokenSession(Outbox(self._transport.outbox_bytes))
            session.give_up = asyncio.get_running_loop().call_later(
                self._transport.attach_timeout_s, self._ingress_gone, ingress_id, session
            )
            self._sessions[ingress_id] = session
        return session

    def _to_ingress(self, ingress_id: str, session: TokenSession, frame: wire.WorkerToIngress) -> None:
        if session.broken.is_set():
            return  # A frame after one that was dropped would make a hole in the answer.
        try:
            session.outbox.put(frame)
        except OutboxFullError as error:
            log.warning("ingress_too_slow", ingress_id=ingress_id, problem=str(error))
            session.broken.set()

    def _ingress_gone(self, ingress_id: str, session: TokenSession) -> None:
        """Abort all that this session's ingress asked for; whoever still wants it submits it again."""
        if self._sessions.get(ingress_id) is not session:
            return
        del self._sessions[ingress_id]
        self._abort([attempt_id for attempt_id, call in self._calls.items() if call.ingress_id == ingress_id], "lost")

    async def serve_ingress(self, requests: AsyncIterator[wire.IngressToWorker], context: Any) -> None:
        """One token stream, from attach to the end."""
        first = await first_message(requests, "attach", context)
        await self._check_version(first.attach, context)
        ingress_id = first.attach.ingress_id
        session = self._adopt(ingress_id)
        try:
            await context.write(wire.WorkerToIngress(attached=self.facts))
            await until_first_ends(
                self._write_frames(session, context),
                self._read_ingress(ingress_id, session, requests),
                session.broken.wait(),
            )
        finally:
            self._ingress_gone(ingress_id, session)

    async def _check_version(self, attach: wire.IngressAttach, context: Any) -> None:
        facts = self._live_engine.facts
        if facts.engine == "vllm" and attach.engine_version != facts.engine_version:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker runs vLLM {facts.engine_version}, the ingress {attach.engine_version}; "
                "both must have the same version",
            )

    def _adopt(self, ingress_id: str) -> TokenSession:
        """The session that waits for this ingress, or a new one in place of a stale stream."""
        stale = self._sessions.get(ingress_id)
        if stale is not None and stale.is_attached:
            stale.broken.set()
            self._ingress_gone(ingress_id, stale)
        session = self._session(ingress_id)
        session.is_attached = True
        if session.give_up is not None:
            session.give_up.cancel()
        return session

    async def _write_frames(self, session: TokenSession, context: Any) -> None:
        while True:
            await context.write(await session.outbox.take())

    async def _read_ingress(
        self, ingress_id: str, session: TokenSession, requests: AsyncIterator[wire.IngressToWorker]
    ) -> None:
        async for message in requests:
            self._abort(list(message.aborts), "cancelled")
            for answer in message.payloads:
                self._on_payload(answer)
            for utility in message.utilities:
                task = asyncio.create_task(self._answer_utility(ingress_id, session, utility))
                self._utility_tasks.add(task)
                task.add_done_callback(self._utility_tasks.discard)

    def _on_payload(self, answer: wire.PayloadAnswer) -> None:
        attempt_id = answer.request_id if answer.attempt == 0 else f"{answer.request_id}@{answer.attempt}"
        call = self._calls.get(attempt_id)
        if call is None or call.is_in_engine:
            return
        if answer.is_gone:
            self._abort([attempt_id], "cancelled")
        else:
            self._submit(attempt_id, call, tuple(answer.payload.buffers))

    async def _answer_utility(self, ingress_id: str, session: TokenSession, utility: wire.UtilityCall) -> None:
        answer = wire.UtilityAnswer(call_id=utility.call_id)
        try:
            answer.result.buffers.extend(await self._live_engine.call_utility(utility.call))
        except TempoError as error:
            answer.failure = str(error)
        except Exception as error:
            # Whoever asked waits for an answer, whatever the engine does.
            log.exception("utility_call_failed", worker_id=self.worker_id)
            answer.failure = repr(error)
        self._to_ingress(ingress_id, session, wire.WorkerToIngress(utilities=[answer]))


class _TokenPlane(wire_pb2_grpc.TokenPlaneServicer):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    # The stubs know only handlers that yield; gRPC also takes ones that write.
    async def Attach(  # type: ignore[override]  # noqa: N802
        self, requests: AsyncIterator[wire.IngressToWorker], context: Any
    ) -> None:
        await self._worker.serve_ingress(requests, context)


def _frame(outputs: ClientOutputs) -> wire.WorkerToIngress:
    frame = wire.WorkerToIngress()
    if outputs.buffers:
        frame.engine_outputs.buffers.extend(outputs.buffers)
    for delta in outputs.deltas:
        frame.deltas.add(
            request_id=delta.request_id,
            token_ids=delta.token_ids,
            finish_reason=delta.finish_reason or "",
            stop_reason=delta.stop_reason or "",
        )
    return frame


def _load_message(load: ReplicaLoad) -> wire.Progress:
    return wire.Progress(
        running=load.running,
        waiting=load.waiting,
        free_kv_tokens=load.free_kv_tokens,
        prefix_hit_tokens=load.prefix_hit_tokens,
        prefix_query_tokens=load.prefix_query_tokens,
        preemptions=load.preemptions,
    )


def _facts_message(facts: EngineFacts) -> wire.EngineFacts:
    return wire.EngineFacts(
        engine=facts.engine,
        engine_version=facts.engine_version,
        model=facts.model,
        max_model_len=facts.max_model_len,
        kv_blocks=facts.kv_blocks,
        block_size=facts.block_size,
        kv_tokens=facts.kv_tokens,
        max_running=facts.max_running,
        max_step_tokens=facts.max_step_tokens,
        supported_tasks=facts.supported_tasks,
        ready_response=facts.ready_response,
        has_step_planner=facts.has_step_planner,
    )
