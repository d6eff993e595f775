"""An ingress's side of programs: what it asks of the router, kept until it is answered and stored.

A router that dies has perhaps carried out what it was asked, and perhaps not: the next one is told again, under the
same number, and carries out what it does not know.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from cluster import wire_pb2 as wire
from cluster.program_desk import QUESTIONS
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.program_ops import BeginCall, CreateProgram

log = structlog.get_logger()

MOST_ASKED = 50_000
"""Operations on programs that are kept for a later router, at most. Guessed."""

_TAKEN_BACK = (BeginCall.__name__, CreateProgram.__name__)
"""What its asker takes back when nobody answers: a call, and the program of a graph, which nothing would run."""


class GraphRunner(Protocol):
    """Who runs declared graphs here. Called on the event loop; programs that are not run here are ignored."""

    def tool_output(self, program_id: str, node: str, output: bytes) -> None:
        """The output of a tool came, as JSON."""
        ...

    def program_over(self, program_id: str) -> None:
        """The program was cancelled."""
        ...

    def program_news(self, program_id: str, *, is_relegated: bool) -> None:
        """Whether the program's deadline is out of reach; may be said again."""
        ...


class _NoGraphs:
    def tool_output(self, program_id: str, node: str, output: bytes) -> None:
        """Nobody waits for it."""

    def program_over(self, program_id: str) -> None:
        """Nobody minds."""

    def program_news(self, program_id: str, *, is_relegated: bool) -> None:
        """Nobody minds."""


@dataclass(slots=True)
class _Asked:
    """An operation on programs. answer: None when nobody waits for one."""

    message: wire.ProgramOp
    answer: asyncio.Future[bytes] | None


class IngressPrograms:
    """Operations on programs, from one ingress. Belongs to one event loop.

    send: into the stream to the router; lost if there is none. wait_s: for an answer. graphs: who runs declared graphs.
    """

    def __init__(self, ingress_id: str, *, send: Callable[[wire.IngressToRouter], None], wait_s: float) -> None:
        self.ingress_id = ingress_id
        self.graphs: GraphRunner = _NoGraphs()
        self._send = send
        self._wait_s = wait_s
        self._asked: dict[str, _Asked] = {}
        self._numbers = itertools.count(1)

    @property
    def unstored(self) -> int:
        """Operations that a new router would be told again."""
        return len(self._asked)

    async def ask(self, kind: str, body: bytes) -> bytes:
        """Have an operation carried out and wait for its result, both JSON.

        Raises ProgramError, or RouterUnavailableError when no router answers in time. A change that was sent is
        carried out all the same when a router comes, unless it is taken back; a question that nobody waits for any
        more is forgotten.
        """
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        op_id = self._keep(kind, body, answer)
        try:
            async with asyncio.timeout(self._wait_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise RouterUnavailableError(f"no router answered within {self._wait_s} s; {_what_next(kind)}") from None
        finally:
            if kind in QUESTIONS:
                self._asked.pop(op_id, None)

    def tell(self, kind: str, body: bytes) -> None:
        """Have an operation carried out that nobody waits for; it is kept until it is stored."""
        self._keep(kind, body, None)

    def repeat(self) -> None:
        """A router is there, perhaps a new one: tell it all that may not be stored, in order."""
        for asked in list(self._asked.values()):
            self._send(wire.IngressToRouter(program_ops=[asked.message]))

    def router_said(self, message: wire.RouterToIngress) -> None:
        """Answers, outputs of tools, and programs that were given up, are given up no longer, or are over."""
        for answer in message.program_answers:
            self._answered(answer)
        for output in message.tool_outputs:
            self.graphs.tool_output(output.program_id, output.node, output.output)
        for news in message.program_news:
            self.graphs.program_news(news.program_id, is_relegated=news.is_relegated)
        for program_id in message.programs_over:
            self.graphs.program_over(program_id)

    def _keep(self, kind: str, body: bytes, answer: "asyncio.Future[bytes] | None") -> str:
        """The operation's name."""
        message = wire.ProgramOp(op_id=f"{self.ingress_id}:{next(self._numbers)}", kind=kind, body=body)
        self._asked[message.op_id] = _Asked(message, answer)
        if len(self._asked) > MOST_ASKED:
            # A router that has been away for so long, or a Redis: the oldest news are of no use to anyone any more.
            oldest = self._asked.pop(next(iter(self._asked)))
            log.warning("program_news_dropped", kind=oldest.message.kind)
        self._send(wire.IngressToRouter(program_ops=[message]))
        return message.op_id

    def _answered(self, answer: wire.ProgramAnswer) -> None:
        asked = self._asked.get(answer.op_id)
        if asked is None:
            return
        is_awaited = asked.answer is not None and not asked.answer.done()
        has_result = bool(answer.error_code) or answer.HasField("result")
        # What it came to may have been lost with a stream; then it was asked again, and only that answer tells.
        if answer.is_stored and (has_result or not is_awaited):
            del self._asked[answer.op_id]
        if asked.answer is None or not is_awaited:
            return
        if answer.error_code:
            asked.answer.set_exception(ProgramError(answer.error_code, answer.error, answer.field))  # type: ignore[arg-type]
            # Whoever asked may have left.
            asked.answer.exception()
        elif answer.HasField("result"):
            asked.answer.set_result(answer.result)


def _what_next(kind: str) -> str:
    if kind in QUESTIONS:
        return "ask again"
    return "try again" if kind in _TAKEN_BACK else "what was asked is carried out once one is back"
