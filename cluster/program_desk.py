"""The router's part in programs: carries out what ingresses ask, keeps the graphs, has them written, tells the core.

An ingress keeps what it asked until it is told that it is stored, and asks a new router again. So a router may die at
any moment: what it answered is in Redis, or comes again. But for what Redis refuses for good: that is answered as if it
were stored. Nothing here waits on the path of a request.
"""

import asyncio
import heapq
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import structlog

from cluster import wire_pb2 as wire
from cluster.program_store import ProgramStore
from cluster.program_writer import ProgramWriter
from cluster.redis_store import ScriptCall
from tempo_router.config import ProgramsConfig
from tempo_router.errors import ProgramError, StoreRefusedError, StoreUnavailableError
from tempo_router.events import Event, ProgramFinished, ProgramOutlined, ProgramRelegated, ProgramRetargeted
from tempo_router.graph_outline import ended_stages
from tempo_router.ledger import Program
from tempo_router.pattern_history import KnownPrograms, PatternHistory
from tempo_router.patterns import Outline
from tempo_router.program_book import Change, ProgramBook
from tempo_router.program_graph import ProgramGraph, ProgramStatus
from tempo_router.program_ops import (
    BeginCall,
    CancelGraph,
    CancelProgram,
    CreateProgram,
    DeliverOutput,
    EndCall,
    ExtendProgram,
    FinishProgram,
    ProgramOp,
)
from tempo_router.program_view import Outlook, program_view, summary
from tempo_router.request import ProgramCall, ProgramId, RequestSpec

log = structlog.get_logger()

SWEEP_S = 0.5
MOST_OUTLINES_AGAIN = 512
"""Outlines that are written once more when Redis may have lost some."""
MOST_LISTED = 1000
_UNTIL_SETTLED = ("unknown_program", "unknown_call", "program_exists")
"""What a new router refuses only when all peers had time to say again what was not stored."""

STALE_DEADLINE_S = 1.0
"""More than clocks of two machines and a slow link make of the same deadline. Guessed."""


class ViewProgram(msgspec.Struct):
    """Show one program."""

    program_id: str
    tenant: str


class ListPrograms(msgspec.Struct):
    """Show the programs of a tenant: in progress first, oldest first; then those that ended, newest first."""

    tenant: str
    status: ProgramStatus | None = None
    app: str | None = None
    name: str | None = None
    limit: int = 100
    after: str | None = None


class ContinueResponse(msgspec.Struct):
    """Which program and call gave this answer."""

    tenant: str
    response_id: str


class ExplainRequest(msgspec.Struct):
    """Why a request was served as it was."""

    name: str
    tenant: str


class ViewConsole(msgspec.Struct):
    """What the console shows. most: programs. tenant: whose; "" for all."""

    most: int = 24
    tenant: str = ""


_KINDS: dict[str, Any] = {
    one.__name__: one
    for one in (
        CreateProgram, BeginCall, EndCall, ExtendProgram, FinishProgram, CancelProgram, CancelGraph,
        ViewProgram, ListPrograms, ContinueResponse, ExplainRequest, ViewConsole, DeliverOutput,
    )
}  # fmt: skip
_decoders = {name: msgspec.json.Decoder(kind) for name, kind in _KINDS.items()}

QUESTIONS = frozenset(
    one.__name__ for one in (ViewProgram, ListPrograms, ContinueResponse, ExplainRequest, ViewConsole)
)
"""Kinds that change nothing: once nobody waits for the answer, they need not be asked again."""

Send = Callable[[str, wire.RouterToIngress], None]
"""Send to an ingress; nothing if it is away: what it asked it asks again."""

MOST_OUTPUT_BYTES = 64 * 1024 * 1024
"""Of the outputs of tools that their graphs have not taken yet: an ingress may be away for seconds. Guessed."""

MOST_TAKEN = 10_000
"""Outputs whose operation is remembered once they are taken: it is told again when its answer was lost. Guessed."""

