"""The router as a named, detached Ray actor, and how others find it.

Ray restarts the actor whenever its process ends; everyone finds it by name and asks for its address. It stops itself
when nobody has been connected for a while, because deleting a Serve application does not delete a detached actor.
"""

import asyncio
import os
import time
import uuid
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from cluster.embedded_redis import EmbeddedRedis, start_embedded_redis
from cluster.redis_store import RedisStore
from cluster.router_server import RouterServer
from deployments.logs import configure_logging
from tempo_router.config import TempoConfig
from tempo_router.errors import RouterUnavailableError, StoreUnavailableError

log = structlog.get_logger()

NAMESPACE = "tempo"
SCHEMA_VERSION = 1
"""Part of the actor's name: routers of two message schemas never answer for each other."""
IDLE_EXIT_S = 60.0
UNUSED_EXIT_S = 1800.0
"""As long waits a router that nobody has reached yet: workers load their weights before they come."""
WATCH_S = 0.5
ADDRESS_TIMEOUT_S = 10.0
FIRST_CONTACT_S = 60.0
"""A router's process imports for 20 s on a busy machine, and what waits for it here would end and begin again."""


def actor_name(app_name: str) -> str:
    """Name of the router actor of an application, in namespace NAMESPACE."""
    return f"{app_name}-router-v{SCHEMA_VERSION}"


class RouterActor:
    """Runs one RouterServer at a time. A changed configuration replaces it, as a restart would."""

    def __init__(self, config_json: str) -> None:
        configure_logging()
        self._config = TempoConfig.model_validate_json(config_json)
        self._owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._redis: EmbeddedRedis | None = None
        self._store: RedisStore | None = None
        self._server: RouterServer | None = None
        self._starting = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    async def address(self) -> str:
        """host:port of the control streams; starts the server on the first call.

        Raises StoreUnavailableError, StoreRefusedError.
        """
        async with self._starting:
            if self._server is None:
                await self._start()
            assert self._server is not None
            return self._server.address

    async def adopt(self, config_json: str) -> str:
        """Use this configuration from now on; a replica that starts calls it. Returns the address."""
        config = TempoConfig.model_validate_json(config_json)
        async with self._starting:
            if self._server is not None and config != self._config:
                log.info("router_reconfigured", app=config.name)
                await self._server.stop()
                self._server = None
            self._config = config
        return await self.address()

    async def snapshot(self) -> dict[str, Any]:
        """Counts for status pages and tests; `pid` is this process."""
        await self.address()
        assert self._server is not None
        return {"pid": os.getpid(), **self._server.snapshot()}

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests; wait until all open ones have ended. Returns whether they have, in time."""
        return self._server is None or await self._server.drain(timeout_s)

    async def stop(self) -> None:
        """Close the streams, store what was learnt, end the embedded Redis."""
        # The watch itself calls this when nobody needs a router: cancelled, it would stop halfway.
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            self._watcher.cancel()
        if self._server is not None:
            await self._server.stop()
        if self._store is not None:
            await self._store.close()
        if self._redis is not None:
            self._redis.stop()

    async def _start(self) -> None:
        if self._store is None:
            self._store = await RedisStore.connect(await self._redis_url(), self._config.name)
        server = RouterServer(self._config, self._store, owner=self._owner, host=own_address(self._config))
        await server.start()
        self._server = server
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch(), name="router watch")

    async def _redis_url(self) -> str:
        """The shared Redis, or our own."""
        if self._config.redis_url is not None:
            return self._config.redis_url
        self._redis = await asyncio.to_thread(start_embedded_redis, Path(self._config.data_dir))
        return self._redis.url

    async def _keep_redis(self) -> None:
        """An embedded server that we only attached to ends with its owner, a router before us: then start our own."""
        if self._redis is None or self._redis.owned:
            return
        try:
            self._redis = await asyncio.to_thread(start_embedded_redis, Path(self._config.data_dir))
        except StoreUnavailableError as error:
            log.warning("embedded_redis_not_restarted", problem=str(error))

    async def _watch(self) -> None:
        """End the process when a background task died (Ray starts a new one), or when nobody needs a router."""
        idle_s, had_peers = 0.0, False
        while True:
            await asyncio.sleep(WATCH_S)
            if self._server is None:
                continue
            await self._keep_redis()
            failure = self._server.failure()
            if failure is not None:
                log.error("router_failed", problem=str(failure), effect="the process ends and Ray starts a new router")
                os._exit(1)
            has_peers = self._server.has_peers
            had_peers = had_peers or has_peers
            idle_s = 0.0 if has_peers else idle_s + WATCH_S
            if idle_s >= (IDLE_EXIT_S if had_peers else UNUSED_EXIT_S):
                log.info("router_idle", idle_s=idle_s, effect="the actor ends")
                await self.stop()
                await self._end_actor()

    async def _end_actor(self) -> None:
        await asyncio.to_thread(ray.kill, ray.get_runtime_context().current_actor, no_restart=True)


def own_address(config: TempoConfig) -> str:
    """Where the other processes reach this one: what is configured, else this node's address in its Ray cluster."""
    return config.transport.host or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class RouterFinder:
    """Finds an application's router, and creates it if there is none. One per process."""

    def __init__(self, config: TempoConfig) -> None:
        self._config_json = config.model_dump_json(by_alias=True)
        self._name = actor_name(config.name)
        self._handle: Any = None
        self._has_adopted = False

    async def locate(self) -> str:
        """host:port of the router. Raises RouterUnavailableError; the text of the store's error is inside it."""
        try:
            async with asyncio.timeout(ADDRESS_TIMEOUT_S):
                if self._handle is None:
                    # Creating or looking up an actor blocks, and would hold back every token meanwhile.
                    self._handle = await asyncio.to_thread(self._get_or_create)
                if self._has_adopted:
                    return str(await self._handle.address.remote())
                address = str(await self._handle.adopt.remote(self._config_json))
                self._has_adopted = True
                return address
        except RayError as error:
            self._handle = None
            raise RouterUnavailableError(f"router {self._name!r} does not answer: {_first_line(error)}") from error
        except TimeoutError as error:
            raise RouterUnavailableError(f"router {self._name!r} gave no address in {ADDRESS_TIMEOUT_S} s") from error

    async def first_contact(self) -> None:
        """Make sure that there is a router before anything is built on it. Raises RouterUnavailableError, why it ended.

        A constructor that raises shows its reason in `serve status`; one that waits shows nothing.
        """
        give_up_s = time.monotonic() + FIRST_CONTACT_S
        while True:
            try:
                await self.locate()
            except RouterUnavailableError:
                if time.monotonic() > give_up_s:
                    raise
                await asyncio.sleep(WATCH_S)
            else:
                return

    async def snapshot(self) -> dict[str, Any]:
        """The router's counts. Raises RouterUnavailableError."""
        await self.locate()
        try:
            return dict(await self._handle.snapshot.remote())
        except RayError as error:
            raise RouterUnavailableError(f"router {self._name!r} does not answer: {_first_line(error)}") from error

    def _get_or_create(self) -> Any:
        return (
            ray.remote(RouterActor)
            .options(
                name=self._name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=1000,
                num_cpus=0,
            )
            .remote(self._config_json)
        )


def existing_router(app_name: str) -> Any:
    """The actor's handle, or None. Blocks; call it from a thread."""
    try:
        return ray.get_actor(actor_name(app_name), namespace=NAMESPACE)
    except ValueError:
        return None


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1] if str(cause).strip() else repr(cause)
