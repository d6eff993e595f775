"""Goodput of the served system with real vLLM: one trace, several policies, replayed in turns.

    python -m benchmarks.live --quick
    python -m benchmarks.live --trace a.csv.gz --policies vllm,vllm_priority,fcfs,priority,class_priority,tempo \
        --workers 2 --loads 0.75,1.5 --seeds 3 --slots 8 --seconds 60 --scale 0.1 --json out.json --report out.md

Every policy has an application of its own, `tempo serve` with the same engine flags, and all are up all the time; only
one is under load. --through fleet leaves out Ray and HTTP (benchmarks/live_fleet.py), for machines on which several
applications are too much; router, workers, engines and the streams between them are the same. For each seed and load
the policies take turns, so that what else the machine does falls on all. Load 1.0 is what fcfs (without it, the first
policy) delivers of this trace's tokens from a backlog, measured first. Rows are those of the simulator's benchmark
(tempo_router/simulation/rows.py), with `profile` naming the live engine; --report has the same tables and pictures.

    vllm            vLLM's own server, without our router: first come, first served; of several each call goes to the
                    one with the fewest open calls
    vllm_priority   the same with vLLM's priority policy: clients give their calls' deadlines as `priority`
    fcfs            first come, first served: in the router, and vLLM's own policy of that name
    priority        earliest deadline, in the router and as vLLM's priority
    class_priority  streams, then deadlines, then best effort, in the router and as vLLM's priority
    tempo           Tempo's plan in the router, its step planner inside vLLM

--scale multiplies all lengths of the trace, so that a laptop serves what a GPU would, and with them the deadlines of
whole answers and programs; --slo-scale multiplies all targets.
"""

import argparse
import asyncio
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.goodput_plan import OBJECTIVE_AWARE, code_digest
from benchmarks.goodput_report import Results, write_report
from benchmarks.live_client import Target, replay_http
from benchmarks.live_fleet import fleet_server, preload_vllm
from benchmarks.live_truth import Record, engines_of, errors, read_record, simulated_row
from benchmarks.servers import plain_vllm, tempo_server
from tempo_router.request import BestEffort
from tempo_router.simulation import transform
from tempo_router.simulation.experiment import (
    OVERLOAD,
    STEADY,
    backlog,
    output_rate,
    recorded_tokens_per_s,
    trace_digest,
)
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.report import Report
from tempo_router.simulation.rows import IDENTITY, MEASURES, measures
from tempo_router.simulation.trace import Trace
from tempo_router.simulation.trace_file import read_trace
from workers.default_model import resolve_model

MODEL = "tempo-tiny"
STOCK: dict[str, str] = {"vllm": "fcfs", "vllm_priority": "priority"}
"""vLLM without our router: its own scheduling policy."""
POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {"policy": "fcfs", "engine": "fcfs"},
    "priority": {"policy": "edf", "engine": "priority"},
    "class_priority": {"policy": "class_priority", "engine": "priority"},
    "tempo": {"policy": "tempo", "engine": "planned"},
}
_MOST_TOKENS = 3000
"""Of one call, prompt and answer together; longer ones are left out, since the engines' contexts are short."""
RIVALS = (*STOCK, "fcfs", "class_priority")
"""Policies over which the summary has the goodput of each."""
_UNSEEN = ("steps", "preemptions", "recomputed_tokens", "prefix_hit_tokens")
"""Columns of which a client sees nothing."""
DEFAULT_WORKLOAD = GeneratorConfig(duration_s=2400.0, rate_per_s=1.0)


def workload(options: argparse.Namespace) -> Trace:
    """The trace, its lengths scaled, what the engines cannot hold left out."""
    trace = read_trace(options.trace) if options.trace else generate(DEFAULT_WORKLOAD, seed=1)
    # Shorter answers take less time: at a tenth of the lengths nobody could miss the deadlines of the trace.
    trace = transform.with_deadline_scale(transform.with_length_scale(trace, options.scale), options.scale)
    trace = transform.at_most_tokens(transform.with_slo_scale(trace, options.slo_scale), _MOST_TOKENS)
    if not trace.units:
        raise SystemExit("no unit of this trace fits the engines; use a smaller --scale")
    return trace


