r"""How much useful work each policy gets out of the same engines: goodput and attainment over the load, side by side.

    python -m benchmarks.goodput --quick
    python -m benchmarks.goodput --traces a.csv.gz b.csv.gz --profile llama-3-8b:a100-80g:1 \
        --profile-path step_time.json --loads 0.75,0.9,1.0,1.25,1.5,2.0 --policies all --objectives token,balanced \
        --seeds 3 --tune --bound --ablation --out bench-results/goodput.json --report docs/results.md
    python -m benchmarks.goodput --render bench-results/goodput.json --report docs/results.md

Every policy runs as in production, in virtual time: router, step planner, length estimates. Loads are relative to the
saturated throughput under first come, first served with 128 slots, whatever slots a policy runs with.
Rivals that know no objective run once; those in OBJECTIVE_AWARE run under each. --tune: every rival runs with the
slots and the shedding that suit it best, chosen on a part that is not compared (benchmarks/goodput_tuning.py). Rows go
to --out as they come, so an interrupted run keeps them, marked by "complete": false; --resume goes on with it. --quick:
a generated workload, few policies, three minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, get_args

import tempo_router
from benchmarks.crew import Crew, process_pool
from benchmarks.goodput_report import Results, read_results, write_report
from benchmarks.goodput_tables import OURS, comparison_markdown, grouped, policies_markdown
from benchmarks.goodput_tuning import Choice, Part, Tuning, choice_key, chosen, tried, tunings_of, with_choice
from tempo_router.config import PolicyName, SwitchesConfig
from tempo_router.errors import ConfigError, TempoError
from tempo_router.option_values import above_zero, at_least_one, whole
from tempo_router.simulation import transform
from tempo_router.simulation.experiment import (
    OBJECTIVES,
    REFERENCE_SLOTS,
    Cell,
    bound_slots,
    bound_tokens_per_s,
    calls_digest,
    fleet,
    identity,
    nearest,
    offered,
    recorded_tokens_per_s,
    replicas_needed,
    run_cell,
    saturated_tokens_per_s,
    scheduling_of,
)
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.trace import Trace
from tempo_router.simulation.trace_file import read_trace

POLICIES: tuple[str, ...] = (OURS, *(name for name in get_args(PolicyName) if name != OURS))
OBJECTIVE_AWARE = frozenset({OURS, "density"})
"""Policies whose order depends on the objective."""

QUICK_POLICIES = (OURS, "fcfs", "edf", "class_priority", "qoserve", "jitserve", "jitserve_tuned")
QUICK_LOADS = (1.0, 1.5)
QUICK_PROFILE = "llama-3-8b:h100-80g:1"
QUICK_WORKLOAD = GeneratorConfig(duration_s=1500.0)

DEFAULT_LOADS = (0.75, 0.9, 1.0, 1.25, 1.5, 2.0)
REPLICA_RATES = (2.0, 4.0)
"""--replicas-needed: rates of arrivals, as multiples of the saturated throughput of one replica."""
REPLICA_ATTAINMENT = 0.95
REPLICA_MOST = 16

TUNE_SLOTS = (32, 48, 64, 128)
TUNE_SEED = 1000
"""Far from the seeds that are compared, so that more of them can be added."""
TUNE_LOAD = 1.5

SLOWNESS = {OURS: 3.0}
"""Time that a call takes to simulate, relative to other policies; a guess that orders cells until some are measured."""

EXIT_INTERRUPTED = 130


# ---- what is run


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
    for cell in {(_engines(cell), cell.policy, cell.objective): cell for cell in cells}.values():
        scheduling_of(cell)
    for cell in {_engines(cell): cell for cell in cells}.values():
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


# ---- results of earlier runs


def resumed(path: Path, plan: Plan) -> Results:
    """The earlier run's rows, to go on with. Raises ConfigError when they were measured with other code or traces."""
    before, conditions = read_results(path), plan.conditions
    if before.conditions["code"] != conditions["code"]:
        raise ConfigError(
            f"{path}: its rows were measured with other code (sources {before.conditions['code']}, now"
            f" {conditions['code']}), and would not be comparable; run without --resume or with another --out"
        )
    # The report would refuse rows of two traces with one name, hours later.
    grouped([*before.rows, *(identity(cell) for cell in plan.cells)])
    # What failed is tried again.
    kept = {**conditions, "date": before.conditions["date"]}
    return Results(path, kept, before.rows, before.needs, choices=before.choices, further=before.further)


