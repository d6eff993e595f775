"""What the router knows, from there to a scrape: real gRPC and Redis, a simulated engine."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient
from prometheus_client import CollectorRegistry, make_asgi_app

from deployments.http_edge import HttpEdge
from deployments.own_metrics import RouterMetrics
from deployments.program_client import ProgramClient
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.errors import RouterUnavailableError
from tempo_router.program_ops import CreateProgram
from tempo_router.request import Latency
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
    registry, scrape = await scraped(fleet)

    known = {one.replica_id: one for one in fleet.router.snapshot()["core"].replicas}
    assert set(known) == {"worker-1", "worker-2"}
    assert any(one.step_error > 0 for one in known.values())
    for name, one in known.items():
        labels = {"replica": name}
        assert registry.get_sample_value("tempo_step_time_error_ratio", labels) == one.step_error
        assert registry.get_sample_value("tempo_step_time_unsure", labels) == float(one.is_unsure)
        assert f'tempo_step_time_error_ratio{{replica="{name}"}} {one.step_error}' in scrape


async def scraped(fleet: Fleet) -> tuple[CollectorRegistry, str]:
    registry = CollectorRegistry()
    told = RouterMetrics(ProgramClient(fleet.clients[0].link.programs), registry)
    edge = HttpEdge(make_asgi_app(registry), CONFIG, not_ready_because=lambda: None, before_scrape=told.ask)
    async with AsyncClient(transport=ASGITransport(edge), base_url="http://edge") as http:
        return registry, (await http.get("/metrics")).text


@pytest.mark.redis
async def test_a_scrape_tells_what_waits_and_what_runs(tmp_path: Path) -> None:
    engine = EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 4}, time_scale=1.0)
    async with fleet_over_redis(CONFIG.model_copy(update={"engine": engine}), tmp_path) as fleet:
        await fleet.start()
        client = fleet.clients[0]
        for number in range(30):
            await submit(client, call(f"r{number}", output_tokens=2000, slo=Latency(60.0, 1.0)))
        await submit(client, call("whenever", output_tokens=2000))
        await eventually(lambda: len(client.tokens) >= 4, "the slots are taken")
        registry, _ = await scraped(fleet)

    def requests(slo_class: str, *states: str) -> float:
        labels = ({"slo_class": slo_class, "state": state} for state in states)
        return sum(registry.get_sample_value("tempo_queue_requests", one) or 0.0 for one in labels)

    at_engine = ("begun", "unbegun", "deferred_in_engine", "relegated_in_engine")
    at_router = ("in_turn", "deferred", "relegated", "unplaceable")
    assert requests("latency", "begun") == 4
    assert 4 <= requests("latency", *at_engine) <= 4 + CONFIG.scheduling.replica_queue_depth
    assert requests("latency", *at_router, *at_engine) == 30
    assert requests("latency", "unplaceable") == 0
    assert requests("best_effort", *at_router, *at_engine) == 1


@pytest.mark.redis
async def test_a_scrape_tells_what_redis_refused(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = fleet.router.programs.writer
    await eventually(lambda: writer.waiting == 0, "nothing is to be written")
    graph, _ = fleet.router.programs.book.apply(CreateProgram("p", "", "app", time.time() + 600), time.time())
    assert graph is not None
    writer.put(("this is no Lua", ("program:p",), ()), graph)
    await eventually(lambda: writer.refused == 1, "it is refused")
    registry, _ = await scraped(fleet)
    assert registry.get_sample_value("tempo_refused_program_changes_total") == 1
    assert registry.get_sample_value("tempo_unwritten_program_changes") == 0
    assert registry.get_sample_value("tempo_redis_away") == 0


class OneAnswer:
    """A router that tells once, and then is away."""

    def __init__(self, replicas: list[dict[str, Any]]) -> None:
        store = {"is_store_away": False, "unwritten": 3, "refused": 0}
        self.answers = [{"queue": {"states": {"deadline": {"in_turn": 5}}, "replicas": replicas}, "store": store}]

    async def ask(self, op: Any) -> Any:
        if not self.answers:
            raise RouterUnavailableError("none")
        return self.answers.pop()


async def test_without_a_router_a_scrape_tells_nothing_rather_than_what_was() -> None:
    registry = CollectorRegistry()
    told = [{"replica_id": "gpu0", "step_error": 0.45, "is_unsure": True}]
    errors = RouterMetrics(OneAnswer(told), registry)  # type: ignore[arg-type]  # as much of a client as is asked
    await errors.ask()
    assert registry.get_sample_value("tempo_step_time_error_ratio", {"replica": "gpu0"}) == 0.45
    assert registry.get_sample_value("tempo_step_time_unsure", {"replica": "gpu0"}) == 1.0
    waiting = {"slo_class": "deadline", "state": "in_turn"}
    assert registry.get_sample_value("tempo_queue_requests", waiting) == 5
    assert registry.get_sample_value("tempo_unwritten_program_changes") == 3

    await errors.ask()
    assert registry.get_sample_value("tempo_queue_requests", waiting) is None
    assert registry.get_sample_value("tempo_unwritten_program_changes") is None
    assert registry.get_sample_value("tempo_step_time_error_ratio", {"replica": "gpu0"}) is None
