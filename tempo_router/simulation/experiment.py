"""One cell of a comparison: a trace, a fleet, a load, a policy and a seed make one row.

Load is relative: offered output tokens per second over the saturated throughput of the fleet, which is what first come,
first served with chunked prefill and REFERENCE_SLOTS puts out while the trace comes too fast for it. That reference
depends on the calls and arrivals of the trace and on the profile alone, not on targets: policies that run with other
slots see the same arrivals. It is measured once and kept in a cache on disk, and so is the upper bound.
"""

import difflib
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from pydantic import ValidationError

from tempo_router.config import PolicyName, SchedulingConfig, SwitchesConfig, unknown_key_message
from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Deadline
from tempo_router.simulation import transform
from tempo_router.simulation.report import UnitOutcome
from tempo_router.simulation.rows import measures
from tempo_router.simulation.simulator import Knowledge, Setup, simulate
from tempo_router.simulation.step_profiles import StepProfile, load_profile, scaled
from tempo_router.simulation.trace import Trace, Unit

OnProgress = Callable[[float], None]
"""Told the share of the work that is done, 0 to 1."""

OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "token": {"objective": "mix", "request_weight": 0.0},
    "balanced": {"objective": "mix", "request_weight": 0.75, "dag_weight": 4.0},
    "request": {"objective": "mix", "request_weight": 1.0},
    "gain": {"objective": "gain"},
}
"""Settings of the scheduler by the name of what a success counts."""

_NO_SWITCHES: Mapping[str, str] = {
    "policy": "--policy",
    "hopeless": "--no-shedding (or leave it out: hopeless work is then dropped)",
    "objective": f"--objective ({', '.join(OBJECTIVES)})",
    "switches": "the switches' own names, one by one, such as reserve=false",
}
"""Settings of the scheduler that a cell has a field for: a row would name one of them and be of another."""

REFERENCE_SLOTS = 128
"""Slots at which the reference for loads is measured, whatever a cell runs with."""

OVERLOAD = 1.5
"""The trace comes so many times as fast as its calls are worked off from a backlog while the reference is measured.

A backlog alone understates what engines deliver: nothing of it is in the prefix cache yet, since the calls of a program
wait side by side. On mixed111_poisson30 it is 2,578 tokens/s (H100) and 1,237 (A100), while the same engines under the
same policy put out 3,062 and 1,470 of the middle tokens when the trace comes at 1.25 times that, 3,216 and 1,547 at 1.5
times and 3,281 and 1,577 at twice that.
"""

STEADY = (0.1, 0.9)
"""The reference is measured between these shares of all tokens: filling and emptying are left out."""

_REFERENCE_FORMAT = 2
"""To be raised when the engine's model or the reference changes, so that figures measured before are not used."""

_BOUND_FORMAT = 3
"""To be raised when the bound is computed otherwise, so that older ones are not used. 2: steps in a row."""

_MOST_REPLICAS = 64

ORACLES = frozenset({"srpt"})
"""Policies that are defined by what nobody can know: their cells run with true lengths unless they say otherwise."""

_NEVER_S = 1e8
"""A deadline that nothing meets or misses in a simulation: three years."""

_REMEMBERED_TRACES = 256
"""Traces whose hashes are kept: a comparison asks for them again and again, each time in the same order."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is run.

    profile_names: one per replica, presets or names in the file profile_path. load: above 0, see the module.
    is_recorded: arrivals keep the trace's own speed, whatever `load` says; no reference is measured.
    objective: one of OBJECTIVES; rivals that know no objective ignore it. seed: 0 keeps the trace's order of units.
    slots: calls that one replica runs at once. sheds: hopeless work is dropped; None: the policy's usual way.
    tuned: slots and sheds were chosen for this policy in runs that are no part of the comparison.
    knowledge, patience, retries: see Setup; knowledge None: "true" for ORACLES, else "learned".
    time_scale, kv_scale: of all profiles.
    switches: names of SwitchesConfig or SchedulingConfig with their values, over those of the objective.
    """

    trace: Trace
    profile_names: tuple[str, ...]
    profile_path: Path | None
    load: float
    policy: str
    objective: str = "token"
    seed: int = 0
    slots: int = REFERENCE_SLOTS
    sheds: bool | None = None
    tuned: bool = False
    knowledge: str | None = None
    patience: float | None = None
    retries: int = 0
    time_scale: float = 1.0
    kv_scale: float = 1.0
    switches: Mapping[str, Any] = field(default_factory=dict)
    is_recorded: bool = False


