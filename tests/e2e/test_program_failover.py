"""200 programs through the served application while its parts are killed: each ends, with the right graph in Redis."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.embedded_redis import EmbeddedRedis, start_embedded_redis
from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from tests.served import Served, served

pytestmark = [pytest.mark.e2e, pytest.mark.redis, pytest.mark.timeout(900)]

MODEL = "tempo-tiny"
PROGRAMS = 200
PER_SECOND = 4.0
SEED = 5
GIVE_UP_S = 240.0
TENANT = "failover"


class Redis:
    """A server of the test's own, which it may restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: EmbeddedRedis = start_embedded_redis(folder)
        self.url = self.server.url

    def restart(self) -> None:
        psutil.Process(self.server.pid).kill()
        self.server.stop()
        self.server = start_embedded_redis(self.folder)
        assert self.server.url == self.url


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    redis = Redis(tmp_path_factory.mktemp("redis"))
    yield redis
    redis.server.stop()


@pytest.fixture(scope="module")
def server(redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments: dict[str, Any] = {
        "redis_url": redis.url,
        "engine": {"kind": "simulated", "engine_kwargs": {"max_num_seqs": 32, "max_model_len": 4096}},
        "scheduling": {"policy": "tempo", "program_model": "patterns"},
        "workers": {"replicas": 2},
        "ingress": {"replicas": 2, "router_wait_s": 60},
    }
    with served(tmp_path_factory.mktemp("failover"), arguments) as running:
        yield running


@dataclass
class Run:
    """One program as its client lived it: calls that it was answered, with their tokens."""

    name: str
    answered: dict[str, int] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    broken_streams: int = 0
    longest_gap_s: float = 0.0


class Clients:
    """Programs of three stages, by clients that try again when a connection breaks or a part is away."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=url, timeout=90, limits=limits, headers={"x-tenant-id": TENANT})
        self.runs: list[Run] = []

    async def persist(self, ask: Callable[[int], Awaitable[httpx.Response | None]], done: tuple[int, ...]) -> Any:
        """Ask until the answer is one of these; give up when nothing has helped for long."""
        give_up_s, tries = time.monotonic() + GIVE_UP_S, 0
        while True:
            try:
                answer = await ask(tries)
            except httpx.HTTPError:
                answer = None
            if answer is not None and answer.status_code in done:
                return answer
            reason = None if answer is None else (answer.status_code, answer.text[:300])
            assert answer is None or answer.status_code >= 500, reason
            assert time.monotonic() < give_up_s, reason
            tries += 1
            await asyncio.sleep(0.2)

    async def run(self, number: int) -> None:
        run = Run(f"run {number}")
        self.runs.append(run)
        fields = {"deadline_s": 300, "app": "failover", "name": run.name}
        await self.persist(lambda _: self.http.post("/v1/programs", json=fields), (200,))
        await self.call(run, f"{number}-plan", 20)
        searches = [f"{number}-search-{one}" for one in range(1 + number % 3)]
        await asyncio.gather(*(self.call(run, one, 60, parents=f"{number}-plan") for one in searches))
        await self.call(run, f"{number}-sum", 30, parents=",".join(searches))
        await self.persist(lambda _: self.http.post(f"/v1/programs/{run.name}/finish"), (200, 409))

    async def call(self, run: Run, call_id: str, tokens: int, parents: str = "") -> None:
        run.begun.add(call_id)
        answer = await self.persist(lambda tries: self.stream(run, call_id, tokens, parents, tries), (200, 409))
        if answer.status_code == 409:
            # Its last bytes were lost with an ingress, after it had been counted as answered.
            assert answer.json()["error"]["code"] == "call_ended", answer.text
        run.answered[call_id] = tokens

    async def stream(self, run: Run, call_id: str, tokens: int, parents: str, tries: int) -> httpx.Response | None:
        body = {
            "model": MODEL, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {"x-tempo-program": run.name, "x-tempo-call": call_id, "x-tempo-attempt": str(tries)}
        if parents:
            headers["x-tempo-parent"] = parents
        async with self.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return answer
            received, is_whole, last_s = 0, False, time.monotonic()
            async for line in answer.aiter_lines():
                if line.startswith('data: {"error"'):
                    return None
                if line.startswith("data: {"):
                    usage = json.loads(line[6:]).get("usage")
                    received = usage["completion_tokens"] if usage else received
                    run.longest_gap_s = max(run.longest_gap_s, time.monotonic() - last_s)
                    last_s = time.monotonic()
                is_whole = is_whole or line == "data: [DONE]"
            if not is_whole:
                run.broken_streams += 1
                return None
            assert received == tokens, f"{call_id}: {received} of {tokens} tokens"
            return answer


class Trouble:
    """Kills parts at random moments, and measures how long until a program can be made again."""

    def __init__(self, server: Served, redis: Redis, clients: Clients) -> None:
        self.server, self.redis, self.clients = server, redis, clients
        self.recovery_s: list[tuple[str, float]] = []

    async def go_on(self, over_s: float) -> None:
        rng = random.Random(SEED)
        kinds = ["router", "worker", "redis", "ingress", "router", "worker", "redis"]
        rng.shuffle(kinds)
        for kind in kinds:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * over_s / (len(kinds) + 1))
            await self.strike(kind)

    async def strike(self, kind: str) -> None:
        match kind:
            case "redis":
                await asyncio.to_thread(self.redis.restart)
            case "router":
                self.server.processes("ray::RouterActor")[0].kill()
            case _:
                found = self.server.processes(f"ServeReplica:tempo:{kind}")
                if len(found) < 2:
                    return  # The last one has not been replaced yet: nobody would be left to serve.
                found[0].kill()
        began_s = time.monotonic()
        fields = {"deadline_s": 60, "app": "probe"}
        await self.clients.persist(lambda _: self.clients.http.post("/v1/programs", json=fields), (200,))
        self.recovery_s.append((kind, round(time.monotonic() - began_s, 2)))


async def test_every_program_ends_with_the_right_graph(
    server: Served, redis: Redis, record_property: Callable[[str, object], None]
) -> None:
    clients = Clients(server.url)
    trouble = Trouble(server, redis, clients)
    rng = random.Random(SEED)
    async with asyncio.TaskGroup() as work:
        work.create_task(trouble.go_on(PROGRAMS / PER_SECOND))
        for number in range(PROGRAMS):
            work.create_task(clients.run(number))
            await asyncio.sleep(rng.expovariate(PER_SECOND))

    views = await ended(clients)
    assert {one["status"] for one in views.values()} <= {"finished", "relegated", "cancelled"}
    store = await RedisStore.connect(redis.url, "tempo")
    try:
        await graphs_are_right(ProgramStore(store), clients, views)
    finally:
        await store.close()
        await clients.http.aclose()
    record_property("recovered_s", trouble.recovery_s)
    record_property("streams_broken_by_a_killed_ingress", sum(run.broken_streams for run in clients.runs))
    record_property("longest_gap_in_a_stream_s", round(max(run.longest_gap_s for run in clients.runs), 2))


async def ended(clients: Clients) -> dict[str, dict[str, Any]]:
    """All programs, by name, once each has ended and is stored."""
    views: dict[str, dict[str, Any]] = {}
    give_up_s = time.monotonic() + 60
    for run in clients.runs:
        while True:
            answer = await clients.persist(lambda _, name=run.name: clients.http.get(f"/v1/programs/{name}"), (200,))
            views[run.name] = answer.json()
            if views[run.name]["ended_at"] is not None:
                break
            assert time.monotonic() < give_up_s, views[run.name]
            await asyncio.sleep(0.1)
    return views


async def graphs_are_right(programs: ProgramStore, clients: Clients, views: dict[str, dict[str, Any]]) -> None:
    """In Redis each program has exactly its client's calls, each answered once, with all of its tokens."""
    for run in clients.runs:
        program_id = views[run.name]["id"]
        graph = await programs.load(program_id)
        assert graph is not None, run.name
        assert graph.status == views[run.name]["status"] == "finished", (run.name, graph.status, graph.reason)
        assert graph.calls.keys() == run.begun, run.name
        assert run.answered.keys() == run.begun, run.name
        for call_id, tokens in run.answered.items():
            call = graph.calls[call_id]
            assert (call.status, call.output_tokens) == ("completed", tokens), (run.name, call)
        counters = await programs.counters(program_id)
        assert counters == {"calls": len(run.begun), "done": len(run.begun), "tokens": sum(run.answered.values())}
        parents = {call_id: set(call.parents) for call_id, call in graph.calls.items()}
        number = run.name.split()[1]
        searches = {call_id for call_id in run.begun if "search" in call_id}
        assert parents[f"{number}-sum"] == searches
        assert all(parents[one] == {f"{number}-plan"} for one in searches)
