"""One served application for all tests of real engines: two vLLM workers whose steps Tempo plans, one ingress."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import ray

from deployments.client import connect
from tests.served import Served, served

WORKERS = 2
ARGUMENTS: dict[str, Any] = {
    "scheduling": {"policy": "tempo"},
    "engine": {
        "engine_kwargs": {
            "max_model_len": 4096,
            "max_num_seqs": 16,
            "kv_cache_memory_bytes": 64 * 1024 * 1024,
        },
        "frontend_kwargs": {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
    },
    "workers": {"replicas": WORKERS, "drain_timeout_s": 30},
    # Small, so that ordinary prompts take the way of large ones too: fetched by the worker from the ingress.
    "transport": {"inline_payload_bytes": 512},
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served"), ARGUMENTS) as running:
        yield running


PROGRAM_ARGUMENTS: dict[str, Any] = {
    "engine": {"kind": "simulated", "engine_kwargs": {"max_num_seqs": 8, "max_model_len": 4096}},
    "scheduling": {"policy": "tempo", "program_model": "patterns"},
}


@pytest.fixture(scope="session")
def program_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """For all tests of programs that kill nothing: a simulated engine, everything else as users have it."""
    with served(tmp_path_factory.mktemp("programs"), PROGRAM_ARGUMENTS) as running:
        yield running


@pytest.fixture
async def client(server: Served) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def handle(server: Served) -> Iterator[Any]:
    """The Python handle, in a driver connected to the application's Ray."""
    yield connect(server.folder / "data")
    ray.shutdown()
