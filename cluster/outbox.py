"""Messages on their way into one gRPC stream: bounded, and merged while the stream is busy.

gRPC's write waits for flow control. What is put meanwhile either joins the last waiting message, so that a busy
stream carries fewer, larger messages and an idle one adds no delay, or queues behind it.
"""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

MERGED_BYTES = 1024 * 1024
"""Messages are merged up to this size: far below gRPC's limit of one message, beyond which the stream would break."""


class OutboxFullError(Exception):
    """The reader is so slow that the bound was reached; the stream must be given up."""


class Outbox(Generic[M]):
    """One writer takes, any number of callers in the same event loop put.

    limit_bytes bounds what waits, counted by encoded size. Without a limit nothing is counted: use that only where
    the amount is bounded otherwise (control messages, bounded by the open requests).
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._waiting: deque[M] = deque()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._limit_bytes = limit_bytes
        self._can_grow = False
        self._grown_bytes = 0
        self._has_some = asyncio.Event()

    def put(self, message: M) -> None:
        """Queue a message by itself: nothing is merged into it. Raises OutboxFullError at the bound."""
        self._can_grow = False
        if self._limit_bytes is not None:
            size = message.ByteSize()
            if self._bytes + size > self._limit_bytes:
                raise OutboxFullError(f"{self._bytes} bytes wait and {size} more would pass {self._limit_bytes}")
            self._sizes.append(size)
            self._bytes += size
        self._waiting.append(message)
        self._has_some.set()

    def merge(self, message: M) -> None:
        """Join the message with the last waiting one, if that was merged too. For messages of repeated fields only."""
        size = message.ByteSize()
        is_room = self._grown_bytes + size <= MERGED_BYTES
        if self._waiting and self._can_grow and self._limit_bytes is None and is_room:
            self._waiting[-1].MergeFrom(message)
            self._grown_bytes += size
        else:
            self.put(message)
            self._can_grow = True
            self._grown_bytes = size

    async def take(self) -> M:
        """The oldest message; waits for one."""
        while not self._waiting:
            self._has_some.clear()
            await self._has_some.wait()
        if self._limit_bytes is not None:
            self._bytes -= self._sizes.popleft()
        return self._waiting.popleft()

    def clear(self) -> None:
        """Forget all that waits: the stream they were meant for is gone."""
        self._waiting.clear()
        self._sizes.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)
