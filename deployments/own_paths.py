"""What an ingress answers itself: programs, declared graphs, explanations, the console. ASGI around their logic."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import unquote

import msgspec

from deployments import console, openai_errors, program_api
from deployments.asgi import JSON, AsgiApp, Message, Receive, Scope, Send, send_body, send_error
from deployments.graph_api import GraphApi
from deployments.logs import log_unforeseen
from deployments.openai_errors import ApiError
from deployments.program_api import ProgramApi
from deployments.program_client import ProgramClient
from deployments.slo_wire import parse_tenant
from tempo_router.errors import InvalidSloError, ProgramError, RouterUnavailableError

_PATHS = (program_api.PREFIX, program_api.REQUESTS, console.STATE_PATH)
_BEAT_S = 2.0
_DONE = b"data: [DONE]\n\n"


class OwnPaths:
    """front_door: this ingress as its clients see it; nodes of declared graphs are answered through it.

    model: what they are answered by. epoch_s: the clock of dates.
    """

    def __init__(
        self,
        client: ProgramClient,
        front_door: AsgiApp,
        *,
        model: str,
        has_console: bool,
        epoch_s: Callable[[], float],
    ) -> None:
        self._front_door = front_door
        self._has_console = has_console
        self.programs = ProgramApi(client, epoch_s, has_console=has_console)
        self.graphs = GraphApi(self.programs, client, self._ask_ourselves, model)

    def answers(self, path: str) -> bool:
        """Whether a path is one of these."""
        return any(path == known or path.startswith(f"{known}/") for known in _PATHS) or self._is_console(path)

    async def get(self, path: str, scope: Scope, send: Send) -> None:
        """Any method that has no body."""
        if self._is_console(path) and scope["method"] == "GET":
            await send_body(send, console.page(), console.HEADERS)
        else:
            await self._answer_program(path, scope, b"", send)

    def _is_console(self, path: str) -> bool:
        return self._has_console and path in (console.PATH, f"{console.PATH}/")

    async def post(self, path: str, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """What has to do with declared graphs; everything else of programs is one question and one answer."""
        parts = path.removeprefix(program_api.PREFIX).strip("/").split("/")
        is_creation = path.rstrip("/") == program_api.PREFIX
        if not is_creation and not (len(parts) == 4 and parts[1] == "nodes" and parts[3] == "output"):
            await self._answer_program(path, scope, body, send)
            return
        try:
            tenant = parse_tenant(scope["headers"])
            if not is_creation:
                value = await self.graphs.deliver(unquote(parts[0]), unquote(parts[2]), body, tenant)
                await send_body(send, program_api.as_bytes(value), [JSON])
                return
            new, is_streaming = program_api.creation(body, tenant)
            if new.graph is None:
                await self._answer_program(path, scope, body, send)
            elif is_streaming:
                await _stream_events(await self.graphs.run(new), receive, send)
            else:
                # Whoever leaves while the program is made must not leave it behind: it is cancelled once it is there.
                value = await _unless_gone(self.graphs.whole(await self.graphs.run(new)), receive)
                if value is not None:
                    await send_body(send, program_api.as_bytes(value), [JSON])
        except (InvalidSloError, ProgramError, RouterUnavailableError) as error:
            await send_error(send, _refusal(error))

    async def _ask_ourselves(self, path: str, body: bytes) -> tuple[int, bytes]:
        """One request as if it had come from outside; a node of a declared graph is one.

        Raises what the application raises, unless it has answered.
        """
        status, chunks, is_whole = 500, [], False

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                chunks.append(message.get("body", b""))
                is_whole = not message.get("more_body", False)

        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None,
            "server": None,
            "headers": [JSON, (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        try:
            await self._front_door(scope, _then_silent(receive), send)
        except Exception as error:
            if not is_whole:
                raise
            # vLLM answers 500 and hands the exception on, for the server to log: here we are the server.
            log_unforeseen("request_failed", error, path=path)
        return status, b"".join(chunks)

    async def _answer_program(self, path: str, scope: Scope, body: bytes, send: Send) -> None:
        try:
            tenant = parse_tenant(scope["headers"])
        except InvalidSloError as error:
            await send_error(send, openai_errors.invalid_slo(error))
            return
        status, value = await self.programs.answer(scope["method"], path, scope.get("query_string", b""), body, tenant)
        if isinstance(value, ApiError):
            await send_error(send, value)
            return
        await send_body(send, program_api.as_bytes(value), [JSON], status)


def _then_silent(first: Receive) -> Receive:
    """The body once, and then nobody ever leaves."""
    is_given = False

    async def receive() -> Message:
        nonlocal is_given
        if is_given:
            await asyncio.Event().wait()
        is_given = True
        return await first()

    return receive


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result of this work; None, with the work cancelled, if the client leaves before."""
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream_events(events: AsyncGenerator[Mapping[str, Any]], receive: Receive, send: Send) -> None:
    """Server-sent events until they end; if the client leaves, they are closed, which cancels what makes them.

    What goes wrong on the way becomes the last event, since the status has been sent.
    """
    async with aclosing(events) as open_events:
        # Before anything else may happen: from its first event on, closing a graph cancels it.
        first = await anext(open_events)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        one_at_a_time = asyncio.Lock()

        async def write(body: bytes) -> None:
            async with one_at_a_time:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        async def pass_on() -> bool:
            await write(_as_sent(first))
            try:
                async for event in open_events:
                    await write(_as_sent(event))
            except Exception as error:  # noqa: BLE001 - the client must not wait for what will never come
                await write(_as_sent({"event": "error", **_refusal(error).payload()}))
            return True

        beating = asyncio.create_task(_beat(write))
        try:
            is_over = await _unless_gone(pass_on(), receive)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
    if is_over:
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})


def _as_sent(event: Mapping[str, Any]) -> bytes:
    return b"event: " + str(event["event"]).encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _refusal(error: Exception) -> ApiError:
    """What a client is told of an error."""
    match error:
        case InvalidSloError():
            return openai_errors.invalid_slo(error)
        case ProgramError():
            return openai_errors.program_refused(error)
        case RouterUnavailableError():
            return openai_errors.no_router()
        case _:
            log_unforeseen("graph_failed", error)
            return openai_errors.internal_error()


async def _beat(write: Callable[[bytes], Awaitable[None]]) -> None:
    """A comment now and then: a proxy between us hears of a client that left only when it has something for it."""
    while True:
        await asyncio.sleep(_BEAT_S)
        await write(b": still working\n\n")
