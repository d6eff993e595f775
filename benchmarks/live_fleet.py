"""Router, workers and an ingress link without Ray and HTTP: real vLLM, real gRPC, real Redis, one process each.

For machines on which several whole applications are too much: processes are forked from one that has imported vLLM
already, so an application is up in seconds. What is left out is the same for every policy: the HTTP server, templates,
tokenizing and detokenizing. The router hears of a call what it would hear from an ingress.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.live_client import Delivered, headers_of, program_name, prompt_of, replay
from cluster import wire_pb2 as wire
from cluster.embedded_redis import start_embedded_redis
from cluster.ingress_link import IngressLink
from cluster.redis_store import RedisStore
from cluster.router_server import RouterServer
from deployments.prefix_growth import SharedPrefixes
from deployments.program_api import ProgramApi
from deployments.program_calls import join
from deployments.program_client import ProgramClient
from deployments.program_identity import ProgramFields, identify
from deployments.request_context import RequestContext
from tempo_router.config import TempoConfig
from tempo_router.errors import ProgramError
from tempo_router.program_graph import CallStatus
from tempo_router.program_ops import EndCall
from tempo_router.request import Deadline, GroupId, Latency, ProgramCall, RequestId, RequestSpec
from tempo_router.simulation.report import Report
from tempo_router.simulation.trace import Trace, TraceCall, Unit

_HOST = "127.0.0.1"
_START_S = 120.0
_REPLAY_S = 3600.0
_QUIET_S = 0.5
"""After a replay: what it cut off is still being given up."""


def preload_vllm() -> None:
    """Import what engines need, before the first fork."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import transformers  # noqa: F401
    import vllm.v1.executor.uniproc_executor
    import xgrammar  # noqa: F401
    from vllm.platforms import current_platform

    import workers.vllm_engine  # noqa: F401

    # Only what initialises no device: children could not use one that their parent has opened.
    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker  # noqa: F401


@dataclass
class FleetServer:
    """One application under one policy."""

    router: BaseProcess
    workers: Sequence[BaseProcess]
    pipe: Connection

    def replay(self, trace: Trace, limit_s: float) -> Report:
        """Run the trace through it. Raises what the client raised."""
        self.pipe.send((trace, limit_s))
        if not self.pipe.poll(_REPLAY_S):
            raise TimeoutError(f"no report within {_REPLAY_S} s")
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Report)
        return answer

    def stop(self) -> None:
        """End its processes."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.router.join(30)
        for process in (*self.workers, self.router):
            if process.is_alive():
                process.terminate()
                process.join(10)


@contextlib.contextmanager
def fleet_server(folder: Path, arguments: Mapping[str, Any]) -> Iterator[FleetServer]:
    """Up until the block ends. arguments: `args` of serve_config.yaml."""
    context = multiprocessing.get_context("fork")
    config = TempoConfig.model_validate({**arguments, "data_dir": str(folder / "data")})
    ours, theirs = context.Pipe()
    router = context.Process(target=_run, args=(_route, folder / "router.log", config, theirs), daemon=True)
    router.start()
    address = _told(ours)
    workers = []
    try:
        for number in range(config.workers.replicas):
            mine, its = context.Pipe()
            log = folder / f"worker-{number}.log"
            process = context.Process(target=_run, args=(_work, log, config, f"worker-{number}", address, its))
            process.start()
            workers.append(process)
            # One after the other: each binds threads and allocates its cache.
            _told(mine)
        server = FleetServer(router, workers, ours)
        ours.send("connect")
        _told(ours)
        yield server
    finally:
        FleetServer(router, workers, ours).stop()


def _told(pipe: Connection) -> Any:
    if not pipe.poll(_START_S):
        raise TimeoutError(f"a process said nothing within {_START_S} s")
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _run(main: Callable[..., Any], log: Path, *arguments: Any) -> None:
    """In the child: its output goes to a file, its failure to whoever waits."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    pipe: Connection = arguments[-1]
    try:
        asyncio.run(main(*arguments))
    except Exception as error:
        pipe.send(RuntimeError(f"{main.__name__}: {error!r}"))
        raise