def key_of(columns: Mapping[str, Any]) -> str:
    """What tells cells and rows apart."""
    names = ("trace_digest", "profile", "replicas", "load", "policy", "objective", "seed", "slots", "sheds",
             "tuned", "knowledge", "time_scale", "kv_scale", "switches")  # fmt: skip
    return json.dumps([columns[name] for name in names], sort_keys=True)


# ---- running


def execute(plan: Plan, results: Results, pool: Executor, jobs: int, say: Callable[[str], None]) -> bool:
    """Run what is not in the results yet, `jobs` at a time; whether everything is there at the end.

    A cell that fails is noted and does not keep the others from running. On an interrupt the rows that are there have
    been written; KeyboardInterrupt goes on to the caller.
    """
    crew = Crew(pool, jobs, say)
    results.write(is_complete=False)
    if plan.tunings:
        _tune(plan, results, crew)
    choices = {choice_key(choice): choice for choice in results.choices}
    planned = [with_choice(cell, choices) for cell in plan.cells] if plan.tunings else plan.cells
    sought = [with_choice(cell, choices) for cell in plan.searches] if plan.tunings else plan.searches
    have = {key_of(row) for row in results.rows}
    cells = [cell for cell in planned if key_of(identity(cell)) not in have]
    searched = {_need_key(need) for need in results.needs}
    searches = [cell for cell in sought if _need_key(_need_of(cell)) not in searched]
    if have:
        say(f"{len(planned) - len(cells)} of {len(planned)} cells are there already")
    _fill_cache(crew, cells, searches, with_bound=plan.with_bound)
    speeds = speeds_of(results.rows)
    cells.sort(key=lambda cell: (cell.seed, -work_of(cell, speeds)))
    weights = [work_of(cell, speeds) for cell in cells]
    for row in crew.each(_run, [(cell, plan.with_bound) for cell in cells], "cells", results.failures, weights):
        results.rows.append(row)
        results.write(is_complete=False)
    searches.sort(key=lambda cell: -cell.load * work_of(cell, speeds))
    weights = [cell.load * work_of(cell, speeds) for cell in searches]
    for need in crew.each(_search, [(cell,) for cell in searches], "searches", results.failures, weights):
        results.needs.append(need)
        results.write(is_complete=False)
    # In the order of the plan, whichever was ready first.
    order = {key_of(identity(cell)): number for number, cell in enumerate(planned)}
    results.rows.sort(key=lambda row: order.get(key_of(row), len(order)))
    needs_order = {_need_key(_need_of(cell)): number for number, cell in enumerate(sought)}
    results.needs.sort(key=lambda need: needs_order.get(_need_key(need), len(needs_order)))
    if plan.with_bound:
        add_bounds(plan, results, crew, results.failures)
    is_complete = not results.failures
    results.write(is_complete=is_complete)
    return is_complete


def add_bounds(plan: Plan, results: Results, crew: Crew, failures: list[dict[str, Any]]) -> None:
    """Give the rows of the plan's traces, engines, loads and seeds the upper bound, where they lack it.

    It depends on no policy, so the rows may be of other code: arrivals follow from the rate that a row has for 1.0x.
    """
    cells = {_offer_key(identity(cell)): cell for cell in plan.cells}
    lacking: dict[str, tuple[Cell, float, list[dict[str, Any]]]] = {}
    for row in results.rows:
        cell = cells.get(_offer_key(row))
        if cell is None or row["bound_token_goodput"] is not None:
            continue
        slots, saturated = bound_slots(replace(cell, slots=row["slots"])), row["saturated_tokens_per_s"]
        key = json.dumps([_offer_key(row), slots, saturated])
        lacking.setdefault(key, (replace(cell, slots=slots), saturated, []))[2].append(row)
    tasks = [(cell, key, saturated) for key, (cell, saturated, _) in lacking.items()]
    for key, bound in crew.each(_bound_of, tasks, "bounds", failures):
        for row in lacking[key][2]:
            row["bound_token_goodput"] = bound
        results.write(is_complete=results.is_complete)


