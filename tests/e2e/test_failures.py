"""The served application when clients leave and processes are killed. Real engines, real kills."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from deployments.handle_api import GenerateRequest
from tempo_router.request import Deadline, Latency
from tests.e2e.conftest import WORKERS
from tests.served import Served

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]
MODEL = "tempo-tiny"
WAIT_S = 90.0


async def eventually(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask again until it holds; fail after WAIT_S."""
    give_up_s = time.monotonic() + WAIT_S
    while not await holds():
        assert time.monotonic() < give_up_s, f"not within {WAIT_S} s: {what}"
        await asyncio.sleep(0.1)


async def nothing_is_open(handle: Any) -> None:
    """Every counter of the ingress and the router is back to zero."""

    async def is_empty() -> bool:
        counts = await handle.snapshot.remote()
        return not any(value for key, value in counts.items() if key != "router") and not any(
            counts["router"][key] for key in ("open_requests", "payloads", "dispatched")
        )

    await eventually(is_empty, "all counters are zero")


async def all_workers_are_attached(handle: Any) -> None:
    async def are_there() -> bool:
        return len((await handle.snapshot.remote())["router"]["workers"]) == WORKERS

    await eventually(are_there, f"{WORKERS} workers are attached")


async def stream_text(client: openai.AsyncOpenAI, prompt: str, tokens: int, started: asyncio.Event) -> str:
    """One greedy stream of exactly so many tokens; `started` is set at its fifth chunk."""
    stream = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    parts: list[str] = []
    async for chunk in stream:
        parts.extend(choice.text for choice in chunk.choices)
        if len(parts) == 5:
            started.set()
    return "".join(parts)


async def stream_all(client: openai.AsyncOpenAI, count: int, tokens: int, meanwhile: Callable[[], Any]) -> list[str]:
    """Run streams side by side; once all have started, do something to the server. Returns their texts."""
    started = [asyncio.Event() for _ in range(count)]
    work = [
        asyncio.create_task(stream_text(client, f"Story {number}:", tokens, event))
        for number, event in enumerate(started)
    ]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), WAIT_S)
    result = meanwhile()
    if asyncio.iscoroutine(result):
        await result
    return await asyncio.wait_for(asyncio.gather(*work), WAIT_S)


async def test_a_client_that_leaves_frees_everything(client: openai.AsyncOpenAI, handle: Any) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="x", max_tokens=3500, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    await stream.close()
    await nothing_is_open(handle)


async def test_the_handle_generates_streams_and_cancels(handle: Any) -> None:
    answer = await handle.generate.remote(
        GenerateRequest(prompt="Hello", slo=Deadline(ttlt_s=60), sampling={"max_tokens": 7, "ignore_eos": True})
    )
    assert len(answer.token_ids) == 7
    assert answer.finish_reason == "length"
    assert answer.outcome.slo_class == "deadline"
    assert answer.outcome.is_met

    chat = GenerateRequest(
        messages=[{"role": "user", "content": "Hi"}],
        slo=Latency(ttft_s=30, tbt_s=5),
        sampling={"max_tokens": 9, "ignore_eos": True},
    )
    parts = [part async for part in handle.options(stream=True).stream.remote(chat)]
    assert sum(len(part.token_ids) for part in parts) == 9
    assert parts[-1].outcome is not None
    assert parts[-1].outcome.is_met

    endless = GenerateRequest(prompt="x", request_id="mine", sampling={"max_tokens": 3500, "ignore_eos": True})
    received = 0
    async for part in handle.options(stream=True).stream.remote(endless):
        received += len(part.token_ids)
        if received == 5:
            await handle.cancel.remote("mine")
    assert received < 3500
    await nothing_is_open(handle)


async def test_streams_survive_a_killed_worker_token_for_token(
    client: openai.AsyncOpenAI, handle: Any, server: Served
) -> None:
    """Greedy answers are the same as without the kill: nothing is missing, nothing comes twice."""
    await all_workers_are_attached(handle)
    expected = await stream_all(client, 8, 150, lambda: None)

    def kill_a_worker() -> None:
        server.processes("ServeReplica:tempo:worker")[0].kill()

    assert await stream_all(client, 8, 150, kill_a_worker) == expected
    await nothing_is_open(handle)
    await all_workers_are_attached(handle)


async def test_streams_survive_a_killed_router_and_new_requests_wait_for_the_next(
    client: openai.AsyncOpenAI, handle: Any, server: Served
) -> None:
    expected = await stream_all(client, 8, 400, lambda: None)
    before = (await handle.snapshot.remote())["router"]["epoch"]

    async def kill_the_router_and_ask() -> None:
        [router] = server.processes("ray::RouterActor")
        router.kill()
        answers = await asyncio.gather(
            *(client.completions.create(model=MODEL, prompt=f"Late {number}", max_tokens=4) for number in range(4))
        )
        assert all(answer.usage and answer.usage.completion_tokens <= 4 for answer in answers)

    assert await stream_all(client, 8, 400, kill_the_router_and_ask) == expected
    assert (await handle.snapshot.remote())["router"]["epoch"] > before
    await nothing_is_open(handle)


async def test_what_cannot_be_continued_fails_honestly(client: openai.AsyncOpenAI, handle: Any, server: Served) -> None:
    """A seeded answer would differ after the loss of its worker, so that request alone ends with an error."""
    await all_workers_are_attached(handle)
    stream = await client.completions.create(
        model=MODEL, prompt="x", max_tokens=3500, seed=7, stream=True, extra_body={"ignore_eos": True}
    )
    events = aiter(stream)
    await anext(events)
    for worker in server.processes("ServeReplica:tempo:worker"):
        worker.kill()
    with pytest.raises(openai.APIError, match="worker was lost"):
        async for _ in events:
            pass
    await nothing_is_open(handle)
    await all_workers_are_attached(handle)