def without_targets(trace: Trace) -> Trace:
    """The trace with nothing that is ever late. No deadline in years, as in the simulator: a service refuses those."""
    return Trace(trace.name, tuple(dataclasses.replace(unit, slo=BestEffort()) for unit in trace.units))


def engine_kwargs_of(options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's arguments, the same for all policies."""
    # Our workers would be eager on a CPU anyway, vLLM's own server would not.
    small = {"kv_cache_memory_bytes": 256 * 1024 * 1024, "enforce_eager": True}
    return {
        "max_model_len": 4096,
        "max_num_seqs": options.slots,
        "max_num_batched_tokens": options.step_tokens,
        **(small if options.model == MODEL else {}),
        **options.engine_kwargs,
    }


def arguments_of(policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """`args` of the application under this policy; everything but the policy is the same for all."""
    chosen = POLICIES[policy]
    engine_kwargs = engine_kwargs_of(options)
    if chosen["engine"] == "fcfs":
        engine_kwargs["scheduling_policy"] = "fcfs"
    arguments: dict[str, Any] = {"record_events": str(events_log(policy, options))} if options.truth else {}
    return {
        **arguments,
        "model": options.model,
        "scheduling": {"policy": chosen["policy"], "hopeless": options.hopeless},
        "engine": {
            "engine_kwargs": engine_kwargs,
            "step_planner": "on" if chosen["engine"] == "planned" else "off",
        },
        "workers": {"replicas": options.workers},
    }


def events_log(policy: str, options: argparse.Namespace) -> Path:
    """Where the router of this policy records; the epoch is appended to the name."""
    return Path(options.folder.absolute() / policy / "events.jsonl")


Replay = Callable[[Trace, float], Report]
"""Runs a trace through one application: (trace, seconds after its last arrival) -> report."""


def saturated_tokens_per_s(trace: Trace, served: Replay, tokens: int) -> float:
    """Output tokens per second under a flood of this trace's beginning, filling and emptying left out.

    tokens: about so many are sent, twice: all at once to see how fast they are worked off, then OVERLOAD times as fast
    as that. As in the simulator's benchmark, which says why.
    """
    part = without_targets(transform.first_output_tokens(trace, tokens))
    worked_off = output_rate(served(transform.with_names(backlog(part), "backlog-"), 600.0).units, (0.0, STEADY[1]))
    flood = transform.faster(part, OVERLOAD * worked_off / recorded_tokens_per_s(part))
    return output_rate(served(transform.with_names(flood, "flood-"), 600.0).units, STEADY)


def saturation(trace: Trace, targets: Mapping[str, Replay], rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Tokens/s of a backlog in which nobody has a target, every policy in turn; and over that of the first."""
    part = without_targets(transform.first_output_tokens(trace, tokens))
    rates: dict[str, list[float]] = {name: [] for name in targets}
    for number in range(rounds):
        for name in sorted(targets, reverse=bool(number % 2)):
            report = targets[name](transform.with_names(backlog(part), f"saturation-{number}-"), 600.0)
            rates[name].append(output_rate(report.units, STEADY))
    first = next(iter(targets))
    found = []
    for name, own in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(own, rates[first], strict=True)]
        found.append({"policy": name, "tokens_per_s": _spread(own), f"over_{first}": _spread(ratios)})
        print(json.dumps(found[-1]), flush=True)
    return found


def offered(trace: Trace, load: float, saturated: float, seconds: float, seed: int) -> Trace:
    """The trace at this load, permuted by seed, cut after `seconds` of real time."""
    factor = load * saturated / recorded_tokens_per_s(trace)
    return transform.first_s(transform.faster(transform.permuted(trace, seed), factor), seconds)


def row(report: Report, replayed: Trace, **identity: Any) -> dict[str, Any]:
    """One row, as of the simulator's benchmark."""
    blank = {column.name: None for column in (*IDENTITY, *MEASURES)}
    unchanged = {"tuned": False, "knowledge": "learned", "time_scale": 1.0, "kv_scale": 1.0, "switches": {}}
    seen = {name: value for name, value in measures(report, replayed).items() if name not in _UNSEEN}
    return {**blank, **unchanged, **identity, **seen}


def conditions_of(options: argparse.Namespace, trace: Trace) -> dict[str, Any]:
    """What a reader of the rows must know, as of the simulator's benchmark; and all options."""
    return {
        "live": {
            "through": options.through,
            "seconds": options.seconds,
            "limit_s": options.limit_s,
            "scale": options.scale,
            "options": {name: str(value) for name, value in vars(options).items()},
        },
        "traces": {trace.name: f"{len(trace.units)} units, {trace.calls} calls, {trace.span_s:.0f} s"},
        "profiles": [profile_of(options)],
        "replicas": options.workers,
        "slots": options.slots,
        "seeds": options.seeds,
        "loads": list(options.loads),
        "sheds": "on" if options.hopeless == "refuse" else "off",
        "time_scale": 1.0,
        "kv_scale": 1.0,
        "slo_scale": options.slo_scale,
        "slo_unloaded": [],
        "tuned": None,
        "window_s": None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tempo": version("tempo-serve"),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "code": code_digest(),
    }


def profile_of(options: argparse.Namespace) -> str:
    """The engines, in place of a step-time profile."""
    return f"live {Path(options.model).name} x {options.workers} through {options.through}"


def identity_of(options: argparse.Namespace, trace: Trace, policy: str, **cell: Any) -> dict[str, Any]:
    """The columns that say what a row was measured of. cell: load, seed and saturated_tokens_per_s."""
    return {
        "trace": trace.name,
        "trace_digest": trace_digest(trace),
        "profile": profile_of(options),
        "replicas": options.workers,
        "policy": policy,
        "objective": "balanced" if policy in OBJECTIVE_AWARE else "token",
        "slots": options.slots,
        "sheds": options.hopeless == "refuse" and policy not in STOCK,
        **cell,
    }


def run(options: argparse.Namespace) -> Results:
    """Start the applications, measure the capacity, replay, and return rows, conditions and summary."""
    trace = workload(options)
    folder = options.folder.absolute()
    results = Results(options.json or folder / "live.json", conditions_of(options, trace))
    rows, found = results.rows, results.further
    cells: list[tuple[Trace, float, float]] = []
    with ExitStack() as stack:
        targets = _start(stack, folder, options)
        for name, served in targets.items():
            saturated_tokens_per_s(transform.with_names(trace, "warm-"), served, options.backlog // 4)
            print(f"{name} is warm", flush=True)
        reference = targets.get("fcfs") or next(iter(targets.values()))
        full = transform.with_names(trace, "full-")
        saturated = options.saturated or saturated_tokens_per_s(full, reference, options.backlog)
        print(f"load 1.0 is {saturated:.0f} output tokens/s", flush=True)
        if options.saturation:
            found["saturation"] = saturation(trace, targets, options.saturation, options.backlog)
        for seed in range(options.seeds):
            for load in options.loads:
                part = offered(trace, load, saturated, options.seconds, seed)
                order = list(targets)
                for name in order if seed % 2 == 0 else reversed(order):
                    began_s = time.monotonic()
                    report = targets[name](transform.with_names(part, f"{seed}-{load}-"), options.limit_s)
                    cells.append((part, began_s, time.monotonic()))
                    cell = {"load": load, "seed": seed, "saturated_tokens_per_s": saturated}
                    rows.append(row(report, part, **identity_of(options, trace, name, **cell)))
                    _print_row(rows[-1])
                    found["summary"] = summary(rows)
                    results.write(is_complete=False)
    if options.truth:
        found["truth"] = truth(rows, cells, options)
    results.write(is_complete=True)
    return results


def truth(
    rows: Sequence[dict[str, Any]], cells: Sequence[tuple[Trace, float, float]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every cell once more, simulated with the steps that its own engines made meanwhile. cells: trace, begin, end.

    But those of vLLM without our router: nobody recorded its steps. Where the record tells too little of an engine, the
    cell's entry has the `reason` and no more.
    """
    records: dict[str, Record] = {}
    found = []
    for live, (part, began_s, ended_s) in zip(rows, cells, strict=True):
        policy = live["policy"]
        if policy in STOCK:
            continue
        entry = {"policy": policy, "load": live["load"], "seed": live["seed"]}
        try:
            if policy not in records:
                records[policy] = read_record(_newest_log(policy, options))
            engines = engines_of(records[policy], began_s, ended_s)
            simulated = simulated_row(part, live, engines, POLICIES[policy]["policy"])
        except ValueError as error:
            entry["reason"] = str(error)
        else:
            entry["steps"] = [engine.steps for engine in engines]
            entry["step_error"] = [round(engine.step_error, 3) for engine in engines]
            entry |= errors(live, simulated)
        found.append(entry)
        print(json.dumps(entry), flush=True)
    return found


def _newest_log(policy: str, options: argparse.Namespace) -> Path:
    log = events_log(policy, options)
    logs = list(log.parent.glob(f"{log.stem}-*{log.suffix}"))
    if not logs:
        raise ValueError(f"{log}: no router has recorded anything")
    return max(logs, key=lambda path: path.stat().st_mtime)


def _start(stack: ExitStack, folder: Path, options: argparse.Namespace) -> dict[str, Replay]:
    """All applications, one after the other: imports dominate, and two at once only get into each other's way."""
    if options.through == "fleet":
        preload_vllm()
    began_s = time.monotonic()
    targets: dict[str, Replay] = {}
    for name in options.policies:
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        if name in STOCK:
            targets[name] = partial(_over_http, _start_stock(stack, own, name, options))
        elif options.through == "fleet":
            targets[name] = stack.enter_context(fleet_server(own, arguments_of(name, options))).replay
        else:
            server = stack.enter_context(tempo_server(own, arguments_of(name, options)))
            targets[name] = partial(_over_http, Target((server.url,), options.model))
        print(f"{name} is up after {time.monotonic() - began_s:.0f} s", flush=True)
    return targets


def _start_stock(stack: ExitStack, folder: Path, policy: str, options: argparse.Namespace) -> Target:
    """As many of vLLM's own servers as there are workers otherwise."""
    model_path = resolve_model(options.model, folder / "data")
    flags = {**engine_kwargs_of(options), "scheduling_policy": STOCK[policy]}
    urls = []
    for number in range(options.workers):
        own = folder / f"server-{number}"
        own.mkdir(exist_ok=True)
        urls.append(stack.enter_context(plain_vllm(own, model_path, flags, model=options.model)).url)
    return Target(tuple(urls), options.model, has_programs=False, has_priorities=STOCK[policy] == "priority")


def _over_http(target: Target, trace: Trace, limit_s: float) -> Report:
    return asyncio.run(replay_http(trace, target, limit_s=limit_s))


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By load and policy: mean and range over the seeds, and goodput over that of each of RIVALS."""
    found = []
    for load in sorted({one["load"] for one in rows}):
        at_load = [one for one in rows if one["load"] == load]
        for policy in dict.fromkeys(one["policy"] for one in at_load):
            own = [one for one in at_load if one["policy"] == policy]
            entry: dict[str, Any] = {"load": load, "policy": policy, "seeds": len(own)}
            for name in ("token_goodput", "request_goodput", "attainment", "ttft_p95_s", "throughput"):
                values = [one[name] for one in own if one[name] is not None]
                entry[name] = _spread(values)
            entry["attainment_of_streams"] = _spread(
                [one["attainment_by_class"]["latency"] for one in own if "latency" in one["attainment_by_class"]]
            )
            for rival in RIVALS:
                theirs = {one["seed"]: one for one in at_load if one["policy"] == rival}
                entry[f"goodput_over_{rival}"] = _spread(
                    [
                        one["token_goodput"] / theirs[one["seed"]]["token_goodput"]
                        for one in own
                        if one["seed"] in theirs and theirs[one["seed"]]["token_goodput"] > 0
                    ]
                )
            found.append(entry)
    return found


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": round(statistics.fmean(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def _print_row(one: dict[str, Any]) -> None:
    by_class = " ".join(f"{name} {share:.2f}" for name, share in one["attainment_by_class"].items())
    # Of few units none may have a target, or none be a stream.
    attained, ttft_s = ("-" if one[name] is None else f"{one[name]:.3f}" for name in ("attainment", "ttft_p95_s"))
    print(
        f"seed {one['seed']} load {one['load']:.2f} {one['policy']:15} good tokens/s {one['token_goodput']:7.1f} "
        f"attained {attained} ({by_class}) TTFT P95 {ttft_s} s units {one['units']} {one['status_by_class']}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parsed(arguments)
    results = run(options)
    for entry in results.further["summary"]:
        print(json.dumps(entry))
    if options.report:
        write_report(options.report, [results])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked. Raises SystemExit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: a generated one")
    parser.add_argument("--policies", type=lambda text: text.split(","), help="default: all that --through can serve")
    parser.add_argument("--loads", type=lambda text: [float(one) for one in text.split(",")], help="default: 0.75,1.5")
    parser.add_argument("--seeds", type=int, help="default: 3")
    parser.add_argument("--model", default=MODEL, help="path or hub id")
    parser.add_argument("--engine-kwargs", type=json.loads, default={}, help="further arguments of vLLM, as JSON")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slots", type=int, default=8, help="sequences of one engine step")
    parser.add_argument("--step-tokens", type=int, default=512, help="vLLM's max_num_batched_tokens")
    parser.add_argument("--scale", type=float, default=0.1, help="of all lengths and deadlines of the trace")
    parser.add_argument("--slo-scale", type=float, default=1.0, help="of all targets")
    parser.add_argument("--seconds", type=float, help="of arrivals, for each cell; default: 60")
    parser.add_argument("--limit-s", type=float, default=20.0, help="after the last arrival; what is open then is cut")
    parser.add_argument("--saturated", type=float, help="load 1.0 in output tokens/s; default: measured")
    parser.add_argument("--hopeless", choices=("relegate", "refuse"), default="relegate")
    parser.add_argument("--through", choices=("http", "fleet"), default="http", help="fleet: without Ray and HTTP")
    parser.add_argument("--backlog", type=int, default=20_000, help="output tokens by which load 1.0 is measured")
    parser.add_argument("--folder", type=Path, default=Path("bench-results/live"), help="for logs and the model")
    parser.add_argument("--json", type=Path, help="rows go here as they come; default: live.json in --folder")
    parser.add_argument("--report", type=Path, help="write Markdown with tables to this file, pictures beside it")
    parser.add_argument("--saturation", type=int, default=0, help="rounds of a backlog without targets, first")
    parser.add_argument("--truth", action="store_true", help="simulate every cell too, and report what differs")
    parser.add_argument("--quick", action="store_true", help="by default one seed, one load, two policies, 20 s")
    options = parser.parse_args(arguments)
    known = (*POLICIES,) if options.through == "fleet" else (*STOCK, *POLICIES)
    defaults: dict[str, Any] = (
        {"policies": ["fcfs", "tempo"], "seeds": 1, "loads": [1.5], "seconds": 20.0}
        if options.quick
        else {"policies": list(known), "seeds": 3, "loads": [0.75, 1.5], "seconds": 60.0}
    )
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    unknown = [name for name in options.policies if name not in known]
    if unknown:
        parser.error(f"no such policies through {options.through}: {', '.join(unknown)}; there are {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