async def _work(config: TempoConfig, worker_id: str, address: str, pipe: Connection) -> None:
    from workers.default_model import resolve_model
    from workers.vllm_engine import start_vllm_engine
    from workers.worker import Worker

    async def locate() -> str:
        return address

    worker = Worker(worker_id, locate_router=locate, host=_HOST, transport=config.transport)
    engine = await start_vllm_engine(
        resolve_model(config.model, Path(config.data_dir)),
        config.engine.engine_kwargs,
        on_step=worker.on_step,
        on_death=worker.on_death,
        scheduling=config.planned_scheduling,
    )
    await worker.start(engine)
    pipe.send("up")
    await asyncio.Event().wait()


async def _route(config: TempoConfig, pipe: Connection) -> None:
    redis = await asyncio.to_thread(start_embedded_redis, config.data_dir)
    store = await RedisStore.connect(redis.url, config.name)
    router = RouterServer(config, store, owner="benchmark", host=_HOST)
    pipe.send(await router.start())
    await asyncio.to_thread(pipe.recv)
    client = LinkSender(config, router.address)
    await client.connect()
    pipe.send("connected")
    while (order := await asyncio.to_thread(pipe.recv)) is not None:
        trace, limit_s = order
        try:
            pipe.send(await replay(trace, client, limit_s=limit_s))
        except Exception as error:  # noqa: BLE001 - whoever ordered the replay hears of it
            pipe.send(RuntimeError(repr(error)))
        await asyncio.sleep(_QUIET_S)
    await client.link.stop()
    await router.stop()
    await store.close()
    redis.stop()