def _offer_key(columns: Mapping[str, Any]) -> str:
    """What rows and cells have in common for which the bound is the same, but for many slots."""
    names = ("trace_digest", "profile", "replicas", "load", "seed", "time_scale", "kv_scale")
    return json.dumps([columns[name] for name in names])


def _tune(plan: Plan, results: Results, crew: Crew) -> None:
    """Choose the settings that `results` has no choice of yet."""
    code = plan.conditions["code"]
    there = {choice_key(choice) for choice in results.choices}
    tunings = [tuning for tuning in plan.tunings if tuning.key not in there]
    candidates = [cell for tuning in tunings for cell in tuning.candidates]
    _fill_cache(crew, candidates, [], with_bound=False)
    speeds = speeds_of(results.rows)
    candidates.sort(key=lambda cell: -work_of(cell, speeds))
    weights = [work_of(cell, speeds) for cell in candidates]
    found: dict[str, float] = {}
    for one in crew.each(tried, [(cell, code) for cell in candidates], "settings", results.failures, weights):
        found[key_of(one)] = one["token_goodput"]
    for tuning in tunings:
        goodputs = {
            (cell.slots, cell.sheds is not False): found[key]
            for cell in tuning.candidates
            if (key := key_of(identity(cell))) in found
        }
        choice = chosen(tuning, goodputs, code)
        if choice is not None:
            results.choices.append(choice)
    results.write(is_complete=False)


def speeds_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds that a call takes to simulate, by policy, as far as rows tell."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["wall_s"] is not None and row["calls"]:
            found.setdefault(row["policy"], []).append(row["wall_s"] / row["calls"])
    return {policy: sum(values) / len(values) for policy, values in found.items()}


def work_of(cell: Cell, speeds: Mapping[str, float]) -> float:
    """How long a cell is expected to take, in units of its own: what orders cells and tells how much is left."""
    usual = [speed / SLOWNESS.get(policy, 1.0) for policy, speed in speeds.items()]
    speed = speeds.get(cell.policy) or SLOWNESS.get(cell.policy, 1.0) * (sum(usual) / len(usual) if usual else 1.0)
    return cell.trace.calls * speed


def _fill_cache(crew: Crew, cells: Sequence[Cell], searches: Sequence[Cell], *, with_bound: bool) -> None:
    """Compute once what several cells need. What fails here fails again, and is reported, in the cells."""
    engines = {(calls_digest(cell.trace), *_engines(cell)): cell for cell in (*cells, *searches)}
    for _ in crew.each(_saturate, [(cell,) for cell in engines.values()], "references", []):
        pass
    if with_bound:
        offers = {(id(cell.trace), *_engines(cell), bound_slots(cell), cell.load, cell.seed): cell for cell in cells}
        for _ in crew.each(_bound, [(cell,) for cell in offers.values()], "bounds", []):
            pass


def _engines(cell: Cell) -> tuple[Any, ...]:
    return cell.profile_names, cell.time_scale, cell.kv_scale


def _saturate(cell: Cell) -> float:
    return saturated_tokens_per_s(cell.trace, fleet(cell))


def _bound(cell: Cell) -> float | None:
    return _bound_of(cell, "", saturated_tokens_per_s(cell.trace, fleet(cell)))[1]


def _bound_of(cell: Cell, key: str, saturated: float) -> tuple[str, float | None]:
    return key, bound_tokens_per_s(offered(cell, saturated), fleet(cell), bound_slots(cell))


def _run(cell: Cell, with_bound: bool) -> dict[str, Any]:
    return run_cell(cell, clock=time.perf_counter, with_bound=with_bound)


def _search(cell: Cell) -> dict[str, Any]:
    replicas, rows = replicas_needed(cell, REPLICA_ATTAINMENT, most=REPLICA_MOST)
    found = rows[replicas if replicas is not None else max(rows)]
    return {
        **_need_of(cell),
        "replicas": replicas,
        "attainment": found["attainment"],
        "token_goodput": found["token_goodput"],
        "tried": {str(count): row["attainment"] for count, row in sorted(rows.items())},
    }