TOOL = "tool: "
"""So the labels of tools begin."""


@dataclass(frozen=True, slots=True)
class _Output:
    """What a tool gave, until its graph has taken it. asked_by, op_id: who told it. runner: who runs the graph."""

    asked_by: str
    op_id: str
    runner: str
    output: wire.ToolOutput


class ProgramDesk:
    """Programs of one router life. fence: its number. handle: gives the core an event.

    cancel_calls: ends the requests of a program, wherever they are. outlook: what is foretold of a program.
    least_left_s: what it still needs even if all goes well. patterns: learns from programs that ended, if anyone does.
    questions: answers what is asked about more than programs, by the type of what is asked.
    most_answer_bytes: of one answer. A larger one than a message may be would break its ingress's stream, and again
    whenever it is asked for once more.
    """

    def __init__(
        self,
        config: ProgramsConfig,
        store: ProgramStore,
        *,
        fence: int,
        handle: Callable[[Event], None],
        send: Send,
        cancel_calls: Callable[[ProgramId], None],
        outlook: Callable[[ProgramGraph, float], Outlook | None],
        least_left_s: Callable[[ProgramId], float] = lambda _: 0.0,
        patterns: PatternHistory | None = None,
        questions: Mapping[type, Callable[[Any], Any]] | None = None,
        most_answer_bytes: int = 32 * 1024 * 1024,
        epoch_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._fence = fence
        self._handle = handle
        self._send = send
        self._cancel_calls = cancel_calls
        self._outlook = outlook
        self._least_left_s = least_left_s
        self._patterns = patterns
        self._questions = questions or {}
        self._most_answer_bytes = most_answer_bytes
        self._pattern_age_s = config.pattern_age_s
        self._epoch_s = epoch_s
        # Programs that moved since the last sweep; and (when its deadline may come to be out of reach, program) of all,
        # looked at then, and set anew where there is hope.
        self._moved: dict[ProgramId, None] = {}
        self._doubts: list[tuple[float, ProgramId]] = []
        self._deferred: list[tuple[str, wire.ProgramOp]] | None = []
        self._lookups: set[asyncio.Task[None]] = set()
        # The last ones stored, oldest first.
        self._outlines: deque[Outline] = deque(maxlen=MOST_OUTLINES_AGAIN)
        # By program and node.
        self._outputs: dict[tuple[str, str], _Output] = {}
        self._output_bytes = 0
        # Which operation brought the outputs that were taken last, by program and node.
        self._taken: OrderedDict[tuple[str, str], str] = OrderedDict()
        # How to answer those who wait for what they asked to be stored, by operation.
        self._unanswered: dict[str, Callable[[], None]] = {}
        self.book = ProgramBook(most=config.max_programs, linger_s=config.keep_s)
        self.writer = ProgramWriter(store, self._whole, most=config.max_unwritten, on_away=self._answer_unstored)

    # ---- life ----

    async def restore(self) -> KnownPrograms:
        """Read the programs in progress, the last ones that ended, and outlines.

        Raises StoreUnavailableError, StoreRefusedError. Returns what `patterns` was told of them.
        """
        now_s = self._epoch_s()
        outlines: list[Outline] = []
        if self._patterns is not None:
            oldest_s = now_s - self._pattern_age_s
            outlines = [one for one in await self._store.load_patterns() if one.at_s >= oldest_s]
            self._outlines.extend(reversed(outlines[:MOST_OUTLINES_AGAIN]))
        for ended in await self._store.load_ended():
            self.book.restore(ended)
        graphs = await self._store.load_live()
        for graph in graphs:
            self.book.restore(graph)
            self._moved[graph.program_id] = None
        if self._patterns is None:
            return KnownPrograms()
        now_here_s = time.monotonic()
        unfolding = tuple(
            (graph.program_id, tuple(ended_stages(graph)), now_here_s - (now_s - graph.last_s)) for graph in graphs
        )
        here = (replace(one, at_s=now_here_s - (now_s - one.at_s)) for one in reversed(outlines))
        known = KnownPrograms(tuple(here), unfolding)
        self._patterns.begin(known)
        return known

    def settled(self) -> None:
        """Every ingress had time to say again what was not stored: now what is unknown does not exist."""
        for graph in self.book.live:
            self._tell_outline(graph)
        deferred, self._deferred = self._deferred or [], None
        for owner, op in deferred:
            self.asked(owner, op)

    def store_again(self) -> None:
        """Redis may have lost what it acknowledged last: write all programs that are known, and the latest outlines."""
        programs = [*self.book.live, *self.book.ended]
        log.info("programs_written_again", programs=len(programs), outlines=len(self._outlines))
        outline_of = partial(self._store.script_for_pattern, fence=self._fence, is_again=True)
        self.writer.write_again(
            [
                *((len(graph.calls), partial(self._whole, graph)) for graph in programs),
                *((1, partial(outline_of, outline)) for outline in self._outlines),
            ]
        )

    async def sweep(self) -> None:
        """Relegate what is late and close what nobody will finish, now and then, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            if self._deferred is not None:
                continue  # What an earlier router was asked, and did not store, may give a program more time.
            now_s = self._epoch_s()
            self._changed(self.book.overdue(now_s))
            self._relegate_hopeless(now_s)

    def _relegate_hopeless(self, now_s: float) -> None:
        moved, self._moved = self._moved, {}
        while self._doubts and self._doubts[0][0] <= now_s:
            moved[heapq.heappop(self._doubts)[1]] = None
        for program_id in moved:
            graph = self.book.find(program_id)
            if graph is None or graph.status != "running" or graph.deadline_s is None:
                continue
            at_s = graph.deadline_s - self._least_left_s(program_id)
            if at_s <= now_s:
                self._changed(self.book.relegate(graph, now_s))
            else:
                heapq.heappush(self._doubts, (max(at_s, now_s + SWEEP_S), program_id))

    async def stop(self) -> None:
        """Write what waits. Raises StoreUnavailableError, LeaseLostError."""
        for task in self._lookups:
            task.cancel()
        await self.writer.flush()

    def owners_gone(self, present: Iterable[str]) -> None:
        """Calls and graphs whose ingress is not among these any more have lost their clients."""
        owners = {call.owner for graph in self.book.live for call in graph.running}
        owners |= {graph.runner for graph in self.book.live if graph.runner}
        for owner in sorted(owners - set(present)):
            self.ingress_gone(owner)

    def ingress_back(self, owner: str) -> None:
        """An ingress has a stream again: what its graphs were told may have been lost with the one before.

        It may have been away for so long that its programs were cancelled, and a graph whose tool runs asks nothing.
        """
        cancelled = [
            graph.program_id for graph in self.book.ended if graph.runner == owner and graph.status == "cancelled"
        ]
        if owner and cancelled:
            self._send(owner, wire.RouterToIngress(programs_over=cancelled))
        for one in self._outputs.values():
            if one.runner == owner:
                self._send(owner, wire.RouterToIngress(tool_outputs=[one.output]))

    def ingress_gone(self, owner: str) -> None:
        """An ingress is gone for good."""
        self._changed(self.book.owner_gone(owner, self._epoch_s()))

    def answered(self, program_id: str, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """The engine has ended the answer of a call."""
        graph = self.book.find(program_id)
        if graph is not None:
            graph.answered(call_id, prompt_tokens, output_tokens)

    def tell_core(self, program_id: ProgramId, program: Program | None) -> None:
        """Tell the core what it does not know of a program: it has it from calls whose senders may not know either.

        program: as the core knows it; None if it does not.
        """
        graph = self.book.find(program_id)
        if graph is None or graph.is_over or graph.deadline_s is None:
            return
        now_s, deadline_s = self._deadline(graph.deadline_s)
        if program is not None and abs(deadline_s - program.deadline_s) > STALE_DEADLINE_S:
            self._handle(ProgramRetargeted(now_s, program_id, deadline_s))
        if graph.status == "relegated" and not (program is not None and program.is_lost):
            self._handle(ProgramRelegated(now_s, program_id))

    def corrected(self, spec: RequestSpec) -> RequestSpec:
        """A call of a program with the deadline that its program has now: its sender may have missed that it moved."""
        if not isinstance(spec.slo, ProgramCall):
            return spec
        graph = self.book.find(spec.slo.program_id)
        if graph is None or graph.is_over or graph.deadline_s is None:
            return spec
        ttlt_s = self._deadline(graph.deadline_s)[1] - spec.arrival_s
        is_stale = abs(ttlt_s - spec.slo.ttlt_s) > STALE_DEADLINE_S
        return replace(spec, slo=ProgramCall(graph.program_id, ttlt_s)) if is_stale else spec

    def is_cancelled(self, program_id: str) -> bool:
        """Whether this program was cancelled, as far as is remembered."""
        graph = self.book.find(program_id) if program_id else None
        return graph is not None and graph.status == "cancelled"

    def _deadline(self, deadline_epoch_s: float) -> tuple[float, float]:
        """(now, a date), both on the monotonic clock."""
        now_s = time.monotonic()
        return now_s, now_s + deadline_epoch_s - self._epoch_s()

    # ---- what is asked ----

    def asked(self, owner: str, message: wire.ProgramOp) -> None:
        """Carry out one operation of an ingress and answer it."""
        try:
            op = _decoders[message.kind].decode(message.body)
        except (msgspec.DecodeError, KeyError) as error:
            self._refuse(owner, message, ProgramError("invalid_program", f"{message.kind}: {error}"))
            return
        if self._deferred is not None and self._must_wait(op):
            self._deferred.append((owner, message))
            return
        try:
            self._carry_out(owner, message, op)
        except ProgramError as error:
            if error.code in _UNTIL_SETTLED and self._deferred is not None:
                # Another ingress may still tell of the program, of the call that this one follows, or of more time.
                self._deferred.append((owner, message))
            elif error.code == "unknown_program" and not isinstance(op, BeginCall | CreateProgram):
                self._look_up(owner, message, op, error)
            else:
                self._refuse(owner, message, error)

    def _must_wait(self, op: Any) -> bool:
        """Whether what came before it may still be told again, by who told it to an earlier router."""
        if isinstance(op, EndCall):
            # Its beginning may wait itself, for the call that it follows.
            return self.book.holder(op.program_id, op.call_id) is None
        # Not CancelGraph: who tells it told the creation just before, and the next of that name must find it free.
        return isinstance(op, FinishProgram | CancelProgram | ExtendProgram)

    def _carry_out(self, owner: str, message: wire.ProgramOp, op: Any) -> None:
        now_s = self._epoch_s()
        match op:
            case ViewProgram():
                graph = self.book.of_tenant(op.program_id, op.tenant)
                self._answer(owner, message, self.view(graph))
            case ListPrograms():
                self._answer(owner, message, self._listed(op))
            case ContinueResponse():
                self._answer(owner, message, self.book.continued(op.tenant, op.response_id))
            case DeliverOutput():
                self._deliver(owner, message, op)
            case ExplainRequest() | ViewConsole():
                self._answer(owner, message, self._questions[type(op)](op))
            case _:
                self._change(owner, message, op, now_s)

    def _change(self, owner: str, message: wire.ProgramOp, op: ProgramOp, now_s: float) -> None:
        if self.writer.is_full and self._is_new(op):
            text = "programs cannot be stored at the moment, and too much waits already; try again later"
            raise ProgramError("store_unavailable", text)
        graph, changes = self.book.apply(op, now_s)
        if isinstance(op, BeginCall):
            assert graph is not None
            ticket = self.book.ticket(graph, graph.calls[op.call.call_id], now_s)
            self._answer(owner, message, ticket, is_stored=False)
            if graph.status == "relegated":
                # Its ingress has not heard of it if this is its first call there, or an earlier router gave it up.
                self._send(owner, _news_of(graph))
        elif not isinstance(op, EndCall):
            self._unanswered[message.op_id] = lambda: self._answer(
                owner, message, self._after_change(graph), is_stored=False
            )
            if self.writer.is_away:
                self._answer_unstored()
        self._changed(changes)
        if isinstance(op, ExtendProgram):
            now_here_s, deadline_s = self._deadline(op.deadline_s)
            self._handle(ProgramRetargeted(now_here_s, ProgramId(op.program_id), deadline_s))

        def told() -> None:
            # Of what Redis refuses for good, too: an ingress that kept it would have every later router refused.
            self._unanswered.pop(message.op_id, None)
            answer = wire.ProgramAnswer(op_id=message.op_id, is_stored=True)
            if not isinstance(op, BeginCall | EndCall):
                answer.result = bytes(self._after_change(graph))
            self._tell(owner, answer)

        self.writer.put(None, graph, told)

    def _answer_unstored(self) -> None:
        """Clients need not wait for Redis: changes are kept here and at the ingress until it is back."""
        unanswered, self._unanswered = self._unanswered, {}
        for answer in unanswered.values():
            answer()

    def _deliver(self, owner: str, message: wire.ProgramOp, op: DeliverOutput) -> None:
        """Pass an output on. Until its graph has taken it, it is kept here, and at the ingress for a later router."""
        graph = self.book.of_tenant(op.program_id, op.tenant)
        place = (graph.program_id, op.node)
        if self._taken.get(place) == message.op_id:
            # Told again, as the answer was lost with a stream: the same answer, whatever has become of the program.
            self._answer(owner, message, None)
            return
        if graph.is_over:
            text = f"program {op.program_id!r} is {graph.status}: its graph takes no output of {op.node!r} any more"
            raise ProgramError("program_ended", text, "program")
        node = graph.calls.get(op.node)
        if node is None or not node.label.startswith(TOOL):
            raise ProgramError("unknown_call", f"no tool {op.node!r} of {op.program_id!r} was asked for", "node")
        kept = self._outputs.get(place)
        if node.status != "running" or (kept is not None and kept.op_id != message.op_id):
            raise ProgramError("call_ended", f"tool {op.node!r} of {op.program_id!r} has its output", "node")
        if kept is None:
            output = wire.ToolOutput(program_id=op.program_id, node=op.node, output=op.output.encode())
            kept = _Output(owner, message.op_id, node.owner, output)
            self._keep_output(place, kept)
        self._answer(owner, message, None, is_stored=False)
        self._send(kept.runner, wire.RouterToIngress(tool_outputs=[kept.output]))

    def _keep_output(self, place: tuple[str, str], kept: _Output) -> None:
        size = len(kept.output.output)
        if self._output_bytes + size > MOST_OUTPUT_BYTES:
            text = (
                f"outputs of tools that their graphs have not taken yet take {self._output_bytes} bytes; with this one "
                f"they would take more than {MOST_OUTPUT_BYTES}: post it again later"
            )
            raise ProgramError("store_unavailable", text, "output")
        self._outputs[place] = kept
        self._output_bytes += size

    def _output_taken(self, program_id: str, node: str) -> None:
        """A call has ended; if it is a tool, nobody waits for its output any more."""
        kept = self._outputs.pop((program_id, node), None)
        if kept is not None:
            self._output_bytes -= len(kept.output.output)
            self._taken[program_id, node] = kept.op_id
            self._taken.move_to_end((program_id, node))
            if len(self._taken) > MOST_TAKEN:
                self._taken.popitem(last=False)
            self._tell(kept.asked_by, wire.ProgramAnswer(op_id=kept.op_id, is_stored=True))

    def _is_new(self, op: ProgramOp) -> bool:
        if isinstance(op, BeginCall):
            return self.book.find(self.book.place_of(op)) is None
        return isinstance(op, CreateProgram) and self.book.find(op.program_id) is None

    def _changed(self, changes: Iterable[Change]) -> None:
        now_s = self._epoch_s()
        for change in changes:
            graph = change.program
            self.writer.put(self._store.script_for(change, self._fence, now_s), graph)
            if change.kind in ("whole", "outlined"):
                self._tell_outline(graph)
            if change.kind == "ended" and change.call is not None:
                self._output_taken(graph.program_id, change.call.call_id)
            if change.kind == "status":
                self._status_changed(graph)
            if not graph.is_over:
                self._moved[graph.program_id] = None

    def _tell_outline(self, graph: ProgramGraph) -> None:
        """Tell the core what is known of a program's shape."""
        if graph.outline:
            self._handle(ProgramOutlined(time.monotonic(), graph.program_id, graph.outline))

    def _status_changed(self, graph: ProgramGraph) -> None:
        if not graph.is_over:
            self._tell_owners(graph, _news_of(graph))
        if graph.status == "relegated":
            log.info("program_relegated", program_id=graph.program_id, app=graph.app, calls=len(graph.calls))
            self._handle(ProgramRelegated(time.monotonic(), graph.program_id))
        elif graph.is_over:
            log.info(
                "program_over", program_id=graph.program_id, app=graph.app, status=graph.status, is_met=graph.is_met,
                calls=len(graph.calls), reason=graph.reason,
            )  # fmt: skip
            if graph.status == "cancelled":
                self._cancel_calls(graph.program_id)
                self._tell_owners(graph, wire.RouterToIngress(programs_over=[graph.program_id]))
            is_complete = graph.status == "finished"
            self._handle(ProgramFinished(time.monotonic(), graph.program_id, is_complete=is_complete))
            self._store_learnt()

    def _store_learnt(self) -> None:
        if self._patterns is None:
            return
        now_s = self._epoch_s()
        for learnt in self._patterns.drain_learnt():
            outline = replace(learnt, at_s=now_s)
            self._outlines.append(outline)
            self.writer.put(self._store.script_for_pattern(outline, self._fence))

    # ---- answers ----

    def view(self, graph: ProgramGraph) -> dict[str, Any]:
        """All of a program, with what is foretold of it."""
        now_s = self._epoch_s()
        return program_view(graph, now_s, None if graph.is_over else self._outlook(graph, now_s))

    def newest(self, most: int, tenant: str = "") -> list[msgspec.Raw]:
        """All of the programs in progress that began last, then of those that ended last. tenant: whose; "" for all.

        A large one is without its calls, so that all together are half of the largest answer at most.
        """
        every = itertools.chain(reversed(list(self.book.live)), self.book.ended)
        wanted = (graph for graph in every if tenant in ("", graph.tenant))
        return [
            self._shortened(graph, self._most_answer_bytes // 2 // most) for graph in itertools.islice(wanted, most)
        ]

    def _shortened(self, graph: ProgramGraph, most_bytes: int) -> msgspec.Raw:
        view = self.view(graph)
        whole = msgspec.json.encode(view)
        return msgspec.Raw(whole if len(whole) <= most_bytes else msgspec.json.encode({**view, "calls": []}))

    def _after_change(self, graph: ProgramGraph | None) -> msgspec.Raw:
        """The answer to a change: all of its program, or what lists show if that is too large."""
        if graph is None:
            return msgspec.Raw(b"null")
        whole = msgspec.json.encode(self.view(graph))
        return msgspec.Raw(whole if len(whole) <= self._most_answer_bytes else msgspec.json.encode(summary(graph)))

    def _listed(self, op: ListPrograms) -> dict[str, Any]:
        found = [
            graph
            for graph in (*self.book.live, *self.book.ended)
            if graph.tenant == op.tenant
            and op.status in (None, graph.status)
            and op.app in (None, graph.app)
            and op.name in (None, graph.name)
        ]
        first = 0
        if op.after is not None:
            # Who pages from the beginning again would never come to an end.
            ids = [graph.program_id for graph in found]
            if op.after not in ids:
                text = f"{op.after[:200]!r} is not in this list (any more); begin again, without after"
                raise ProgramError("invalid_program", text, "after")
            first = ids.index(ProgramId(op.after)) + 1
        most = min(max(op.limit, 1), MOST_LISTED)
        shown = found[first : first + most]
        return {
            "object": "list",
            "data": [summary(graph) for graph in shown],
            "has_more": len(found) > first + most,
            "last_id": shown[-1].program_id if shown else None,
        }

    def _look_up(self, owner: str, message: wire.ProgramOp, op: Any, error: ProgramError) -> None:
        """One that ended long ago may still be in Redis: whoever asks for it waits."""
        task = asyncio.create_task(self._looked_up(owner, message, op, error), name="program look-up")
        self._lookups.add(task)
        task.add_done_callback(self._lookups.discard)

    async def _looked_up(self, owner: str, message: wire.ProgramOp, op: Any, error: ProgramError) -> None:
        try:
            graph = None if self.writer.is_away else await self._store.load(op.program_id)
        except StoreUnavailableError as problem:
            log.warning("program_look_up_failed", problem=str(problem))
            graph = None
        except StoreRefusedError as problem:
            log.exception("program_look_up_refused", program_id=op.program_id, problem=str(problem))
            graph = None
        if graph is None or graph.tenant != op.tenant or self.book.find(op.program_id) is not None:
            self._refuse(owner, message, error)
            return
        self.book.restore(graph)
        self.asked(owner, message)

    def _tell_owners(self, graph: ProgramGraph, message: wire.RouterToIngress) -> None:
        """Tell the ingresses of its calls, and the one that runs its graph, of which no call may be known yet."""
        runner = [graph.runner] if graph.runner else []
        for owner in dict.fromkeys([*runner, *(call.owner for call in graph.calls.values())]):
            self._send(owner, message)

    def _tell(self, owner: str, answer: wire.ProgramAnswer) -> None:
        self._send(owner, wire.RouterToIngress(program_answers=[answer]))

    def _answer(self, owner: str, message: wire.ProgramOp, result: Any, *, is_stored: bool = True) -> None:
        encoded = msgspec.json.encode(result)
        if len(encoded) > self._most_answer_bytes:
            text = (
                f"the answer takes {len(encoded)} bytes, more than {self._most_answer_bytes} (half of "
                "transport.max_message_bytes); the list of programs shows them without their calls: ask for that, with "
                "a smaller limit if it is the list that is too large"
            )
            raise ProgramError("answer_too_large", text)
        self._tell(owner, wire.ProgramAnswer(op_id=message.op_id, result=encoded, is_stored=is_stored))

    def _refuse(self, owner: str, message: wire.ProgramOp, error: ProgramError) -> None:
        answer = wire.ProgramAnswer(
            op_id=message.op_id, error_code=error.code, error=str(error), field=error.field, is_stored=True
        )
        self._tell(owner, answer)

    def _whole(self, graph: ProgramGraph) -> ScriptCall:
        # Another may have its name by now: what is written for an earlier one must not replace that.
        graph = self.book.find(graph.program_id) or graph
        return self._store.script_for_whole(graph, self._fence, self._epoch_s())


def _news_of(graph: ProgramGraph) -> wire.RouterToIngress:
    news = wire.ProgramNews(program_id=graph.program_id, is_relegated=graph.status == "relegated")
    return wire.RouterToIngress(program_news=[news])
