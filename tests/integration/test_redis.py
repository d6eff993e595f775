"""The store: leases, snapshots, scripts, and what it says of a Redis that is away or refuses. A real Redis."""

import asyncio
import itertools
import re
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import redis.asyncio
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cluster.embedded_redis import EmbeddedRedis, _executable, start_embedded_redis
from cluster.redis_store import LeaseHolder, RedisStore, redacted
from tempo_router.errors import ConfigError, LeaseLostError, StoreRefusedError, StoreUnavailableError
from tests.fleet import eventually

pytestmark = pytest.mark.redis

TTL_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """One server for all tests that do not end it; each test is an application of its own."""
    server = start_embedded_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
async def store(server: EmbeddedRedis) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(server.url, f"app-{uuid4().hex}")
    yield store
    await store.close()


# --- the lease


async def test_a_new_owner_takes_over_at_once_and_the_old_one_hears_it(store: RedisStore) -> None:
    first = await store.acquire_lease("router-1", TTL_S)
    await store.renew("router-1", first, TTL_S)

    second = await store.acquire_lease("router-2", TTL_S)

    assert second > first
    with pytest.raises(LeaseLostError, match=f"fence {first} is stale.*holds {second}"):
        await store.renew("router-1", first, TTL_S)
    await store.renew("router-2", second, TTL_S)


async def test_a_new_fence_is_above_what_the_peers_have_seen(store: RedisStore) -> None:
    """Redis may have lost its data; the ingresses and workers remember the last epoch."""
    assert await store.acquire_lease("router", TTL_S, minimum=41) == 42
    assert await store.acquire_lease("router", TTL_S, minimum=7) == 43


async def test_the_lease_of_an_owner_that_died_ends_by_itself(store: RedisStore) -> None:
    assert await store.lease_holder() is None
    fence = await store.acquire_lease("router", ttl_s=0.05)

    holder = await store.lease_holder()
    async with asyncio.timeout(5):
        while holder is None or holder.is_alive:
            holder = await store.lease_holder()

    assert holder == LeaseHolder("router", fence, is_alive=False)
    await store.renew("router", fence, TTL_S)
    assert await store.lease_holder() == LeaseHolder("router", fence, is_alive=True)


async def test_release_ends_only_the_own_lease(store: RedisStore) -> None:
    first = await store.acquire_lease("router-1", TTL_S)
    second = await store.acquire_lease("router-2", TTL_S)

    await store.release("router-1", first)
    assert await store.lease_holder() == LeaseHolder("router-2", second, is_alive=True)
    await store.release("router-2", second)
    assert await store.lease_holder() == LeaseHolder("router-2", second, is_alive=False)
    assert await store.acquire_lease("router-3", TTL_S) == second + 1


async def test_two_owners_with_one_number_are_told_apart(server: EmbeddedRedis, store: RedisStore) -> None:
    """After Redis lost its data two routers can have counted to the same fence; who is recorded is right."""
    fence = await store.acquire_lease("router-2", TTL_S)
    with pytest.raises(LeaseLostError):
        await store.renew("router-1", fence, TTL_S)


async def test_applications_do_not_see_each_other(server: EmbeddedRedis, store: RedisStore) -> None:
    other = await RedisStore.connect(server.url, f"app-{uuid4().hex}")
    fence = await store.acquire_lease("router", TTL_S, minimum=100)
    await store.save_snapshot("lengths", b"mine", fence)

    assert await other.acquire_lease("router", TTL_S) == 1
    assert await other.load_snapshot("lengths") is None
    await other.close()


# --- snapshots


async def test_a_snapshot_is_read_back_byte_for_byte(store: RedisStore) -> None:
    fence = await store.acquire_lease("router", TTL_S)
    content = bytes(range(256)) * 4096

    assert await store.load_snapshot("lengths") is None
    await store.save_snapshot("lengths", content, fence)
    assert await store.load_snapshot("lengths") == content
    assert await store.load_snapshot("other") is None