class FigureCache:
    """Numbers that are expensive to compute and depend on nothing but their key; one small file for each."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_cache_folder() if folder is None else folder

    def get(self, name: str, key: str) -> float | None:
        """The number, or None when it is not there or its file is damaged."""
        try:
            value = json.loads(self._path(name, key).read_text(encoding="utf-8"))["value"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def put(self, name: str, key: str, value: float, about: Mapping[str, Any]) -> None:
        """Keep it, whole or not at all. about: for the human who opens the file.

        Warns where it cannot be kept: what was measured is not lost with it.
        """
        try:
            write_atomically(self._path(name, key), json.dumps({"value": value, **about}, indent=1))
        except OSError as e:
            warnings.warn(
                f"cannot keep figures in {self.folder} ({e.strerror or e}), so they are computed anew in each run; set"
                " XDG_CACHE_HOME to another folder",
                RuntimeWarning,
                stacklevel=2,
            )

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key}.json"


def default_cache_folder() -> Path:
    """Where a user's caches belong: XDG_CACHE_HOME, else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "tempo" / "figures"


def write_atomically(path: Path, text: str) -> None:
    """Write the file so that whoever reads it sees the old or the new text and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.close()
            # Made private by tempfile; results are to be as readable as any other file.
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


# ---- one cell


def run_cell(
    cell: Cell,
    on_progress: OnProgress | None = None,
    *,
    clock: Callable[[], float] | None = None,
    with_bound: bool = False,
    cache: FigureCache | None = None,
) -> dict[str, Any]:
    """Simulate and measure: a row with all of rows.COLUMNS.

    clock: read before and after the simulation, for wall_s; without it wall_s is None. with_bound: compute the upper
    bound too. Raises ConfigError for what is unknown or out of range, before anything runs.
    """
    setup_of = _checked(cell)
    cache = cache or FigureCache()
    profiles = fleet(cell)
    saturated = None if cell.is_recorded else saturated_tokens_per_s(cell.trace, profiles, cache=cache)
    trace = transform.permuted(cell.trace, cell.seed) if saturated is None else offered(cell, saturated)
    began_s = clock() if clock else 0.0
    report = simulate(trace, setup_of(profiles), on_progress=on_progress)
    wall_s = clock() - began_s if clock else None
    bound = bound_tokens_per_s(trace, profiles, bound_slots(cell), cache=cache) if with_bound else None
    return {
        **identity(cell),
        "saturated_tokens_per_s": saturated,
        **measures(report, trace),
        "bound_token_goodput": bound,
        "wall_s": wall_s,
    }


def identity(cell: Cell) -> dict[str, Any]:
    """The columns that say which cell a row belongs to. Equal for equal cells; no simulation needed."""
    return {
        "trace": cell.trace.name,
        "trace_digest": trace_digest(cell.trace),
        "profile": fleet_name(cell.profile_names),
        "replicas": len(cell.profile_names),
        "load": None if cell.is_recorded else cell.load,
        "policy": cell.policy,
        "objective": cell.objective,
        "seed": cell.seed,
        "slots": cell.slots,
        "sheds": cell.sheds is not False,
        "tuned": cell.tuned,
        "knowledge": knowledge_of(cell),
        "time_scale": cell.time_scale,
        "kv_scale": cell.kv_scale,
        "switches": dict(cell.switches),
        "patience": cell.patience,
        "retries": cell.retries,
    }


def knowledge_of(cell: Cell) -> Knowledge:
    """What a cell's policy knows of lengths and programs. Raises ConfigError for unknown names."""
    if cell.knowledge is None:
        return "true" if cell.policy in ORACLES else "learned"
    return cast(Knowledge, nearest(cell.knowledge, get_args(Knowledge), "knowledge"))


