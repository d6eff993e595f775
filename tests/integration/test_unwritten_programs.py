"""Programs while Redis is away: changes wait, within a bound, and are all there once and in order when it is back.

What it had acknowledged and lost is written again.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from deployments.openai_errors import ApiError
from deployments.program_api import ProgramApi
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import EngineConfig, ProgramsConfig, SchedulingConfig, TempoConfig, TransportConfig
from tempo_router.errors import StoreUnavailableError
from tempo_router.program_ops import CreateProgram, EndCall, FinishProgram
from tempo_router.request import ProgramCall, ProgramId
from tests.fleet import Fleet, call, eventually, submit
from tests.forgetful_redis import ForgetfulRedis

pytestmark = pytest.mark.redis

MOST = 200
CONFIG = TempoConfig(
    engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 32, "max_model_len": 4096}),
    scheduling=SchedulingConfig(program_model="patterns", length_model="histogram", settle_s=0.1, tick_s=0.02),
    programs=ProgramsConfig(max_unwritten=MOST),
    transport=TransportConfig(attach_timeout_s=2, snapshot_s=0.5, lease_s=2),
)


class WatchedStore(RedisStore):
    """Notes what was asked of Redis in each round trip that it answered."""

    written: list[tuple[Sequence[str], Sequence[Any]]]

    async def run(self, calls: Sequence[tuple[str, Sequence[str], Sequence[Any]]]) -> list[Any]:
        answers = await super().run(calls)
        self.written += [(keys, arguments) for _, keys, arguments in calls]
        return answers

    def history(self, program_id: str) -> list[str]:
        """What was written of a program: a call and how it stood, or the program and how it stood, or all of it."""
        return [_told(arguments) for keys, arguments in self.written if keys[0] == f"program:{program_id}"]


def _told(arguments: Sequence[Any]) -> str:
    if arguments[4] == "about":
        return "whole"
    name = str(arguments[2])
    if name.startswith("c:"):
        return f"{name[2:]} {arguments[4].split(b'|')[1].decode()}"
    return str(arguments[4])


class Outage:
    """A fleet over a Redis that can be ended and started again.

    notices_restarts: whether the router hears of it. Then it writes again, beside what waits, all that it knows.
    """

    def __init__(self, folder: Path) -> None:
        self.redis = ForgetfulRedis(folder)

    async def start(self, *, notices_restarts: bool = False) -> None:
        self.store = await WatchedStore.connect(self.redis.url, "outage")
        self.store.written = []
        self.fleet = Fleet(CONFIG, self.store)
        await self.fleet.start()
        if not notices_restarts:
            self.store.on_restart = lambda: None
        self.client = self.fleet.clients[0]
        self.programs = ProgramClient(self.client.link.programs)
        self.api = ProgramApi(self.programs, time.time)

    @property
    def writer(self):
        return self.fleet.router.programs.writer

    async def begin_outage(self) -> None:
        """Redis is killed; a program that is made in this moment is answered all the same."""
        self.redis.kill()
        assert (await self.post({"name": "first-to-notice", "deadline_s": 60}))[0] == 200
        assert self.writer.is_away

    async def end_outage(self) -> None:
        await asyncio.to_thread(self.redis.start, forgets=False)
        await eventually(lambda: not self.writer.is_away and not self.writer.waiting, "all is written")
        await eventually(lambda: not self.client.link.programs.unstored, "the ingress keeps nothing")

    async def post(self, fields: dict[str, Any]) -> tuple[int, Any]:
        return await self.api.answer("POST", "/v1/programs", b"", json.dumps(fields).encode(), "")

    async def create(self, program_id: str) -> None:
        await self.programs.ask(CreateProgram(program_id, "", "app", time.time() + 600))

    async def call(self, program_id: str, call_id: str) -> None:
        """One call from its beginning to its end, answered by the engine."""
        identity = Identity("explicit", program_id, call_id=call_id)
        ticket = await self.programs.begin(identity, tenant="", app="", now_epoch_s=time.time())
        assert ticket.left_s is not None
        slo = ProgramCall(ProgramId(program_id), ticket.left_s)
        spec = call(f"{program_id}-{call_id}", output_tokens=2, slo=slo)
        spec = replace(spec, program_id=program_id, call_id=call_id, stage=ticket.stage)
        assert (await submit(self.client, spec)).is_admitted
        await eventually(lambda: spec.request_id in self.client.ended, f"{spec.request_id} is answered")
        self.programs.end(EndCall(program_id, call_id, ticket.attempt, "completed", 10, 2))

    async def finish(self, program_id: str) -> None:
        await self.programs.ask(FinishProgram(program_id, "", f"finish-{program_id}"))

    async def assert_stored(self, program_id: str, calls: Sequence[str], status: str) -> None:
        """Redis has the program with these calls, each ended, and each counted once."""
        store = ProgramStore(self.store)
        graph = await store.load(program_id)
        assert graph is not None
        assert graph.status == status
        assert [(one.call_id, one.status) for one in graph.calls.values()] == [(name, "completed") for name in calls]
        counted = {"calls": len(calls), "done": len(calls), "tokens": 2 * len(calls)}
        assert await store.counters(program_id) == counted

    async def stop(self) -> None:
        await self.fleet.close()
        await self.store.close()
        self.redis.stop()


@pytest.fixture
async def outage(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Outage]:
    outage = Outage(tmp_path)
    await outage.start(notices_restarts=getattr(request, "param", False))
    yield outage
    await outage.stop()


async def test_changes_wait_for_redis_and_are_written_in_order(outage: Outage) -> None:
    await outage.create("old")
    await outage.call("old", "before")
    await eventually(lambda: not outage.writer.waiting, "all is written")
    await outage.begin_outage()

    for name in ("a", "b", "c"):
        await outage.call("old", name)
    await outage.create("new")
    await outage.call("new", "only")
    await outage.finish("new")
    assert not outage.writer.is_full
    await outage.end_outage()

    steps = [f"{name} {status}" for name in ("before", "a", "b", "c") for status in ("running", "completed")]
    assert outage.store.history("old") == ["whole", *steps]
    assert outage.store.history("new") == ["whole", "only running", "only completed", "finished"]
    await outage.assert_stored("old", ("before", "a", "b", "c"), "running")
    await outage.assert_stored("new", ("only",), "finished")
    [outline] = await ProgramStore(outage.store).load_patterns()
    assert len(outline.stages) == 1


async def test_beyond_the_bound_new_programs_are_refused_until_redis_is_back(outage: Outage) -> None:
    await outage.create("old")
    await outage.begin_outage()
    names = []
    while not outage.writer.is_full:
        names.append(f"call-{len(names)}")
        await outage.call("old", names[-1])
    waiting = outage.writer.waiting

    status, refused = await outage.post({"name": "too-late", "deadline_s": 60})
    assert isinstance(refused, ApiError)
    assert (status, refused.code) == (503, "store_unavailable")
    assert (b"retry-after", b"1") in refused.headers()
    for name in ("late-1", "late-2", "late-3"):
        names.append(name)
        await outage.call("old", name)
    await outage.finish("old")
    assert outage.writer.waiting <= waiting + 2, "of further changes only the program is kept, and its outline"
    await outage.end_outage()

    history = outage.store.history("old")
    early = [f"{name} {status}" for name in names for status in ("running", "completed")][: len(history) - 2]
    assert history == ["whole", *early, "whole"], "the first changes one by one, then all of the program"
    assert len(early) < 2 * len(names)
    await outage.assert_stored("old", names, "finished")
    assert (await outage.post({"name": "in-time", "deadline_s": 60}))[0] == 200
    await eventually(lambda: not outage.writer.waiting, "all is written")
    stored = await ProgramStore(outage.store).load_live()
    assert sorted(graph.name for graph in stored) == ["first-to-notice", "in-time"]


async def test_an_answer_of_redis_that_was_lost_leaves_nothing_twice(outage: Outage) -> None:
    """It carried out what waits, and its answer never came: all of it is told again."""
    run, losses = outage.store.run, iter([True])

    async def losing(calls: Sequence[tuple[str, Sequence[str], Sequence[Any]]]) -> list[Any]:
        answers = await run(calls)
        if any(keys[0] == "patterns" for _, keys, _ in calls) and next(losses, False):
            raise StoreUnavailableError("the connection broke")
        return answers

    outage.store.run = losing  # type: ignore[method-assign]
    await outage.create("p")
    await outage.call("p", "only")
    await outage.finish("p")
    await eventually(lambda: not outage.writer.waiting and not outage.writer.is_away, "all is written")
    await outage.assert_stored("p", ("only",), "finished")
    assert outage.store.history("p").count("finished") == 2
    assert len(await ProgramStore(outage.store).load_patterns()) == 1


@pytest.mark.parametrize("outage", [True], indirect=True)
async def test_what_redis_acknowledged_and_lost_is_written_again(outage: Outage) -> None:
    """Nobody asks for anything meanwhile: the router finds out when it renews its lease."""
    await outage.create("ended")
    await outage.call("ended", "a")
    await outage.create("running")
    await eventually(lambda: not outage.writer.waiting, "all is written")
    outage.redis.remember()

    await outage.call("ended", "b")
    await outage.finish("ended")
    await outage.call("running", "only")
    await outage.create("later")
    await eventually(lambda: not outage.writer.waiting, "all is acknowledged")
    assert not outage.client.link.programs.unstored
    await asyncio.to_thread(outage.redis.kill)
    outage.store.written.clear()
    await asyncio.to_thread(outage.redis.start, forgets=True)

    def is_again(program_id: str) -> bool:
        return "whole" in outage.store.history(program_id)

    await eventually(lambda: all(map(is_again, ("ended", "running", "later"))), "all is written again")
    await eventually(lambda: not outage.writer.waiting, "nothing waits")
    await outage.assert_stored("ended", ("a", "b"), "finished")
    await outage.assert_stored("running", ("only",), "running")
    await outage.assert_stored("later", (), "running")
    assert len(await ProgramStore(outage.store).load_patterns()) == 1
