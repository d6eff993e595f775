"""The ready-made hooks, each with the framework it is for, against the served application: unchanged user code."""

import asyncio
from typing import Any, TypedDict

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.served import Served

pytestmark = [
    pytest.mark.e2e,
    # Inside the frameworks.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
MODEL = "tempo-tiny"
TENANT = {"x-tenant-id": "hooks"}


@pytest.fixture
def server(program_server: Served) -> Served:
    return program_server


async def programs(server: Served, **filters: str) -> list[dict[str, Any]]:
    """Programs of this test's tenant, all of each."""
    async with httpx.AsyncClient(base_url=f"{server.url}/v1", headers=TENANT) as http:
        listed = (await http.get("/programs", params=filters)).json()["data"]
        return [(await http.get(f"/programs/{one['id']}")).json() for one in listed]


async def only(server: Served, app: str, status: str) -> dict[str, Any]:
    """The one program of an app, once it has this status: its end is told beside the task."""
    async with asyncio.timeout(30):
        while True:
            found = await programs(server, app=app)
            assert len(found) == 1, found
            if found[0]["status"] == status:
                return found[0]
            await asyncio.sleep(0.05)


def test_a_plain_client_gives_its_calls_one_deadline(server: Served) -> None:
    from deployments.hooks.openai_client import program

    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", default_headers=TENANT) as client,
        program(client, deadline_s=60, app="plain") as task,
    ):
        plan = task.step("plan").completions.with_raw_response.create(model=MODEL, prompt="x", max_tokens=3)
        assert plan.headers["x-tempo-class"] == "program"
        call = plan.headers["x-tempo-call"]
        task.step("sum", call).completions.create(model=MODEL, prompt="x", max_tokens=3)
        task.extend(90)
    assert (task.result["status"], task.result["deadline_met"]) == ("finished", True)
    assert [one["label"] for one in task.result["calls"]] == ["plan", "sum"]
    assert task.result["calls"][1]["parents"] == [call]


async def test_an_exception_in_the_block_cancels_the_program(server: Served) -> None:
    from deployments.hooks.openai_client import async_program

    tasks: list[Any] = []

    async def fail(client: AsyncOpenAI) -> None:
        async with async_program(client, deadline_s=60) as task:
            tasks.append(task)
            await task.client.completions.create(model=MODEL, prompt="x", max_tokens=3)
            raise ZeroDivisionError

    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", default_headers=TENANT) as client:
        with pytest.raises(ZeroDivisionError):
            await fail(client)
    assert tasks[0].result["status"] == "cancelled"


class State(TypedDict):
    """Of the graph below."""

    notes: list[str]


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_langgraph_run_is_a_program_with_its_nodes_as_steps(server: Served, is_async: bool) -> None:
    from langchain_openai import ChatOpenAI
    from langgraph.graph import END, START, StateGraph

    from deployments.hooks.langchain import ProgramCalls

    app = f"graph-{is_async}"
    calls = ProgramCalls(f"{server.url}/v1", deadline_s=60, app=app, extra=TENANT)
    async with calls.async_http_client() as async_http:
        with calls.http_client() as http:
            model = ChatOpenAI(
                model=MODEL, base_url=f"{server.url}/v1", api_key="none", max_tokens=3,
                http_client=http, http_async_client=async_http,
            )  # fmt: skip

            def node(state: State) -> State:
                return {"notes": [*state["notes"], str(model.invoke("x").content)]}

            async def async_node(state: State) -> State:
                return {"notes": [*state["notes"], str((await model.ainvoke("x")).content)]}

            graph = StateGraph(State)
            graph.add_node("plan", async_node if is_async else node)
            graph.add_node("write", async_node if is_async else node)
            graph.add_edge(START, "plan")
            graph.add_edge("plan", "write")
            graph.add_edge("write", END)
            config: Any = {"callbacks": [calls], "configurable": {"thread_id": "night"}}
            compiled = graph.compile()
            if is_async:
                result = await compiled.ainvoke({"notes": []}, config)
            else:
                result = await asyncio.to_thread(compiled.invoke, {"notes": []}, config)
            assert len(result["notes"]) == 2
    await asyncio.to_thread(calls.close)
    seen = await only(server, app, "finished")
    assert seen["name"].startswith("night ")
    assert [one["label"] for one in seen["calls"]] == ["plan", "write"]
    assert seen["calls"][1]["parents"] == [seen["calls"][0]["id"]]
    assert seen["deadline_met"] is True


async def test_an_agents_sdk_trace_is_a_program_with_its_agents_as_steps(server: Served) -> None:
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_trace_processors, trace

    from deployments.hooks.openai_agents import ProgramCalls

    calls = ProgramCalls(f"{server.url}/v1", deadline_s=60, extra=TENANT)
    set_trace_processors([calls])
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=calls.http_client())
    agents = [
        Agent(
            name=name, instructions="Be short.", model=OpenAIChatCompletionsModel(MODEL, client),
            model_settings=ModelSettings(max_tokens=3),
        )
        for name in ("planner", "writer")
    ]  # fmt: skip
    with trace("night report"):
        for agent in agents:
            await Runner.run(agent, "x")
    await asyncio.to_thread(calls.shutdown)
    await client.close()
    seen = await only(server, "night report", "finished")
    assert [one["label"] for one in seen["calls"]] == ["planner", "writer"]
    assert [one["stage"] for one in seen["calls"]] == [0, 1]
    assert seen["deadline_met"] is True