@dataclass
class _Open:
    """A call on its way."""

    delivered: Delivered
    now_s: Callable[[], float]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class LinkSender:
    """An ingress without HTTP: it submits, counts tokens and continues what a lost worker had begun."""

    def __init__(self, config: TempoConfig, address: str) -> None:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder

        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._open: dict[RequestId, _Open] = {}
        self._numbers = itertools.count()
        self._model = config.model_name

        async def locate() -> str:
            return address

        import vllm

        self.link = IngressLink(
            "ingress",
            locate_router=locate,
            listener=self,
            transport=config.transport,
            router_wait_s=30.0,
            engine_version=str(vllm.__version__),
        )
        self._run = uuid.uuid4()
        self._prefixes = SharedPrefixes()
        self._programs = ProgramClient(self.link.programs)
        self._program_api = ProgramApi(self._programs, time.time)

    async def connect(self) -> None:
        """Wait until the router and a worker are there."""
        self.link.start()
        async with asyncio.timeout(60.0):
            while self.link.not_ready_because is not None:  # noqa: ASYNC110 - the link has no event for it
                await asyncio.sleep(0.05)

    async def send(self, unit: Unit, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]) -> None:
        """Find its place in its program, submit and wait for the end."""
        context = RequestContext(
            slo=unit.slo,
            tier="",
            app=unit.app,
            tenant=unit.tenant,
            arrival_s=time.monotonic() - (now_s() - unit.arrival_s if not unit.is_program else 0.0),
            is_streaming=isinstance(unit.slo, Latency),
        )
        said = [(name.encode(), value.encode()) for name, value in headers_of(unit, call, self._run, now_s()).items()]
        identity = identify(said, ProgramFields(), unit.tenant, ())
        if identity is None:
            await self._submit(context, call, delivered, now_s)
            return
        has_own_slo = not isinstance(unit.slo, Deadline)
        await join(self._programs, identity, context, has_own_slo=has_own_slo, now_epoch_s=time.time())
        try:
            await self._submit(context, call, delivered, now_s)
        finally:
            self._leave(context, delivered)

    async def end_program(self, unit: Unit, *, is_complete: bool) -> None:
        """Finish or cancel it."""
        name = program_name(unit, self._run)
        if is_complete:
            await self._program_api.finish(name, unit.tenant)
            return
        try:
            await self._program_api.cancel(name, "", unit.tenant)
        except ProgramError as error:
            # What was cut off before the router had heard of it made no program.
            if error.code != "unknown_program":
                raise

    async def _submit(
        self, context: RequestContext, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]
    ) -> None:
        name = RequestId(f"{next(self._numbers)}-{call.request_id}")
        prompt = prompt_of(call)
        prefix_id, prefix_tokens = self._prefixes.note(context.tenant, prompt)
        ticket = context.program
        spec = RequestSpec(
            request_id=name,
            arrival_s=context.arrival_s,
            slo=context.slo,
            prompt_tokens=call.prompt_tokens,
            max_output_tokens=call.output_tokens,
            group_id=GroupId(name),
            model=self._model,
            app=context.app,
            tenant=context.tenant,
            stage=ticket.stage if ticket else 0,
            prefix_id=prefix_id,
            prefix_tokens=prefix_tokens,
            program_id=ticket.program_id if ticket else "",
            call_id=ticket.call_id if ticket else "",
        )
        one = self._open[name] = _Open(delivered, now_s)
        try:
            verdict = await self.link.submit(spec, _payload(spec, prompt))
            if not verdict.is_admitted:
                delivered.status = "refused"
                return
            await one.ended.wait()
        finally:
            # Unless it has ended, its client has left.
            if self._open.pop(name, None) is not None:
                self.link.cancel(name)

    def _leave(self, context: RequestContext, delivered: Delivered) -> None:
        ticket = context.program
        assert ticket is not None
        statuses: dict[str, CallStatus] = {"finished": "completed", "cut": "cancelled"}
        self._programs.end(
            EndCall(
                ticket.program_id,
                ticket.call_id,
                ticket.attempt,
                statuses.get(delivered.status, "failed"),
                prompt_tokens=delivered.call.prompt_tokens,
                output_tokens=delivered.tokens,
            )
        )

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        """Outputs of one engine step."""
        for output in self._decoder.decode(list(frame.engine_outputs.buffers)).outputs:
            name = self.link.claim(worker_id, output.request_id)
            one = self._open.get(name) if name is not None else None
            if name is None or one is None:
                continue
            one.delivered.tokens += len(output.new_token_ids)
            one.delivered.times_s.extend([one.now_s()] * len(output.new_token_ids))
            if output.finish_reason is not None:
                one.delivered.end()
                self.link.finish(name)
                self._end(name)

    def attempt_lost(self, request_id: RequestId) -> None:
        """No worker is lost in a benchmark; if one is, the call is."""
        self.link.cancel(request_id)
        self._end(request_id)

    def relegated(self, request_id: RequestId) -> None:
        """It goes on."""

    def redated(self, request_id: RequestId, slo: ProgramCall) -> None:
        """Deadlines stay where they are."""

    def program_cancelled(self, request_id: RequestId) -> None:
        """Nobody cancels a program here; if one is, its call is over."""
        self._end(request_id)

    def expired(self, request_id: RequestId) -> None:
        """The router gave it up."""
        one = self._open.get(request_id)
        if one is not None:
            one.delivered.status = "expired"
            self._end(request_id)

    def _end(self, request_id: RequestId) -> None:
        one = self._open.pop(request_id, None)
        if one is not None:
            one.ended.set()


def _payload(spec: RequestSpec, prompt: Sequence[int]) -> list[bytes]:
    """The request as vLLM's front end would encode it; greedy, and as long as the trace says."""
    from vllm import SamplingParams

    from workers.vllm_payload import encoded_request

    params = SamplingParams(max_tokens=spec.max_output_tokens, ignore_eos=True, temperature=0.0)
    return list(encoded_request(spec.attempt_id, prompt, params))
