"""All programs of an application that are in progress, and the last ones that ended. Pure: time is passed in.

Every change is also said as a `Change`, which is all that a store needs to make the same change once, however often it
is told.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar, assert_never

from tempo_router.errors import ProgramError
from tempo_router.program_graph import CallStatus, GraphCall, Objective, ProgramGraph
from tempo_router.program_ops import (
    BeginCall,
    CallTicket,
    CancelGraph,
    CancelProgram,
    CreateProgram,
    EndCall,
    ExtendProgram,
    FinishProgram,
    ProgramOp,
)
from tempo_router.request import ProgramId

LONGEST_S = 366 * 24 * 3600.0
MOST_ENDED = 1000
"""Programs that are remembered after their end."""
_RESPONSES = 20_000
_ALIASES = 50_000
_PLACES = 50_000


@dataclass(frozen=True, slots=True)
class Change:
    """One transition. call: the one that began or ended.

    whole: the program is new, or told anew in full. outlined: its client said later which stages it will have.
    """

    program: ProgramGraph
    kind: Literal["whole", "began", "ended", "status", "outlined"]
    call: GraphCall | None = None


class ProgramBook:
    """Programs by id. `apply` is the only way in; it raises ProgramError with nothing changed.

    most: programs in progress, at most. linger_s: how long after its deadline, or its last call where it has none, an
    unfinished program is kept.
    """

    def __init__(self, *, most: int = 100_000, linger_s: float = 600.0) -> None:
        self._most = most
        self._linger_s = linger_s
        self._live: dict[ProgramId, ProgramGraph] = {}
        self._ended: OrderedDict[ProgramId, ProgramGraph] = OrderedDict()
        self._responses: OrderedDict[tuple[str, str], tuple[ProgramId, str]] = OrderedDict()
        self._aliases: OrderedDict[str, str] = OrderedDict()
        # Where calls began whose clients named another program: by that name and the call's.
        self._places: OrderedDict[tuple[str, str], ProgramId] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    @property
    def live(self) -> Iterable[ProgramGraph]:
        """Programs in progress, oldest first."""
        return self._live.values()

    @property
    def ended(self) -> Iterator[ProgramGraph]:
        """The last programs that ended, newest first."""
        return reversed(self._ended.values())

    def find(self, program_id: str) -> ProgramGraph | None:
        """A program in progress, or one of the last that ended."""
        name = ProgramId(program_id)
        return self._live.get(name) or self._ended.get(name)

    def holder(self, program_id: str, call_id: str) -> ProgramGraph | None:
        """The program in which a call began, by the name that its client gave that; None if it is not known."""
        # Another program may have the name by now that the call's had.
        for name in (program_id, self._places.get((program_id, call_id), "")):
            graph = self.find(name)
            if graph is not None and call_id in graph.calls:
                return graph
        return None

    def of_tenant(self, program_id: str, tenant: str) -> ProgramGraph:
        """Likewise, for who asks. Raises ProgramError: another tenant's program is as good as none."""
        graph = self.find(program_id)
        if graph is None or graph.tenant != tenant:
            raise ProgramError("unknown_program", f"there is no program {program_id!r}", "program")
        return graph

    def continued(self, tenant: str, response_id: str) -> tuple[ProgramId, str] | None:
        """(program, call) that gave this answer, if it is remembered."""
        return self._responses.get((tenant, response_id))

    def restore(self, graph: ProgramGraph) -> None:
        """A program as it was stored. What is known to be over stays so: Redis may have forgotten that."""
        if graph.is_over:
            self._live.pop(graph.program_id, None)
            self._remember_ended(graph)
        elif graph.program_id not in self._ended:
            self._live[graph.program_id] = graph
        for call in graph.calls.values():
            if call.asked_as:
                _remember(self._places, (call.asked_as, call.call_id), graph.program_id, _PLACES)
        for alias in dict.fromkeys(call.alias for call in graph.calls.values() if call.alias):
            # A session that goes on in another program belongs to that one.
            if not graph.is_over or self._aliases.get(alias) not in self._live:
                _remember(self._aliases, alias, graph.program_id, _ALIASES)

    # ---- changes ----

    def apply(self, op: ProgramOp, now_s: float) -> tuple[ProgramGraph | None, list[Change]]:
        """Carry out what a client asked. Returns the program (None: an end that nobody waits for) and what changed."""
        match op:
            case CreateProgram():
                return self._create(op, now_s)
            case BeginCall():
                return self._begin(op, now_s)
            case EndCall():
                return self._end(op, now_s)
            case ExtendProgram():
                graph = self.of_tenant(op.program_id, op.tenant)
                _check_deadline(op.deadline_s, now_s)
                graph.move_deadline(op.deadline_s)
                return graph, [Change(graph, "status")]
            case FinishProgram():
                graph = self.of_tenant(op.program_id, op.tenant)
                return graph, self._changed(graph, is_news=graph.close(op.operation, now_s))
            case CancelProgram():
                graph = self.of_tenant(op.program_id, op.tenant)
                return graph, self._cancelled(graph, op.operation, op.reason, now_s)
            case CancelGraph():
                graph = self.of_tenant(op.program_id, op.tenant)
                if graph.run_by != op.run_by:
                    return graph, []  # Its creation was refused: the name belongs to another graph, which goes on.
                return graph, self._cancelled(graph, op.operation, op.reason, now_s)
            case _:
                assert_never(op)

    def ticket(self, graph: ProgramGraph, call: GraphCall, now_s: float) -> CallTicket:
        """What the call's request needs to know."""
        left_s = None if graph.deadline_s is None else graph.deadline_s - now_s
        return CallTicket(
            graph.program_id, call.call_id, call.attempt, call.stage, graph.app,
            left_s, graph.status == "relegated" or (left_s is not None and left_s <= 0.0),
            over=graph.status if graph.status in ("finished", "cancelled") else "",
        )  # fmt: skip

    def relegate(self, graph: ProgramGraph, now_s: float) -> list[Change]:
        """It can no longer make its deadline."""
        return self._changed(graph, is_news=graph.relegate(now_s))

    def owner_gone(self, owner: str, now_s: float) -> list[Change]:
        """An ingress is gone, and with it the clients of the calls that it served; but those that were answered.

        So are those of the graphs that it ran: without other calls these programs can never go on.
        """
        changes: list[Change] = []
        for graph in list(self._live.values()):
            for call in [one for one in graph.running if one.owner == owner]:
                is_answered = call.answered_tokens is not None
                call.is_presumed = is_answered
                status: CallStatus = "completed" if is_answered else "cancelled"
                op = EndCall(
                    graph.program_id, call.call_id, call.attempt, status, call.prompt_tokens, call.answered_tokens or 0
                )
                changes += self._end(op, now_s)[1]
            if owner and graph.runner == owner and not graph.is_over and not graph.running:
                reason = f"the ingress that ran its graph is gone ({owner})"
                changes += self._cancelled(graph, f"gone:{owner}", reason, now_s)
        return changes

    def overdue(self, now_s: float) -> list[Change]:
        """Programs whose deadline passed are relegated; what nobody will finish any more is closed."""
        changes: list[Change] = []
        for graph in list(self._live.values()):
            if graph.deadline_s is not None and now_s > graph.deadline_s:
                changes += self.relegate(graph, now_s)
            until_s = max(graph.last_s, graph.deadline_s or 0.0) + self._linger_s
            if now_s > until_s and not graph.running:
                changes += self._abandoned(graph, now_s)
        return changes

    # ---- one by one ----

    def _create(self, op: CreateProgram, now_s: float) -> tuple[ProgramGraph, list[Change]]:
        known = self.find(op.program_id)
        if known is not None:
            if known.tenant != op.tenant:
                raise ProgramError("unknown_program", f"there is no program {op.program_id!r}", "program")
            if op.operation and op.operation in (known.created_by, known.run_by):
                return known, []  # Told again, by an ingress to a new router.
            if op.is_graph and _never_ran(known):
                # Its client was told that nothing came of it, and tries again.
                known = None
        if op.objective == "deadline" and op.deadline_s is None:
            message = "give deadline_s or deadline, or the objective 'best_effort'"
            raise ProgramError("invalid_program", message, "deadline_s")
        if known is None:
            return self._open(op, now_s)
        if not _is_same_deadline(known, op):
            _check_deadline(op.deadline_s, now_s)
        _refuse_unless_equal(known, op)
        is_news = known.tell_outline(op.outline)
        if op.is_graph:
            known.run_by, known.runner, is_news = op.operation, op.runner, True
        return known, [Change(known, "outlined")] if is_news else []

    def _open(self, op: CreateProgram, now_s: float) -> tuple[ProgramGraph, list[Change]]:
        _check_deadline(op.deadline_s, now_s)
        if len(self._live) >= self._most:
            message = f"{self._most} programs are in progress (programs.max_programs); try again later"
            raise ProgramError("too_many_programs", message)
        graph = ProgramGraph(
            ProgramId(op.program_id), op.tenant, op.app, now_s, op.deadline_s, op.objective, op.name,
            created_by=op.operation, asked_s=_asked_s(op), outline=op.outline,
            run_by=op.operation if op.is_graph else "", runner=op.runner,
        )  # fmt: skip
        self._ended.pop(graph.program_id, None)
        self._live[graph.program_id] = graph
        return graph, [Change(graph, "whole")]

    def _begin(self, op: BeginCall, now_s: float) -> tuple[ProgramGraph, list[Change]]:
        program_id = self.place_of(op)
        if op.alias:
            _remember(self._aliases, op.alias, program_id, _ALIASES)
        graph = self.find(program_id)
        changes: list[Change] = []
        if graph is None and op.is_new_allowed:
            objective: Objective = "deadline" if op.deadline_s is not None else "best_effort"
            new = CreateProgram(program_id, op.tenant, op.app, op.deadline_s, objective, op.name)
            _, changes = self._open(new, now_s)
        graph = self.of_tenant(program_id, op.tenant)
        try:
            call, is_news = graph.begin(op.call, now_s)
        except ProgramError:
            if changes:
                del self._live[graph.program_id]
            raise
        if is_news:
            call.alias = op.alias
            if graph.program_id != op.program_id:
                call.asked_as = op.program_id
                _remember(self._places, (op.program_id, call.call_id), graph.program_id, _PLACES)
        if changes:
            return graph, changes
        return graph, [Change(graph, "began", call)] if is_news else []

    def place_of(self, op: BeginCall) -> str:
        """The id of the program in which this call begins; that need not exist yet."""
        return self._generation(op) if op.may_restart else op.program_id

    def _generation(self, op: BeginCall) -> str:
        """The name under which a session goes on: its own, or the next one that is not over.

        A begin that is told again is where it was, though the session may belong to another program meanwhile.
        """
        holder = self.holder(op.program_id, op.call.call_id)
        if holder is not None:
            return holder.program_id
        program_id = self._aliases.get(op.program_id, op.program_id)
        for number in range(2, MOST_ENDED + 2):
            graph = self.find(program_id)
            if graph is None or not (graph.is_over or graph.closed_by):
                break
            program_id = f"{op.program_id}.{number}"
        return program_id

    def _end(self, op: EndCall, now_s: float) -> tuple[ProgramGraph | None, list[Change]]:
        # A client that left before its call had begun could not hear in which program it does.
        graph = self.holder(op.program_id, op.call_id)
        if graph is None:
            return None, []
        if op.response_id:
            name = (graph.tenant, op.response_id)
            _remember(self._responses, name, (graph.program_id, op.call_id), _RESPONSES)
        call = graph.end(
            op.call_id, op.attempt, op.status, now_s, prompt_tokens=op.prompt_tokens, output_tokens=op.output_tokens
        )
        if call is None:
            return graph, []
        if op.is_last and not graph.closed_by and not graph.is_over:
            graph.close(f"{op.call_id}@{op.attempt}", now_s)
        is_status_news = graph.is_over or (op.is_last and bool(graph.closed_by))
        changes = [Change(graph, "ended", call)]
        return graph, [*changes, *self._changed(graph, is_news=is_status_news)]

    def _cancelled(self, graph: ProgramGraph, operation: str, reason: str, now_s: float) -> list[Change]:
        running = graph.running
        is_news = graph.cancel(operation, reason, now_s)
        return [*(Change(graph, "ended", call) for call in running), *self._changed(graph, is_news=is_news)]

    def _abandoned(self, graph: ProgramGraph, now_s: float) -> list[Change]:
        """Without a deadline silence is the usual end; with one nobody knows what was still to come."""
        if graph.deadline_s is None:
            return self._changed(graph, is_news=graph.close("silence", now_s))
        return self._cancelled(graph, "silence", "abandoned: nobody finished it", now_s)

    def _changed(self, graph: ProgramGraph, *, is_news: bool) -> list[Change]:
        if graph.is_over and self._live.pop(graph.program_id, None) is not None:
            self._remember_ended(graph)
        return [Change(graph, "status")] if is_news else []

    def _remember_ended(self, graph: ProgramGraph) -> None:
        _remember(self._ended, graph.program_id, graph, MOST_ENDED)


