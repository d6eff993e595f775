"""200 programs while routers, workers, ingresses and Redis are killed at random moments: real gRPC, real Redis."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig, TransportConfig
from tempo_router.errors import ProgramError
from tempo_router.program_ops import CancelProgram, CreateProgram, EndCall, FinishProgram
from tempo_router.request import BestEffort, ProgramCall, ProgramId
from tests.fleet import Client, Fleet, call, eventually, payload_of
from tests.forgetful_redis import ForgetfulRedis

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]

CONFIG = TempoConfig(
    engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 32, "max_model_len": 4096}),
    scheduling=SchedulingConfig(
        policy="tempo", program_model="patterns", length_model="histogram", settle_s=0.2, tick_s=0.02
    ),
    transport=TransportConfig(inline_payload_bytes=64, attach_timeout_s=2, snapshot_s=0.2, lease_s=2),
)
PROGRAMS = 200
PER_SECOND = 12.0
SEED = 11
FATES: dict[int, Literal["late", "cancelled"]] = {3: "cancelled", 7: "late"}
"""Of each ten programs."""
LATE_S = 0.2
"""Deadline of a program that is late: shorter than its first call takes."""
LOST_S = 0.5
"""So much of what it acknowledged last Redis has lost when it is back."""


class Killable:
    """A fleet over a Redis that can be restarted, with ingresses that can be lost."""

    def __init__(self, folder: Path) -> None:
        self.redis = ForgetfulRedis(folder)
        self.fleet: Fleet
        self.gone: set[int] = set()
        self.recovery_s: list[tuple[str, float]] = []

    async def start(self) -> None:
        self.store = await RedisStore.connect(self.redis.url, "failover")
        self.fleet = Fleet(CONFIG, self.store)
        await self.fleet.start(workers=2, clients=2)

    @property
    def ingresses(self) -> list[int]:
        return [number for number in range(len(self.fleet.clients)) if number not in self.gone]

    async def strike(self, kind: str, rng: random.Random) -> None:
        match kind:
            case "router":
                await self.fleet.replace_router()
            case "worker":
                await self.fleet.kill_worker(rng.choice(list(self.fleet.workers)))
                await self.fleet.add_worker()
            case "redis":
                self.redis.remember()
                await asyncio.sleep(LOST_S)
                await asyncio.to_thread(self.restart_redis)
            case "ingress":
                number = rng.choice(self.ingresses)
                await self.fleet.add_client()
                self.gone.add(number)
                await self.fleet.clients[number].link.stop()
        began_s = time.monotonic()
        programs = ProgramClient(self.fleet.clients[self.ingresses[0]].link.programs)
        await programs.ask(CreateProgram(f"probe-{began_s}", "", "probe", time.time() + 600))
        self.recovery_s.append((kind, round(time.monotonic() - began_s, 3)))

    def restart_redis(self) -> None:
        self.redis.kill()
        self.redis.start(forgets=True)

    async def stop(self) -> None:
        await self.fleet.close()
        await self.store.close()
        self.redis.stop()


@pytest.fixture
async def killable(tmp_path: Path) -> AsyncIterator[Killable]:
    killable = Killable(tmp_path)
    await killable.start()
    yield killable
    await killable.stop()


@dataclass
class Run:
    """One program as its client lived it. fate: how it ends. calls: tokens by call, of those that were answered."""

    program_id: str
    fate: Literal["in time", "late", "cancelled"]
    calls: dict[str, int] = field(default_factory=dict)
    longest_gap_s: float = 0.0


Ask = Callable[[ProgramClient, Client, int], Coroutine[Any, Any, Any]]


class Life:
    """A program's client: plan, search side by side, sum up; what is lost with an ingress goes through another."""

    def __init__(self, killable: Killable, number: int) -> None:
        self.killable = killable
        self.number = number
        self.run = Run(f"p{number}", FATES.get(number % 10, "in time"))
        self.rng = random.Random(number)

    async def live(self) -> Run:
        await self.persist(self.create)
        await self.call("plan", 20, ())
        if self.run.fate == "cancelled":
            await self.persist(self.cancel)
            return self.run
        searches = tuple(f"search-{one}" for one in range(1 + self.number % 3))
        await asyncio.gather(*(self.call(name, 60, ("plan",)) for name in searches))
        await self.call("sum", 30, searches)
        await self.persist(self.finish)
        return self.run

    async def persist(self, ask: Ask) -> None:
        tries = 0
        while not await self.has_asked(ask, tries):
            tries += 1

    async def has_asked(self, ask: Ask, tries: int) -> bool:
        """Whether it came to its end; not if its ingress was killed meanwhile, as a broken connection tells."""
        ingress = self.rng.choice(self.killable.ingresses)
        client = self.killable.fleet.clients[ingress]
        asking = asyncio.ensure_future(ask(ProgramClient(client.link.programs), client, tries))
        while not asking.done() and ingress not in self.killable.gone:
            await asyncio.wait((asking,), timeout=0.1)
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return False
        error = asking.exception()
        if isinstance(error, ProgramError) and error.code in ("call_ended", "program_ended"):
            return True  # It was carried out, and only the answer was lost.
        if isinstance(error, ProgramError) and self.run.fate == "late" and error.field == "deadline":
            return False  # No router was there until it had passed.
        asking.result()
        return True

    async def call(self, call_id: str, tokens: int, parents: tuple[str, ...]) -> None:
        await self.persist(lambda programs, client, tries: self.one(programs, client, tries, call_id, tokens, parents))
        self.run.calls[call_id] = tokens

    async def one(
        self, programs: ProgramClient, client: Client, tries: int, call_id: str, tokens: int, parents: tuple[str, ...]
    ) -> None:
        program_id = self.run.program_id
        identity = Identity("explicit", program_id, call_id=call_id, attempt=tries, parents=parents)
        ticket = await programs.begin(identity, tenant="", app="", now_epoch_s=time.time())
        assert ticket.left_s is not None
        name = f"{program_id}-{call_id}.{tries}"
        slo = BestEffort() if ticket.is_relegated else ProgramCall(ProgramId(program_id), ticket.left_s)
        spec = call(name, output_tokens=tokens, slo=slo)
        spec = replace(spec, program_id=program_id, call_id=call_id, stage=ticket.stage)
        assert (await client.link.submit(spec, payload_of(spec))).is_admitted
        seen, seen_s = 0, time.monotonic()
        while name not in client.ended:
            await asyncio.sleep(0.01)
            if client.tokens.get(spec.request_id, 0) > seen:
                gap_s = time.monotonic() - seen_s
                self.run.longest_gap_s = max(self.run.longest_gap_s, gap_s if seen else 0.0)
                seen, seen_s = client.tokens[spec.request_id], time.monotonic()
        assert client.tokens[spec.request_id] == tokens
        programs.end(EndCall(program_id, call_id, ticket.attempt, "completed", 10, tokens))

    async def create(self, programs: ProgramClient, client: Client, tries: int) -> None:
        left_s = LATE_S if self.run.fate == "late" else 600.0
        deadline_s = time.time() + left_s
        await programs.ask(CreateProgram(self.run.program_id, "", "app", deadline_s, asked_s=left_s))

    async def cancel(self, programs: ProgramClient, client: Client, tries: int) -> None:
        """While a call runs that is never ended by anyone else."""
        program_id = self.run.program_id
        identity = Identity("explicit", program_id, call_id="cut-off", attempt=tries, parents=("plan",))
        await programs.begin(identity, tenant="", app="", now_epoch_s=time.time())
        await programs.ask(CancelProgram(program_id, "", f"cancel-{program_id}-{tries}"))

    async def finish(self, programs: ProgramClient, client: Client, tries: int) -> None:
        program_id = self.run.program_id
        await programs.ask(FinishProgram(program_id, "", f"finish-{program_id}-{tries}"))


