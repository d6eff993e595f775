"""Workload traces: token counts and times of requests and programs. The format is described in docs/workloads.md."""

from dataclasses import dataclass

from tempo_router.request import BestEffort, Deadline, Latency

UnitSlo = Latency | Deadline | BestEffort


@dataclass(frozen=True, slots=True)
class TraceCall:
    """One call of a model.

    output_tokens: the true length, at least 1; nothing that schedules may read it before the call ends.
    stage: 0-based stage inside its program. parents: positions in `Unit.calls` of the calls that must end first.
    gap_s: tool or think time between the end of the last parent (without parents: the arrival of the unit) and the
        release of this call.
    prefix_id, prefix_tokens: cache group ("" for none), and how many leading prompt tokens an unbounded cache, cold
        at the start of the trace, would hold already when the call comes.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    stage: int = 0
    parents: tuple[int, ...] = ()
    gap_s: float = 0.0
    prefix_id: str = ""
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """What is judged as one: a single request, or a program (a DAG of calls with one deadline).

    slo: a program has a Deadline, counted from arrival_s to the end of its last call, or is best effort.
    calls: parents come before their children; at least one call without parents has no gap.
    """

    unit_id: str
    arrival_s: float
    slo: UnitSlo
    calls: tuple[TraceCall, ...]
    app: str = ""
    tenant: str = ""
    is_program: bool = False

    @property
    def output_tokens(self) -> int:
        """True tokens of all calls."""
        return sum(call.output_tokens for call in self.calls)


@dataclass(frozen=True, slots=True)
class Trace:
    """Units in order of arrival; arrival_s counts from the start of the window."""

    name: str
    units: tuple[Unit, ...]

    @property
    def span_s(self) -> float:
        """Time of the last arrival."""
        return self.units[-1].arrival_s if self.units else 0.0

    @property
    def calls(self) -> int:
        """Calls of all units."""
        return sum(len(unit.calls) for unit in self.units)
