"""`tempo serve` as a process: overload, stop, refuse to start. Engines are simulated where they are not the point."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.served import START_S, Served, launched, served

pytestmark = pytest.mark.e2e
MODEL = "tempo-tiny"
SIMULATED: dict[str, Any] = {
    "engine": {
        "kind": "simulated",
        "time_scale": 5.0,
        "engine_kwargs": {"max_num_seqs": 2, "max_model_len": 4096},
    },
    "scheduling": {"max_waiting_requests": 3},
}


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, **more}


async def health_until(http: httpx.AsyncClient, holds: Callable[[int], bool]) -> httpx.Response:
    """Ask /health until its status is as wanted; fail after a minute."""
    async with asyncio.timeout(60):
        while True:
            response = await http.get("/health")
            if holds(response.status_code):
                return response
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def overloaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served(tmp_path_factory.mktemp("overloaded"), SIMULATED) as running:
        yield running


async def test_a_full_queue_is_429_with_a_computed_retry_after_streamed_or_not(overloaded: Served) -> None:
    async with httpx.AsyncClient(timeout=120, base_url=overloaded.url) as http:
        answers = await asyncio.gather(
            *(http.post("/v1/completions", json=body(60, stream=number % 2 == 0)) for number in range(30))
        )
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    for refused in (answer for answer in answers if answer.status_code == 429):
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
    for taken in (answer for answer in answers if answer.status_code == 200):
        assert "error" not in taken.text


async def test_health_tells_readiness_from_liveness(overloaded: Served) -> None:
    async with httpx.AsyncClient(timeout=30, base_url=overloaded.url) as http:
        assert (await http.get("/health")).status_code == 200
        for worker in overloaded.processes("ServeReplica:tempo:worker"):
            worker.kill()
        not_ready = await health_until(http, lambda status: status != 200)
        assert "worker" in not_ready.text
        assert (await http.get("/liveness")).status_code == 200
        await health_until(http, lambda status: status == 200)


async def test_ctrl_c_lets_streams_end_and_leaves_no_process(overloaded: Served) -> None:
    """Runs last in this module: it ends the server."""
    everything = psutil.Process(overloaded.process.pid).children(recursive=True)
    async with (
        httpx.AsyncClient(timeout=120, base_url=overloaded.url) as http,
        http.stream("POST", "/v1/completions", json=body(100, stream=True)) as response,
    ):
        lines = response.aiter_lines()
        await anext(lines)
        overloaded.process.send_signal(signal.SIGINT)
        try:
            rest = [line async for line in lines]
        except httpx.HTTPError as error:
            raise AssertionError(f"the stream was cut: {error!r}\n{overloaded.log[-8000:]}") from error
    assert rest[-1] == "" or rest[-1] == "data: [DONE]"
    assert "data: [DONE]" in rest
    assert await asyncio.to_thread(overloaded.process.wait, 120) == 0, overloaded.log
    assert not [process for process in everything if process.is_running()]


@pytest.mark.vllm
@pytest.mark.timeout(3 * START_S)
def test_a_worker_that_cannot_start_says_why_and_the_command_ends(tmp_path: Path) -> None:
    with launched(tmp_path, {"engine": {"engine_kwargs": {"max_model_len": 100_000_000}}}) as server:
        # Serve tries twice, and each try imports vLLM beside the ingress that does, too.
        assert server.process.wait(timeout=2 * START_S) != 0
        assert "max_model_len" in server.log or "100000000" in server.log


def test_a_model_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, {"model": "./no/such/model"}) as server:
        assert server.process.wait(timeout=60) != 0
        assert "no/such/model" in server.log


def test_a_misspelt_key_is_named_with_the_right_one(tmp_path: Path) -> None:
    with launched(tmp_path, {"scheduling": {"polcy": "edf"}}) as server:
        assert server.process.wait(timeout=60) == 2
        assert "polcy" in server.log
        assert "'policy'" in server.log


def test_redis_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, {"redis_url": "redis://127.0.0.1:1/0"}) as server:
        assert server.process.wait(timeout=60) != 0
        assert "127.0.0.1:1" in server.log
        assert "Redis" in server.log
