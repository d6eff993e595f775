"""One program as it unfolds: its calls, what follows from what, and how it ended. Pure; who keeps it passes the time.

Times here are seconds since the epoch, because a graph outlives the process that keeps it. What is told twice (a
message that was sent again after a router died) changes nothing the second time: a call is known by its id and attempt,
an end by the attempt that it ends, a closing by the name of the operation that closed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tempo_router.errors import ProgramError
from tempo_router.known_stages import KnownStage
from tempo_router.request import ProgramId

CallStatus = Literal["running", "completed", "failed", "cancelled"]
ProgramStatus = Literal["running", "relegated", "finished", "cancelled"]
"""relegated: it can no longer make its deadline and goes on as best effort."""

Objective = Literal["deadline", "best_effort"]
"""deadline: the whole counts if its last call ends in time. best_effort: no deadline; its calls take what is left."""

MAX_STAGE = 1000
MAX_CALLS = 10_000
MAX_ARROWS = 100_000
"""Parents that the calls of one program name in all: with the longest ids they take 13 MB whenever it is shown."""
_INFERRED_PARENTS = 32
"""Arrows that are drawn when a call did not say what it follows: from so many calls of the stage before it, at most."""


@dataclass(frozen=True, slots=True)
class NewCall:
    """A call as its client announces it. What it leaves open is inferred (see ProgramGraph.begin).

    label: what the client calls this step ("plan", "search"). branch: the agent that makes it, "" for the only one.
    parent_branch: the agent that started that one. owner: the ingress that serves it. is_tool: no call of the model but
    a gap that the client fills; it stands in the stage of what it follows.
    """

    call_id: str
    attempt: int = 0
    stage: int | None = None
    parents: tuple[str, ...] = ()
    label: str = ""
    branch: str = ""
    parent_branch: str = ""
    owner: str = ""
    is_tool: bool = False


@dataclass(slots=True)
class GraphCall:
    """One node. output_tokens counts once the call has ended.

    answered_tokens: what the engine put out in all, when it has ended and the ingress has not said so; None before.
    is_presumed: only the engine says that it was answered, its ingress is gone; its client may try again.
    alias: another id of its program, by which its agent's session is known. asked_as: the id by which its client named
    its program, where that is another: a session goes on in a later one, or in its parent's.
    """

    call_id: str
    attempt: int
    stage: int
    parents: tuple[str, ...]
    began_s: float
    label: str = ""
    branch: str = ""
    owner: str = ""
    status: CallStatus = "running"
    ended_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    answered_tokens: int | None = None
    is_presumed: bool = False
    alias: str = ""
    asked_as: str = ""


@dataclass(slots=True)
class ProgramGraph:
    """State of one program. Only its keeper changes it, through the methods.

    deadline_s: when its last call must have ended; None without one. stage: highest stage that began.
    closed_by: operation that said that no further call will come; "" while more may come. last_s: when its last call
    began or ended. relegated_s, ended_s: when that happened. reason: why it was cancelled. created_by, asked_s: the
    operation that created it and the deadline as that gave it (see CreateProgram). outline: all stages that it will
    have, as its client knows them; empty where nothing is known. run_by, runner: the operation whose declared graph it
    runs, and the ingress that runs it.
    """

    program_id: ProgramId
    tenant: str
    app: str
    created_s: float
    deadline_s: float | None
    objective: Objective = "deadline"
    name: str = ""
    status: ProgramStatus = "running"
    reason: str = ""
    closed_by: str = ""
    stage: int = -1
    last_s: float = 0.0
    relegated_s: float | None = None
    ended_s: float | None = None
    calls: dict[str, GraphCall] = field(default_factory=dict)
    created_by: str = ""
    asked_s: float | None = None
    outline: tuple[KnownStage, ...] = ()
    run_by: str = ""
    runner: str = ""
    _running: dict[str, GraphCall] = field(default_factory=dict)
    _last_of_branch: dict[str, str] = field(default_factory=dict)
    _by_stage: dict[int, list[str]] = field(default_factory=dict)
    _arrows: int = 0

    def __post_init__(self) -> None:
        self.last_s = max(self.last_s, self.created_s)
        calls, self.calls = self.calls, {}
        for call in sorted(calls.values(), key=lambda one: (one.began_s, one.stage)):
            self._add(call)

    @property
    def is_over(self) -> bool:
        """Finished or cancelled: nothing can be added."""
        return self.status in ("finished", "cancelled")

    @property
    def is_met(self) -> bool | None:
        """Whether the whole task was done in time; None while that is open, and without a deadline."""
        if self.deadline_s is None or not self.is_over:
            return None
        return self.status == "finished" and self.last_s <= self.deadline_s

    @property
    def running(self) -> list[GraphCall]:
        """Calls that have begun and not ended, in order of beginning."""
        return list(self._running.values())

    @property
    def stages(self) -> Iterator[tuple[int, list[GraphCall]]]:
        """Calls by stage, ascending."""
        for stage in sorted(self._by_stage):
            yield stage, [self.calls[call_id] for call_id in self._by_stage[stage]]

    @property
    def _arrows_left(self) -> int:
        """How many parents a new call may have: one at least."""
        return max(1, MAX_ARROWS - self._arrows)

    # ---- calls ----

    def begin(self, new: NewCall, now_s: float) -> tuple[GraphCall, bool]:
        """A call of this program begins. Returns it, and whether that is news. Raises ProgramError.

        Where the client names neither stage nor parents, an agent's calls follow one another; calls of one agent that
        run at the same time are siblings of one stage; an agent's first call follows the last one of who started it.
        """
        known = self.calls.get(new.call_id)
        if known is not None and new.attempt <= known.attempt:
            return known, False
        self._refuse_if_closed(f"call {new.call_id!r}")
        if known is not None and known.status == "completed" and not known.is_presumed:
            raise ProgramError("call_ended", f"call {new.call_id!r} of {self.program_id!r} was answered", "call")
        if known is not None:
            return self._begin_again(known, new, now_s), True
        if len(self.calls) >= MAX_CALLS:
            raise ProgramError("invalid_program", f"a program has {MAX_CALLS} calls at most", "program")
        parents = self._parents(new)
        call = GraphCall(
            new.call_id, new.attempt, self._stage(new, parents), parents, now_s, new.label, new.branch, new.owner
        )
        self._add(call)
        self.last_s = max(self.last_s, now_s)
        return call, True

    def end(
        self, call_id: str, attempt: int, status: CallStatus, now_s: float, *, prompt_tokens: int, output_tokens: int
    ) -> GraphCall | None:
        """An attempt ended. Returns its call if that is news: not for one that is unknown, overtaken or over."""
        call = self.calls.get(call_id)
        if call is None or call.attempt != attempt or call.status != "running":
            return None
        call.status, call.ended_s = status, now_s
        call.prompt_tokens, call.output_tokens = prompt_tokens, output_tokens
        self._running.pop(call_id, None)
        self.last_s = max(self.last_s, now_s)
        self._finish_if_done(now_s)
        return call

    def answered(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """The engine has ended its answer. Its ingress will say so, too, unless it is killed before."""
        call = self._running.get(call_id)
        if call is not None:
            call.prompt_tokens, call.answered_tokens = prompt_tokens, output_tokens

    # ---- the whole ----

    def close(self, operation: str, now_s: float) -> bool:
        """No further call will come; it is finished when those that run have ended. Returns whether that is news."""
        if self.closed_by and self.closed_by == operation:
            return False
        self._refuse_if_closed("finish")
        self.closed_by = operation
        self._finish_if_done(now_s)
        return True

    def cancel(self, operation: str, reason: str, now_s: float) -> bool:
        """It is given up, with all that runs. Returns whether that is news. Raises ProgramError when it is over."""
        if self.is_over:
            if self.closed_by == operation:
                return False
            raise self._over("cancel")
        for call in list(self._running.values()):
            call.status, call.ended_s = "cancelled", now_s
        self._running.clear()
        self.status, self.reason, self.closed_by, self.ended_s = "cancelled", reason, operation, now_s
        return True

    def move_deadline(self, deadline_s: float) -> None:
        """Another deadline; a program that could not make the old one has another chance. Raises ProgramError."""
        if self.is_over:
            raise self._over("extend")
        self.deadline_s = deadline_s
        self.objective = "deadline"
        if self.status == "relegated":
            self.status, self.relegated_s = "running", None

    def tell_outline(self, stages: tuple[KnownStage, ...]) -> bool:
        """Which stages it will have, if nothing is known of that yet. Returns whether that is news."""
        if not stages or self.outline:
            return False
        self.outline = stages
        return True

    def relegate(self, now_s: float) -> bool:
        """It can no longer make its deadline. Returns whether that is news."""
        if self.status != "running":
            return False
        self.status, self.relegated_s = "relegated", now_s
        return True

    # ---- inside ----

    def _add(self, call: GraphCall) -> None:
        self.calls[call.call_id] = call
        self._arrows += len(call.parents)
        self._by_stage.setdefault(call.stage, []).append(call.call_id)
        self._last_of_branch[call.branch] = call.call_id
        self.stage = max(self.stage, call.stage)
        if call.status == "running":
            self._running[call.call_id] = call

    def _begin_again(self, known: GraphCall, new: NewCall, now_s: float) -> GraphCall:
        known.attempt, known.owner, known.status, known.ended_s = new.attempt, new.owner, "running", None
        known.answered_tokens, known.is_presumed, known.output_tokens = None, False, 0
        self._running[known.call_id] = known
        self.last_s = max(self.last_s, now_s)
        return known

    def _finish_if_done(self, now_s: float) -> None:
        if self.closed_by and not self._running and not self.is_over:
            self.status, self.ended_s = "finished", now_s

    def _refuse_if_closed(self, what: str) -> None:
        if self.is_over or self.closed_by:
            raise self._over(what)

    def _over(self, what: str) -> ProgramError:
        state = self.status if self.is_over else "being finished"
        return ProgramError("program_ended", f"{what}: program {self.program_id!r} is {state}", "program")

    def _parents(self, new: NewCall) -> tuple[str, ...]:
        if new.call_id in new.parents:
            raise ProgramError("invalid_program", f"call {new.call_id!r} cannot follow itself", "parent")
        for parent in new.parents:
            if parent not in self.calls:
                message = f"parent {parent!r} is no call of program {self.program_id!r}"
                raise ProgramError("unknown_call", message, "parent")
        if new.parents:
            return self._said_parents(tuple(dict.fromkeys(new.parents)))
        inferred = self._inferred_parents(new)
        if len(inferred) <= self._arrows_left:
            return inferred
        # One keeps the stage as it would be.
        return (max(inferred, key=lambda parent: self.calls[parent].stage),)

    def _said_parents(self, parents: tuple[str, ...]) -> tuple[str, ...]:
        if len(parents) > self._arrows_left:
            message = (
                f"{len(parents)} parents: the calls of program {self.program_id!r} name {self._arrows} already, of "
                f"{MAX_ARROWS} at most; name one of the latest stage, or the stage alone: it places the call as well"
            )
            raise ProgramError("invalid_program", message, "parent")
        return parents

    def _inferred_parents(self, new: NewCall) -> tuple[str, ...]:
        if new.stage is not None:
            before = max((stage for stage in self._by_stage if stage < new.stage), default=-1)
            return tuple(self._by_stage.get(before, ())[-_INFERRED_PARENTS:])
        sibling = next((call for call in reversed(self._running.values()) if call.branch == new.branch), None)
        if sibling is not None:
            return sibling.parents
        last = self._previous(new)
        if last is None:
            return ()
        return (last.call_id,) if last.branch else tuple(self._by_stage[last.stage][-_INFERRED_PARENTS:])

    def _previous(self, new: NewCall) -> GraphCall | None:
        """The call that a new one follows, or stands beside, as far as its agent tells."""
        for branch in (new.branch, new.parent_branch, ""):
            call_id = self._last_of_branch.get(branch)
            if call_id is not None:
                return self.calls[call_id]
        return None

    def _stage(self, new: NewCall, parents: tuple[str, ...]) -> int:
        least = 1 + max((self.calls[parent].stage for parent in parents), default=-1)
        if new.is_tool:
            return max(least - 1, 0)
        if new.stage is None:
            return min(least, MAX_STAGE)
        if new.stage > MAX_STAGE:
            raise ProgramError("invalid_program", f"stage {new.stage} is above {MAX_STAGE}", "stage")
        if new.parents and new.stage < least:
            message = f"stage {new.stage} goes backwards: a parent is of stage {least - 1}"
            raise ProgramError("invalid_program", message, "stage")
        if not new.parents and new.stage < self.stage:
            message = f"stage {new.stage} goes backwards: the program is at stage {self.stage}"
            raise ProgramError("invalid_program", message, "stage")
        return new.stage
