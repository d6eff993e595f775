"""The server side of a bidirectional gRPC stream."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import grpc.aio
import structlog

from cluster.outbox import Outbox

log = structlog.get_logger()


async def first_message(requests: AsyncIterator[Any], wanted: str, context: Any) -> Any:
    """The message that opens a stream. Ends the call, by raising, unless it has the field `wanted`."""
    first = await anext(aiter(requests), None)
    if first is None or not first.HasField(wanted):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the first message must be `{wanted}`")
    return first


async def until_first_ends(*work: Coroutine[Any, Any, Any]) -> None:
    """Run parts of a stream until one of them ends, then end all. Raises what went wrong in it.

    That the peer has gone, or the call is over, is an end like any other.
    """
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if error is not None and not isinstance(error, grpc.aio.AioRpcError | grpc.aio.UsageError):
                log.error("stream_failed", exc_info=error)
                raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def serve_stream(
    context: Any, outbox: Outbox[Any], requests: AsyncIterator[Any], on_message: Callable[[Any], None]
) -> None:
    """Write what the outbox gives and read what comes, until either side ends."""

    async def write() -> None:
        while True:
            await context.write(await outbox.take())

    async def read() -> None:
        async for message in requests:
            on_message(message)

    await until_first_ends(write(), read())