def scheduling_of(cell: Cell) -> SchedulingConfig:
    """The scheduler's settings of a cell: policy, objective and switches. Raises ConfigError for unknown names."""
    objective = dict(OBJECTIVES[nearest(cell.objective, tuple(OBJECTIVES), "objective")])
    policy = nearest(cell.policy, get_args(PolicyName), "policy")
    settings: dict[str, Any] = {"policy": policy, **objective}
    parts: dict[str, Any] = {}
    valid = (*SwitchesConfig.model_fields, *SchedulingConfig.model_fields)
    for name, value in cell.switches.items():
        if name not in valid:
            raise ConfigError(f"switches: {unknown_key_message(name, valid)}")
        if name in _NO_SWITCHES:
            raise ConfigError(f"switches: {name}={value!r}: is no switch here; use {_NO_SWITCHES[name]}")
        (parts if name in SwitchesConfig.model_fields else settings)[name] = value
    if parts:
        settings["switches"] = parts
    try:
        return SchedulingConfig.model_validate(settings)
    except ValidationError as e:
        problems = (
            f"{error['loc'][-1] if error['loc'] else 'settings'}={error['input']!r}: {error['msg']}"
            for error in e.errors()
        )
        raise ConfigError(f"switches: {'; '.join(problems)}") from e


def nearest(name: str, valid: Sequence[str], what: str) -> str:
    """The name itself if it is valid. Raises ConfigError that proposes the nearest valid one."""
    if name in valid:
        return name
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(valid)}"
    raise ConfigError(f"{what}={name!r}: no such {what}; {hint}")


def fleet(cell: Cell) -> tuple[StepProfile, ...]:
    """The profiles of a cell's replicas, scaled. Raises ConfigError for unknown names."""
    loaded = {name: load_profile(name, cell.profile_path) for name in dict.fromkeys(cell.profile_names)}
    if (cell.time_scale, cell.kv_scale) != (1.0, 1.0):
        loaded = {name: scaled(profile, cell.time_scale, cell.kv_scale) for name, profile in loaded.items()}
    return tuple(loaded[name] for name in cell.profile_names)


def fleet_name(profile_names: Sequence[str]) -> str:
    """A name for several profiles: 2 x a + b."""
    counts = Counter(profile_names)
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def offered(cell: Cell, saturated: float) -> Trace:
    """The cell's trace in the order of its seed, arrivals moved so that it offers `load` times `saturated` tokens/s."""
    trace = transform.permuted(cell.trace, cell.seed)
    return transform.faster(trace, cell.load * saturated / recorded_tokens_per_s(cell.trace))


def recorded_tokens_per_s(trace: Trace) -> float:
    """Output tokens/s that the trace offers at its own speed. Raises ConfigError for a trace that has no rate."""
    tokens = sum(unit.output_tokens for unit in trace.units)
    if not trace.span_s > 0 or not tokens:
        raise ConfigError(
            f"trace {trace.name!r}: {len(trace.units)} units within {trace.span_s} s have no rate of arrivals, so a"
            " load means nothing; take a trace with at least two arrival times, or simulate it as it is with"
            " tempo-router simulate --load recorded"
        )
    return tokens / trace.span_s


def check_load(cell: Cell) -> None:
    """Raises ConfigError for a load that cannot be offered: out of range, or of a trace without a rate."""
    if not (math.isfinite(cell.load) and cell.load > 0):
        raise ConfigError(f"load={cell.load}: must be above zero; 1.0 offers what the engines can just deliver")
    if not cell.trace.units:
        raise ConfigError(f"trace {cell.trace.name!r}: it has no units, so no rate of arrivals and nothing to simulate")
    if not cell.is_recorded:
        recorded_tokens_per_s(cell.trace)


