"""When the deadline of a program moves: what waits and what runs has the new one at once, and a chance again."""

from dataclasses import replace

from tempo_router.actions import Action, Redate, Retarget, Retune
from tempo_router.hopeless import HopelessTimers
from tempo_router.ledger import Ledger, Program
from tempo_router.policies import Context
from tempo_router.replicas import Call
from tempo_router.request import ProgramCall, RequestSpec
from tempo_router.tempo_plan import TempoPlan
from tempo_router.value import hopeless_at_s
from tempo_router.waiting import WaitingRequest
from tempo_router.waiting_line import WaitingLine

_MOVED_S = 1e-3
"""Less is what clocks and roundings do to a deadline that every call states anew."""


class MovedDeadlines:
    """Deadlines of programs that moved while their calls were live. plan: None for policies that make none."""

    def __init__(self, ledger: Ledger, line: WaitingLine, timers: HopelessTimers, plan: TempoPlan | None) -> None:
        self._ledger = ledger
        self._line = line
        self._timers = timers
        self._plan = plan

    def of(self, spec: RequestSpec) -> RequestSpec:
        """The spec with its program's deadline, if that moved: those who send it may not have heard."""
        program = self._ledger.program(spec)
        return _redated(spec, program) if program is not None and program.is_retargeted else spec

    def move(self, program: Program, deadline_s: float, context: Context, actions: list[Action]) -> bool:
        """A client gave the program another deadline. False if it had that one, and was not given up."""
        if abs(program.deadline_s - deadline_s) <= _MOVED_S and not program.is_lost:
            return False
        program.move_deadline(deadline_s)
        program.is_retargeted, program.is_lost = True, False
        self._tell_engines(program, actions)
        for job in program.live.values():
            assert isinstance(job, WaitingRequest | Call)
            job.spec = _redated(job.spec, program)
            if self._plan is not None:
                self._plan.retarget(job)
            actions.append(Redate(job.spec.request_id, program.program_id, deadline_s))
            if isinstance(job, Call):
                self._forgive_call(job, context, actions)
            else:
                self._forgive(job, context)
        return True

    def stated(self, program: Program, known_s: float, actions: list[Action]) -> None:
        """The program's newest call stated its deadline, which was `known_s`. If it moved, engines hear of it."""
        if abs(program.deadline_s - known_s) > _MOVED_S:
            self._tell_engines(program, actions)

    def _tell_engines(self, program: Program, actions: list[Action]) -> None:
        actions.extend(
            Retarget(job.replica.replica_id, job.dispatch_id, _target(program, job.spec))
            for job in program.live.values()
            if isinstance(job, Call) and not job.is_aborted and job.replica.capacity.has_step_planner
        )

    def _forgive(self, request: WaitingRequest, context: Context) -> None:
        """It has time again."""
        request.is_given_up = False
        request.standing = request.standing._replace(is_relegated=False)
        request.hopeless_at_s = hopeless_at_s(request.spec, request.lengths, context.pace)
        self._timers.set(request)
        if request.is_queued:
            self._line.queue.rekey(request, context)

    def _forgive_call(self, call: Call, context: Context, actions: list[Action]) -> None:
        if call.is_aborted:
            return
        was_relegated = call.is_relegated
        call.is_given_up = False
        call.standing = call.standing._replace(is_relegated=False)
        if not call.new_tokens:
            self._timers.set_again(call, context.pace, context.now_s)
        if not was_relegated:
            return
        if call.replica.capacity.has_step_planner:
            cap_s = self._plan.step_cap_s if self._plan is not None else None
            actions.append(Retune(call.replica.replica_id, ((call.dispatch_id, call.standing),), cap_s))


def _redated(spec: RequestSpec, program: Program) -> RequestSpec:
    return replace(spec, slo=_target(program, spec))


def _target(program: Program, spec: RequestSpec) -> ProgramCall:
    return ProgramCall(program.program_id, program.deadline_s - spec.arrival_s)
