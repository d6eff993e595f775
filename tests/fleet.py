"""A router, workers with simulated engines and ingresses in one process, over real gRPC and real Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from cluster import wire_pb2 as wire
from cluster.embedded_redis import EmbeddedRedis, start_embedded_redis
from cluster.ingress_link import IngressLink, Verdict
from cluster.redis_store import RedisStore
from cluster.router_server import RouterServer
from tempo_router.config import TempoConfig
from tempo_router.request import BestEffort, GroupId, ProgramCall, RequestId, RequestSpec, Slo
from workers.simulated_engine import start_simulated_engine
from workers.worker import Worker

WAIT_S = 20.0


async def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds, looking again whenever the loop had a chance to move; fail after WAIT_S."""
    give_up_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < give_up_s, f"not within {WAIT_S} s: {what}"
        await asyncio.sleep(0.005)


@dataclass
class Client:
    """Plays the engine client: counts tokens, continues lost attempts, remembers how each request ended."""

    link: IngressLink = field(init=False)
    tokens: dict[RequestId, int] = field(default_factory=dict)
    ended: dict[RequestId, str] = field(default_factory=dict)
    resumed: list[RequestId] = field(default_factory=list)
    relegations: list[RequestId] = field(default_factory=list)
    redates: list[tuple[RequestId, ProgramCall]] = field(default_factory=list)

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        for delta in frame.deltas:
            request_id = self.link.claim(worker_id, delta.request_id)
            if request_id is None:
                continue
            self.tokens[request_id] = self.tokens.get(request_id, 0) + len(delta.token_ids)
            if delta.finish_reason:
                assert request_id not in self.ended, f"{request_id} ended twice"
                self.ended[request_id] = delta.finish_reason
                self.link.finish(request_id)

    def attempt_lost(self, request_id: RequestId) -> None:
        spec = self.link.open[request_id].spec
        self.resumed.append(request_id)
        again = replace(spec, attempt=spec.attempt + 1, generated_tokens=self.tokens.get(request_id, 0))
        self.link.resubmit(again, payload_of(again))

    def relegated(self, request_id: RequestId) -> None:
        self.relegations.append(request_id)

    def redated(self, request_id: RequestId, slo: ProgramCall) -> None:
        self.redates.append((request_id, slo))

    def program_cancelled(self, request_id: RequestId) -> None:
        self.ended[request_id] = "program cancelled"

    def expired(self, request_id: RequestId) -> None:
        self.ended[request_id] = "expired"


class Fleet:
    """Everything that one test needs; `close` ends it."""

    redis: EmbeddedRedis

    def __init__(self, config: TempoConfig, store: RedisStore) -> None:
        self.config = config
        self.store = store
        self.router = RouterServer(config, store, owner="router-1", host="127.0.0.1")
        self.workers: dict[str, Worker] = {}
        self.clients: list[Client] = []
        self._count = 0

    async def start(self, *, workers: int = 1, clients: int = 1) -> None:
        await self.router.start()
        for _ in range(workers):
            await self.add_worker()
        for _ in range(clients):
            await self.add_client()

    async def locate(self) -> str:
        if not self.router.address:
            raise OSError("no router")
        return self.router.address

    async def add_worker(self) -> Worker:
        self._count += 1
        worker = Worker(
            f"worker-{self._count}", locate_router=self.locate, host="127.0.0.1", transport=self.config.transport
        )
        engine = await start_simulated_engine(self.config.engine, on_step=worker.on_step, on_death=worker.on_death)
        await worker.start(engine)
        self.workers[worker.worker_id] = worker
        return worker

    async def add_client(self) -> Client:
        client = await self.add_unconnected_client(router_wait_s=WAIT_S)
        await eventually(lambda: client.link.not_ready_because is None, "the ingress is ready")
        return client

    async def add_unconnected_client(self, *, router_wait_s: float) -> Client:
        client = Client()
        client.link = IngressLink(
            f"ingress-{len(self.clients) + 1}",
            locate_router=self.locate,
            listener=client,
            transport=self.config.transport,
            router_wait_s=router_wait_s,
            engine_version="none",
        )
        client.link.start()
        self.clients.append(client)
        return client

    async def replace_router(self) -> None:
        """Kill the router and start another one, as Ray does with the actor."""
        old, self.router = self.router, RouterServer(self.config, self.store, owner="router-2", host="127.0.0.1")
        await kill_router(old)
        await self.router.start()

    async def kill_worker(self, worker_id: str) -> None:
        """End a worker as SIGKILL would: no drain, no last word."""
        await self.workers.pop(worker_id).stop()

    def is_empty(self) -> bool:
        """Whether nothing of any request is left anywhere."""
        snapshot = self.router.snapshot()
        return (
            snapshot["open_requests"] == snapshot["payloads"] == snapshot["dispatched"] == 0
            and all(worker.live_calls == 0 for worker in self.workers.values())
            and all(not client.link.open for client in self.clients)
        )

    async def close(self) -> None:
        for client in self.clients:
            await client.link.stop()
        for worker in self.workers.values():
            await worker.stop()
        await self.router.stop()


