"""The client side of a bidirectional gRPC stream, opened again whenever it breaks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.message import Message

from cluster.outbox import Outbox
from tempo_router.config import TransportConfig
from tempo_router.errors import TempoError

log = structlog.get_logger()

SendT = TypeVar("SendT", bound=Message)
RecvT = TypeVar("RecvT", bound=Message)
HelloT_co = TypeVar("HelloT_co", bound=Message, covariant=True)
HeardT_contra = TypeVar("HeardT_contra", bound=Message, contravariant=True)

FIRST_RETRY_S = 0.02
LAST_RETRY_S = 1.0


def channel_options(transport: TransportConfig) -> list[tuple[str, int]]:
    """gRPC settings of every stream of ours, client and server; the library's own limit is 4 MiB a message."""
    return [
        ("grpc.max_send_message_length", transport.max_message_bytes),
        ("grpc.max_receive_message_length", transport.max_message_bytes),
        ("grpc.keepalive_time_ms", int(transport.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(transport.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(transport.keepalive_s * 500)),
        # A reconnect after a peer's death must not wait for gRPC's own back-off of up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Every process keeps its own connections: a global pool would tie the lives of unrelated streams together.
        ("grpc.use_local_subchannel_pool", 1),
        # Two processes that bind one port would share it silently.
        ("grpc.so_reuseport", 0),
    ]


class RefusedError(TempoError):
    """The peer, or we, refuse to work together (another version, an older epoch); trying again cannot help soon."""


class LinkEnds(Protocol[HelloT_co, HeardT_contra]):
    """What the owner of a link provides. All methods are called on the event loop and do not block it."""

    def hello(self) -> HelloT_co:
        """The first message of each new stream."""
        ...

    def opened(self, answer: HeardT_contra) -> None:
        """Judge the peer's first message. Raises RefusedError to give the stream up."""
        ...

    def ready(self) -> None:
        """The stream was accepted."""
        ...

    def received(self, message: HeardT_contra) -> None:
        """Any later message."""
        ...

    def closed(self) -> None:
        """The stream, once opened, is gone, and with it what was not sent."""
        ...


class Link(Generic[SendT, RecvT]):
    """Keeps one stream up.

    is_live: the hello of the current stream has been composed, so all that happens from now on must follow it.
    is_open: the peer has answered. Messages belong to one stream: what it did not carry is forgotten when it breaks,
    and the next hello has to say it.

    locate: asks for the peer's host:port before every attempt; may raise, which counts as a failed attempt.
    open_stream: the stub's method for a channel.
    """

    def __init__(
        self,
        name: str,
        *,
        locate: Callable[[], Awaitable[str]],
        open_stream: Callable[[grpc.aio.Channel], Callable[..., Any]],
        ends: LinkEnds[SendT, RecvT],
        transport: TransportConfig,
    ) -> None:
        self.name = name
        self.is_live = False
        self.is_open = False
        self._outbox: Outbox[SendT] = Outbox()
        self._locate = locate
        self._open_stream = open_stream
        self._ends = ends
        self._transport = transport

    async def run(self) -> None:
        """Connect, serve, and connect again, until cancelled."""
        retry_s, last_problem = FIRST_RETRY_S, ""
        while True:
            try:
                address = await self._locate()
                was_open = await self._serve(address)
                problem = "the peer closed the stream"
            except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
                was_open, problem = self._close(), _describe(error)
            except (TempoError, OSError, TimeoutError) as error:
                was_open, problem = self._close(), str(error)
            retry_s = FIRST_RETRY_S if was_open else min(LAST_RETRY_S, retry_s * 2)
            if was_open or problem != last_problem:
                log.warning("link_down", link=self.name, problem=problem, effect="it is opened again until it holds")
            last_problem = problem
            await asyncio.sleep(retry_s)

    def send(self, message: SendT) -> None:
        """Send on the current stream, merged with what waits; without a stream the next hello has to say it."""
        if self.is_live:
            self._outbox.merge(message)

    async def _serve(self, address: str) -> bool:
        async with grpc.aio.insecure_channel(address, options=channel_options(self._transport)) as channel:
            call = self._open_stream(channel)()
            self._outbox.clear()
            self._outbox.put(self._ends.hello())
            self.is_live = True
            writer = asyncio.create_task(self._write(call))
            try:
                await self._read(call)
            finally:
                writer.cancel()
                call.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        return self._close()

    async def _read(self, call: Any) -> None:
        messages: AsyncIterator[RecvT] = call.__aiter__()
        async for first in messages:
            self._ends.opened(first)
            self.is_open = True
            log.info("link_up", link=self.name)
            self._ends.ready()
            break
        async for message in messages:
            self._ends.received(message)

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outbox.take())

    def _close(self) -> bool:
        was_open, self.is_open = self.is_open, False
        self.is_live = False
        self._outbox.clear()
        if was_open:
            self._ends.closed()
        return was_open


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return repr(error)