async def test_a_stale_owner_cannot_write(store: RedisStore) -> None:
    old = await store.acquire_lease("router-1", TTL_S)
    new = await store.acquire_lease("router-2", TTL_S)
    await store.save_snapshot("lengths", b"new", new)

    with pytest.raises(LeaseLostError):
        await store.save_snapshot("lengths", b"old", old)
    assert await store.load_snapshot("lengths") == b"new"


class TwoOwners(RuleBasedStateMachine):
    """Two routers of one application that acquire, renew, save and release in any order."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        name = f"app-{uuid4().hex}"
        self.stores = [self.run(RedisStore.connect(url, name)) for _ in range(2)]
        self.fences: list[int | None] = [None, None]
        self.highest = 0
        self.saved: bytes | None = None
        self.writes = 0

    def run(self, call):
        return self.runner.run(call)

    def is_stale(self, owner: int) -> bool:
        return self.fences[owner] != self.highest

    def teardown(self) -> None:
        for store in self.stores:
            self.run(store.close())
        self.runner.close()

    @rule(owner=st.integers(0, 1), minimum=st.integers(0, 10))
    def acquire(self, owner: int, minimum: int) -> None:
        fence = self.run(self.stores[owner].acquire_lease(f"router-{owner}", TTL_S, minimum))
        assert fence > max(self.highest, minimum), "a fence must be above every earlier one"
        self.fences[owner] = self.highest = fence

    @precondition(lambda self: any(self.fences))
    @rule(owner=st.integers(0, 1))
    def renew(self, owner: int) -> None:
        fence = self.fences[owner]
        if fence is None:
            return
        call = self.stores[owner].renew(f"router-{owner}", fence, TTL_S)
        if self.is_stale(owner):
            with pytest.raises(LeaseLostError):
                self.run(call)
        else:
            self.run(call)

    @precondition(lambda self: any(self.fences))
    @rule(owner=st.integers(0, 1))
    def save(self, owner: int) -> None:
        fence = self.fences[owner]
        if fence is None:
            return
        self.writes += 1
        content = f"{owner}:{self.writes}".encode()
        call = self.stores[owner].save_snapshot("lengths", content, fence)
        if self.is_stale(owner):
            with pytest.raises(LeaseLostError):
                self.run(call)
        else:
            self.run(call)
            self.saved = content

    @precondition(lambda self: any(self.fences))
    @rule(owner=st.integers(0, 1))
    def release(self, owner: int) -> None:
        fence = self.fences[owner]
        if fence is not None:
            self.run(self.stores[owner].release(f"router-{owner}", fence))

    @invariant()
    def the_newest_owners_last_write_stands(self) -> None:
        assert self.run(self.stores[0].load_snapshot("lengths")) == self.saved


def test_no_history_of_two_owners_lets_a_stale_one_write(server: EmbeddedRedis) -> None:
    run_state_machine_as_test(
        lambda: TwoOwners(server.url),
        settings=settings(
            max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


# --- when Redis is away


async def test_a_store_works_again_when_its_server_returns(own_server: EmbeddedRedis, tmp_path: Path) -> None:
    store = await RedisStore.connect(own_server.url, "tempo")
    fence = await store.acquire_lease("router", TTL_S)
    await store.save_snapshot("lengths", b"learnt", fence)

    own_server.stop()
    with pytest.raises(StoreUnavailableError, match="redis_url"):
        await store.renew("router", fence, TTL_S)
    with pytest.raises(StoreUnavailableError):
        await store.save_snapshot("lengths", b"lost", fence)

    again = start_embedded_redis(tmp_path)
    try:
        await store.renew("router", fence, TTL_S)
        assert await store.load_snapshot("lengths") == b"learnt"
        await store.save_snapshot("lengths", b"newer", fence)
        assert await store.acquire_lease("router", TTL_S) == fence + 1
    finally:
        await store.close()
        again.stop()


async def test_a_call_can_be_cancelled_at_any_moment(store: RedisStore) -> None:
    """A background task that missed its cancellation would keep its owner from stopping."""
    fence = await store.acquire_lease("a", TTL_S)
    for moments in itertools.count():
        renewal = asyncio.create_task(store.renew("a", fence, TTL_S))
        for _ in range(moments):
            await asyncio.sleep(0)
        if not renewal.cancel():
            break
        with pytest.raises(asyncio.CancelledError):
            await renewal
    await renewal
    assert moments > 1


async def test_a_server_that_hangs_is_given_up_after_the_timeout(own_server: EmbeddedRedis) -> None:
    store = await RedisStore.connect(own_server.url, "tempo", timeout_s=0.2)
    process = psutil.Process(own_server.pid)
    process.suspend()
    try:
        started_s = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await store.acquire_lease("router", TTL_S)
        assert time.monotonic() - started_s < 2.0
    finally:
        process.resume()
    assert await store.acquire_lease("router", TTL_S) > 0
    await store.close()


async def test_data_that_redis_lost_is_written_again(own_server: EmbeddedRedis) -> None:
    """Someone flushed the server: the owner goes on with its own fence, it does not stop."""
    store = await RedisStore.connect(own_server.url, "tempo")
    await store.acquire_lease("router-0", TTL_S, minimum=4)
    fence = await store.acquire_lease("router-1", TTL_S)
    await store._redis.flushall()

    await store.save_snapshot("lengths", b"again", fence)
    await store.renew("router-1", fence, TTL_S)

    assert await store.load_snapshot("lengths") == b"again"
    assert await store.acquire_lease("router-2", TTL_S) == fence + 1
    await store.close()


async def test_another_server_process_is_noticed_once(own_server: EmbeddedRedis, tmp_path: Path) -> None:
    store = await RedisStore.connect(own_server.url, "app")
    restarts: list[bool] = []
    store.on_restart = lambda: restarts.append(True)
    await asyncio.gather(*(store.lease_holder() for _ in range(5)))
    assert not restarts, "more connections to one server are none"

    own_server.stop()
    with pytest.raises(StoreUnavailableError):
        await store.lease_holder()
    assert not restarts
    second = await asyncio.to_thread(start_embedded_redis, tmp_path)
    try:
        await asyncio.gather(*(store.lease_holder() for _ in range(5)))
        assert restarts == [True]
    finally:
        await store.close()
        second.stop()


async def test_a_server_that_does_not_say_who_it_is_serves_all_the_same(own_server: EmbeddedRedis) -> None:
    """It is said once that nobody will notice a restart."""
    async with redis.asyncio.from_url(own_server.url) as admin:
        await admin.acl_setuser("limited", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-info"])
        with structlog.testing.capture_logs() as logs:
            store = await RedisStore.connect(own_server.url.replace("unix://", "unix://limited:any@"), "app")
            restarts: list[bool] = []
            store.on_restart = lambda: restarts.append(True)
            await admin.execute_command("CLIENT", "KILL", "USER", "limited")
            assert await store.lease_holder() is None
            await store.close()
    assert not restarts
    assert [line["event"] for line in logs] == ["redis_does_not_say_who_it_is"]


async def test_idle_connections_are_made_anew(store: RedisStore, server: EmbeddedRedis) -> None:
    """They may lead to a server that nobody else talks to any more."""
    async with redis.asyncio.from_url(server.url) as admin:
        before = {client["id"] for client in await admin.client_list()}
        await store.reconnect()
        assert await store.lease_holder() is None
        after = {client["id"] for client in await admin.client_list()}
    assert len(before - after) == 1


async def test_nobody_at_the_address_is_said_without_the_password() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        port = unused.getsockname()[1]
        with pytest.raises(StoreUnavailableError) as error:
            await RedisStore.connect(f"redis://me:s3cret@127.0.0.1:{port}/3", "tempo")
    assert f"redis://***@127.0.0.1:{port}/3" in str(error.value)
    assert "TEMPO_REDIS_URL" in str(error.value)
    assert "s3cret" not in str(error.value)


async def test_a_wrong_password_is_an_unavailable_store(tmp_path: Path, server: EmbeddedRedis) -> None:
    with pytest.raises(StoreUnavailableError) as error:
        await RedisStore.connect(server.url.replace("unix://", "unix://me:s3cret@"), "tempo")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["localhost:6379", "http://localhost", "redis://host:port/0", "redis://h/0?socket_timeout=x"]
)
async def test_what_is_no_redis_url_is_a_mistake_in_the_configuration(url: str) -> None:
    with pytest.raises(ConfigError, match="redis://host:port/db"):
        await RedisStore.connect(url, "tempo")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:p@h:1/0", "redis://***@h:1/0"),
        ("rediss://u:p@x@h:1/0", "rediss://***@h:1/0"),
        ("redis://h:1/0?password=p", "redis://h:1/0"),
        ("unix://u:p@/run/redis.sock?db=1", "unix://***@/run/redis.sock"),
    ],
)
def test_logs_show_an_address_without_secrets(url: str, shown: str) -> None:
    assert redacted(url) == shown


# --- what Redis answers that it will not do


NOT_NOW = {
    "OOM": [("CONFIG", "SET", "maxmemory", "1")],
    "READONLY": [("REPLICAOF", "127.0.0.1", "1")],
    "MASTERDOWN": [("CONFIG", "SET", "replica-serve-stale-data", "no"), ("REPLICAOF", "127.0.0.1", "1")],
    "NOREPLICAS": [("CONFIG", "SET", "min-replicas-to-write", "1")],
}
"""What makes a server answer so until it is told otherwise."""

KEEP = "redis.call('SET', KEYS[2], ARGV[1]) return redis.call('GET', KEYS[2])"


@pytest.mark.parametrize("answer", NOT_NOW)
async def test_a_server_that_cannot_write_now_is_an_unavailable_store(own_server: EmbeddedRedis, answer: str) -> None:
    """Redis 6 tells what a script met in the text of another error."""
    store = await RedisStore.connect(own_server.url, "tempo")
    fence = await store.acquire_lease("router", TTL_S)
    async with redis.asyncio.from_url(own_server.url) as admin:
        for command in NOT_NOW[answer]:
            await admin.execute_command(*command)

    with pytest.raises(StoreUnavailableError):
        await store.renew("router", fence, TTL_S)
    with pytest.raises(StoreUnavailableError):
        await store.run([(KEEP, ("kept",), ("x",))])
    await store.close()


async def test_a_server_that_is_busy_with_a_script_is_an_unavailable_store(own_server: EmbeddedRedis) -> None:
    store = await RedisStore.connect(own_server.url, "tempo")
    async with redis.asyncio.from_url(own_server.url) as admin:
        await admin.config_set("lua-time-limit", 1)
        endless = asyncio.create_task(admin.eval("while true do end", 0))
        async with asyncio.timeout(10):
            problem = ""
            while "BUSY" not in problem:
                try:
                    await store.load_snapshot("lengths")
                except StoreUnavailableError as error:
                    problem = str(error)
        await admin.script_kill()
        with pytest.raises(redis.exceptions.ResponseError):
            await endless
    assert await store.load_snapshot("lengths") is None
    await store.close()


@pytest.mark.parametrize(
    "answer",
    [
        "MISCONF Errors writing to the AOF file",
        "CLUSTERDOWN The cluster is down",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "MOVED 7 host:6379",
    ],
)
async def test_answers_that_only_hold_for_now_are_known(store: RedisStore, answer: str) -> None:
    """Those that are hard to have of a real server; by themselves, or told by a script."""
    for script in (f"return redis.error_reply('{answer}')", f"error('-{answer}')"):
        with pytest.raises(StoreUnavailableError, match=re.escape(answer)):
            await store.run([(script, (), ())])


async def test_what_redis_refuses_for_good_is_no_outage(store: RedisStore) -> None:
    fence = await store.acquire_lease("router", TTL_S)
    await store._redis.set(store._key("fence"), "no hash")
    prefix, fence_key = re.escape(store._prefix), re.escape(store._key("fence"))

    with pytest.raises(
        StoreRefusedError, match=rf"renew of {fence_key}, {prefix}lease: .*WRONGTYPE.*look at what these keys hold"
    ):
        await store.renew("router", fence, TTL_S)
    with pytest.raises(
        StoreRefusedError, match=rf"save_snapshot of {fence_key}, {prefix}snapshot:lengths: .*WRONGTYPE"
    ):
        await store.save_snapshot("lengths", b"learnt", fence)
    nothing, refused = await store.hashes(["count", "fence"])
    assert nothing == {}
    assert isinstance(refused, StoreRefusedError)
    assert re.search(rf"HGETALL of {fence_key}: WRONGTYPE", str(refused))
    with pytest.raises(StoreRefusedError, match=rf"LRANGE of {fence_key}: WRONGTYPE"):
        await store.newest("fence", 10)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("return redis.call('LPUSH', KEYS[2], 1)", "WRONGTYPE"),
        ("return redis.call('NOSUCH', KEYS[2])", "Unknown Redis command"),
        ("return nil + 1", "arithmetic on a nil value"),
        ("retur 1", "compiling script"),
    ],
)
async def test_a_script_that_redis_refuses_keeps_no_other_from_running(
    store: RedisStore, script: str, problem: str
) -> None:
    """Whether Redis knows the others already or not."""
    for _ in range(2):
        first, refused, last = await store.run(
            [(KEEP, ("k",), ("first",)), (script, ("k",), ()), (KEEP, ("k",), ("last",))]
        )
        assert (first, last) == (b"first", b"last")
        assert isinstance(refused, StoreRefusedError)
        keys = re.escape(f"{store._key('fence')}, {store._key('k')}")
        assert re.search(f"refuses a script of {keys}: .*{problem}", str(refused))
        assert refused.code == ("WRONGTYPE" if problem == "WRONGTYPE" else "")


async def limit(admin: redis.asyncio.Redis, *commands: str) -> None:
    """Make a user, or change one, who may do all but these commands."""
    await admin.acl_setuser(
        "limited", enabled=True, nopass=True, commands=["+@all", *(f"-{one}" for one in commands)], keys=["*"]
    )


def answers_at(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """host:port of a server that will answer soon.

    Not a socket file: over one, redis-py itself has other errors for setting up a connection.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [str(_executable()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        yield f"127.0.0.1:{port}"
        process.terminate()


async def test_a_connection_that_may_not_be_set_up_is_an_unavailable_store(address: str) -> None:
    """Nothing of what waits for it was refused: it is written once the connection may be set up."""
    await eventually(lambda: answers_at(address), "the server answers")
    async with redis.asyncio.from_url(f"redis://{address}") as admin:
        await limit(admin)
        url = f"redis://limited:any@{address}/0?client_name=tempo"
        store = await RedisStore.connect(url, "tempo")
        await limit(admin, "client")
        await store.reconnect()
        problem = r"refuses to set up a connection \(NOPERM .*'client.*look at user and database of redis_url"
        with pytest.raises(StoreUnavailableError, match=problem):
            await store.run([(KEEP, ("kept",), ("x",))])
        with pytest.raises(StoreUnavailableError, match=problem):
            await RedisStore.connect(url, "tempo")
        with pytest.raises(StoreUnavailableError, match="DB index is out of range"):
            await RedisStore.connect(f"redis://{address}/100", "tempo")

        await limit(admin)
        assert await store.run([(KEEP, ("kept",), ("x",))]) == [b"x"]
        await store.close()


async def test_a_user_who_may_not_ping_is_refused_at_once(own_server: EmbeddedRedis) -> None:
    async with redis.asyncio.from_url(own_server.url) as admin:
        await limit(admin, "ping")
        with pytest.raises(StoreRefusedError, match=r"refuses PING: NOPERM .*; look at what this Redis user may do"):
            await RedisStore.connect(own_server.url.replace("unix://", "unix://limited:any@"), "tempo")