def replicas_needed(
    cell: Cell,
    attainment: float = 0.95,
    *,
    most: int = _MOST_REPLICAS,
    run: Callable[[Cell], Mapping[str, Any]] = run_cell,
) -> tuple[int | None, dict[int, dict[str, Any]]]:
    """Smallest number of replicas of cell.profile_names[0] that meets `attainment` of all units; and the rows run.

    The rate of arrivals is fixed: cell.load times what *one* replica delivers at saturation. None: `most` are not
    enough. Bisection, so more replicas are taken to be no worse.
    """
    rows: dict[int, dict[str, Any]] = {}

    def is_enough(replicas: int) -> bool:
        names = (cell.profile_names[0],) * replicas
        rows[replicas] = dict(run(replace(cell, profile_names=names, load=cell.load / replicas)))
        share = rows[replicas]["attainment"]
        return share is not None and share >= attainment

    upper = max(1, math.ceil(cell.load))
    lower = 0
    while not is_enough(upper):
        if upper >= most:
            return None, rows
        lower, upper = upper, min(most, max(upper + 1, math.ceil(upper * 1.3)))
    while upper - lower > 1:
        middle = (lower + upper) // 2
        if is_enough(middle):
            upper = middle
        else:
            lower = middle
    return upper, rows


# ---- references


def saturated_tokens_per_s(
    trace: Trace,
    profiles: Sequence[StepProfile],
    slots: int = REFERENCE_SLOTS,
    *,
    cache: FigureCache | None = None,
    on_progress: OnProgress | None = None,
) -> float:
    """Output tokens/s of the fleet while the trace comes too fast for it: first come, first served, chunked prefill.

    Nothing is refused or given up, whatever its target. Each kind of replica is measured alone; a fleet delivers the
    sum. Raises ConfigError for a trace that has no rate.
    """
    cache = cache or FigureCache()
    total = 0.0
    for profile, count in Counter(profiles).items():
        key = _key(calls_digest(trace), repr(profile), str(slots))
        alone = cache.get("saturated", key)
        if alone is None:
            alone = _measure_saturated(trace, profile, slots, on_progress)
            about = {"trace": trace.name, "profile": profile.name, "slots": slots, "unit": "tokens/s"}
            cache.put("saturated", key, alone, about)
        total += count * alone
    return total


def bound_slots(cell: Cell) -> int:
    """Slots for the upper bound of a cell: more of them allow all that fewer do, so cells of few slots share one."""
    return max(cell.slots, REFERENCE_SLOTS)


def bound_tokens_per_s(
    trace: Trace, profiles: Sequence[StepProfile], slots: int, *, cache: FigureCache | None = None
) -> float | None:
    """Good tokens/s that no scheduler exceeds on this trace as it is; see tempo_router.simulation.bound.

    None where the solver's time was over: what it says then is no measure; and for a trace that comes all at once.
    """
    # Not for everyone who runs a cell: it loads a solver.
    from tempo_router.simulation.bound import token_goodput_bound

    cache = cache or FigureCache()
    key = _key(trace_digest(trace), repr(tuple(profiles)), str(slots), str(_BOUND_FORMAT))
    bound = cache.get("bound", key)
    if bound is None:
        found = token_goodput_bound(trace, profiles, slots)
        if found.is_cut_short or found.per_s is None:
            return None
        bound = found.per_s
        names = fleet_name([profile.name for profile in profiles])
        cache.put("bound", key, bound, {"trace": trace.name, "profile": names, "slots": slots, "unit": "tokens/s"})
    return bound


def backlog(trace: Trace) -> Trace:
    """All calls of the trace as units of their own, waiting from the start, without targets: a first guess at rates."""
    units = [
        Unit(
            unit_id=f"{unit.unit_id}/{number}",
            arrival_s=0.0,
            slo=BestEffort(),
            calls=(replace(call, stage=0, parents=(), gap_s=0.0),),
            app=unit.app,
            tenant=unit.tenant,
        )
        for unit in trace.units
        for number, call in enumerate(unit.calls)
    ]
    return Trace(trace.name, tuple(units))


def without_targets(trace: Trace) -> Trace:
    """The trace with nothing that is ever late: single calls are best effort, programs have years."""
    return Trace(
        trace.name,
        tuple(replace(unit, slo=Deadline(_NEVER_S) if unit.is_program else BestEffort()) for unit in trace.units),
    )