async def test_every_program_ends_with_the_right_graph(
    killable: Killable, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(SEED)
    kinds = ["router"] * 4 + ["worker"] * 3 + ["redis"] * 3 + ["ingress"] * 3
    rng.shuffle(kinds)
    work: list[asyncio.Task[Run]] = []

    async def trouble() -> None:
        for kind in kinds:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * PROGRAMS / PER_SECOND / len(kinds))
            await killable.strike(kind, rng)

    striking = asyncio.create_task(trouble())
    for number in range(PROGRAMS):
        work.append(asyncio.create_task(Life(killable, number).live()))
        await asyncio.sleep(rng.expovariate(PER_SECOND))
    runs = await asyncio.gather(*work)
    await striking

    desk = killable.fleet.router.programs
    # The end of a call may have been lost with its ingress: it counts once the router takes the ingress for gone.
    mine = {ProgramId(run.program_id) for run in runs}
    await eventually(lambda: not any(graph.program_id in mine for graph in desk.book.live), "all programs are over")
    await eventually(lambda: desk.writer.waiting == 0 and not desk.writer.is_away, "everything is stored")
    links = [killable.fleet.clients[number].link for number in killable.ingresses]
    await eventually(lambda: not any(link.programs.unstored for link in links), "nobody keeps anything")
    store = ProgramStore(killable.store)
    relegated = 0
    for run in runs:
        graph = await store.load(run.program_id)
        assert graph is not None
        expected: dict[str, tuple[str, int]] = {name: ("completed", tokens) for name, tokens in run.calls.items()}
        if run.fate == "cancelled":
            expected["cut-off"] = ("cancelled", 0)
        found = {call_id: (one.status, one.output_tokens) for call_id, one in graph.calls.items()}
        assert found == expected
        assert await store.counters(run.program_id) == {
            "calls": len(expected), "done": len(expected), "tokens": sum(run.calls.values())
        }  # fmt: skip
        said = run.program_id, graph.status, graph.reason
        if run.fate == "cancelled":
            assert graph.status == "cancelled", said
            continue
        assert (graph.status, graph.is_met) == ("finished", run.fate == "in time"), said
        # One that is late for a moment only, while a new router waits for what it is told again, may end before it is.
        assert graph.relegated_s is None or run.fate == "late", said
        relegated += graph.relegated_s is not None
        searches = {call_id for call_id in run.calls if call_id.startswith("search")}
        assert set(graph.calls["sum"].parents) == searches
        assert all(graph.calls[one].parents == ("plan",) for one in searches)
    assert relegated
    record_property("recovered_s", killable.recovery_s)
    record_property("longest_gap_in_a_stream_s", max(run.longest_gap_s for run in runs))
