"""Programs on the served application. The engine is simulated; everything else is as users have it."""

import asyncio
import json
import time
from contextlib import aclosing
from typing import Any

import httpx
import openai
import pytest

from tests.served import Served

pytestmark = [pytest.mark.e2e, pytest.mark.redis]
MODEL = "tempo-tiny"
OURS = {"x-tenant-id": "ours"}


@pytest.fixture
def server(program_server: Served) -> Served:
    return program_server


@pytest.fixture
async def http(server: Served) -> Any:
    async with httpx.AsyncClient(timeout=60, base_url=server.url, headers=OURS) as client:
        yield client


async def create(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/programs", json={"app": "research", "deadline_s": 60, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def call(http: httpx.AsyncClient, program_id: str, tokens: int = 5, **headers: str) -> httpx.Response:
    body = {"model": MODEL, "prompt": "x", "max_tokens": tokens, "ignore_eos": True}
    named = {"x-tempo-program": program_id, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await http.post("/v1/completions", json=body, headers=named)


async def view(http: httpx.AsyncClient, program_id: str) -> dict[str, Any]:
    response = await http.get(f"/v1/programs/{program_id}")
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_program_unfolds_under_one_deadline(http: httpx.AsyncClient) -> None:
    program = await create(http)
    plan = await call(http, program["id"], x_tempo_stage="plan")
    assert plan.headers["x-tempo-class"] == "program"
    assert plan.headers["x-tempo-program"] == program["id"]
    assert 0 < float(plan.headers["x-tempo-ttlt-ms"]) <= 60_000
    searches = await asyncio.gather(*(call(http, program["id"], tokens=30) for _ in range(3)))
    assert {answer.headers["x-tempo-stage"] for answer in searches} == {"1"}
    parents = ",".join(answer.headers["x-tempo-call"] for answer in searches)
    await call(http, program["id"], x_tempo_parent=parents, x_tempo_call="sum")

    seen = await view(http, program["id"])
    assert [stage["calls"] for stage in seen["stages"]] == [1, 3, 1]
    assert [one["status"] for one in seen["calls"]] == ["completed"] * 5
    assert seen["calls"][0]["label"] == "plan"
    assert set(seen["calls"][-1]["parents"]) == set(parents.split(","))
    assert seen["output_tokens"] == 5 + 3 * 30 + 5
    assert sum(seen["stage_budgets_s"]) == pytest.approx(seen["deadline"] - seen["created"])
    assert 0.0 <= seen["prediction"]["probability"] <= 1.0

    done = (await http.post(f"/v1/programs/{program['id']}/finish")).json()
    assert (done["status"], done["deadline_met"]) == ("finished", True)
    late = await call(http, program["id"])
    assert (late.status_code, late.json()["error"]["code"]) == (409, "program_ended")
    again = await http.post(f"/v1/programs/{program['id']}/finish")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "program_ended")


async def test_cancelling_ends_what_runs_and_tells_its_client(http: httpx.AsyncClient) -> None:
    program = await create(http)
    running = asyncio.create_task(call(http, program["id"], tokens=3500))
    async with asyncio.timeout(30):
        # Another process cannot set an event of ours.
        while (await view(http, program["id"]))["running_calls"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    cancelled = (await http.post(f"/v1/programs/{program['id']}/cancel", json={"reason": "enough"})).json()
    assert (cancelled["status"], cancelled["reason"]) == ("cancelled", "enough")
    answer = await running
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "program_cancelled")


async def test_another_tenant_neither_sees_nor_touches_it(http: httpx.AsyncClient) -> None:
    program = await create(http)
    theirs = {"x-tenant-id": "theirs"}
    for request in (
        http.get(f"/v1/programs/{program['id']}", headers=theirs),
        http.post(f"/v1/programs/{program['id']}/cancel", headers=theirs),
        call(http, program["id"], x_tenant_id="theirs"),
    ):
        answer = await request
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_program")
    listed = (await http.get("/v1/programs", headers=theirs)).json()["data"]
    assert program["id"] not in [one["id"] for one in listed]
    first = await call(http, program["id"], x_tempo_call="mine")
    assert first.status_code == 200
    other = await http.post("/v1/programs", json={"deadline_s": 60}, headers=theirs)
    stolen = await call(http, other.json()["id"], x_tenant_id="theirs", x_tempo_parent="mine")
    assert (stolen.status_code, stolen.json()["error"]["param"]) == (400, "parent")


async def test_programs_are_listed_by_state_and_app(http: httpx.AsyncClient) -> None:
    ids = [(await create(http, app="listed"))["id"] for _ in range(3)]
    await http.post(f"/v1/programs/{ids[0]}/finish")
    running = (await http.get("/v1/programs?app=listed&status=running")).json()
    assert [one["id"] for one in running["data"]] == ids[1:]
    finished = (await http.get("/v1/programs?app=listed&status=finished")).json()
    assert [one["id"] for one in finished["data"]] == ids[:1]
    page = (await http.get("/v1/programs?app=listed&limit=1")).json()
    assert page["has_more"]
    following = (await http.get(f"/v1/programs?app=listed&limit=1&after={page['last_id']}")).json()
    assert [one["id"] for one in following["data"]] == ids[2:]


async def test_a_late_program_is_relegated_at_once_and_its_client_hears_of_it(http: httpx.AsyncClient) -> None:
    program = await create(http, deadline_s=1.0)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    event = ""
    async with http.stream("POST", "/v1/completions", json=body, headers={"x-tempo-program": program["id"]}) as stream:
        async for line in stream.aiter_lines():
            if line.startswith(": tempo") and "relegated" in line:
                event = line
                break
    assert program["id"] in event
    # It is given up once nothing can save it, which may be a few milliseconds before its deadline.
    await asyncio.sleep(program["deadline"] - time.time())
    answer = await call(http, program["id"])
    assert (answer.headers["x-tempo-class"], answer.headers["x-tempo-program-relegated"]) == ("program", "true")
    assert (answer.headers["x-tempo-ttlt-ms"], answer.headers["x-tempo-slo-met"]) == ("0", "false")
    seen = await view(http, program["id"])
    assert seen["status"] == "relegated"
    assert sum(seen["stage_budgets_s"]) == pytest.approx(seen["deadline"] - seen["created"])
    extended = (await http.post(f"/v1/programs/{program['id']}/extend", json={"deadline_s": 60})).json()
    assert extended["status"] == "running"
    after = await call(http, program["id"])
    assert "x-tempo-program-relegated" not in after.headers
    assert after.headers["x-tempo-slo-met"] == "true"


async def test_a_call_that_began_while_its_program_was_relegated_counts_again_once_that_has_more_time(
    http: httpx.AsyncClient,
) -> None:
    program = await create(http, deadline_s=0.2)
    async with asyncio.timeout(30):
        # Another process cannot set an event of ours.
        while (await view(http, program["id"]))["status"] != "relegated":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    news = []
    async with http.stream("POST", "/v1/completions", json=body, headers={"x-tempo-program": program["id"]}) as stream:
        assert stream.headers["x-tempo-program-relegated"] == "true"
        is_extended = False
        async for line in stream.aiter_lines():
            if line.startswith(": tempo "):
                news.append(json.loads(line.removeprefix(": tempo ")))
            elif line.startswith("data: {") and not is_extended:
                is_extended = True
                answer = await http.post(f"/v1/programs/{program['id']}/extend", json={"deadline_s": 300})
                assert answer.json()["status"] == "running"
    assert [(one.get("event"), one.get("program")) for one in news] == [("reinstated", program["id"]), (None, None)]
    assert 290_000 < news[0]["ttlt_ms"] <= 310_000
    assert (news[-1]["class"], news[-1]["is_met"], news[-1]["relegated"]) == ("program", True, False)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "deadline_s"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"deadline": 1.0}, "deadline"),
        ({"deadline_s": 400 * 24 * 3600}, "deadline"),
        ({"deadline_s": 5, "deadline": time.time() + 5}, "deadline"),
        ({"deadline_s": 5, "objective": "speed"}, "objective"),
        ({"deadline_s": 5, "dead_line": 5}, "dead_line"),
        ({"deadline_s": 5, "app": "x" * 1000}, "app"),
    ],
)
async def test_a_program_that_makes_no_sense_is_refused(http: httpx.AsyncClient, fields: Any, param: str) -> None:
    answer = await http.post("/v1/programs", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_program_that_is_not_there_is_called_as_its_client_called_it(http: httpx.AsyncClient) -> None:
    for method, path in (("GET", ""), ("POST", "/finish"), ("POST", "/cancel")):
        answer = await http.request(method, f"/v1/programs/nope{path}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["message"]) == (
            404, "unknown_program", "there is no program 'nope'"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"x_tempo_stage": "0"}, 400, "stage"),
        ({"x_tempo_stage": "-1"}, 400, "stage"),
        ({"x_tempo_stage": "100000"}, 400, "stage"),
        ({"x_tempo_parent": "nobody"}, 400, "parent"),
        ({"x_tempo_parent": "me", "x_tempo_call": "me"}, 400, "parent"),
        ({"x_tempo_call": "no spaces allowed"}, 400, "call"),
    ],
)
async def test_a_call_that_makes_no_sense_leaves_its_program_untouched(
    http: httpx.AsyncClient, headers: dict[str, str], status: int, param: str
) -> None:
    program = await create(http)
    await call(http, program["id"], x_tempo_stage="3")
    before = await view(http, program["id"])
    answer = await call(http, program["id"], **headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert (await view(http, program["id"]))["calls"] == before["calls"]


async def test_an_unknown_id_of_ours_is_no_program(http: httpx.AsyncClient) -> None:
    answer = await call(http, f"prog_{'0' * 32}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_program")


async def test_openais_client_makes_a_program_by_headers_alone(server: Served) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", default_headers={"x-tempo-program": "night run", **OURS}
    ) as client:
        for _ in range(2):
            await client.completions.create(model=MODEL, prompt="x", max_tokens=3)
    async with httpx.AsyncClient(base_url=server.url, headers=OURS) as http:
        seen = (await http.get("/v1/programs/night%20run")).json()
    assert (seen["name"], seen["call_count"], seen["deadline"]) == ("night run", 2, None)


