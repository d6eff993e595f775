"""Programs through the Serve handle, in a driver that is connected to the application's Ray."""

import asyncio
from typing import Any

import pytest

from deployments.handle_api import GenerateRequest, NewProgram, ProgramPlace
from tests import program_handle

pytestmark = [pytest.mark.e2e, pytest.mark.redis]


async def test_a_program_is_made_extended_and_finished(handle: Any) -> None:
    await program_handle.is_made_extended_and_finished(handle)


async def test_a_program_is_cancelled(handle: Any) -> None:
    await program_handle.is_cancelled(handle)


async def test_a_declared_graph_runs(handle: Any) -> None:
    await program_handle.runs_its_graph(handle)


async def test_calls_have_their_places_in_a_program(handle: Any) -> None:
    made = await handle.create_program.remote(NewProgram(deadline_s=120, app="placed"))
    sampling = {"max_tokens": 4, "ignore_eos": True}
    first = await handle.generate.remote(
        GenerateRequest(prompt="Plan", sampling=sampling, program=ProgramPlace(made["id"], stage="plan"))
    )
    place = ProgramPlace(made["id"], parents=(first.call_id,), call="sum", is_last=True)
    second = await handle.generate.remote(GenerateRequest(prompt="Sum", sampling=sampling, program=place))
    assert (first.outcome.slo_class, second.call_id) == ("program", "sum")
    seen = await handle.program.remote(made["id"])
    assert [(one["id"], one["parents"]) for one in seen["calls"]] == [
        (first.call_id, []), ("sum", [first.call_id])
    ]  # fmt: skip
    assert (seen["status"], seen["output_tokens"]) == ("finished", 8)
    told = (await handle.explain.remote(first.call_id))["requests"]
    assert [(one["call"], one["program"]) for one in told] == [(first.call_id, made["id"])]


async def test_a_generation_says_that_its_program_is_late(handle: Any) -> None:
    made = await handle.create_program.remote(NewProgram(deadline_s=0.2))
    async with asyncio.timeout(30):
        # Another process cannot set an event of ours.
        while (await handle.program.remote(made["id"]))["status"] != "relegated":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    place = ProgramPlace(made["id"], call="late")
    request = GenerateRequest(prompt="x", sampling={"max_tokens": 4, "ignore_eos": True}, program=place)
    parts = [part async for part in handle.options(stream=True).stream.remote(request)]
    assert {(part.call_id, part.is_relegated) for part in parts} == {("late", True)}
    await handle.extend_program.remote(made["id"], 600.0)
    answer = await handle.generate.remote(GenerateRequest(prompt="x", program=ProgramPlace(made["id"])))
    assert not answer.is_relegated
