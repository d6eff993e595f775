"""Running a plan of `benchmarks.goodput`: what is there already, what is tried first, and all rows as they come."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.crew import Crew
from benchmarks.goodput_comparison import OURS, grouped
from benchmarks.goodput_plan import Plan, engines_of
from benchmarks.goodput_report import Results, read_results
from benchmarks.goodput_tuning import Choice, choice_key, chosen, tried, with_choice
from tempo_router.errors import ConfigError
from tempo_router.simulation.experiment import (
    Cell,
    bound_slots,
    bound_tokens_per_s,
    calls_digest,
    fleet,
    identity,
    offered,
    replicas_needed,
    run_cell,
    saturated_tokens_per_s,
)

REPLICA_ATTAINMENT = 0.95
REPLICA_MOST = 16

SLOWNESS = {OURS: 3.0}
"""Time that a call takes to simulate, relative to other policies; a guess that orders cells until some are measured."""


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


def choices_from(path: Path, plan: Plan, known: Sequence[Choice]) -> list[Choice]:
    """What an earlier run chose for the tunings of this plan: settings are no measurements, so other code may have."""
    wanted = {tuning.key for tuning in plan.tunings} - {choice_key(choice) for choice in known}
    return [choice for choice in read_results(path).choices if choice_key(choice) in wanted]


def key_of(columns: Mapping[str, Any]) -> str:
    """What tells cells and rows apart."""
    names = ("trace_digest", "profile", "replicas", "load", "policy", "objective", "seed", "slots", "sheds",
             "tuned", "knowledge", "time_scale", "kv_scale", "switches")  # fmt: skip
    return json.dumps([columns[name] for name in names], sort_keys=True)


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
    engines = {(calls_digest(cell.trace), *engines_of(cell)): cell for cell in (*cells, *searches)}
    for _ in crew.each(_saturate, [(cell,) for cell in engines.values()], "references", []):
        pass
    if with_bound:
        offers = {(id(cell.trace), *engines_of(cell), bound_slots(cell), cell.load, cell.seed): cell for cell in cells}
        for _ in crew.each(_bound, [(cell,) for cell in offers.values()], "bounds", []):
            pass


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