async def test_a_request_can_be_explained_by_the_id_of_its_answer(http: httpx.AsyncClient) -> None:
    answer = await call(http, "explained", tokens=7)
    async with asyncio.timeout(30):
        while True:
            told = await http.get(f"/v1/requests/{answer.json()['id']}/explain")
            assert told.status_code == 200, told.text
            [record] = told.json()["requests"]
            if not record["is_open"]:
                break
    assert [one["what"] for one in record["decisions"]] == ["arrived", "queued", "dispatched", "ended"]
    assert (record["class"], record["slo_met"], record["output_tokens"]) == ("latency", True, 7)
    assert record["call"] == answer.headers["x-tempo-call"]
    by_call = await http.get(f"/v1/requests/{record['call']}/explain")
    assert by_call.json()["requests"] == [record]
    theirs = await http.get(f"/v1/requests/{record['call']}/explain", headers={"x-tenant-id": "theirs"})
    assert (theirs.status_code, theirs.json()["error"]["code"]) == (404, "unknown_request")


async def test_answers_that_are_continued_and_sub_agents_stay_in_their_program(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3}
    main = await http.post("/v1/completions", json=body, headers={"x-session-id": "main"})
    sub = await http.post("/v1/completions", json=body, headers={"x-session-id": "sub", "x-parent-session-id": "main"})
    below = await http.post("/v1/completions", json=body, headers={"x-session-id": "two", "x-parent-session-id": "sub"})
    ids = {answer.headers["x-tempo-program"] for answer in (main, sub, below)}
    assert len(ids) == 1
    calls = (await view(http, ids.pop()))["calls"]
    assert [one["agent"] for one in calls] == ["main", "sub", "two"]
    assert [one["parents"] for one in calls] == [[], [calls[0]["id"]], [calls[1]["id"]]]
    answered = {"model": MODEL, "input": "x", "max_output_tokens": 3}
    first = await http.post("/v1/responses", json=answered, headers={"x-session-id": "answers"})
    assert first.status_code == 200, first.text
    again = {"model": MODEL, "input": "y", "max_output_tokens": 3, "previous_response_id": first.json()["id"]}
    # The answer itself is kept only where vLLM is told to; whose program it is, we know without that.
    second = await http.post("/v1/responses", json=again)
    assert second.headers["x-tempo-program"] == first.headers["x-tempo-program"]


