"""Puts headers on the requests of any client that is built on httpx: what a framework knows reaches the server."""

from collections.abc import Callable, Mapping
from typing import Any

import httpx

Current = Callable[[], Mapping[str, str]]
"""The headers of the call that is being made, asked in its own context."""

_MAX_CHARS = 200


def http_client(current: Current, **options: Any) -> httpx.Client:
    """For `OpenAI(http_client=...)`. options: of httpx.Client."""

    def add(request: httpx.Request) -> None:
        request.headers.update(_with_attempt(request, current()))

    return httpx.Client(event_hooks={"request": [add]}, **_with_defaults(options))


def async_http_client(current: Current, **options: Any) -> httpx.AsyncClient:
    """For `AsyncOpenAI(http_client=...)`."""

    async def add(request: httpx.Request) -> None:
        request.headers.update(_with_attempt(request, current()))

    return httpx.AsyncClient(event_hooks={"request": [add]}, **_with_defaults(options))


def clean(value: object) -> str:
    """A name that may stand in a header and be a program's, an agent's or a step's; "" for nothing."""
    text = "" if value is None else str(value)
    return "".join(char if char.isascii() and char.isprintable() else "_" for char in text)[:_MAX_CHARS].strip()


def _with_attempt(request: httpx.Request, headers: Mapping[str, str]) -> dict[str, str]:
    """OpenAI's clients count how often they have tried: the same call, and another attempt at it."""
    found = {name: value for name, value in headers.items() if value}
    count = request.headers.get("x-stainless-retry-count", "0")
    if "x-tempo-call" in found and count.isdigit() and count != "0":
        found["x-tempo-attempt"] = count
    return found


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    # An answer may take as long as its deadline; OpenAI's own client waits ten minutes.
    return {"timeout": httpx.Timeout(600.0, connect=5.0), "follow_redirects": True, **options}
