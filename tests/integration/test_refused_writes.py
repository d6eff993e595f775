"""What Redis refuses is no outage: one write is dropped, aloud, and those behind it are written."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import redis.asyncio
import structlog

from cluster.embedded_redis import EmbeddedRedis, start_embedded_redis
from cluster.learnt_lengths import ANSWERS_SNAPSHOT, LENGTHS_SNAPSHOT, LearntLengths
from cluster.length_estimates import LengthEstimates
from cluster.program_store import ProgramStore, key_of
from cluster.program_writer import ProgramWriter
from cluster.redis_store import RedisStore
from deployments.program_client import ProgramClient
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig, TransportConfig
from tempo_router.errors import ProgramError
from tempo_router.prediction import LengthHistograms, LengthSample
from tempo_router.program_book import ProgramBook
from tempo_router.program_graph import NewCall
from tempo_router.program_ops import BeginCall, CreateProgram, EndCall, FinishProgram, ProgramOp
from tests.fleet import Fleet, call, eventually

pytestmark = pytest.mark.redis

CONFIG = TempoConfig(
    engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 32, "max_model_len": 4096}),
    scheduling=SchedulingConfig(length_model="histogram", settle_s=0.1, tick_s=0.02),
    transport=TransportConfig(attach_timeout_s=2, snapshot_s=0.05, lease_s=0.3),
)


class Programs:
    """Programs of one router life, each change of which is put to its writer."""

    def __init__(self, store: RedisStore, fence: int) -> None:
        self.stored = ProgramStore(store)
        self.fence = fence
        self.book = ProgramBook(most=100, linger_s=600.0)
        self.writer = ProgramWriter(
            self.stored, lambda graph: self.stored.script_for_whole(graph, fence, time.time()), most=1000
        )
        self.told: list[str] = []

    def ask(self, op: ProgramOp, *, script: str | None = None) -> None:
        """script: text to be run in place of the right one."""
        graph, changes = self.book.apply(op, time.time())
        assert graph is not None
        for change in changes:
            text, keys, arguments = self.stored.script_for(change, self.fence, time.time())
            self.writer.put((script or text, keys, arguments), graph)
        self.writer.put(None, graph, lambda: self.told.append(f"{type(op).__name__} {graph.program_id}"))

    def create(self, program_id: str) -> None:
        self.ask(CreateProgram(program_id, "", "app", time.time() + 600))

    def begin(self, program_id: str, *, script: str | None = None) -> None:
        self.ask(BeginCall(program_id, "", NewCall("call", owner="ingress")), script=script)

    async def calls(self, program_id: str) -> list[tuple[str, str]]:
        graph = await self.stored.load(program_id)
        assert graph is not None
        return [(call.call_id, call.status) for call in graph.calls.values()]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    server = await asyncio.to_thread(start_embedded_redis, tmp_path)
    yield server
    server.stop()


@pytest.fixture
async def admin(server: EmbeddedRedis) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.from_url(server.url) as admin:
        yield admin


@pytest.fixture
async def store(server: EmbeddedRedis) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(server.url, "app")
    yield store
    await store.close()


@pytest.fixture
async def programs(store: RedisStore) -> Programs:
    return Programs(store, await store.acquire_lease("router", 30.0))


async def test_a_refused_change_is_dropped_and_those_behind_it_are_written(
    programs: Programs, store: RedisStore, admin: redis.asyncio.Redis
) -> None:
    """Whoever waits for the change is told, too: it would be refused again whoever tells it."""
    programs.create("spoilt")
    programs.create("sound")
    await programs.writer.flush()
    spoilt = store._key(key_of("spoilt"))
    await admin.delete(spoilt)
    await admin.lpush(spoilt, "no hash")
    programs.told.clear()

    programs.begin("spoilt")
    programs.begin("sound")
    with structlog.testing.capture_logs() as logs:
        await programs.writer.flush()

    assert await programs.calls("sound") == [("call", "running")]
    assert programs.told == ["BeginCall spoilt", "BeginCall sound"]
    assert (programs.writer.waiting, programs.writer.refused, programs.writer.written) == (0, 1, 3)
    [line] = logs
    assert (line["log_level"], line["event"]) == ("error", "write_refused")
    assert (line["script"], line["key"]) == ("call began", "program:spoilt")
    assert "WRONGTYPE" in line["problem"]


async def test_a_mistake_in_a_script_costs_only_what_it_was_to_write(programs: Programs) -> None:
    """The next change finds that something is missing, and all of the program is written."""
    programs.create("p")
    programs.begin("p", script="this is no Lua")
    programs.create("q")
    with structlog.testing.capture_logs() as logs:
        await programs.writer.flush()
    assert [(line["event"], line["key"]) for line in logs] == [("write_refused", "program:p")]
    assert await programs.calls("p") == []
    assert await programs.calls("q") == []

    programs.ask(EndCall("p", "call", 0, "completed", 10, 2))
    await programs.writer.flush()
    assert await programs.calls("p") == [("call", "completed")]
    assert await programs.stored.counters("p") == {"calls": 1, "done": 1, "tokens": 2}


async def test_refusals_are_told_once_and_counted_when_they_end(
    programs: Programs, store: RedisStore, admin: redis.asyncio.Redis
) -> None:
    """By script and by reason: neither hides another."""
    p, q = store._key(key_of("p")), store._key(key_of("q"))
    programs.create("p")
    programs.create("q")
    await programs.writer.flush()
    await admin.delete(p, q)
    await admin.lpush(p, "no hash")
    await admin.lpush(q, "no hash")
    with structlog.testing.capture_logs() as logs:
        for name in ("p", "q"):
            programs.begin(name)
            await programs.writer.flush()
        programs.ask(EndCall("p", "call", 0, "completed", 10, 2))
        await programs.writer.flush()
        await admin.delete(p)
        await admin.hset(p, "calls", "no number")
        programs.ask(BeginCall("p", "", NewCall("second", owner="ingress")))
        await programs.writer.flush()
        await admin.delete(p)
        programs.ask(BeginCall("p", "", NewCall("third", owner="ingress")))
        await programs.writer.flush()

    assert [(line["event"], line.get("script")) for line in logs] == [
        ("write_refused", "call began"),
        ("write_refused", "call ended"),
        ("write_refused", "call began"),
        ("writes_taken_again", "call began"),
        ("program_stored_anew", None),
    ]
    assert "WRONGTYPE" in logs[0]["problem"]
    assert "not an integer" in logs[2]["problem"]
    assert (logs[3]["log_level"], logs[3]["dropped"]) == ("warning", 3)


async def test_changes_wait_for_a_server_that_is_out_of_memory(programs: Programs, admin: redis.asyncio.Redis) -> None:
    programs.create("p")
    await programs.writer.flush()
    programs.told.clear()
    await admin.config_set("maxmemory", 1)
    programs.begin("p")
    writing = asyncio.create_task(programs.writer.run())
    try:
        await eventually(lambda: programs.writer.is_away, "it is noticed")
        assert programs.told == []

        await admin.config_set("maxmemory", 0)
        await eventually(lambda: not programs.writer.waiting, "it is written")
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    assert programs.told == ["BeginCall p"]
    assert (programs.writer.refused, await programs.calls("p")) == (0, [("call", "running")])


async def test_a_program_that_cannot_be_read_is_unknown(store: RedisStore, admin: redis.asyncio.Redis) -> None:
    """Whoever asks for it is answered at once, and the router goes on."""
    fleet = Fleet(CONFIG, store)
    await fleet.start()
    await admin.lpush(store._key(key_of("spoilt")), "no hash")
    await eventually(lambda: fleet.router.snapshot()["core"].is_settled, "what is unknown is looked up")
    programs = ProgramClient(fleet.clients[0].link.programs)
    with structlog.testing.capture_logs() as logs, pytest.raises(ProgramError, match="spoilt"):
        await programs.ask(FinishProgram("spoilt", "", "finish"))
    assert [(line["event"], line["log_level"]) for line in logs] == [("program_unreadable", "error")]
    assert fleet.router.failure() is None
    await fleet.close()


async def test_a_program_that_cannot_be_read_keeps_no_router_from_starting(
    programs: Programs, store: RedisStore, admin: redis.asyncio.Redis
) -> None:
    """Whether its key holds no hash, half of one, or what another version wrote."""
    for program_id in ("sound", "no hash", "half", "another version"):
        programs.create(program_id)
        programs.begin(program_id)
    await programs.writer.flush()
    no_hash, half, other = (store._key(key_of(one)) for one in ("no hash", "half", "another version"))
    await admin.delete(no_hash)
    await admin.lpush(no_hash, "this")
    await admin.hdel(half, "about")
    await admin.hset(other, "c:call", "0|running|[]")

    with structlog.testing.capture_logs() as logs:
        known = await programs.stored.load_live()
    assert [graph.program_id for graph in known] == ["sound"]
    assert {(line["event"], line["program_id"]) for line in logs} == {
        ("program_unreadable", one) for one in ("no hash", "half", "another version")
    }

    fleet = Fleet(CONFIG, store)
    await fleet.start()
    asking = ProgramClient(fleet.clients[0].link.programs)
    await asking.ask(FinishProgram("sound", "", "finish"))  # It is known; its call still runs.
    # It is begun anew, and what was there is replaced.
    await asking.ask(CreateProgram("half", "", "app", time.time() + 600))
    await eventually(lambda: fleet.router.programs.writer.waiting == 0, "it is written")
    await fleet.close()
    assert [graph.program_id for graph in await programs.stored.load_live()] == ["half", "sound"]


async def test_what_cannot_be_sent_costs_only_itself(programs: Programs) -> None:
    programs.create("p")
    programs.create("q")
    programs.begin("q")
    _, keys, _ = programs.stored.script_for_whole(programs.book.of_tenant("p", ""), programs.fence, time.time())
    programs.writer.put(("return 1", keys, (object(),)), programs.book.of_tenant("p", ""))
    programs.begin("p")
    with structlog.testing.capture_logs() as logs:
        await programs.writer.flush()
    [line] = logs
    assert (line["event"], line["key"]) == ("write_refused", "program:p")
    assert "cannot be sent to Redis" in line["problem"]
    assert await programs.calls("p") == await programs.calls("q") == [("call", "running")]


class Renewed(RedisStore):
    """Counts how often its lease was to be renewed."""

    renewals = 0

    async def renew(self, owner: str, fence: int, ttl_s: float) -> None:
        self.renewals += 1
        await super().renew(owner, fence, ttl_s)


async def test_serving_goes_on_when_the_lease_cannot_be_renewed(
    server: EmbeddedRedis, admin: redis.asyncio.Redis
) -> None:
    """It is said once, however often it is tried; what is stopped meanwhile stops as it always does."""
    store = await Renewed.connect(server.url, "app")
    fleet = Fleet(CONFIG, store)
    await fleet.start()
    fence = store._key("fence")
    with structlog.testing.capture_logs() as logs:
        await admin.set(fence, "no hash")
        tried = store.renewals + 4
        await eventually(lambda: store.renewals >= tried, "it is tried again")
        await admin.delete(fence)
        await eventually(lambda: any(line["event"] == "lease_renewed_again" for line in logs), "it is renewed")
        assert fleet.router.failure() is None
        await admin.set(fence, "no hash")
        await fleet.close()
        await store.close()
    told = [(line["event"], line["log_level"]) for line in logs]
    assert told.count(("lease_not_renewed", "error")) == 1
    assert told.count(("router_end_not_stored", "warning")) == 1
    assert told.count(("lease_renewed_again", "warning")) == 1
    assert ("redis_away", "warning") not in told
    assert ("redis_back", "warning") not in told


async def test_a_redis_that_could_not_write_is_said_to_be_back(store: RedisStore, admin: redis.asyncio.Redis) -> None:
    fleet = Fleet(CONFIG, store)
    await fleet.start()
    with structlog.testing.capture_logs() as logs:
        for maxmemory, event in ((1, "redis_away"), (0, "redis_back")):
            await admin.config_set("maxmemory", maxmemory)
            await eventually(lambda: any(line["event"] == event for line in logs), event)  # noqa: B023
    await fleet.close()
    told = [line["event"] for line in logs]
    assert (told.count("redis_away"), told.count("redis_back"), told.count("lease_renewed_again")) == (1, 1, 0)


async def limited_to(server: EmbeddedRedis, admin: redis.asyncio.Redis, *keys: str) -> RedisStore:
    """The store of a user who may touch nothing else."""
    await admin.acl_setuser("limited", enabled=True, nopass=True, commands=["+@all"], keys=list(keys))
    return await RedisStore.connect(server.url.replace("unix://", "unix://limited:any@"), "app")


class Answers:
    """Stands for the estimates of lengths: always has something to be stored."""

    async def save(self, store: Callable[[bytes], Awaitable[None]]) -> None:
        await store(b"answers")


async def test_a_snapshot_that_is_refused_does_not_keep_the_other_from_being_written(
    server: EmbeddedRedis, store: RedisStore, admin: redis.asyncio.Redis
) -> None:
    """It is said once, however often it is tried."""
    limited = await limited_to(server, admin, store._key("fence"), store._key(f"snapshot:{ANSWERS_SNAPSHOT}"))
    learnt = LearntLengths(limited, await store.acquire_lease("router", 30.0))

    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await learnt.save(LengthHistograms(), Answers())
    await limited.close()

    assert await store.load_snapshot(LENGTHS_SNAPSHOT) is None
    assert await store.load_snapshot(ANSWERS_SNAPSHOT) == b"answers"
    [line] = logs
    assert (line["log_level"], line["event"], line["snapshot"]) == ("error", "snapshot_refused", LENGTHS_SNAPSHOT)


async def test_answers_that_were_refused_are_written_once_they_may_be(
    server: EmbeddedRedis, store: RedisStore, admin: redis.asyncio.Redis
) -> None:
    """Without a new answer in between: what was refused is not saved."""
    limited = await limited_to(server, admin, store._key("fence"), store._key(f"snapshot:{LENGTHS_SNAPSHOT}"))
    learnt = LearntLengths(limited, await store.acquire_lease("router", 30.0))
    ended = [LengthSample(call("r"), 20, is_complete=True)]
    estimates = LengthEstimates(CONFIG.scheduling, drain=lambda: [ended.pop()] if ended else [], on_predicted=print)
    await estimates._take_answers()

    await learnt.save(LengthHistograms(), estimates)
    assert await store.load_snapshot(ANSWERS_SNAPSHOT) is None
    await admin.acl_setuser("limited", keys=["*"])
    await learnt.save(LengthHistograms(), estimates)
    estimates.close()
    await limited.close()

    later = LengthEstimates(CONFIG.scheduling, drain=list, on_predicted=print)
    await LearntLengths(store, learnt._epoch).restore_answers(later)
    assert [row.tokens for row in later.rows()] == [20]
    later.close()