def _stop_redis(fleet: Fleet) -> None:
    """The one that it has now: a test may have put another server in the first one's place."""
    fleet.redis.stop()


@asynccontextmanager
async def fleet_over_redis(config: TempoConfig, folder: Path) -> AsyncIterator[Fleet]:
    """A fleet that is still to be started, over a Redis of its own that lives in `folder`; both ended at the end."""
    async with AsyncExitStack() as stack:
        redis = await asyncio.to_thread(start_embedded_redis, folder)
        store = await RedisStore.connect(redis.url, "test")
        fleet = Fleet(config, store)
        fleet.redis = redis
        stack.callback(_stop_redis, fleet)
        stack.push_async_callback(store.close)
        stack.push_async_callback(fleet.close)
        yield fleet


async def break_control_stream(peer: Worker | IngressLink) -> None:
    """Cut one peer's stream to the router as a network failure would; both processes live on."""
    async with no_control_stream(peer):
        pass


@asynccontextmanager
async def no_control_stream(peer: Worker | IngressLink) -> AsyncIterator[None]:
    """Likewise; it finds no router before the end."""
    if isinstance(peer, Worker):
        assert peer._router_task is not None
        tasks = [peer._router_task]
    else:
        tasks = [task for task in peer._tasks if not task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    peer._router._close()
    yield
    if isinstance(peer, Worker):
        peer._router_task = asyncio.create_task(peer._router.run())
    else:
        peer._spawn(peer._router.run(), "router link")


def break_token_streams(worker: Worker) -> None:
    """Cut a worker's streams to all ingresses; both ends live on."""
    for session in worker._sessions.values():
        session.broken.set()


async def kill_router(router: RouterServer) -> None:
    """Stop a router's tasks and streams without its leave-taking."""
    router._peers.close()
    for task in router._tasks:
        task.cancel()
    await asyncio.gather(*router._tasks, return_exceptions=True)
    if router.estimates is not None:
        router.estimates.close()
    await router._server.stop(grace=None)


def call(request_id: str, *, output_tokens: int = 20, prompt_tokens: int = 10, slo: Slo | None = None) -> RequestSpec:
    """A request that arrives now and, on the simulated engine, ends by its length."""
    return RequestSpec(
        request_id=RequestId(request_id),
        arrival_s=time.monotonic(),
        slo=slo or BestEffort(),
        prompt_tokens=prompt_tokens,
        max_output_tokens=output_tokens,
        group_id=GroupId(request_id),
    )


def payload_of(spec: RequestSpec, padding_tokens: int = 0) -> list[bytes]:
    """The beginning of vLLM's request, as far as the simulated engine reads it: the answer has its full length."""
    return [msgspec.msgpack.encode([spec.attempt_id, [0] * padding_tokens, None, {"ignore_eos": True}])]


async def submit(client: Client, spec: RequestSpec, padding_tokens: int = 0) -> Verdict:
    """Submit and expect an answer."""
    return await client.link.submit(spec, payload_of(spec, padding_tokens))
