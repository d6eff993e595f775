"""Does the simulator tell the truth? The same trace and policy, live and simulated, side by side.

The live router records what it was told (`record_events`); the steps in there give a profile of the engine, with which
the trace is simulated. Each cell has a profile of its own, from the steps that were made while it ran: on a machine
that others use too, the same steps take half as long again a minute later. Within the cell the profile follows that
speed, second by second. What differs then is the simulator's: within a second steps take their mean time, messages
take none, and the router begins with nothing learnt.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_router.event_log import Asked, read_line
from tempo_router.events import Progressed, ReplicaAttached, ReplicaCapacity, StepReport
from tempo_router.request import ReplicaId
from tempo_router.simulation.rows import measures
from tempo_router.simulation.simulator import Setup, simulate
from tempo_router.simulation.step_profiles import EngineShape, Prefill, StepProfile
from tempo_router.simulation.trace import Trace
from tempo_router.step_time import Coefficients, StepTimeModel

COMPARED = ("token_goodput", "attainment", "ttft_p50_s", "ttft_p95_s", "tbt_p50_s", "tbt_p99_s", "ttlt_p95_s")
_BLOCK_SIZE = 128
_PASSES = 3


@dataclass(frozen=True, slots=True)
class FittedStepTime:
    """Step times from the coefficients of the online fit."""

    coefficients: Coefficients

    def duration_s(self, prefills: Sequence[Prefill], decodes: int, context_tokens: int) -> float:
        """Seconds of one step."""
        c = self.coefficients
        chunks = sum(prefill.chunk for prefill in prefills)
        attention = sum(prefill.chunk * (prefill.past + prefill.chunk / 2) for prefill in prefills)
        return (
            c.tokens_s(chunks + decodes)
            + c.decode_s * decodes
            + c.context_s * context_tokens
            + c.attention_s * attention
        )


@dataclass(frozen=True, slots=True)
class Drift:
    """How much longer than fitted the steps took, by second of the trace; as overall where none was made."""

    overall: float
    by_second: Mapping[int, float]

    def __call__(self, at_s: float) -> float:
        """The factor at a moment of the trace."""
        return self.by_second.get(int(at_s), self.overall)


@dataclass(frozen=True, slots=True)
class Record:
    """What a router's log tells of its engines, in the order in which they attached first.

    steps: of each engine, with the moments when they ended, by the router's clock.
    """

    log: Path
    capacities: Mapping[ReplicaId, ReplicaCapacity]
    steps: Mapping[ReplicaId, Sequence[tuple[float, StepReport]]]


@dataclass(frozen=True, slots=True)
class LiveEngine:
    """What a log of events says of one engine.

    step_error: mean |measured - fitted| / measured over its steps, with the drift.
    """

    profile: StepProfile
    steps: int
    step_error: float


def read_record(log: Path) -> Record:
    """Read a log of events. Raises ValueError when no engine attached."""
    capacities: dict[ReplicaId, ReplicaCapacity] = {}
    steps: defaultdict[ReplicaId, list[tuple[float, StepReport]]] = defaultdict(list)
    for event in _events(log):
        if isinstance(event, ReplicaAttached):
            capacities[event.replica_id] = event.capacity
        elif isinstance(event, Progressed) and event.step is not None:
            steps[event.replica_id].append((event.at_s, event.step))
    if not capacities:
        raise ValueError(f"{log}: no engine attached")
    return Record(log, capacities, steps)


def engines_of(record: Record, since_s: float, until_s: float) -> list[LiveEngine]:
    """Fit a profile of each engine to its steps that ended between these moments of the router's clock.

    Moment 0 of the profiles' drift is since_s. Raises ValueError when one made no steps: then it was lost, or the load
    was too small to tell anything.
    """
    return [_engine_of(record, replica_id, since_s, until_s) for replica_id in record.capacities]


def _engine_of(record: Record, replica_id: ReplicaId, since_s: float, until_s: float) -> LiveEngine:
    timed = [(at_s, step) for at_s, step in record.steps.get(replica_id, ()) if since_s <= at_s <= until_s]
    if not timed:
        raise ValueError(f"{record.log}: no step was made by {replica_id} between {since_s} and {until_s} s")
    model = StepTimeModel()
    for _ in range(_PASSES):
        for _, step in timed:
            model.observe(step)
    drift = _drift(model, timed, since_s)
    errors = [
        abs(drift(at_s - since_s) * _fitted_s(model, step) - step.duration_s) / step.duration_s for at_s, step in timed
    ]
    capacity = record.capacities[replica_id]
    shape = EngineShape(
        kv_tokens=capacity.kv_tokens // _BLOCK_SIZE * _BLOCK_SIZE,
        block_size=_BLOCK_SIZE,
        max_running=capacity.max_running,
        max_step_tokens=capacity.max_step_tokens,
        max_model_len=min(4096, capacity.kv_tokens),
    )
    times = FittedStepTime(model.coefficients)
    profile = StepProfile("fitted to the live engine", str(record.log), times, shape, drift)
    return LiveEngine(profile, len(timed), sum(errors) / len(errors))


def _drift(model: StepTimeModel, timed: Sequence[tuple[float, StepReport]], since_s: float) -> Drift:
    """Sums, not means of ratios: so many steps take as long in the simulator as they did."""
    measured: defaultdict[int, float] = defaultdict(float)
    fitted: defaultdict[int, float] = defaultdict(float)
    for at_s, step in timed:
        second = int(at_s - since_s)
        measured[second] += step.duration_s
        fitted[second] += _fitted_s(model, step)
    overall = sum(measured.values()) / sum(fitted.values())
    return Drift(overall, {second: total / fitted[second] for second, total in measured.items()})


def simulated_row(trace: Trace, live: Mapping[str, Any], engines: Sequence[LiveEngine], policy: str) -> dict[str, Any]:
    """The same cell, simulated. live: its row. policy: of the router. Raises ValueError for engines that came or went.

    The simulated router is told of a call what the live one was: lengths are forced, so the bound that a client states
    is the length. A service has the forest beside the histograms.
    """
    if len(engines) != live["replicas"]:
        raise ValueError(f"{len(engines)} engines attached, {live['replicas']} were to: some were lost meanwhile")
    setup = Setup(
        policy=policy,
        profiles=tuple(engine.profile for engine in engines),
        max_running=live["slots"],
        sheds=live["sheds"],
        seed=live["seed"],
        knowledge="regressor",
        max_output_tokens=1,
    )
    report = simulate(trace, setup)
    return {**live, "profile": engines[0].profile.name, **measures(report, trace)}


def errors(live: Mapping[str, Any], simulated: Mapping[str, Any]) -> dict[str, Any]:
    """By measure: (live, simulated, difference); relative to live, but of attainment in points."""
    found: dict[str, Any] = {}
    for name in COMPARED:
        ours, theirs = live[name], simulated[name]
        if ours is None or theirs is None:
            continue
        difference = theirs - ours if name == "attainment" else (theirs - ours) / ours if ours else None
        found[name] = {"live": round(ours, 4), "simulated": round(theirs, 4), "difference": difference}
    return found


def _fitted_s(model: StepTimeModel, step: StepReport) -> float:
    return model.step_s(step.prefill_tokens, step.decodes, step.context_tokens, step.attention_tokens)


def _events(log: Path) -> Iterator[Any]:
    with log.open(encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            read = read_line(line)
            if not isinstance(read, Asked):
                yield read[0]
