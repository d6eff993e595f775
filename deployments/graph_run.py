"""Runs a declared graph: each node as a request of its own through this ingress's front door, as soon as it may.

So a node is served as any other call of its program: by the program's deadline, under its tenant, visible in its graph.
The run lives with the request that declared it; when that leaves, the program is cancelled.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any

import msgspec

from deployments import openai_errors
from deployments.declared_graph import DeclaredGraph, Node, Unanswered, request_body, tool_inputs
from deployments.logs import log_unforeseen
from deployments.openai_errors import ApiError
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.program_ops import EndCall

Ask = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""Sends a request to this ingress: (path, body as JSON) -> (status, body)."""

Event = dict[str, Any]

_NUMBER = re.compile(r"[+-]?\d+", re.ASCII)
"""It would be taken for the number of a stage, not for what the step is called."""


class GraphRun:
    """One graph on its way. program_id: made for it. deliver: puts the output of a tool in, by node."""

    def __init__(
        self, program_id: str, graph: DeclaredGraph, *, model: str, tenant: str, ask: Ask, programs: ProgramClient
    ) -> None:
        self._program_id = program_id
        self._graph = graph
        self._model = model
        self._tenant = tenant
        self._ask = ask
        self._programs = programs
        self.outputs: dict[str, Any] = {}
        # Tools whose beginning is not confirmed yet, and outputs that came for them; those that wait for theirs.
        self._beginning: set[str] = set()
        self._early: dict[str, Any] = {}
        self._tools: set[str] = set()
        self._is_relegated = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_whole(self) -> bool:
        """Whether every node has ended."""
        return len(self.outputs) == len(self._graph.nodes)

    async def events(self) -> AsyncGenerator[Event]:
        """What happens, as it happens: tools that wait, nodes that ended, a deadline that came to be out of reach.

        Ends after the last node, or a failed one.
        """
        try:
            unanswered = Unanswered(self._graph.nodes)
            await self._begin(unanswered.ready)
            while not self.is_whole:
                event = await self._events.get()
                if event["event"] == "node.finished":
                    self.outputs[event["node"]] = event["output"]
                if event["event"] == "stopped":
                    return
                yield event
                if event["event"] == "node.failed":
                    return
                if event["event"] == "node.finished":
                    await self._begin(unanswered.answered(event["node"]))
        finally:
            # Not waited for: a front end may take its time, and who cancels the program ends its requests anyway.
            for task in list(self._tasks):
                task.cancel()

    def deliver(self, node_id: str, output: Any) -> None:
        """The client ran a tool. Once only; what nobody waits for is dropped (the desk has refused it before)."""
        if node_id in self._beginning:
            self._early.setdefault(node_id, output)
        elif node_id in self._tools:
            self._tools.discard(node_id)
            self._programs.end(EndCall(self._program_id, node_id, 0, "completed"))
            self._events.put_nowait({"event": "node.finished", "node": node_id, "output": output})

    def news(self, *, is_relegated: bool) -> None:
        """The program's deadline is out of reach, or is no longer. Told to the client if it has changed."""
        if is_relegated != self._is_relegated:
            self._is_relegated = is_relegated
            name = "program.relegated" if is_relegated else "program.reinstated"
            self._events.put_nowait({"event": name, "program_id": self._program_id})

    def stop(self) -> None:
        """The program is over."""
        self._events.put_nowait({"event": "stopped"})

    async def _begin(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.tool:
                self._events.put_nowait(await self._tool(node))
                if node.node_id in self._early:
                    self.deliver(node.node_id, self._early.pop(node.node_id))
            else:
                task = asyncio.create_task(self._answer(node), name=f"node {node.node_id}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _tool(self, node: Node) -> Event:
        """A tool begins, as far as its program still may go on."""
        identity = Identity(
            "explicit", self._program_id, call_id=node.node_id, label=node.label, parents=node.after, is_tool=True
        )
        self._beginning.add(node.node_id)
        try:
            needed = tool_inputs(node, self.outputs)
            await self._programs.begin(identity, tenant=self._tenant, app="", now_epoch_s=0.0)
        except ProgramError as error:
            return _failed(node, openai_errors.program_refused(error))
        except RouterUnavailableError:
            return _failed(node, openai_errors.no_router())
        finally:
            self._beginning.discard(node.node_id)
        self._tools.add(node.node_id)
        return {"event": "tool.waiting", "node": node.node_id, "tool": node.tool, "inputs": needed}

    async def _answer(self, node: Node) -> None:
        """Whatever comes of it becomes an event: without one the graph would wait for this node for ever."""
        try:
            event = await self._asked(node)
        except ProgramError as error:
            event = _failed(node, openai_errors.program_refused(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the node has failed
            log_unforeseen("node_failed", error, program_id=self._program_id, node=node.node_id)
            event = _failed(node, openai_errors.internal_error())
        self._events.put_nowait(event)

    async def _asked(self, node: Node) -> Event:
        path, body = request_body(node, self.outputs, self._model)
        # In the body: headers hold no more than Latin letters.
        body["program"] = {"id": self._program_id, "call": node.node_id, "parents": list(node.after)}
        if not _NUMBER.fullmatch(node.label.strip()):
            body["program"]["stage"] = node.label
        if self._tenant:
            body["user"] = self._tenant
        status, content = await self._ask(path, msgspec.json.encode(body))
        return _ended(node, status, content)


def _ended(node: Node, status: int, content: bytes) -> Event:
    try:
        answer = msgspec.json.decode(content)
    except msgspec.DecodeError:
        answer = None
    if status == 200 and isinstance(answer, dict) and answer.get("choices"):
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        return {
            "event": "node.finished",
            "node": node.node_id,
            "output": _output(choice),
            "finish_reason": choice.get("finish_reason"),
            "output_tokens": usage.get("completion_tokens", 0),
        }
    error = answer.get("error") if isinstance(answer, dict) else None
    return {"event": "node.failed", "node": node.node_id, "status": status, "error": error}


def _output(choice: dict[str, Any]) -> Any:
    """The text of an answer; of one that calls tools all that it says, since there may be no text at all."""
    message = choice.get("message") or {"content": choice.get("text")}
    if message.get("tool_calls"):
        return {"content": message.get("content"), "tool_calls": message["tool_calls"]}
    return message.get("content") or ""


def _failed(node: Node, error: ApiError) -> Event:
    """A node that got no answer at all, as if it had got this one."""
    return {"event": "node.failed", "node": node.node_id, "status": error.status, **error.payload()}


def failure_of(event: Event) -> ProgramError:
    """A failed node as an error for a client that waits for the whole."""
    error = event["error"] if isinstance(event["error"], dict) else {}
    message = f"node {event['node']!r} failed with status {event['status']}: {error.get('message', 'no reason given')}"
    return ProgramError("node_failed", message, f"graph.nodes.{event['node']}")