def _need_of(cell: Cell) -> dict[str, Any]:
    names = (
        "trace",
        "trace_digest",
        "profile",
        "policy",
        "objective",
        "seed",
        "slots",
        "sheds",
        "tuned",
        "time_scale",
        "kv_scale",
    )
    columns = identity(cell)
    return {
        **{name: columns[name] for name in names},
        "rate": cell.load,
        "wanted": REPLICA_ATTAINMENT,
        "most": REPLICA_MOST,
    }


def _need_key(need: Mapping[str, Any]) -> str:
    found = ("replicas", "attainment", "token_goodput", "tried")
    return json.dumps({name: value for name, value in need.items() if name not in found}, sort_keys=True)


# ---- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write and print; returns the exit status."""
    options = _parse(arguments)
    try:
        if options.render:
            results = [read_results(path) for path in options.render]
            write_report(options.report, results, options.detail_load)
            for one in results:
                if not one.is_complete:
                    print(f"{one.path}: INCOMPLETE, {len(one.rows)} runs; the report says so", file=sys.stderr)
            print(options.report)
            return 0
        return _measure(options)
    except TempoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the rows so far are in {options.out}, go on with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED


def _measure(options: argparse.Namespace) -> int:
    read = {path.resolve() for path in (*(options.traces or []), options.profile_path) if path is not None}
    if options.out.resolve() in read:
        raise ConfigError(f"--out {options.out}: would overwrite what is measured; name another file")
    plan = plan_of(options)
    signal.signal(signal.SIGTERM, _interrupt)
    if options.add_bound:
        return _add_bounds(plan, options)
    results = resumed(options.out, plan) if options.resume and options.out.exists() else Results(
        options.out, plan.conditions
    )  # fmt: skip
    if options.tune_from is not None:
        results.choices += _choices_from(options.tune_from, plan, results.choices)
    with process_pool(options.jobs) as pool:
        is_complete = execute(plan, results, pool, options.jobs, _tell)
    if results.rows:
        loads = {row["load"] for row in results.rows}
        print(policies_markdown(results.rows, options.detail_load if options.detail_load in loads else max(loads)))
        if options.traces:
            # Aims are for half an hour of traffic; a short workload would say something else every time.
            print("\n" + comparison_markdown(results.rows))
        write_report(options.report, [results], options.detail_load)
        print(f"\n{options.out}\n{options.report}")
    if not is_complete:
        print(f'{len(results.failures)} cells failed; see "failures" in {options.out}', file=sys.stderr)
    return 0 if is_complete else 1


