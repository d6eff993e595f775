"""What a run of `benchmarks.goodput` consists of, from its options: cells, searches and tunings."""

import argparse
import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import tempo_router
from benchmarks.goodput_comparison import OURS
from benchmarks.goodput_tuning import Part, Tuning, tunings_of
from tempo_router.config import PolicyName, SwitchesConfig
from tempo_router.errors import ConfigError
from tempo_router.simulation import transform
from tempo_router.simulation.experiment import OBJECTIVES, Cell, fleet, nearest, recorded_tokens_per_s, scheduling_of
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.trace import Trace
from tempo_router.simulation.trace_file import read_trace

POLICIES: tuple[str, ...] = (OURS, *(name for name in get_args(PolicyName) if name != OURS))
OBJECTIVE_AWARE = frozenset({OURS, "density"})
"""Policies whose order depends on the objective."""

QUICK_PROFILE = "llama-3-8b:h100-80g:1"
QUICK_WORKLOAD = GeneratorConfig(duration_s=1500.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells of a run, and the searches for numbers of replicas; conditions: what a reader must know.

    tunings: what is to be tried first; cells and searches then run with what was chosen.
    """

    cells: tuple[Cell, ...]
    searches: tuple[Cell, ...]
    tunings: tuple[Tuning, ...]
    with_bound: bool
    conditions: Mapping[str, Any]


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for. Raises TempoError for what is unknown or cannot be read."""
    traces = _traces(options)
    profiles = options.profile or [QUICK_PROFILE]
    policies = _policies(options)
    objectives = [nearest(name, tuple(OBJECTIVES), "objective") for name in options.objectives]
    base = {"profile_path": options.profile_path, "slots": options.slots, "sheds": options.sheds == "on",
            "time_scale": options.time_scale, "kv_scale": options.kv_scale,
            "switches": {} if options.chunk_tokens is None else {"chunk_tokens": options.chunk_tokens}}  # fmt: skip
    workloads = {
        profile: _with_unloaded_slos(traces, Cell(traces[0], (profile,), load=1.0, policy=OURS, **base), options)
        for profile in profiles
    }
    cells: list[Cell] = []
    # Seeds outermost: what an interrupted run has is complete for its first seeds.
    for seed in range(options.seeds):
        for load in options.loads:
            for profile in profiles:
                for trace in workloads[profile]:
                    names = (profile,) * options.replicas
                    blank = Cell(trace, names, load=load, policy=OURS, seed=seed, **base)
                    cells += _variants(blank, policies, objectives, with_ablation=options.ablation)
    searches = []
    if options.replicas_needed:
        for profile in profiles:
            for trace in workloads[profile]:
                for rate in options.rates:
                    blank = Cell(trace, (profile,), load=rate, policy=OURS, **base)
                    searches += _variants(blank, policies, objectives, with_ablation=False)
    tunings = _tunings(options, (*cells, *searches))
    _check((*cells, *searches, *(cell for tuning in tunings for cell in tuning.candidates)))
    conditions = _conditions(options, traces, profiles)
    return Plan(tuple(cells), tuple(searches), tuple(tunings), options.bound, conditions)


def _tunings(options: argparse.Namespace, cells: Sequence[Cell]) -> list[Tuning]:
    if not options.tune:
        return []
    also = {nearest(name, POLICIES, "policy") for name in options.tune_also}
    part = Part(options.tune_seed, options.tune_load, options.tune_window_s)
    return tunings_of(cells, {*POLICIES} - {OURS} | also, options.tune_slots, part)


def _check(cells: Sequence[Cell]) -> None:
    """All that can be wrong is said now and not in the third hour."""
    for cell in {id(cell.trace): cell for cell in cells}.values():
        recorded_tokens_per_s(cell.trace)
    for cell in {(engines_of(cell), cell.policy, cell.objective): cell for cell in cells}.values():
        scheduling_of(cell)
    for cell in {engines_of(cell): cell for cell in cells}.values():
        fleet(cell)


def _with_unloaded_slos(traces: Sequence[Trace], cell: Cell, options: argparse.Namespace) -> list[Trace]:
    """The traces as they are or, with --slo-unloaded, one for each factor. cell: has the engine that is alone."""
    if not options.slo_unloaded:
        return list(traces)
    profile = fleet(cell)[0]
    return [
        replace(
            transform.with_unloaded_slos(trace, factor, profile.step_time, step_tokens=profile.shape.max_step_tokens),
            name=f"{trace.name} {factor:g}x unloaded",
        )
        for factor in options.slo_unloaded
        for trace in traces
    ]


def _variants(blank: Cell, policies: Sequence[str], objectives: Sequence[str], *, with_ablation: bool) -> list[Cell]:
    cells = [
        replace(blank, policy=policy, objective=objective, switches={} if policy == OURS else blank.switches)
        for policy in policies
        for objective in (objectives if policy in OBJECTIVE_AWARE else objectives[:1])
    ]
    if with_ablation:
        for objective in objectives:
            ours = replace(blank, objective=objective, switches={})
            cells += [
                replace(ours, switches={name: not is_on}) for name, is_on in SwitchesConfig().model_dump().items()
            ]
            cells += [replace(ours, knowledge="none"), replace(ours, knowledge="true")]
    return cells


def _traces(options: argparse.Namespace) -> list[Trace]:
    traces = [read_trace(path) for path in options.traces] or [generate(QUICK_WORKLOAD, seed=0)]
    # What was made of a trace has a name of its own, or the report would take its rows for those of the trace.
    if options.window_s is not None:
        traces = [
            replace(transform.first_s(trace, options.window_s), name=f"{trace.name} first {options.window_s:g} s")
            for trace in traces
        ]
    if options.slo_scale != 1.0:
        traces = [
            replace(
                transform.with_slo_scale(trace, options.slo_scale), name=f"{trace.name} targets x {options.slo_scale:g}"
            )
            for trace in traces
        ]
    if options.prefix_cache == "off":
        traces = [transform.without_prefix_cache(trace) for trace in traces]
    names = [trace.name for trace in traces]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two traces are called {name!r}; rows could not be told apart: rename a file")
    return traces


def _policies(options: argparse.Namespace) -> list[str]:
    names: list[str] = options.policies
    if names == ["all"]:
        return list(POLICIES)
    return list(dict.fromkeys(nearest(name, POLICIES, "policy") for name in names))


def _conditions(options: argparse.Namespace, traces: Sequence[Trace], profiles: Sequence[str]) -> dict[str, Any]:
    return {
        "traces": {
            trace.name: f"{len(trace.units)} units, {trace.calls} calls, {trace.span_s:.0f} s" for trace in traces
        },
        "profiles": list(profiles),
        "replicas": options.replicas,
        "slots": options.slots,
        "seeds": options.seeds,
        "loads": list(options.loads),
        "sheds": options.sheds,
        "time_scale": options.time_scale,
        "kv_scale": options.kv_scale,
        "slo_scale": options.slo_scale,
        "slo_unloaded": list(options.slo_unloaded),
        "tuned": {
            "slots": list(options.tune_slots),
            "load": options.tune_load,
            "seed": options.tune_seed,
            "window_s": options.tune_window_s,
            "also": list(options.tune_also),
        }
        if options.tune
        else None,
        "window_s": options.window_s,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tempo": version("tempo-serve"),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "code": code_digest(),
    }


def code_digest() -> str:
    """A hash of the scheduler's and the simulator's sources: rows of different code are not to be mixed."""
    digest = hashlib.sha256()
    root = Path(tempo_router.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def engines_of(cell: Cell) -> tuple[Any, ...]:
    """What cells have in common that run on the same engines."""
    return cell.profile_names, cell.time_scale, cell.kv_scale
