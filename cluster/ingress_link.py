"""An ingress's side of the streams: one to the router, one to every worker.

Keeps the table of open requests, from which a new router learns what it must know. It never reads a payload: what a
frame holds is the engine codec's business (deployments/remote_engine.py), which also decides how a request that lost
its worker goes on.

A request is tried in numbered attempts, and the engine knows each attempt under its own id. So a frame of an attempt
that was given up is recognised and dropped, whichever worker sends it and however late.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog

from cluster import wire_pb2 as wire
from cluster import wire_pb2_grpc
from cluster.codec import header_from_spec, message_from_outcome, redated_from_news
from cluster.ingress_programs import IngressPrograms
from cluster.link import Link, RefusedError
from tempo_router.config import TransportConfig
from tempo_router.errors import RequestTooLargeError, RouterUnavailableError, TempoError
from tempo_router.metrics import Outcome
from tempo_router.request import ProgramCall, RequestId, RequestSpec

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The router's answer to a submission; retry_after_s is None when retrying cannot help.

    reject_reason: one of actions.RejectReason, or how it ended before it was answered ("expired", "program_cancelled").
    """

    is_admitted: bool
    expected_wait_s: float = 0.0
    success_probability: float = 1.0
    reject_reason: str | None = None
    retry_after_s: float | None = None


@dataclass(slots=True)
class OpenRequest:
    """A request that this ingress answers for. worker_id: the one whose tokens count, known from the first frame."""

    spec: RequestSpec
    payload: tuple[bytes, ...]
    verdict: asyncio.Future[Verdict]
    worker_id: str | None = None


class LinkListener(Protocol):
    """Who reads the frames. Called on the event loop."""

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        """Outputs of one engine step."""
        ...

    def attempt_lost(self, request_id: RequestId) -> None:
        """The current attempt will give no more tokens: resubmit the request, or forget it."""
        ...

    def relegated(self, request_id: RequestId) -> None:
        """The request goes on as best effort."""
        ...

    def redated(self, request_id: RequestId, slo: ProgramCall) -> None:
        """The deadline of its program moved: this is its target, and it has a chance again if it had none."""
        ...

    def expired(self, request_id: RequestId) -> None:
        """The request was dropped from the queue; the link has forgotten it."""
        ...

    def program_cancelled(self, request_id: RequestId) -> None:
        """The request belongs to a program that was cancelled; the link has forgotten it."""
        ...


