"""What outlives the processes: who owns the application, and what was learnt. The only file that imports redis.

Ownership is a fencing number that only grows. Taking it always succeeds and makes every older owner stale: Ray
keeps one router per application, and where there are two for a while (an upgrade with two clusters, a router that
was given up for dead) the newer one is right. A stale owner finds out when it renews or writes: LeaseLostError.

When Redis lost its data, the highest fence that comes back counts again; `minimum` keeps a new owner above all
that its peers have seen. Every call has a timeout and raises StoreUnavailableError when Redis is away, refuses to set
up a connection, or says that it cannot do this now; the store needs no reconnecting, a later call simply succeeds.
What would be refused every time (a mistake in a script, a key that holds something else, a command that is not
allowed, an argument that cannot be sent) raises StoreRefusedError.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import redis.asyncio as redis
import structlog
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterDownError,
    DataError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from tempo_router.errors import ConfigError, LeaseLostError, StoreRefusedError, StoreUnavailableError

log = structlog.get_logger()

# KEYS: fence, lease. ARGV: owner, ttl in ms, minimum.
_ACQUIRE = """
local fence = math.max(tonumber(redis.call('HGET', KEYS[1], 'fence') or '0'), tonumber(ARGV[3])) + 1
local text = string.format('%.0f', fence)
redis.call('HSET', KEYS[1], 'fence', text, 'owner', ARGV[1])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return fence
"""

# KEYS: fence, lease. ARGV: owner, ttl in ms, fence. Returns 0, or the newer fence.
_RENEW = """
local current = tonumber(redis.call('HGET', KEYS[1], 'fence') or '0')
local mine = tonumber(ARGV[3])
if current > mine then return current end
if current == mine and redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return current end
redis.call('HSET', KEYS[1], 'fence', ARGV[3], 'owner', ARGV[1])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return 0
"""

# KEYS: fence, lease. ARGV: owner, fence. The fence stays: it must never go down.
_RELEASE = """
if redis.call('HGET', KEYS[1], 'fence') == ARGV[2] and redis.call('GET', KEYS[2]) == ARGV[1] then
    redis.call('DEL', KEYS[2])
end
return 0
"""

# KEYS: fence, snapshot. ARGV: fence, bytes. Returns 0, or the newer fence.
_SAVE = """
local current = tonumber(redis.call('HGET', KEYS[1], 'fence') or '0')
if current > tonumber(ARGV[1]) then return current end
redis.call('SET', KEYS[2], ARGV[2])
return 0
"""

# With their subclasses these are also MASTERDOWN and MOVED; LOADING is a ConnectionError.
_NOT_NOW = (AskError, ClusterDownError, NoScriptError, OutOfMemoryError, ReadOnlyError, TryAgainError)
# Without a class of their own; and as Redis 6 tells what a script met: "Error running script (...): ...: -OOM ...".
_SAYS_NOT_NOW = re.compile(r"(^|: -)(MISCONF|BUSY|NOREPLICAS|OOM|READONLY|CLUSTERDOWN|MASTERDOWN|TRYAGAIN|MOVED|ASK) ")

_CODE = re.compile(r"(?:^|@user_script: ?\d+: -?)([A-Z]+) ")
"""Redis's own word for an error, which may be that of a command in a script."""

_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)

_LEASE = ("fence", "lease")

ScriptCall = tuple[str, Sequence[str], Sequence[Any]]
"""A script's text, the suffixes of its keys after the fence's, and its arguments."""

_WHAT_TO_DO = "start that server, or set redis_url (TEMPO_REDIS_URL) to one that runs"


@dataclass(frozen=True, slots=True)
class LeaseHolder:
    """Who owns the application. `is_alive`: its lease was renewed within its life span."""

    owner: str
    fence: int
    is_alive: bool