GRAPH = {
    "nodes": [
        {"id": "plan", "prompt": "Plan.", "max_tokens": 5},
        {"id": "lookup", "tool": "web search", "after": ["plan"]},
        {"id": "left", "prompt": "L {{plan}}", "max_tokens": 5},
        {"id": "sum", "messages": [{"role": "user", "content": "{{left}} {{lookup}}"}], "max_tokens": 5},
    ]
}


async def events_of(http: httpx.AsyncClient, fields: dict[str, Any]) -> Any:
    """Events of a declared graph, as they come."""
    async with http.stream("POST", "/v1/programs", json={**fields, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


async def test_a_declared_graph_runs_and_tells_of_each_node_as_it_ends(http: httpx.AsyncClient) -> None:
    happened: list[str] = []
    outputs: dict[str, Any] = {}
    program_id = ""
    async for event in events_of(http, {"deadline_s": 60, "app": "declared", "graph": GRAPH}):
        happened.append(f"{event['event']} {event.get('node', '')}".strip())
        if event["event"] == "node.finished":
            outputs[event["node"]] = event["output"]
        if event["event"] == "tool.waiting":
            path = f"/v1/programs/{program_id}/nodes/{event['node']}/output"
            assert event["inputs"] == {"plan": outputs["plan"]}
            bad = await http.post(path, content=b'{"output": NaN}')
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "output")
            assert (await http.post(path, json={"output": {"found": [1, 2]}})).status_code == 200
            again = await http.post(path, json={"output": "twice"})
            assert (again.status_code, again.json()["error"]["code"]) == (409, "call_ended")
        if event["event"] == "program.created":
            program_id = event["program"]["id"]
        if event["event"] == "program.finished":
            done = event["program"]
    assert happened[0] == "program.created"
    assert happened[-1] == "program.finished"
    assert set(outputs) == {"plan", "lookup", "left", "sum"}
    assert outputs["lookup"] == {"found": [1, 2]}
    assert happened.index("node.finished left") < happened.index("node.finished sum")
    assert (done["status"], done["deadline_met"]) == ("finished", True)
    parents = {one["id"]: set(one["parents"]) for one in done["calls"]}
    assert parents == {"plan": set(), "lookup": {"plan"}, "left": {"plan"}, "sum": {"left", "lookup"}}


async def test_a_declared_graph_answers_as_a_whole_too(http: httpx.AsyncClient) -> None:
    graph = {"nodes": [{"id": "a", "prompt": "A", "max_tokens": 3}, {"id": "b", "prompt": "{{a}}", "max_tokens": 3}]}
    answer = await http.post("/v1/programs", json={"deadline_s": 60, "graph": graph})
    assert answer.status_code == 200, answer.text
    assert set(answer.json()["outputs"]) == {"a", "b"}
    assert answer.json()["status"] == "finished"


async def test_a_graph_whose_node_fails_or_whose_client_leaves_is_cancelled(http: httpx.AsyncClient) -> None:
    failing = {"nodes": [{"id": "a", "prompt": "A", "sampling": {"temperature": -5}}]}
    answer = await http.post("/v1/programs", json={"deadline_s": 60, "name": "failing", "graph": failing})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "node_failed")
    assert (await view(http, "failing"))["status"] == "cancelled"
    endless = {"nodes": [{"id": "a", "prompt": "A", "max_tokens": 3500, "sampling": {"ignore_eos": True}}]}
    async with aclosing(events_of(http, {"deadline_s": 60, "name": "left", "graph": endless})) as events:
        assert (await anext(events))["event"] == "program.created"
    async with asyncio.timeout(30):
        # Another process cannot set an event of ours.
        while (await view(http, "left"))["status"] != "cancelled":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    unknown = {"nodes": [{"id": "a", "prompt": "{{b}}"}]}
    refused = await http.post("/v1/programs", json={"deadline_s": 60, "graph": unknown})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "graph.nodes[0].prompt")