class IngressLink:
    """All streams of one ingress.

    locate_router: host:port of the current router; asked before each connection attempt.
    engine_version: what this ingress can decode; a vLLM worker of another version is refused.
    programs: what is asked of the router about them.
    """

    def __init__(
        self,
        ingress_id: str,
        *,
        locate_router: Callable[[], Awaitable[str]],
        listener: LinkListener,
        transport: TransportConfig,
        router_wait_s: float,
        engine_version: str,
    ) -> None:
        self.ingress_id = ingress_id
        self.engine_version = engine_version
        self.open: dict[RequestId, OpenRequest] = {}
        self._listener = listener
        self.transport = transport
        self._router_wait_s = router_wait_s
        self._epoch = 0
        self._router: Link[wire.IngressToRouter, wire.RouterToIngress] = Link(
            "router",
            locate=locate_router,
            open_stream=lambda channel: wire_pb2_grpc.RouterControlStub(channel).Ingress,
            ends=_RouterEnds(self),
            transport=transport,
        )
        self.programs = IngressPrograms(ingress_id, send=self._router.send, wait_s=router_wait_s)
        self._workers: dict[str, _WorkerLink] = {}
        self._utility_ids = itertools.count(1)
        self._has_worker = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- life ----

    def start(self) -> None:
        """Begin to connect; needs a running event loop."""
        self._spawn(self._router.run(), "router link")

    async def stop(self) -> None:
        """Close every stream. Workers abort what is still open."""
        tasks = [*self._tasks, *(worker.task for worker in self._workers.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def failure(self) -> BaseException | None:
        """Why a background task ended, or None while all run."""
        for task in (*self._tasks, *(worker.task for worker in self._workers.values())):
            if task.done() and not task.cancelled():
                return task.exception() or RuntimeError(f"{task.get_name()} ended")
        return None

    @property
    def not_ready_because(self) -> str | None:
        """Why no request can be served at the moment; None when one can."""
        if not self._router.is_open:
            return "no router is connected"
        if not any(worker.link.is_open for worker in self._workers.values()):
            return "no worker is attached"
        return None

    @property
    def attached_workers(self) -> list[wire.EngineFacts]:
        """Facts of the workers whose tokens can reach us now."""
        workers = [worker for worker in self._workers.values() if worker.link.is_open]
        return [worker.facts for worker in workers if worker.facts is not None]

    async def first_worker(self) -> wire.EngineFacts:
        """Facts of some attached worker; waits for one."""
        while True:
            for worker in self._workers.values():
                if worker.facts is not None:
                    return worker.facts
            self._has_worker.clear()
            await self._has_worker.wait()

    # ---- requests ----

    async def submit(self, spec: RequestSpec, payload: Sequence[bytes]) -> Verdict:
        """Hand a new request to the router and wait for its verdict.

        Raises RouterUnavailableError when no router answers within the configured time; the request is forgotten then.
        Raises RequestTooLargeError for one that could not be sent to a worker: it would break the stream each time.
        """
        self._check_size(payload)
        request = OpenRequest(spec, tuple(payload), asyncio.get_running_loop().create_future())
        self.open[spec.request_id] = request
        self._send_submit(request)
        try:
            async with asyncio.timeout(self._router_wait_s):
                verdict = await asyncio.shield(request.verdict)
        except TimeoutError:
            self.cancel(spec.request_id)
            raise RouterUnavailableError(
                f"no router answered within {self._router_wait_s} s; the request was not taken"
            ) from None
        except asyncio.CancelledError:
            self.cancel(spec.request_id)
            raise
        if not verdict.is_admitted:
            self.open.pop(spec.request_id, None)
        return verdict

    def resubmit(self, spec: RequestSpec, payload: Sequence[bytes]) -> None:
        """Continue a request under a higher attempt; it cannot be refused any more."""
        request = self.open[spec.request_id]
        self._drop_attempt(request)
        request.spec, request.payload, request.worker_id = spec, tuple(payload), None
        self._send_submit(request)

    def cancel(self, request_id: RequestId, *, is_complete: bool = False) -> None:
        """Stop a request wherever it is. is_complete: its answer had ended, nobody left. Unknown ids are ignored."""
        request = self.open.pop(request_id, None)
        if request is None:
            return
        self._drop_attempt(request)
        if not request.verdict.done():
            request.verdict.cancel()
        self._to_router(wire.IngressToRouter(cancels=[wire.Cancel(request_id=request_id, is_complete=is_complete)]))

    def finish(self, request_id: RequestId) -> None:
        """The last token arrived: nothing is left to tell anyone."""
        self.open.pop(request_id, None)

    def report_outcome(self, request_id: RequestId, outcome: Outcome) -> None:
        """Tell the router how a request ended for its client; news for dashboards, lost if no router is there."""
        self._to_router(wire.IngressToRouter(outcomes=[message_from_outcome(request_id, outcome)]))

    def claim(self, worker_id: str, attempt_id: str) -> RequestId | None:
        """Whose tokens are these? The request, if this worker is the one whose tokens of this attempt count.

        The first worker to deliver is the one. Another's tokens (a router that lost its memory may have dispatched
        twice) are dropped and stopped there.
        """
        request = self._of_attempt(attempt_id)
        if request is not None:
            if request.worker_id is None:
                request.worker_id = worker_id
                request.payload = ()
                _admit(request)
            if request.worker_id == worker_id:
                return request.spec.request_id
        self._abort_at(worker_id, attempt_id)
        return None

    async def call_utility(self, call: bytes) -> list[tuple[bytes, ...]]:
        """Run an administrative call on every attached worker. Raises TempoError if there is none, or on a failure."""
        workers = [worker for worker in self._workers.values() if worker.link.is_open]
        if not workers:
            raise TempoError("no worker is attached; an administrative call needs at least one")
        return list(await asyncio.gather(*(worker.call(next(self._utility_ids), call) for worker in workers)))

    def _of_attempt(self, attempt_id: str) -> OpenRequest | None:
        # A client may have put an "@" into its own id, so what stands before it is only tried second.
        for request_id in (attempt_id, attempt_id.rpartition("@")[0]):
            request = self.open.get(RequestId(request_id))
            if request is not None and request.spec.attempt_id == attempt_id:
                return request
        return None

    # ---- to the peers ----

    def _check_size(self, payload: Sequence[bytes]) -> None:
        # The rest of a message is for the answer's tokens, should the request be continued on another worker.
        size, limit = sum(map(len, payload)), self.transport.max_message_bytes * 7 // 8
        if size > limit:
            raise RequestTooLargeError(
                f"the request takes {size} bytes between our processes, more than {limit} "
                "(7/8 of transport.max_message_bytes); send a smaller one"
            )

    def _to_router(self, message: wire.IngressToRouter) -> None:
        self._router.send(message)

    def _send_submit(self, request: OpenRequest) -> None:
        header = header_from_spec(request.spec, time.monotonic())
        submit = wire.Submit(header=header)
        if sum(map(len, request.payload)) <= self.transport.inline_payload_bytes:
            submit.payload.buffers.extend(request.payload)
        self._to_router(wire.IngressToRouter(submits=[submit]))

    def _drop_attempt(self, request: OpenRequest) -> None:
        if request.worker_id is not None:
            self._abort_at(request.worker_id, request.spec.attempt_id)

    def _abort_at(self, worker_id: str, attempt_id: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.link.send(wire.IngressToWorker(aborts=[attempt_id]))

    # ---- from the router ----

    def router_hello(self) -> wire.IngressToRouter:
        """All that a router must know of us, whether it is new or has merely lost the stream."""
        now_s = time.monotonic()
        hello = wire.IngressHello(ingress_id=self.ingress_id, seen_epoch=self._epoch)
        for request in self.open.values():
            if request.worker_id is None:
                hello.waiting.append(request.spec.request_id)
            else:
                hello.streaming.append(header_from_spec(request.spec, now_s))
        return wire.IngressToRouter(hello=hello)

    def router_opened(self, answer: wire.RouterToIngress) -> None:
        """Accept the router unless a newer one was seen; submit again whatever has no token yet."""
        if answer.hello.epoch < self._epoch:
            raise RefusedError(f"the router has epoch {answer.hello.epoch}, but {self._epoch} was seen: it is outdated")
        self._epoch = answer.hello.epoch

    def router_ready(self) -> None:
        """The stream is open: what waits goes to this router, oldest first, programs before their requests."""
        self.programs.repeat()
        waiting = [request for request in self.open.values() if request.worker_id is None]
        for request in sorted(waiting, key=lambda request: request.spec.arrival_s):
            self._send_submit(request)

    def router_said(self, message: wire.RouterToIngress) -> None:
        """Carry out what the router decided."""
        for verdict in message.verdicts:
            self._on_verdict(verdict)
        for eviction in message.evictions:
            request = self.open.get(RequestId(eviction.request_id))
            if request is not None and request.spec.attempt == eviction.attempt and not _is_refused(request):
                self._listener.attempt_lost(request.spec.request_id)
        self._targets_said(message)
        for request_id in message.expired:
            self._ended_by_router(RequestId(request_id), "expired", self._listener.expired)
        for request_id in message.cancelled:
            self._ended_by_router(RequestId(request_id), "program_cancelled", self._listener.program_cancelled)
        self.programs.router_said(message)
        if message.HasField("workers"):
            self._set_workers(message.workers)

    def _ended_by_router(self, request_id: RequestId, reason: str, tell: Callable[[RequestId], None]) -> None:
        """What has no verdict yet gets none any more from this router: for its submitter that is a refusal."""
        request = self.open.pop(request_id, None)
        if request is None:
            return
        if not request.verdict.done():
            request.verdict.set_result(Verdict(is_admitted=False, reject_reason=reason))
        elif not _is_refused(request):
            tell(request_id)

    def _targets_said(self, message: wire.RouterToIngress) -> None:
        for news in message.target_news:
            request = self.open.get(RequestId(news.request_id))
            if request is None:
                continue
            slo = redated_from_news(news, request.spec.arrival_s, time.monotonic())
            if slo is None:
                self._listener.relegated(request.spec.request_id)
            else:
                request.spec = replace(request.spec, slo=slo)
                self._listener.redated(request.spec.request_id, slo)

    def _on_verdict(self, verdict: wire.Verdict) -> None:
        request = self.open.get(RequestId(verdict.request_id))
        if request is None:
            return
        if request.verdict.done():
            self._on_second_verdict(request, verdict)
            return
        request.verdict.set_result(
            Verdict(
                is_admitted=verdict.is_admitted,
                expected_wait_s=verdict.expected_wait_s,
                success_probability=verdict.success_probability,
                reject_reason=verdict.reject_reason or None,
                retry_after_s=verdict.retry_after_s if verdict.HasField("retry_after_s") else None,
            )
        )

    def _on_second_verdict(self, request: OpenRequest, verdict: wire.Verdict) -> None:
        """A router that does not know of the admission may refuse what it is told again; a higher attempt it takes."""
        is_refused = not verdict.is_admitted and verdict.attempt == request.spec.attempt
        if is_refused and request.worker_id is None:
            self._listener.attempt_lost(request.spec.request_id)

    def _set_workers(self, workers: wire.WorkerSet) -> None:
        wanted = {worker.worker_id: worker for worker in workers.workers}
        for worker_id in [known for known in self._workers if known not in wanted]:
            self._remove_worker(worker_id)
        for worker_id, worker in wanted.items():
            known = self._workers.get(worker_id)
            if known is None:
                self._workers[worker_id] = _WorkerLink(self, worker)
            else:
                known.is_leaving = False

    def _remove_worker(self, worker_id: str) -> None:
        """The router no longer knows the worker. Streams that still flow from it go on until they end or break."""
        worker = self._workers[worker_id]
        if worker.link.is_open and any(request.worker_id == worker_id for request in self.open.values()):
            worker.is_leaving = True
            return
        self.forget_worker(worker_id)
        self.worker_lost(worker_id)

    def forget_worker(self, worker_id: str) -> None:
        """Close the stream for good."""
        worker = self._workers.pop(worker_id)
        worker.task.cancel()
        worker.fail_calls()

    # ---- from the workers ----

    def worker_said(self, worker: "_WorkerLink", frame: wire.WorkerToIngress) -> None:
        """Pass outputs on; answer requests for payloads."""
        for fetch in frame.fetches:
            worker.link.send(wire.IngressToWorker(payloads=[self._payload_answer(fetch)]))
        for answer in frame.utilities:
            worker.answered(answer)
        if frame.HasField("engine_outputs") or frame.deltas:
            self._listener.frame_received(worker.worker_id, frame)
        if worker.is_leaving:
            worker.is_leaving = False
            self._remove_worker(worker.worker_id)

    def _payload_answer(self, fetch: wire.PayloadFetch) -> wire.PayloadAnswer:
        request = self.open.get(RequestId(fetch.request_id))
        answer = wire.PayloadAnswer(request_id=fetch.request_id, attempt=fetch.attempt)
        if request is None or request.spec.attempt != fetch.attempt or not request.payload:
            answer.is_gone = True
        else:
            answer.payload.buffers.extend(request.payload)
        return answer

    def worker_attached(self) -> None:
        """Some worker told its facts."""
        self._has_worker.set()

    def worker_lost(self, worker_id: str) -> None:
        """Its stream broke: every request that it was answering goes on elsewhere. The router hears of it at once.

        A whole answer may have been lost with the stream, of a request whose worker is not known here: the router says
        which of those it has no more.
        """
        unserved = [
            wire.Attempt(request_id=request.spec.request_id, attempt=request.spec.attempt)
            for request in self.open.values()
            if request.worker_id is None
        ]
        self._to_router(wire.IngressToRouter(unreachable_workers=[worker_id], unserved=unserved))
        lost = [request for request in self.open.values() if request.worker_id == worker_id]
        for request in lost:
            request.worker_id = None
            self._listener.attempt_lost(request.spec.request_id)

    def _spawn(self, work: Any, name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)


def _is_refused(request: OpenRequest) -> bool:
    """Whether its verdict has come and its submitter has not yet looked at it."""
    return request.verdict.done() and not request.verdict.cancelled() and not request.verdict.result().is_admitted


def _admit(request: OpenRequest) -> None:
    """Tokens are an admission. They come on another stream and may overtake the verdict, or outlive its router."""
    if not request.verdict.done():
        request.verdict.set_result(Verdict(is_admitted=True))


class _RouterEnds:
    """Our end of the control stream."""

    def __init__(self, owner: IngressLink) -> None:
        self._owner = owner

    def hello(self) -> wire.IngressToRouter:
        return self._owner.router_hello()

    def opened(self, answer: wire.RouterToIngress) -> None:
        self._owner.router_opened(answer)

    def ready(self) -> None:
        self._owner.router_ready()

    def received(self, message: wire.RouterToIngress) -> None:
        self._owner.router_said(message)

    def closed(self) -> None:
        """Nothing to do: open requests stay open, and tokens do not come this way."""


@dataclass(slots=True)
class _WorkerLink:
    """Our token stream to one worker. is_leaving: the router dropped it, but tokens still flow."""

    owner: IngressLink
    address: wire.WorkerAddress
    is_leaving: bool = False
    facts: wire.EngineFacts | None = None
    link: Link[wire.IngressToWorker, wire.WorkerToIngress] = field(init=False)
    task: asyncio.Task[None] = field(init=False)
    calls: dict[int, asyncio.Future[tuple[bytes, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link = Link(
            f"worker {self.worker_id}",
            locate=self._locate,
            open_stream=lambda channel: wire_pb2_grpc.TokenPlaneStub(channel).Attach,
            ends=self,
            transport=self.owner.transport,
        )
        self.task = asyncio.create_task(self.link.run(), name=f"token stream from {self.worker_id}")

    @property
    def worker_id(self) -> str:
        return self.address.worker_id

    async def _locate(self) -> str:
        return self.address.address

    def hello(self) -> wire.IngressToWorker:
        attach = wire.IngressAttach(ingress_id=self.owner.ingress_id, engine_version=self.owner.engine_version)
        return wire.IngressToWorker(attach=attach)

    def opened(self, answer: wire.WorkerToIngress) -> None:
        facts = answer.attached
        if facts.engine == "vllm" and facts.engine_version != self.owner.engine_version:
            raise RefusedError(
                f"worker {self.worker_id} runs vLLM {facts.engine_version}, this ingress {self.owner.engine_version}; "
                "both must have the same version"
            )
        self.facts = facts

    def ready(self) -> None:
        self.owner.worker_attached()

    def received(self, message: wire.WorkerToIngress) -> None:
        self.owner.worker_said(self, message)

    def closed(self) -> None:
        self.fail_calls()
        if self.is_leaving:
            self.owner.forget_worker(self.worker_id)
        self.owner.worker_lost(self.worker_id)

    def fail_calls(self) -> None:
        """No answer to an administrative call will come any more."""
        for future in self.calls.values():
            if not future.done():
                future.set_exception(TempoError(f"worker {self.worker_id} was lost during an administrative call"))
        self.calls.clear()

    async def call(self, call_id: int, call: bytes) -> tuple[bytes, ...]:
        future: asyncio.Future[tuple[bytes, ...]] = asyncio.get_running_loop().create_future()
        self.calls[call_id] = future
        self.link.send(wire.IngressToWorker(utilities=[wire.UtilityCall(call_id=call_id, call=call)]))
        return await future

    def answered(self, answer: wire.UtilityAnswer) -> None:
        future = self.calls.pop(answer.call_id, None)
        if future is None or future.done():
            return
        if answer.failure:
            future.set_exception(TempoError(f"worker {self.worker_id}: {answer.failure}"))
        else:
            future.set_result(tuple(answer.result.buffers))
