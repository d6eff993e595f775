"""An HTTP edge that listens, within the test's process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from deployments.http_edge import HttpEdge
from deployments.ports import free_port
from tests.fleet import eventually


@asynccontextmanager
async def listening(edge: HttpEdge) -> AsyncIterator[str]:
    """Serve an edge over real HTTP; its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(edge, port=port, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    try:
        await eventually(lambda: server.started or serving.done(), "it is served")
        assert server.started, "see what uvicorn says"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving
