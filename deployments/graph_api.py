"""`POST /v1/programs` with a graph: runs it here and tells what happens, as events or at the end.

A client that leaves cancels its program. The output of a tool may be posted to any ingress: the router passes it on.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
import structlog

from deployments import openai_errors
from deployments.declared_graph import parse_graph, parse_output
from deployments.graph_run import Ask, Event, GraphRun, failure_of
from deployments.handle_api import NewProgram
from deployments.program_api import ProgramApi, new_operation
from deployments.program_client import ProgramClient
from deployments.program_identity import resolved_id
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.program_ops import DeliverOutput

SendEvent = Callable[[bytes], Awaitable[None]]

log = structlog.get_logger()


class GraphApi:
    """All declared graphs that run in this ingress. model: what nodes are answered by."""

    def __init__(self, programs: ProgramApi, client: ProgramClient, ask: Ask, model: str) -> None:
        self._programs = programs
        self._client = client
        self._ask = ask
        self._model = model
        self._runs: dict[str, GraphRun] = {}
        client.run_graphs(self)

    # ---- from the router ----

    def tool_output(self, program_id: str, node: str, output: bytes) -> None:
        """The client ran a tool."""
        run = self._runs.get(program_id)
        if run is not None:
            run.deliver(node, msgspec.json.decode(output))

    def program_over(self, program_id: str) -> None:
        """Somebody cancelled the program: its graph ends."""
        run = self._runs.get(program_id)
        if run is not None:
            run.stop()

    def program_news(self, program_id: str, *, is_relegated: bool) -> None:
        """Its deadline is out of reach, or is no longer."""
        run = self._runs.get(program_id)
        if run is not None:
            run.news(is_relegated=is_relegated)

    # ---- from clients ----

    async def deliver(self, given: str, node: str, body: bytes, tenant: str) -> Any:
        """The output of a tool. tenant: "" if only the body may say. Raises ProgramError."""
        output, user = parse_output(body)
        tenant = tenant or user
        op = DeliverOutput(resolved_id(tenant, given), tenant, node, msgspec.json.encode(output).decode())
        await self._client.ask(op)
        return {"object": "tool.output", "node": node}

    async def run(self, new: NewProgram) -> AsyncGenerator[Event]:
        """Make the program and run its graph. Raises ProgramError before the first event for what makes no sense.

        The last event is "program.finished" or "program.cancelled", with the whole of it. Closing it early cancels the
        program, once it has given its first event.
        """
        graph = parse_graph(new.graph)
        operation = new_operation()
        made = await self._programs.create(new, graph, operation)
        program_id = str(made["id"])
        if program_id in self._runs:
            # That one's program was cancelled before its first call, and it has not heard of that yet.
            self._programs.undo(program_id, new.tenant, operation, "an earlier one of its name had not ended here")
            message = (
                f"an earlier graph of program {program_id!r} was cancelled and has not ended here yet: "
                "try again, or give this graph another name"
            )
            raise ProgramError("invalid_program", message, "graph")
        run = GraphRun(program_id, graph, model=self._model, tenant=new.tenant, ask=self._ask, programs=self._client)
        self._runs[program_id] = run
        return self._events(program_id, run, new.tenant, made)

    async def whole(self, events: AsyncGenerator[Event]) -> Any:
        """Wait for the end of a graph that runs: the program, and `outputs` by node.

        Raises ProgramError if a node fails, and if somebody else ends the program.
        """
        outputs: dict[str, Any] = {}
        last: Event = {}
        async with aclosing(events):
            async for event in events:
                last = event
                if event["event"] == "node.finished":
                    outputs[event["node"]] = event["output"]
        if last["event"] == "program.cancelled":
            error = last["error"]
            raise ProgramError(error["code"], error["message"], error["param"] or "")
        return {**last["program"], "outputs": outputs}

    async def _events(
        self, program_id: str, run: GraphRun, tenant: str, made: Mapping[str, Any]
    ) -> AsyncGenerator[Event]:
        failed: Event | None = None
        is_whole = is_ours = has_client_left = False
        try:
            yield {"event": "program.created", "program": dict(made)}
            async with aclosing(run.events()) as events:
                async for event in events:
                    failed = event if event["event"] == "node.failed" else failed
                    yield event
            is_whole = run.is_whole
        except (GeneratorExit, asyncio.CancelledError):
            has_client_left = True
            raise
        finally:
            del self._runs[program_id]
            if not is_whole:
                reason = "its client left" if has_client_left else "its graph could not go on"
                if failed is not None:
                    reason = f"node {failed['node']} failed"
                # The client may be gone, and this task with it: the program must not go on for nobody.
                ending = asyncio.ensure_future(self._cancel(program_id, reason, tenant))
                is_ours = await asyncio.shield(ending)
        program = await (self._finish if is_whole else self._programs.view)(program_id, tenant)
        if program["status"] == "cancelled":
            error = failure_of(failed) if is_ours and failed is not None else _cancelled(program)
            yield {"event": "program.cancelled", "program": program, **openai_errors.program_refused(error).payload()}
        elif is_whole:
            yield {"event": "program.finished", "program": program}
        else:
            message = f"program {program_id!r} is {program['status']}: the rest of its graph cannot run"
            raise ProgramError("program_ended", message, "graph")

    async def _finish(self, program_id: str, tenant: str) -> Any:
        try:
            return await self._programs.finish(program_id, tenant)
        except ProgramError as error:
            if error.code != "program_ended":
                raise
            # Its client has closed it already; the graph was done all the same.
            return await self._programs.view(program_id, tenant)

    async def _cancel(self, program_id: str, reason: str, tenant: str) -> bool:
        """Give the program up, as far as it can be. Returns False if it was over before."""
        try:
            await self._programs.cancel(program_id, reason, tenant)
        except (ProgramError, RouterUnavailableError) as error:
            if isinstance(error, ProgramError) and error.code == "program_ended":
                return False
            # Without a router the next one is told.
            log.warning("graph_not_cancelled", program_id=program_id, reason=reason, problem=str(error))
        return True


def _cancelled(program: Mapping[str, Any]) -> ProgramError:
    return ProgramError("program_cancelled", f"program {program['id']!r} was cancelled: {program['reason']}")