def output_rate(outcomes: Sequence[UnitOutcome], shares: tuple[float, float]) -> float:
    """Tokens/s between the moments when these shares of the tokens of all finished units were out.

    A unit's tokens are taken to come evenly between its first and its last.
    """
    spans = np.array(
        [
            (o.arrival_s + o.ttft_s, o.arrival_s + o.ttlt_s, o.output_tokens)
            for o in outcomes
            if o.ttft_s is not None and o.ttlt_s is not None
        ],
        dtype=np.float64,
    ).reshape(-1, 3)
    first_s, last_s, tokens = spans.T
    total = float(tokens.sum())
    if not total > 0:
        raise ConfigError("no call of this trace could be finished by this engine; is its KV memory too small?")
    lengths_s = np.maximum(last_s - first_s, 1e-9)

    def out_at_s(share: float) -> float:
        lower, upper = 0.0, float(last_s.max()) + 1e-6
        for _ in range(60):
            middle = (lower + upper) / 2
            is_out = (tokens * np.clip((middle - first_s) / lengths_s, 0.0, 1.0)).sum() >= share * total
            lower, upper = (lower, middle) if is_out else (middle, upper)
        return upper

    before, after = shares
    began_s = out_at_s(before) if before > 0 else 0.0
    return (after - before) * total / max(out_at_s(after) - began_s, 1e-9)


def _measure_saturated(trace: Trace, profile: StepProfile, slots: int, on_progress: OnProgress | None) -> float:
    recorded = recorded_tokens_per_s(trace)

    def half(done: float, at: float) -> None:
        if on_progress is not None:
            on_progress(at + done / 2)

    worked_off = _first_come(backlog(trace), profile, slots, lambda done: half(done, 0.0))
    flood = transform.faster(without_targets(trace), OVERLOAD * output_rate(worked_off, (0.0, STEADY[1])) / recorded)
    return output_rate(_first_come(flood, profile, slots, lambda done: half(done, 0.5)), STEADY)


def _first_come(trace: Trace, profile: StepProfile, slots: int, on_progress: OnProgress) -> Sequence[UnitOutcome]:
    """First come, first served with chunked prefill; nothing is refused."""
    setup = Setup(policy="fcfs", profiles=(profile,), max_running=slots, sheds=False)
    return simulate(trace, setup, on_progress=on_progress).units


def trace_digest(trace: Trace) -> str:
    """A hash of all that the trace contains but its name."""
    return _digest(_Same(trace))


def calls_digest(trace: Trace) -> str:
    """A hash of what the reference is measured with: targets do not matter to it."""
    return _calls_digest(_Same(trace))


class _Same:
    """Equal to itself alone: a trace's own equality would look at every call of it."""

    __slots__ = ("trace",)

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.trace is self.trace

    def __hash__(self) -> int:
        return id(self.trace)


@lru_cache(maxsize=_REMEMBERED_TRACES)
def _digest(same: _Same) -> str:
    # Of the content alone: rows of two releases are of one trace.
    return hashlib.sha256(repr(same.trace.units).encode()).hexdigest()[:16]


@lru_cache(maxsize=_REMEMBERED_TRACES)
def _calls_digest(same: _Same) -> str:
    return _key(repr(without_targets(same.trace).units))


def _key(*parts: str) -> str:
    text = "\n".join((version("tempo-serve"), str(_REFERENCE_FORMAT), *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked(cell: Cell) -> Callable[[tuple[StepProfile, ...]], Setup]:
    """What is wrong with a cell is said before the first simulation; returns what makes its set-up from profiles."""
    check_load(cell)
    if not cell.profile_names:
        raise ConfigError("profile_names is empty: name one step-time profile for each replica")
    if cell.slots < 1:
        raise ConfigError(f"slots={cell.slots}: must be at least 1")
    knowledge = knowledge_of(cell)
    scheduling = scheduling_of(cell)

    def setup_of(profiles: tuple[StepProfile, ...]) -> Setup:
        return Setup(
            policy=cell.policy,
            profiles=profiles,
            scheduling=scheduling,
            seed=cell.seed,
            max_running=cell.slots,
            sheds=cell.sheds is not False,
            knowledge=knowledge,
            patience=cell.patience,
            retries=cell.retries,
        )

    return setup_of
