"""A program whose shape its client knows, over HTTP, with a real router and Redis and a simulated engine."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.http_edge import HttpEdge
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.event_log import replay
from tempo_router.request import ProgramCall, ProgramId
from tests.fleet import Fleet, call, eventually, fleet_over_redis, submit
from tests.integration.test_graph_api import Model
from tests.listening import listening

pytestmark = pytest.mark.redis

OUTLINE = {
    "stages": [
        {"calls": 1, "output_tokens": 50},
        {"calls": 4, "prompt_tokens": 100, "output_tokens": 200, "gap_s": 30},
        {"calls": 1, "prompt_tokens": 900, "output_tokens": 400, "gap_s": 0},
    ]
}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Fleet, httpx.AsyncClient]]:
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 4, "max_model_len": 4096}),
        scheduling=SchedulingConfig(policy="tempo", length_model="histogram", settle_s=0.1, tick_s=0.02),
        record_events=str(tmp_path / "events.jsonl"),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start()
        programs = ProgramClient(fleet.clients[0].link.programs)
        edge = HttpEdge(Model(), config, not_ready_because=lambda: None, programs=programs)
        async with listening(edge) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
            yield fleet, http


async def first_call(fleet: Fleet, program_id: str) -> None:
    """It runs for longer than the test."""
    client = fleet.clients[0]
    programs = ProgramClient(client.link.programs)
    identity = Identity("explicit", program_id, call_id="first")
    ticket = await programs.begin(identity, tenant="", app="", now_epoch_s=time.time())
    assert ticket.left_s is not None
    spec = call("first", output_tokens=4000, slo=ProgramCall(ProgramId(program_id), ticket.left_s))
    spec = replace(spec, app="research", program_id=program_id, call_id="first", stage=ticket.stage)
    assert (await submit(client, spec)).is_admitted


async def seen(http: httpx.AsyncClient, program_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = (await http.get(f"/v1/programs/{program_id}")).json()
    return shown


def is_of_the_outline(shown: dict[str, Any]) -> None:
    assert shown["outline"] == {"stages": [{"stage": n, **one} for n, one in enumerate(OUTLINE["stages"])]}
    foretold = shown["prediction"]
    assert foretold["pattern"] == {"kind": "known graph", "app": "research", "stage": 0, "stages": 3}
    assert (foretold["later_stages"], foretold["later_calls"], foretold["later_output_tokens"]) == (2, 5, 1200)
    budgets = shown["stage_budgets_s"]
    assert len(budgets) == 3
    assert sum(budgets) == pytest.approx(shown["deadline"] - shown["created"])
    assert budgets[1] > budgets[2], "tools take half a minute before the second stage"


async def test_the_stages_that_a_client_knows_have_budgets_before_they_begin_and_under_the_next_router(
    served: tuple[Fleet, httpx.AsyncClient], tmp_path: Path
) -> None:
    fleet, http = served
    made = await http.post("/v1/programs", json={"app": "research", "deadline_s": 300, "outline": OUTLINE})
    assert made.status_code == 200, made.text
    program_id = made.json()["id"]
    await first_call(fleet, program_id)
    is_of_the_outline(await seen(http, program_id))

    await eventually(lambda: not fleet.clients[0].link.programs.unstored, "all is stored")
    routers = [fleet.router]
    await fleet.replace_router()
    routers.append(fleet.router)
    await eventually(lambda: fleet.router.snapshot()["core"].is_settled, "the next router has settled")
    await eventually(lambda: fleet.router._runner.core.ledger.programs != {}, "the next router knows the call")
    is_of_the_outline(await seen(http, program_id))

    for epoch, router in enumerate(routers, start=1):
        assert router._runner.recorder is not None
        router._runner.recorder.close()
        lines = (tmp_path / f"events-{epoch}.jsonl").read_text().splitlines()
        assert any("ProgramOutlined" in line for line in lines)
        assert list(replay(lines)) == []
    assert (await http.post(f"/v1/programs/{program_id}/cancel")).status_code == 200


async def test_stages_that_are_told_later_are_known_from_then_on(served: tuple[Fleet, httpx.AsyncClient]) -> None:
    fleet, http = served
    program = {"name": "late", "app": "research", "deadline": time.time() + 300}
    made = await http.post("/v1/programs", json=program)
    await first_call(fleet, made.json()["id"])
    before = await seen(http, "late")
    assert before["outline"] is None
    assert before["prediction"]["pattern"]["kind"] != "known graph"

    graph = {"nodes": [{"id": "a", "prompt": "A"}]}
    refused = await http.post("/v1/programs", json={**program, "graph": graph})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "graph")
    assert (await seen(http, "late"))["outline"] is None, "what is refused changes nothing"

    told = await http.post("/v1/programs", json={**program, "outline": OUTLINE})
    assert told.status_code == 200, told.text
    is_of_the_outline(await seen(http, "late"))
    other = await http.post("/v1/programs", json={**program, "outline": {"stages": [{}]}})
    assert (other.status_code, other.json()["error"]["param"]) == (409, "outline")
    is_of_the_outline(await seen(http, "late"))


async def test_a_declared_graph_tells_the_router_its_stages(served: tuple[Fleet, httpx.AsyncClient]) -> None:
    _, http = served
    nodes = [{"id": "a", "prompt": "A", "max_tokens": 9}, {"id": "t", "tool": "x", "after": ["a"]}]
    nodes += [{"id": name, "prompt": "{{t}}"} for name in ("b", "c")]
    fields = {"deadline_s": 60, "stream": True, "graph": {"nodes": nodes}}
    async with http.stream("POST", "/v1/programs", json=fields) as answer:
        events = (json.loads(line[6:]) async for line in answer.aiter_lines() if line.startswith("data: {"))
        made = (await anext(events))["program"]
        shown = await seen(http, made["id"])
    first, second = {"stage": 0, "calls": 1, "max_tokens": 9, "gap_s": 0.0}, {"stage": 1, "calls": 2}
    assert shown["outline"] == made["outline"] == {"stages": [first, second]}


async def test_an_outline_that_makes_no_sense_makes_no_program(served: tuple[Fleet, httpx.AsyncClient]) -> None:
    _, http = served
    backwards = {"stages": [{"stage": 2}, {"stage": 1}]}
    refused = await http.post("/v1/programs", json={"deadline_s": 60, "name": "n", "outline": backwards})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "outline.stages[1].stage"
    graph = {"nodes": [{"id": "a", "prompt": "A"}]}
    both = await http.post("/v1/programs", json={"deadline_s": 60, "name": "n", "outline": OUTLINE, "graph": graph})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "outline")
    assert (await http.get("/v1/programs/n")).status_code == 404
