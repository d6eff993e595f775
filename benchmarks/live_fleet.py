"""Router, workers and an ingress link without Ray and HTTP: real vLLM, real gRPC, real Redis, one process each.

For machines on which several whole applications are too much: processes are forked from one that has imported vLLM
already, so an application is up in seconds. What is left out is the same for every policy: the HTTP server, templates,
tokenizing and detokenizing.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.live_client import Delivered, prompt_of, replay
from cluster import wire_pb2 as wire
from cluster.embedded_redis import start_embedded_redis
from cluster.ingress_link import IngressLink
from cluster.redis_store import RedisStore
from cluster.router_server import RouterServer
from tempo_router.config import TempoConfig
from tempo_router.request import Deadline, GroupId, ProgramCall, ProgramId, RequestId, RequestSpec, Slo
from tempo_router.simulation.report import Report
from tempo_router.simulation.trace import Trace, TraceCall, Unit

_HOST = "127.0.0.1"
_START_S = 120.0
_REPLAY_S = 3600.0


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
        await client.forget_all()
    await client.link.stop()
    await router.stop()
    await store.close()
    redis.stop()


@dataclass
class _Open:
    """A call on its way. is_stream: the time of every token counts."""

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

    async def connect(self) -> None:
        """Wait until the router and a worker are there."""
        self.link.start()
        async with asyncio.timeout(60.0):
            while self.link.not_ready_because is not None:  # noqa: ASYNC110 - the link has no event for it
                await asyncio.sleep(0.05)

    async def forget_all(self) -> None:
        """Cancel what a replay left open."""
        for request_id in list(self._open):
            self.link.cancel(request_id)
            self._open.pop(request_id).ended.set()
        await asyncio.sleep(0.5)

    async def send(self, unit: Unit, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]) -> None:
        """Submit and wait for the end."""
        arrival_s = time.monotonic() - (now_s() - unit.arrival_s if not unit.is_program else 0.0)
        name = RequestId(f"{next(self._numbers)}-{call.request_id}")
        spec = RequestSpec(
            request_id=name,
            arrival_s=arrival_s,
            slo=_slo(unit, now_s()),
            prompt_tokens=call.prompt_tokens,
            max_output_tokens=call.output_tokens,
            group_id=GroupId(name),
            model=self._model,
            app=unit.app,
            tenant=unit.tenant,
        )
        one = self._open[name] = _Open(delivered, now_s)
        verdict = await self.link.submit(spec, _payload(spec, call))
        if not verdict.is_admitted:
            self._open.pop(name, None)
            delivered.status = "refused"
            return
        await one.ended.wait()

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
                one.delivered.status = "finished"
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


def _slo(unit: Unit, now_s: float) -> Slo:
    if unit.is_program and isinstance(unit.slo, Deadline):
        return ProgramCall(ProgramId(unit.unit_id), max(0.001, unit.arrival_s + unit.slo.ttlt_s - now_s))
    return unit.slo


def _payload(spec: RequestSpec, call: TraceCall) -> list[bytes]:
    """The request as vLLM's front end would encode it; greedy, and as long as the trace says."""
    from vllm import SamplingParams

    from workers.vllm_payload import encoded_request

    params = SamplingParams(max_tokens=call.output_tokens, ignore_eos=True, temperature=0.0)
    return list(encoded_request(spec.attempt_id, prompt_of(call), params))


def with_names(trace: Trace, prefix: str) -> Trace:
    """The same trace under other names, so that two replays on one server share no ids and no cached prefixes."""
    units = []
    for unit in trace.units:
        calls = tuple(
            replace(
                call,
                request_id=f"{prefix}{call.request_id}",
                prefix_id=f"{prefix}{call.prefix_id}" if call.prefix_id else "",
            )
            for call in unit.calls
        )
        units.append(replace(unit, unit_id=f"{prefix}{unit.unit_id}", calls=calls))
    return Trace(trace.name, tuple(units))
