r"""How much useful work each policy gets out of the same engines: goodput and attainment over the load, side by side.

    python -m benchmarks.goodput --quick
    python -m benchmarks.goodput --traces a.csv.gz b.csv.gz --profile llama-3-8b:a100-80g:1 \
        --profile-path step_time.json --loads 0.75,0.9,1.0,1.25,1.5,2.0 --policies all --objectives token,balanced \
        --seeds 3 --tune --bound --ablation --out bench-results/goodput.json --report docs/results.md
    python -m benchmarks.goodput --render bench-results/goodput.json --report docs/results.md

Every policy runs as in production, in virtual time: router, step planner, length estimates. Loads are relative to the
saturated throughput under first come, first served with 128 slots, whatever slots a policy runs with.
tempo and density run under each objective; the other policies know none and run once. --tune: every rival runs with the
slots and the shedding that suit it best, chosen on a part that is not compared (benchmarks/goodput_tuning.py). Rows go
to --out as they come, so an interrupted run keeps them, marked by "complete": false; --resume goes on with it. --quick:
a generated workload, few policies, three minutes on two cores.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks.crew import Crew, process_pool
from benchmarks.goodput_comparison import OURS
from benchmarks.goodput_plan import QUICK_PROFILE, Plan, plan_of
from benchmarks.goodput_report import Results, check_report, read_results, write_report
from benchmarks.goodput_run import add_bounds, choices_from, execute, resumed
from benchmarks.goodput_tables import comparison_markdown, policies_markdown
from tempo_router.errors import ConfigError, TempoError
from tempo_router.option_values import above_zero, at_least_one, whole
from tempo_router.simulation.experiment import OBJECTIVES, REFERENCE_SLOTS

QUICK_POLICIES = (OURS, "fcfs", "edf", "class_priority", "qoserve", "jitserve", "jitserve_tuned")
QUICK_LOADS = (1.0, 1.5)
DEFAULT_LOADS = (0.75, 0.9, 1.0, 1.25, 1.5, 2.0)

REPLICA_RATES = (2.0, 4.0)
"""--replicas-needed: rates of arrivals, as multiples of the saturated throughput of one replica."""
TUNE_SLOTS = (32, 48, 64, 128)
TUNE_SEED = 1000
"""Far from the seeds that are compared, so that more of them can be added."""
TUNE_LOAD = 1.5
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write and print; returns the exit status."""
    options = _parse(arguments)
    try:
        if options.render:
            results = [read_results(path) for path in options.render]
            check_report(options.report, options.render)
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
    # Before the first run: a typing error is not to be found after the last.
    check_report(options.report, {*read, options.out})
    signal.signal(signal.SIGTERM, _interrupt)
    if options.add_bound:
        return _add_bounds(plan, options)
    results = resumed(options.out, plan) if options.resume and options.out.exists() else Results(
        options.out, plan.conditions
    )  # fmt: skip
    if options.tune_from is not None:
        results.choices += choices_from(options.tune_from, plan, results.choices)
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