def _add_bounds(plan: Plan, options: argparse.Namespace) -> int:
    results = read_results(options.out)
    failures: list[dict[str, Any]] = []
    before = sum(row["bound_token_goodput"] is None for row in results.rows)
    with process_pool(options.jobs) as pool:
        add_bounds(plan, results, Crew(pool, options.jobs, _tell), failures)
    left = sum(row["bound_token_goodput"] is None for row in results.rows)
    _tell(f"{options.out}: {before - left} rows have got a bound, {left} have none (of other traces, engines, loads or")
    _tell("seeds than these options name, or failed)")
    write_report(options.report, [results], options.detail_load)
    print(f"{options.out}\n{options.report}")
    return 1 if failures else 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _choices_from(path: Path, plan: Plan, known: Sequence[Choice]) -> list[Choice]:
    """What an earlier run chose for the tunings of this plan: settings are no measurements, so other code may have."""
    wanted = {tuning.key for tuning in plan.tunings} - {choice_key(choice) for choice in known}
    return [choice for choice in read_results(path).choices if choice_key(choice) in wanted]


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--traces", type=Path, nargs="+", default=[], metavar="FILE", help="workloads; default: a generated one, short")
    add("--profile", action="append", metavar="NAME", help=f"engine; may be repeated; default {QUICK_PROFILE}")
    add("--profile-path", type=Path, metavar="FILE", help="a file with more profiles")
    add("--replicas", type=at_least_one, default=1, help="engines of the profile (default 1)")
    add("--loads", type=_loads, default=None, help="comma-separated; default 0.75,0.9,1.0,1.25,1.5,2.0")
    add("--policies", type=_names, default=None, help="comma-separated, or all (the default)")
    add("--objectives", type=_names, default=["token", "balanced"], help=f"some of {', '.join(OBJECTIVES)}")
    add("--seeds", type=at_least_one, default=None, help="number of seeds (default 3; 0 is the trace as recorded)")
    add("--slots", type=at_least_one, default=REFERENCE_SLOTS, help="calls that a replica runs at once (default 128)")
    add("--sheds", choices=("on", "off"), default="on", help="whether hopeless work is dropped (default on)")
    add("--chunk-tokens", type=at_least_one, metavar="N",
        help=f"tokens of a step of policies that fill it with pieces of prompts; not {OURS} (default 512)")  # fmt: skip
    add("--tune", action="store_true", help="choose slots and shedding for every policy but ours, on a part of its own")
    add("--tune-slots", type=_counts, default=TUNE_SLOTS, metavar="N,N", help="to choose from (default 32,48,64,128)")
    add("--tune-also", type=_names, default=[], metavar="NAMES", help=f"choose for these, too: {OURS}")
    add("--tune-seed", type=whole, default=TUNE_SEED, help="order of units to choose on (default %(default)s)")
    add("--tune-load", type=above_zero, default=TUNE_LOAD, help="load to choose at (default %(default)s)")
    add("--tune-window-s", type=above_zero, default=None, help="choose on the first seconds of each trace only")
    add("--tune-from", type=Path, metavar="FILE", help="take what these results chose, whatever code; try the rest")
    add("--prefix-cache", choices=("on", "off"), default="on", help="whether engines cache prefixes (default on)")
    add("--time-scale", type=above_zero, default=1.0, help="factor on step times")
    add("--kv-scale", type=above_zero, default=1.0, help="factor on KV memory")
    add("--slo-scale", type=above_zero, default=1.0, help="factor on all targets; below 1 is tighter")
    add("--slo-unloaded", type=_loads, default=(), metavar="F,F",
        help="instead of the traces' own targets: F times what each unit takes alone on an idle replica")  # fmt: skip
    add("--window-s", type=above_zero, default=None, help="only the first seconds of each trace")
    add("--ablation", action="store_true", help="also our policy with each part left out, blind, and clairvoyant")
    add("--bound", action="store_true", help="also the upper bound for any scheduler (minutes per load and seed)")
    add("--add-bound", action="store_true",
        help="run nothing else: give it to the rows that --out has, whatever code they were measured with")  # fmt: skip
    add("--replicas-needed", action="store_true", help="also the replicas needed for 95 %% attainment, by policy")
    add("--rates", type=_loads, default=REPLICA_RATES, help="rates for --replicas-needed, in replicas' capacities")
    add("--quick", action="store_true", help="a generated workload, few policies, two loads, one seed")
    add("--jobs", type=at_least_one, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    add("--out", "--json", type=Path, default=Path("bench-results/goodput.json"), help="rows (default %(default)s)")
    add("--resume", action="store_true", help="keep the rows that --out has and run the missing ones")
    add("--report", type=Path, default=None, help="Markdown with tables and pictures; default: beside --out")
    add("--render", type=Path, nargs="+", metavar="FILE", help="run nothing; write --report from these results")
    add(
        "--detail-load",
        type=above_zero,
        default=1.5,
        help="load of the tables and pictures that show one (default 1.5)",
    )
    options = parser.parse_args(arguments)
    if options.quick and options.traces:
        parser.error("--quick has a workload of its own: leave --traces out")
    options.tune = options.tune or options.tune_from is not None or bool(options.tune_also)
    if options.slo_unloaded and options.slo_scale != 1.0:
        parser.error("--slo-unloaded sets all targets: put the scale into its factors and leave --slo-scale out")
    if options.tune and options.chunk_tokens is not None:
        parser.error("--chunk-tokens and --tune: settings are chosen with each policy's own chunks; leave one out")
    is_short = options.quick or not options.traces
    options.loads = options.loads or (QUICK_LOADS if is_short else DEFAULT_LOADS)
    options.policies = options.policies or (list(QUICK_POLICIES) if is_short else ["all"])
    options.seeds = options.seeds or (1 if is_short else 3)
    if options.tune and options.tune_seed < options.seeds:
        parser.error(f"--tune-seed {options.tune_seed} is among the {options.seeds} seeds that are compared")
    options.report = options.report or options.out.with_suffix(".md")
    return options


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected comma-separated names")
    return names


def _loads(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(above_zero(part) for part in text.split(",")))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(at_least_one(part) for part in text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
