"""What programs cost the router: CPU time and Redis round trips of a call, memory of programs in progress.

    python -m benchmarks.program_desk [--programs 10000] [--json out.json]

A desk as the router has it, over a real Redis: programs begin, each has its calls stage by stage (told as an ingress
tells them, encoded and decoded), and stay in progress. CPU time is the process's, writing to Redis included; memory is
what the process grows by until all programs are in progress.
"""

import argparse
import asyncio
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from cluster import wire_pb2 as wire
from cluster.embedded_redis import start_embedded_redis
from cluster.program_desk import ProgramDesk
from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from tempo_router.config import ProgramsConfig
from tempo_router.program_graph import NewCall
from tempo_router.program_ops import BeginCall, CreateProgram, EndCall

STAGES = (1, 2, 1, 3, 1)
"""Calls of each stage: a deep-research program of two rounds."""


async def measure(programs: int, folder: Path) -> dict[str, Any]:
    """All programs side by side, stage by stage."""
    redis = start_embedded_redis(folder)
    store = await RedisStore.connect(redis.url, "desk")
    answers: list[int] = []
    desk = ProgramDesk(
        ProgramsConfig(max_unwritten=1_000_000), ProgramStore(store), fence=await store.acquire_lease("desk", 600.0),
        handle=lambda _: None, send=lambda _, message: answers.append(len(message.program_answers)),
        cancel_calls=lambda _: None, outlook=lambda _, __: None,
    )  # fmt: skip
    desk.settled()
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    number = 0

    def ask(op: object) -> None:
        nonlocal number
        number += 1
        body = msgspec.json.encode(op)
        desk.asked("ingress", wire.ProgramOp(op_id=f"ingress:{number}", kind=type(op).__name__, body=body))

    writing = asyncio.create_task(desk.writer.run())
    began_s, calls = time.process_time(), 0
    deadline_s = time.time() + 3600.0
    for one in range(programs):
        ask(CreateProgram(f"prog_{one:032x}", "tenant", "research", deadline_s))
        if one % 64 == 0:
            await asyncio.sleep(0)
    created_s = time.process_time() - began_s
    began_s = time.process_time()
    for stage, width in enumerate(STAGES):
        for one in range(programs):
            program_id = f"prog_{one:032x}"
            for place in range(width):
                call_id = f"call_{one:024x}{stage:04x}{place:04x}"
                ask(BeginCall(program_id, "tenant", NewCall(call_id, stage=stage, owner="ingress")))
                ask(EndCall(program_id, call_id, 0, "completed", 500, 300))
                calls += 1
            if one % 16 == 0:
                await asyncio.sleep(0)
    while desk.writer.waiting:  # noqa: ASYNC110  # the writer tells nobody when it is done
        await asyncio.sleep(0.01)
    call_s = time.process_time() - began_s
    gc.collect()
    grown = process.memory_info().rss - before
    writing.cancel()
    result = {
        "programs": programs,
        "calls": calls,
        "cpu_ms_per_call": round(1000 * call_s / calls, 4),
        "cpu_ms_per_program": round(1000 * created_s / programs, 4),
        "redis_round_trips_per_call": round(desk.writer.round_trips / calls, 4),
        "memory_mib": round(grown / 2**20, 1),
        "answers": sum(answers),
    }
    await store.close()
    redis.stop()
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(options.programs, Path(folder)))
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
