"""What the Python handle's methods for programs do, whatever carries the calls: `handle.method.remote(...)`."""

import asyncio
import math
from typing import Any

import pytest

from deployments.handle_api import NewProgram
from tempo_router.errors import ProgramError

GRAPH = {
    "nodes": [
        {"id": "plan", "prompt": "Plan.", "max_tokens": 3},
        {"id": "lookup", "tool": "web search", "after": ["plan"]},
        {"id": "sum", "prompt": "{{plan}} {{lookup}}", "max_tokens": 3},
    ]
}


async def is_made_extended_and_finished(handle: Any) -> None:
    """create_program, program, programs, extend_program, finish_program."""
    outline = {"stages": [{"calls": 1}, {"calls": 3, "output_tokens": 40}]}
    made = await handle.create_program.remote(
        NewProgram(deadline_s=60, app="by hand", name="job", tenant="ours", outline=outline)
    )
    assert [one["calls"] for one in made["outline"]["stages"]] == [1, 3]
    assert (made["status"], made["app"]) == ("running", "by hand")
    assert (await handle.program.remote("job", "ours"))["id"] == made["id"]
    listed = await handle.programs.remote("ours", app="by hand", status="running")
    assert [one["id"] for one in listed["data"]] == [made["id"]]
    assert (await handle.programs.remote("theirs"))["data"] == []
    later = await handle.extend_program.remote(made["id"], 600.0, "ours")
    assert later["deadline"] > made["deadline"] + 500
    dated = await handle.extend_program.remote(made["id"], tenant="ours", deadline=later["deadline"] + 100)
    assert dated["deadline"] == later["deadline"] + 100
    with pytest.raises(ProgramError, match="not both"):
        await handle.extend_program.remote(made["id"], 600.0, "ours", deadline=later["deadline"])
    with pytest.raises(ProgramError) as unknown:
        await handle.program.remote(made["id"], "theirs")
    assert unknown.value.code == "unknown_program"
    done = await handle.finish_program.remote(made["id"], "ours")
    assert done["status"] == "finished"
    with pytest.raises(ProgramError) as over:
        await handle.finish_program.remote(made["id"], "ours")
    assert over.value.code == "program_ended"


async def is_cancelled(handle: Any) -> None:
    """cancel_program, of a program without a deadline."""
    made = await handle.create_program.remote(NewProgram(objective="best_effort"))
    gone = await handle.cancel_program.remote(made["id"], "enough")
    assert (gone["status"], gone["reason"], gone["deadline"]) == ("cancelled", "enough", None)


async def runs_its_graph(handle: Any) -> None:
    """run_program and deliver_output."""
    outputs: dict[str, Any] = {}
    async with asyncio.timeout(60):
        async for event in handle.options(stream=True).run_program.remote(NewProgram(deadline_s=60, graph=GRAPH)):
            match event["event"]:
                case "program.created":
                    program_id = event["program"]["id"]
                case "tool.waiting":
                    for wrong, where in ((object(), "output.found[1]"), (math.nan, "output.found[1]")):
                        with pytest.raises(ProgramError) as refused:
                            await handle.deliver_output.remote(program_id, event["node"], {"found": [3, wrong]})
                        assert (refused.value.code, refused.value.field) == ("invalid_program", where)
                    await handle.deliver_output.remote(program_id, event["node"], {"found": 3})
                case "node.finished":
                    outputs[event["node"]] = event["output"]
    assert set(outputs) == {"plan", "lookup", "sum"}
    with pytest.raises(ProgramError) as forgotten:
        await handle.explain.remote("nobody")
    assert forgotten.value.code == "unknown_request"
    assert outputs["lookup"] == {"found": 3}
    assert (event["event"], event["program"]["status"]) == ("program.finished", "finished")
