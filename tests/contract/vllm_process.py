"""A process of its own that starts vLLM, for test_vllm_process.py. Prints what happens, one JSON per line."""

import asyncio
import json
import sys
from typing import Any

import psutil

from tempo_router.errors import TempoError
from tests.vllm_payload import encode_request
from workers.engine import EngineCall
from workers.vllm_engine import start_vllm_engine


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)  # noqa: T201 - the parent reads it


def children() -> list[int]:
    """The executor's processes; Python's own resource tracker ends with us."""
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(child.cmdline())
    ]


async def main(model: str, engine_kwargs: dict[str, Any]) -> None:
    died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    first_tokens = asyncio.Event()
    try:
        engine = await start_vllm_engine(
            model,
            engine_kwargs,
            on_step=lambda step: first_tokens.set() if step.tokens else None,
            on_death=died.set_result,
        )
    except TempoError as error:
        tell(failed=type(error).__name__, reason=str(error), children=children())
        return
    payload = encode_request("long", range(97, 117), max_tokens=100_000)
    engine.submit(EngineCall("long", "ingress", 0, payload, 20, 100_000))
    await first_tokens.wait()
    tell(children=children())
    reason = await died
    await engine.shutdown()
    tell(died=reason, children=children())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
