"""`tempo-router simulate` and `bound`: policies on a workload in virtual time, and what nobody could beat."""

import argparse
import csv
import io
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from tempo_router.cli_workloads import check_outputs, generated, say, settings
from tempo_router.config import PolicyName, SchedulingConfig
from tempo_router.errors import ConfigError
from tempo_router.exit_statuses import EXIT_INTERRUPTED
from tempo_router.option_values import above_zero, at_least_one, whole
from tempo_router.simulation import transform
from tempo_router.simulation.step_profiles import load_profile, preset_profiles
from tempo_router.simulation.trace import Trace
from tempo_router.simulation.trace_file import read_trace

if TYPE_CHECKING:
    from tempo_router.simulation.experiment import Cell
    from tempo_router.simulation.step_profiles import StepProfile, StepTime

# Of a row, what fits on a line: column, heading, how it is shown.
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("trace", "trace", "s"),
    ("profile", "profile", "s"),
    ("load", "load", "g"),
    ("policy", "policy", "s"),
    ("seed", "seed", "d"),
    ("token_goodput", "good tok/s", ".1f"),
    ("request_goodput", "good req/s", ".3f"),
    ("attainment", "attained", ".1%"),
    ("worst_class_attainment", "worst class", ".1%"),
    ("ttft_p95_s", "TTFT P95 s", ".3f"),
    ("tbt_p99_s", "TBT P99 s", ".3f"),
    ("wall_s", "took s", ".1f"),
)


# ---- options of simulate and bound


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", dest="traces", action="append", type=Path, default=[], help="may be repeated")
    parser.add_argument("--generate", nargs="*", metavar="KEY=VALUE", help="generate the trace instead of reading it")
    parser.add_argument("--generate-seed", type=whole, default=0)
    parser.add_argument("--first-s", type=above_zero, help="only what arrives in the first seconds of a trace")
    parser.add_argument("--without-app", action="append", default=[], help="leave out this application; repeatable")
    parser.add_argument("--max-call-tokens", type=at_least_one, help="leave out units with a larger call")
    parser.add_argument("--no-prefix-cache", action="store_true", help="engines that cache no prefixes of prompts")
    parser.add_argument("--slo-factor", type=above_zero, help="multiply all targets; below 1 is tighter")
    parser.add_argument(
        "--slo-unloaded",
        type=above_zero,
        metavar="FACTOR",
        help="targets of FACTOR times the unloaded time of each unit",
    )
    parser.add_argument(
        "--profile",
        dest="profiles",
        action="append",
        required=True,
        metavar="NAME",
        help=f"step times: {', '.join(preset_profiles())}, or one of --profile-path; repeat for unlike replicas",
    )
    parser.add_argument("--profile-path", type=Path, help="a file with more profiles")
    parser.add_argument(
        "--replicas", type=at_least_one, help="that many of one profile; default: one of each --profile"
    )
    parser.add_argument(
        "--slots", type=at_least_one, default=128, help="calls that a replica runs at once (default: 128)"
    )


def _workloads(options: argparse.Namespace, profile_names: Sequence[str]) -> list[Trace]:
    if options.generate is not None and options.traces:
        raise ConfigError("give --trace or --generate, not both")
    if options.generate is not None:
        traces = [generated(options.generate, options.generate_seed)]
    elif options.traces:
        traces = [read_trace(path) for path in options.traces]
    else:
        raise ConfigError("no workload: give --trace FILE or --generate")
    step_times = [load_profile(name, options.profile_path).step_time for name in dict.fromkeys(profile_names)]
    if options.slo_unloaded is not None and len(step_times) > 1:
        raise ConfigError("--slo-unloaded: unlike replicas have no one unloaded time; use --slo-factor")
    _check_apps(options.without_app, traces)
    return [_changed(trace, options, step_times[0]) for trace in traces]


def _changed(trace: Trace, options: argparse.Namespace, step_time: "StepTime") -> Trace:
    """What the options make of a trace, named so, as benchmarks.goodput does: rows of both would else look alike."""
    units_before = len(trace.units)
    if options.first_s is not None:
        trace = _named(transform.first_s(trace, options.first_s), f"first {options.first_s:g} s")
    if options.without_app:
        apps = sorted(set(options.without_app))
        trace = _named(transform.without_apps(trace, apps), f"without {', '.join(apps)}")
    if options.max_call_tokens is not None:
        tokens = options.max_call_tokens
        trace = _named(transform.at_most_tokens(trace, tokens), f"calls to {tokens} tokens")
    if not trace.units:
        raise ConfigError(f"{trace.name}: none of {units_before} units is left; leave out less")
    if options.no_prefix_cache:
        trace = transform.without_prefix_cache(trace)
    if options.slo_unloaded is not None:
        factor = options.slo_unloaded
        trace = _named(transform.with_unloaded_slos(trace, factor, step_time), f"{factor:g}x unloaded")
    if options.slo_factor is not None:
        factor = options.slo_factor
        trace = _named(transform.with_slo_scale(trace, factor), f"targets x {factor:g}")
    return trace


