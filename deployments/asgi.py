"""ASGI in a few words: the types of its messages, and whole answers."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from deployments.openai_errors import ApiError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON = (b"content-type", b"application/json")


async def send_error(send: Send, error: ApiError, extra_headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """An error in OpenAI's shape."""
    headers = [*error.headers(), *extra_headers]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.body(), "more_body": False})


async def send_body(send: Send, content: bytes, headers: Iterable[tuple[bytes, bytes]], status: int = 200) -> None:
    """A whole answer."""
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": content, "more_body": False})
