"""One deadline for several calls of a plain `openai` client.

    with program(client, deadline_s=60, app="research") as task:
        plan = task.client.chat.completions.create(model=..., messages=...)
        ...                                   # every call through task.client belongs to it
    print(task.result["deadline_met"])

Leaving the block finishes the program; an exception cancels it, and with it what still runs.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from openai import AsyncOpenAI, OpenAI


@dataclass
class Task:
    """A program and the client that calls on its behalf. result: what the server says of it, as of the last answer."""

    client: OpenAI
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Its id: give it to whoever else calls on its behalf."""
        return str(self.result["id"])

    def step(self, name: str, *parents: str) -> OpenAI:
        """A client for one step: named, and after these calls (each answer's `x-tempo-call` header names its call)."""
        return self.client.with_options(default_headers=_step(name, parents))

    def extend(self, deadline_s: float) -> None:
        """So many seconds more, from now."""
        self.result = _post(self.client, f"/programs/{self.id}/extend", {"deadline_s": deadline_s})


@dataclass
class AsyncTask:
    """The same with an asynchronous client."""

    client: AsyncOpenAI
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Its id."""
        return str(self.result["id"])

    def step(self, name: str, *parents: str) -> AsyncOpenAI:
        """A client for one step."""
        return self.client.with_options(default_headers=_step(name, parents))

    async def extend(self, deadline_s: float) -> None:
        """So many seconds more, from now."""
        self.result = await _apost(self.client, f"/programs/{self.id}/extend", {"deadline_s": deadline_s})


@contextmanager
def program(client: OpenAI, *, deadline_s: float, app: str = "") -> Iterator[Task]:
    """A program for the calls inside the block."""
    made = _post(client, "/programs", {"deadline_s": deadline_s, "app": app})
    task = Task(client.with_options(default_headers={"x-tempo-program": made["id"]}), made)
    try:
        yield task
    except BaseException:
        task.result = _post(client, f"/programs/{task.id}/cancel", {"reason": "an exception at the client"})
        raise
    task.result = _post(client, f"/programs/{task.id}/finish", {})


@asynccontextmanager
async def async_program(client: AsyncOpenAI, *, deadline_s: float, app: str = "") -> AsyncIterator[AsyncTask]:
    """A program for the calls inside the block."""
    made = await _apost(client, "/programs", {"deadline_s": deadline_s, "app": app})
    task = AsyncTask(client.with_options(default_headers={"x-tempo-program": made["id"]}), made)
    try:
        yield task
    except BaseException:
        task.result = await _apost(client, f"/programs/{task.id}/cancel", {"reason": "an exception at the client"})
        raise
    task.result = await _apost(client, f"/programs/{task.id}/finish", {})


def _step(name: str, parents: tuple[str, ...]) -> dict[str, str]:
    return {"x-tempo-stage": name, **({"x-tempo-parent": ",".join(parents)} if parents else {})}


def _post(client: OpenAI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], client.post(path, cast_to=object, body=body))


async def _apost(client: AsyncOpenAI, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], await client.post(path, cast_to=object, body=body))
