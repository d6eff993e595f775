"""How far off step times are estimated, by replica, from the router to a scrape: real gRPC, a simulated engine."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient
from prometheus_client import CollectorRegistry, make_asgi_app

from deployments.http_edge import HttpEdge
from deployments.own_metrics import StepTimeErrors
from deployments.program_client import ProgramClient
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.errors import RouterUnavailableError
from tests.fleet import Fleet, call, eventually, fleet_over_redis, submit

CONFIG = TempoConfig(
    engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 4}, time_scale=0.02),
    scheduling=SchedulingConfig(length_model="histogram", settle_s=0.05, tick_s=0.02),
)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet_over_redis(CONFIG, tmp_path) as fleet:
        await fleet.start(workers=2)
        yield fleet


@pytest.mark.redis
async def test_a_scrape_tells_the_step_time_error_that_the_router_knows(fleet: Fleet) -> None:
    client = fleet.clients[0]
    for number in range(8):
        await submit(client, call(f"r{number}", output_tokens=100))
    await eventually(lambda: len(client.ended) == 8, "all are answered, with many steps")
    await eventually(fleet.is_empty, "no further step comes")
    registry = CollectorRegistry()
    errors = StepTimeErrors(ProgramClient(client.link.programs), registry)
    edge = HttpEdge(make_asgi_app(registry), CONFIG, not_ready_because=lambda: None, before_scrape=errors.ask)
    async with AsyncClient(transport=ASGITransport(edge), base_url="http://edge") as http:
        scrape = (await http.get("/metrics")).text

    known = {one.replica_id: one for one in fleet.router.snapshot()["core"].replicas}
    assert set(known) == {"worker-1", "worker-2"}
    assert any(one.step_error > 0 for one in known.values())
    for name, one in known.items():
        labels = {"replica": name}
        assert registry.get_sample_value("tempo_step_time_error_ratio", labels) == one.step_error
        assert registry.get_sample_value("tempo_step_time_unsure", labels) == float(one.is_unsure)
        assert f'tempo_step_time_error_ratio{{replica="{name}"}} {one.step_error}' in scrape


class OneAnswer:
    """A router that tells once, and then is away."""

    def __init__(self, replicas: list[dict[str, Any]]) -> None:
        self.answers = [{"queue": {"replicas": replicas}}]

    async def ask(self, op: Any) -> Any:
        if not self.answers:
            raise RouterUnavailableError("none")
        return self.answers.pop()


async def test_without_a_router_a_scrape_tells_nothing_rather_than_what_was() -> None:
    registry = CollectorRegistry()
    told = [{"replica_id": "gpu0", "step_error": 0.45, "is_unsure": True}]
    errors = StepTimeErrors(OneAnswer(told), registry)  # type: ignore[arg-type]  # as much of a client as is asked
    await errors.ask()
    assert registry.get_sample_value("tempo_step_time_error_ratio", {"replica": "gpu0"}) == 0.45
    assert registry.get_sample_value("tempo_step_time_unsure", {"replica": "gpu0"}) == 1.0

    await errors.ask()
    assert registry.get_sample_value("tempo_step_time_error_ratio", {"replica": "gpu0"}) is None
