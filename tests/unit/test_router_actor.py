"""The router's actor without Ray: its life around the RouterServer."""

import asyncio
from pathlib import Path

import psutil
import pytest

from cluster.router_server import RouterServer
from deployments import router_actor
from deployments.router_actor import RouterActor
from tempo_router.config import SchedulingConfig, TempoConfig, TransportConfig


class LocalActor(RouterActor):
    """An actor that Ray does not know; it notes that it would end."""

    def __init__(self, config: TempoConfig) -> None:
        super().__init__(config.model_dump_json(by_alias=True))
        self.has_ended = asyncio.Event()

    async def _end_actor(self) -> None:
        self.has_ended.set()


def config(data_dir: Path) -> TempoConfig:
    return TempoConfig(
        data_dir=str(data_dir),
        scheduling=SchedulingConfig(settle_s=0.05),
        transport=TransportConfig(host="127.0.0.1"),
    )


async def test_an_idle_router_stops_entirely_and_ends_its_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half stopped it would still take connections, and never notice that a worker is gone."""
    monkeypatch.setattr(router_actor, "WATCH_S", 0.01)
    monkeypatch.setattr(router_actor, "UNUSED_EXIT_S", 0.02)
    actor = LocalActor(config(tmp_path))
    host, port = (await actor.address()).split(":")
    async with asyncio.timeout(15):
        await actor.has_ended.wait()
    with pytest.raises(OSError, match=r"refused|failed"):
        await asyncio.open_connection(host, int(port))
    assert actor._redis is not None
    assert actor._redis.pid is not None
    assert not psutil.pid_exists(actor._redis.pid)


async def test_a_router_that_nobody_has_reached_yet_waits_for_those_who_load_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([False] * 20 + [True])
    seen: list[bool] = []

    def has_peers(_: RouterServer) -> bool:
        seen.append(next(looks, False))
        return seen[-1]

    monkeypatch.setattr(router_actor, "WATCH_S", 0.01)
    monkeypatch.setattr(router_actor, "IDLE_EXIT_S", 0.03)
    monkeypatch.setattr(RouterServer, "has_peers", property(has_peers))
    actor = LocalActor(config(tmp_path))
    await actor.address()
    async with asyncio.timeout(15):
        await actor.has_ended.wait()
    assert True in seen, "it was there when the first one came, and ended when that one had been gone for a while"
