"""The router's actor without Ray: its life around the RouterServer."""

import asyncio
from pathlib import Path

import psutil
import pytest

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
    monkeypatch.setattr(router_actor, "IDLE_EXIT_S", 0.02)
    actor = LocalActor(config(tmp_path))
    host, port = (await actor.address()).split(":")
    async with asyncio.timeout(15):
        await actor.has_ended.wait()
    with pytest.raises(OSError, match=r"refused|failed"):
        await asyncio.open_connection(host, int(port))
    assert actor._redis is not None
    assert actor._redis.pid is not None
    assert not psutil.pid_exists(actor._redis.pid)