_K = TypeVar("_K")
_V = TypeVar("_V")


def _remember(table: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> None:
    """The entries that were set last are kept."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)


def _refuse_unless_equal(known: ProgramGraph, op: CreateProgram) -> None:
    """A client that asks again for what is there gets it; one that means another program must learn that it is not."""
    what = f"program {known.name or known.program_id!r}"
    if known.is_over or known.closed_by:
        state = known.status if known.is_over else "being finished"
        raise ProgramError("program_ended", f"{what} is {state}; give a new program another name", "name")
    if op.is_graph and (known.calls or known.run_by):
        message = f"{what} has begun: its graph runs once; wait for it, cancel it, or give another graph another name"
        raise ProgramError("invalid_program", message, "graph")
    if op.app and op.app != known.app:
        message = f"{what} is of the application {known.app!r}, not {op.app!r}; give another program another name"
        raise ProgramError("program_exists", message, "app")
    if op.outline and known.outline and op.outline != known.outline:
        message = f"{what} has another outline; give another program another name"
        raise ProgramError("program_exists", message, "outline")
    if not _is_same_deadline(known, op):
        message = (
            f"{what} has the deadline {_date(known.deadline_s)}, not {_date(op.deadline_s)}; extend it to move that, "
            "or give another program another name"
        )
        raise ProgramError("program_exists", message, "deadline")


def _never_ran(graph: ProgramGraph) -> bool:
    """Whether it was made for a graph and given up before the first call, so that the graph may still run once."""
    return graph.status == "cancelled" and bool(graph.run_by) and not graph.calls


def _is_same_deadline(known: ProgramGraph, op: CreateProgram) -> bool:
    """As it is now, or as it was asked for first."""
    return op.deadline_s == known.deadline_s or _asked_s(op) == known.asked_s


def _asked_s(op: CreateProgram) -> float | None:
    return op.deadline_s if op.asked_s is None else op.asked_s


def _date(epoch_s: float | None) -> str:
    return "none" if epoch_s is None else f"{epoch_s:.3f}"


def _check_deadline(deadline_s: float | None, now_s: float) -> None:
    if deadline_s is None:
        return
    if deadline_s <= now_s:
        raise ProgramError("invalid_program", "the deadline lies in the past", "deadline")
    if deadline_s > now_s + LONGEST_S:
        raise ProgramError("invalid_program", "the deadline lies more than a year ahead", "deadline")