def _named(trace: Trace, change: str) -> Trace:
    return replace(trace, name=f"{trace.name} {change}")


def _check_apps(left_out: Sequence[str], traces: Sequence[Trace]) -> None:
    """Raises ConfigError for an application that no trace has: leaving out nothing would look like success."""
    apps = sorted({unit.app for trace in traces for unit in trace.units})
    for app in left_out:
        if app not in apps:
            raise ConfigError(f"--without-app {app}: no unit is of this application; there are: {', '.join(apps)}")


def _profile_names(options: argparse.Namespace) -> tuple[str, ...]:
    names: list[str] = options.profiles
    if options.replicas is None or options.replicas == len(names):
        return tuple(names)
    if len(names) > 1:
        raise ConfigError(f"--replicas {options.replicas}: there are {len(names)} --profile; give one, or one for each")
    return tuple(names * options.replicas)


def _load(text: str) -> float | None:
    """None: the trace's own speed."""
    if text == "recorded":
        return None
    try:
        return above_zero(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}, or recorded: the trace's own speed") from e


# ---- simulate


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Options of `simulate`."""
    _add_workload(parser)
    parser.add_argument(
        "--load",
        dest="loads",
        action="append",
        type=_load,
        metavar="LOAD",
        help="offered tokens over what the replicas can just deliver (default: 1.0), or `recorded`: the trace's own "
        "speed; may be repeated",
    )
    default_policy = SchedulingConfig.model_fields["policy"].default
    parser.add_argument(
        "--policy",
        dest="policies",
        action="append",
        metavar="NAME",
        help=f"may be repeated (default: {default_policy}); of {', '.join(get_args(PolicyName))}",
    )
    parser.add_argument(
        "--objective", default="balanced", help="token, balanced (as a service by default), request or gain"
    )
    parser.add_argument(
        "--seed", dest="seeds", action="append", type=whole, help="0 (default): the trace as it is; else permuted"
    )
    parser.add_argument("--no-shedding", action="store_true", help="hopeless work goes on as best effort")
    parser.add_argument(
        "--knowledge",
        help="of lengths and programs: learned (default; srpt: true), regressor, none, graphs or true",
    )
    parser.add_argument(
        "--patience",
        type=above_zero,
        metavar="F",
        help="clients leave after F times their TTFT, or time to last token (default: they stay)",
    )
    parser.add_argument(
        "--retries", type=whole, default=0, metavar="N", help="how often a refused unit is sent again (default: 0)"
    )
    parser.add_argument(
        "--switch",
        dest="switches",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of `scheduling` or its `switches` in docs/configuration.md that has no option here; repeatable",
    )
    parser.add_argument("--out", type=Path, help="all rows as JSON")
    parser.add_argument("--csv", type=Path, help="all rows as CSV")
    parser.set_defaults(command=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    from tempo_router.simulation.experiment import fleet, run_cell

    check_outputs([options.out, options.csv], [*options.traces, options.profile_path])
    cells = _cells(options)
    rows: list[dict[str, Any]] = []
    # Written before the first simulation, so that a path that cannot be written costs no time.
    _write_rows(options, rows, is_complete=False)
    is_complete = False
    try:
        with tqdm(total=len(cells), unit="run", disable=None, file=sys.stderr, bar_format=_BAR) as bar:
            for done, cell in enumerate(cells):
                if not cell.is_recorded:
                    _measure_reference(cell.trace, fleet(cell))
                bar.set_description_str(
                    f"{cell.policy} at {'its own speed' if cell.is_recorded else f'{cell.load:g}x'}"
                )
                rows.append(run_cell(cell, _Progress(bar, done), clock=time.perf_counter))
                bar.n = done + 1
                bar.refresh()
                _write_rows(options, rows, is_complete=False)
        is_complete = True
    except KeyboardInterrupt:
        sys.stderr.write(f"\ntempo-router: interrupted; {len(rows)} of {len(cells)} runs are complete\n")
    finally:
        _write_rows(options, rows, is_complete=is_complete)
        if rows:
            say(_table(rows))
            _warn_of_short_arrivals(rows)
            if not is_complete:
                # The table may go to a file, where nobody sees what stderr said.
                say(f"incomplete: {len(rows)} of {len(cells)} runs")
    return 0 if is_complete else EXIT_INTERRUPTED


def _warn_of_short_arrivals(rows: Sequence[dict[str, Any]]) -> None:
    """Where most of a run comes after the last arrival, nothing waits long for its turn and rates say little."""
    short = [row for row in rows if 0 < row["arrival_span_s"] < row["duration_s"] / 2]
    if not short:
        return
    least = min(short, key=lambda row: row["arrival_span_s"] / row["duration_s"])
    sys.stderr.write(
        f"tempo-router: in {len(short)} of {len(rows)} runs most of the time is after the last arrival (at most"
        f" {least['arrival_span_s']:.3g} s of arrivals in a run of {least['duration_s']:.3g} s). Good tokens and"
        " requests are per second of arrivals, so there they are more than the replicas delivered; take a longer trace"
        " or a lower --load\n"
    )


def _measure_reference(trace: Trace, profiles: "tuple[StepProfile, ...]") -> float:
    """What load 1.0 means: known from earlier runs or measured now, with a bar of its own, since it takes as long."""
    from tempo_router.simulation.experiment import saturated_tokens_per_s

    with tqdm(total=1, disable=None, file=sys.stderr, bar_format=_REFERENCE_BAR, leave=False) as bar:
        return saturated_tokens_per_s(trace, profiles, on_progress=_Progress(bar, 0))


_REFERENCE_BAR = "saturated throughput {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.2f}/{total} runs [{elapsed}<{remaining}]"


class _Progress:
    """Moves the bar by the share of one run; at most some hundred times, since a terminal is slow."""

    def __init__(self, bar: "tqdm[Any]", done: int) -> None:
        self._bar = bar
        self._done = done
        self._shown = 0.0

    def __call__(self, share: float) -> None:
        if share >= self._shown + 0.005:
            self._shown = share
            self._bar.n = self._done + min(share, 1.0)
            self._bar.refresh()


def _cells(options: argparse.Namespace) -> "list[Cell]":
    """All that is to be run, checked: what is wrong with the last is said before the first starts."""
    from tempo_router.simulation.experiment import Cell

    profile_names = _profile_names(options)
    # What is given twice runs once: equal cells give equal rows.
    options.traces = list({path.resolve(): path for path in options.traces}.values())
    loads = dict.fromkeys(options.loads or [1.0])
    policies = dict.fromkeys(options.policies or [SchedulingConfig.model_fields["policy"].default])
    seeds = dict.fromkeys(options.seeds or [0])
    switches = settings(options.switches)
    combinations = itertools.product(_workloads(options, profile_names), loads, policies, seeds)
    cells = [
        Cell(
            trace=trace,
            profile_names=profile_names,
            profile_path=options.profile_path,
            load=1.0 if load is None else load,
            is_recorded=load is None,
            policy=policy,
            objective=options.objective,
            seed=seed,
            slots=options.slots,
            sheds=False if options.no_shedding else None,
            knowledge=options.knowledge,
            patience=options.patience,
            retries=options.retries,
            switches=switches,
        )
        for trace, load, policy, seed in combinations
    ]
    for cell in cells:
        _check(cell)
    return cells


def _check(cell: "Cell") -> None:
    """Raises ConfigError for a policy, objective, switch, profile or trace with which the cell could not run."""
    from tempo_router.simulation.experiment import check_load, fleet, knowledge_of, scheduling_of

    scheduling_of(cell)
    fleet(cell)
    knowledge_of(cell)
    check_load(cell)


def _write_rows(options: argparse.Namespace, rows: Sequence[dict[str, Any]], *, is_complete: bool) -> None:
    from tempo_router.simulation.experiment import write_atomically

    _write_json(options.out, "rows", rows, is_complete=is_complete)
    try:
        if options.csv is not None:
            write_atomically(options.csv, _csv_text(rows, is_complete=is_complete))
    except OSError as e:
        raise ConfigError(f"{e.filename or 'output'}: cannot be written: {e.strerror or e}") from e


def _write_json(path: Path | None, name: str, results: Sequence[dict[str, Any]], *, is_complete: bool) -> None:
    from tempo_router.simulation.experiment import write_atomically

    if path is None:
        return
    content = {"complete": is_complete, "version": version("tempo-serve"), name: list(results)}
    try:
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror or e}") from e


def _csv_text(rows: Sequence[dict[str, Any]], *, is_complete: bool) -> str:
    """Nested values as JSON; the first column, in a row of its own if need be, says whether all is there."""
    from tempo_router.simulation.rows import COLUMNS

    names = [column.name for column in COLUMNS]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["complete", *names])
    for row in rows:
        values = [row.get(name) for name in names]
        cells = [json.dumps(value) if isinstance(value, dict | list) else value for value in values]
        writer.writerow([str(is_complete).lower(), *cells])
    if not rows and not is_complete:
        writer.writerow(["false", *[None] * len(names)])
    return buffer.getvalue()


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [heading for _, heading, _ in _TABLE],
        *([_shown(row, name, form) for name, _, form in _TABLE] for row in rows),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_TABLE))]
    is_text = [form == "s" for _, _, form in _TABLE]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def _shown(row: dict[str, Any], name: str, form: str) -> str:
    if row.get(name) is None:
        return "recorded" if name == "load" else "-"
    return format(row[name], form)


# ---- bound


def add_bound(parser: argparse.ArgumentParser) -> None:
    """Options of `bound`."""
    _add_workload(parser)
    parser.add_argument(
        "--load",
        type=_load,
        metavar="LOAD",
        help="offered tokens over what the replicas can just deliver; default: `recorded`, the trace's own speed",
    )
    parser.add_argument("--seed", type=whole, default=0, help="0: the trace as it is; else units permuted")
    parser.add_argument("--bucket-s", type=above_zero, default=4.0, help="width of a time bucket (default: 4)")
    parser.add_argument("--time-limit-s", type=above_zero, default=300.0, help="of the solver, for each trace")
    parser.add_argument(
        "--loose", action="store_true", help="leave out that tokens in a row need as many steps: half the time"
    )
    parser.add_argument("--out", type=Path, help="the bounds as JSON")
    parser.set_defaults(command=_bound)


def _bound(options: argparse.Namespace) -> int:
    check_outputs([options.out], [*options.traces, options.profile_path])
    names = _profile_names(options)
    profiles = tuple(load_profile(name, options.profile_path) for name in names)
    traces = _workloads(options, names)
    results: list[dict[str, Any]] = []
    # Written before the first solution, so that a path that cannot be written costs no time.
    _write_json(options.out, "bounds", results, is_complete=False)
    try:
        for trace in traces:
            results.append(_bound_of(trace, profiles, options))
            _write_json(options.out, "bounds", results, is_complete=len(results) == len(traces))
    except KeyboardInterrupt:
        # Said before anything else: the solver ends at its next look, which may take a moment.
        sys.stderr.write(f"\ntempo-router: interrupted; {len(results)} of {len(traces)} bounds are complete\n")
        if results:
            say(f"incomplete: {len(results)} of {len(traces)} bounds")
        return EXIT_INTERRUPTED
    say("Assumptions:")
    for assumption in results[0]["assumptions"]:
        say(f"  - {assumption}")
    return 0


def _bound_of(trace: Trace, profiles: "tuple[StepProfile, ...]", options: argparse.Namespace) -> dict[str, Any]:
    """Compute, print and return it."""
    from tempo_router.simulation.bound import token_goodput_bound
    from tempo_router.simulation.experiment import recorded_tokens_per_s

    offered = transform.permuted(trace, options.seed)
    if options.load is not None:
        saturated = _measure_reference(trace, profiles)
        offered = transform.faster(offered, options.load * saturated / recorded_tokens_per_s(trace))
    bound = token_goodput_bound(
        offered,
        profiles,
        options.slots,
        bucket_s=options.bucket_s,
        time_limit_s=options.time_limit_s,
        serial_steps=not options.loose,
    )
    per_s = "-" if bound.per_s is None else f"{bound.per_s:.1f}"
    say(f"{trace.name}: at most {per_s} good tokens/s ({bound.total:.0f} in all)")
    if bound.per_s is None:
        say("  all of it comes at once, so there is no rate of arrivals; what counts is the number in all")
    for name, offered_tokens in bound.offered.items():
        if offered_tokens:
            share = bound.accepted.get(name, 0.0) / offered_tokens
            say(f"  {name:<12} {share:6.1%} of {offered_tokens:.0f} tokens in the optimum")
    say(f"  {bound.rows} rows, {bound.columns} columns, {bound.solve_s:.1f} s")
    if bound.is_cut_short:
        limit = f"--time-limit-s {options.time_limit_s:g}"
        say(f"  the solver's time was over: the bound holds, but is loose; give it more than {limit}")
    return {"trace": trace.name, "load": options.load, "seed": options.seed, **asdict(bound)}