class _Server:
    """Which server process answers, by the id that Redis gives itself at each start."""

    def __init__(self) -> None:
        self._run_id: bytes | None = None
        self._is_silent = False
        self.on_restart: Callable[[], None] = lambda: None

    async def connected(self, connection: AbstractConnection) -> None:
        """Set up a new connection and look who is there. Raises redis-py's ConnectionError where that is refused, too.

        Whatever is asked over it waits then, as it does while no server answers: nothing of it was refused.
        """
        try:
            await connection.on_connect()
        except ResponseError as error:
            reason = f"it refuses to set up a connection ({_said(error)}): look at user and database of redis_url"
            raise redis.ConnectionError(reason) from error
        await connection.send_command("INFO", "server", check_health=False)
        try:
            found = _RUN_ID.search(await connection.read_response())
        except ResponseError as error:
            if not self._is_silent:
                effect = "what a Redis that is restarted has lost is not written again"
                log.warning("redis_does_not_say_who_it_is", problem=str(error), effect=effect)
            self._is_silent = True
            return
        run_id = found[1] if found is not None else None
        is_other = self._run_id is not None and run_id != self._run_id
        self._run_id = run_id
        if is_other:
            self.on_restart()


class RedisStore:
    """One application's part of a Redis server: all keys start with `tempo:{name}:`.

    Every call may raise StoreUnavailableError; all but `run` and `reconnect` may raise StoreRefusedError.
    """

    def __init__(self, client: redis.Redis, server: _Server, name: str, address: str, timeout_s: float) -> None:
        # The braces are a Redis Cluster hash tag: all keys of one application live on one node, as Lua needs.
        self._prefix = f"tempo:{{{name}}}:"
        self._redis = client
        self._server = server
        self._address = address
        self._timeout_s = timeout_s
        self._shas: dict[str, str] = {}
        self._acquire = client.register_script(_ACQUIRE)
        self._renew = client.register_script(_RENEW)
        self._release = client.register_script(_RELEASE)
        self._save = client.register_script(_SAVE)

    @classmethod
    async def connect(cls, url: str, name: str, *, timeout_s: float = 2.0) -> Self:
        """Open the part of application `name`; the server must answer now.

        url: redis://, rediss:// or unix://. timeout_s: limit of every later call too. Raises ConfigError for a
        URL that is none, StoreUnavailableError when no server answers or it does not let us in, StoreRefusedError when
        it does not let this user PING.
        """
        address = redacted(url)
        server = _Server()
        try:
            client = redis.from_url(
                url,
                redis_connect_func=server.connected,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # Once more, at once: a pooled connection may be dead after the server's restart.
                retry=Retry(NoBackoff(), 1),
            )
        except (ValueError, RedisError) as e:
            raise ConfigError(
                f"redis_url {address!r} is not a Redis URL: write redis://host:port/db or unix:///path"
            ) from e
        store = cls(client, server, name, address, timeout_s)
        try:
            async with store._translated_errors("PING"):
                await client.ping()
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        await self._redis.aclose()

    @property
    def on_restart(self) -> Callable[[], None]:
        """Called when another server process answers than before: it may have lost what was acknowledged last.

        A Redis that syncs its log each second loses two seconds of writes when it is killed; one that only takes
        snapshots loses more, and a replica that takes over may be behind. Noticed with the next new connection; called
        while a command is under way, so it must not wait for one. Then `reconnect`, or what is idle stays with the
        other server.
        """
        return self._server.on_restart

    @on_restart.setter
    def on_restart(self, callback: Callable[[], None]) -> None:
        self._server.on_restart = callback

    async def reconnect(self) -> None:
        """Close the connections that are idle: each command that follows goes to whoever answers at the address now."""
        async with self._translated_errors("to reconnect"):
            await self._redis.connection_pool.disconnect(inuse_connections=False)

    async def acquire_lease(self, owner: str, ttl_s: float, minimum: int = 0) -> int:
        """Become the owner and return the new fencing number: above every earlier one, and above `minimum`."""
        async with self._translated_errors("acquire_lease", *_LEASE):
            return int(await self._acquire(self._lease_keys(), [owner, _milliseconds(ttl_s), minimum]))

    async def renew(self, owner: str, fence: int, ttl_s: float) -> None:
        """Say that this owner lives. Raises LeaseLostError when a newer owner exists."""
        async with self._translated_errors("renew", *_LEASE):
            newer = int(await self._renew(self._lease_keys(), [owner, _milliseconds(ttl_s), fence]))
        self._refuse_stale(fence, newer)

    async def release(self, owner: str, fence: int) -> None:
        """Say that this owner has gone. Without effect when it is not the owner any more."""
        async with self._translated_errors("release", *_LEASE):
            await self._release(self._lease_keys(), [owner, fence])

    async def lease_holder(self) -> LeaseHolder | None:
        """The last owner, or None when there never was one."""
        async with self._translated_errors("lease_holder", *_LEASE), self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(self._key("fence"), ["owner", "fence"])
            pipe.exists(self._key("lease"))
            (owner, fence), alive = await pipe.execute()
        if owner is None:
            return None
        return LeaseHolder(owner=owner.decode(), fence=int(fence), is_alive=bool(alive))

    async def save_snapshot(self, name: str, content: bytes, fence: int) -> None:
        """Keep `content` under `name`. Raises LeaseLostError, and keeps what is there, when a newer owner exists."""
        keys = ("fence", f"snapshot:{name}")
        async with self._translated_errors("save_snapshot", *keys):
            newer = int(await self._save(list(map(self._key, keys)), [fence, content]))
        self._refuse_stale(fence, newer)

    async def load_snapshot(self, name: str) -> bytes | None:
        """What was last saved under `name`, whoever the owner was."""
        async with self._translated_errors("GET", f"snapshot:{name}"):
            content = await self._redis.get(self._key(f"snapshot:{name}"))
        assert content is None or isinstance(content, bytes)
        return content

    # ---- for what keeps more than a snapshot (program_store.py) ----

    async def run(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Run scripts in one round trip. Their answers, in order.

        Every script is atomic by itself; the first key of each is the fence's. Scripts must bear being run twice: a
        server that lost them is given them again, and then all of these calls. In place of the answer of a script that
        Redis refuses, or that cannot be sent, there is a StoreRefusedError; the others have been run.
        """
        try:
            return await self._run_together(calls)
        except StoreRefusedError as error:
            # One of them cannot be sent, and so none was.
            if len(calls) == 1:
                return [error]
            return [answer for call in calls for answer in await self.run([call])]

    async def _run_together(self, calls: Sequence[ScriptCall]) -> list[Any]:
        async with self._translated_errors("scripts"):
            answers = await self._run(calls)
            if any(isinstance(answer, NoScriptError) for answer in answers):
                faulty = await self._load([text for text, _, _ in calls])
                answers = [
                    faulty.get(call[0], answer) for call, answer in zip(calls, await self._run(calls), strict=True)
                ]
        for number, answer in enumerate(answers):
            if isinstance(answer, ResponseError):
                answers[number] = self._translated(answer, "a script", "fence", *calls[number][1])
        unavailable = next((answer for answer in answers if isinstance(answer, StoreUnavailableError)), None)
        if unavailable is not None:
            raise unavailable
        return answers

    async def _load(self, texts: Sequence[str]) -> dict[str, ResponseError]:
        """Give the server these scripts. Those that it does not take, with what it says."""
        faulty = {}
        for text in dict.fromkeys(texts):
            try:
                await self._redis.script_load(text)
            except ResponseError as error:
                faulty[text] = error
        return faulty

    async def _run(self, calls: Sequence[ScriptCall]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for text, suffixes, arguments in calls:
                keys = [self._key("fence"), *map(self._key, suffixes)]
                pipe.evalsha(self._sha(text), len(keys), *keys, *arguments)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
            return answers

    async def hashes(self, suffixes: Sequence[str]) -> list[dict[bytes, bytes] | StoreRefusedError]:
        """The hashes under these keys, in one round trip; empty for those that do not exist.

        In place of what is there and is no hash there is a StoreRefusedError.
        """
        async with self._translated_errors("HGETALL", *suffixes), self._redis.pipeline(transaction=False) as pipe:
            for suffix in suffixes:
                pipe.hgetall(self._key(suffix))
            found: list[Any] = await pipe.execute(raise_on_error=False)
        for number, (suffix, one) in enumerate(zip(suffixes, found, strict=True)):
            if isinstance(one, ResponseError):
                found[number] = error = self._translated(one, "HGETALL", suffix)
                if not isinstance(error, StoreRefusedError) or error.code != "WRONGTYPE":
                    raise error
        return found

    async def members(self, suffix: str) -> set[bytes]:
        """Members of a set."""
        async with self._translated_errors("SMEMBERS", suffix):
            found = await self._redis.smembers(self._key(suffix))
        return {one for one in found if isinstance(one, bytes)}

    async def ranked(self, suffix: str) -> list[bytes]:
        """Members of a sorted set, the lowest first."""
        async with self._translated_errors("ZRANGE", suffix):
            found = await self._redis.zrange(self._key(suffix), 0, -1)
        return [one for one in found if isinstance(one, bytes)]

    async def newest(self, suffix: str, most: int) -> list[bytes]:
        """The first so many entries of a list."""
        async with self._translated_errors("LRANGE", suffix):
            found = await self._redis.lrange(self._key(suffix), 0, most - 1)
        return [one for one in found if isinstance(one, bytes)]

    def _sha(self, text: str) -> str:
        known = self._shas.get(text)
        if known is None:
            # Redis names scripts by this hash; nothing is kept secret with it.
            known = self._shas[text] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        return known

    def _key(self, suffix: str) -> str:
        return self._prefix + suffix

    def _lease_keys(self) -> list[str]:
        return list(map(self._key, _LEASE))

    def _refuse_stale(self, fence: int, newer: int) -> None:
        if newer:
            raise LeaseLostError(f"fence {fence} is stale: another owner of {self._prefix!r} holds {newer}")

    def _translated(self, error: Exception, command: str, *suffixes: str) -> StoreUnavailableError | StoreRefusedError:
        """What an error of redis-py means to callers. command: what was asked, of which keys, for the message."""
        keys = ", ".join(map(self._key, suffixes))
        asked = f"{command} of {keys}" if keys else command
        if isinstance(error, ResponseError) and not (isinstance(error, _NOT_NOW) or _SAYS_NOT_NOW.search(str(error))):
            said = _said(error)
            code = _CODE.search(said)
            look_at = (
                "what these keys hold, or at what this Redis user may do" if keys else "what this Redis user may do"
            )
            return StoreRefusedError(
                f"Redis at {self._address} refuses {asked}: {said}; look at {look_at}", code[1] if code else ""
            )
        if isinstance(error, DataError):
            return StoreRefusedError(f"{asked} cannot be sent to Redis: {error}; this is a defect of Tempo")
        reason = _said(error) or f"no answer within {self._timeout_s:g} s"
        return StoreUnavailableError(f"Redis at {self._address} cannot be used: {reason}; {_WHAT_TO_DO}")

    @asynccontextmanager
    async def _translated_errors(self, command: str, *suffixes: str) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        # redis-py limits each read and write; the limit around the whole call also covers its retry and resolving.
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                yield
        except (RedisError, OSError, TimeoutError) as e:
            if task.cancelling() > cancels:
                raise asyncio.CancelledError from e
            raise self._translated(e, command, *suffixes) from e
        # Before Python 3.12 a cancellation is lost when it meets the answer in asyncio.wait_for, which redis-py uses;
        # a background task would then outlive its owner's stop, which waits for it.
        if task.cancelling() > cancels:
            raise asyncio.CancelledError


def redacted(url: str) -> str:
    """The URL without user, password and options, for logs and messages."""
    return re.sub(r"//.*@", "//***@", url.partition("?")[0])


def _said(error: Exception) -> str:
    """All that Redis said: redis-py keeps the code of the errors that it knows apart from the text."""
    code = getattr(error, "status_code", None) or ""
    return f"{code} {error}".strip() if code != "ERR" else str(error)


def _milliseconds(duration_s: float) -> int:
    return max(1, round(duration_s * 1000))
