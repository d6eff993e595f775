"""What serving through Tempo costs: our server with one worker against plain vLLM, and ours alone at 1,000 streams.

    python -m benchmarks.overhead [--json out.json] [--repetitions 5] [--streams 1 16 64]
    python -m benchmarks.overhead --engine simulated [--streams 1000] [--seconds 20]

Against vLLM: the same model (tempo-tiny), engine flags and load; both servers are up all the time and only one is under
load, the two taking turns, first one first and then the other. Each repetition gives a ratio; the median and the range
of the ratios are reported. With the simulated engine: tokens/s and requests/s of one ingress and one router, and the
CPU time by process.

The load generator shares the machine with the servers.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures_file import add_json_option, write_figures
from benchmarks.http_load import Load, Result, cpu_seconds, drive
from benchmarks.servers import ENGINE_KWARGS, MODEL, Server, plain_vllm, tempo_server
from tempo_router.option_values import above_zero, at_least_one
from workers.default_model import resolve_model

# Enough streams for the loads below, and ten times as fast as the profile: the engine must not be what limits.
SIMULATED_ENGINE = {
    "kind": "simulated",
    "engine_kwargs": {"max_num_seqs": 1024, "max_num_batched_tokens": 16384, "max_model_len": 4096},
    "time_scale": 0.1,
}
RATIOS = ("ttft_p50_ms", "ttft_p99_ms", "tokens_per_s", "cpu_us_per_token")


@dataclass(frozen=True, slots=True)
class Measured:
    """A load on a server, and where the CPU time went (seconds by role; `generator` is the benchmark itself)."""

    server: str
    repetition: int
    result: Result
    cpu_s: dict[str, float]


def one_load(server: Server, load: Load, repetition: int) -> Measured:
    """Drive a server and look at its processes before and after."""
    before, own_before = server.cpu_seconds_by_role(), cpu_seconds([psutil.Process()])
    result = asyncio.run(drive(server.url, MODEL, load, server.processes()))
    if result.failures:
        raise RuntimeError(f"{server.name}: {result.failures} of {result.requests} requests failed")
    after = server.cpu_seconds_by_role()
    cpu_s = {role: round(used - before.get(role, 0.0), 3) for role, used in after.items()}
    cpu_s["generator"] = round(cpu_seconds([psutil.Process()]) - own_before, 3)
    return Measured(server.name, repetition, result, cpu_s)


# ---- against plain vLLM


def load_for(streams: int, scale: float) -> Load:
    """About two seconds of load, times scale."""
    requests = {1: 24, 16: 96, 64: 192}.get(streams, 3 * streams)
    return Load(streams=streams, requests=max(streams, int(requests * scale)), max_tokens=64)


def against_vllm(folder: Path, streams: Sequence[int], repetitions: int, scale: float) -> dict[str, Any]:
    """Measure both servers in turn."""
    model_path = resolve_model(MODEL, folder / "data")
    measured: list[Measured] = []
    with ExitStack() as stack:
        engine = {"kind": "vllm", "engine_kwargs": ENGINE_KWARGS}
        ours = stack.enter_context(tempo_server(folder, {"model": MODEL, "engine": engine}))
        plain = stack.enter_context(plain_vllm(folder, model_path, ENGINE_KWARGS))
        for server in (ours, plain):
            for count in streams:
                one_load(server, load_for(count, 1.0), -1)
        for repetition in range(repetitions):
            for count in streams:
                pair = (ours, plain) if (repetition + count) % 2 else (plain, ours)
                measured += [one_load(server, load_for(count, scale), repetition) for server in pair]
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {"engine_kwargs": ENGINE_KWARGS, "runs": [asdict(one) for one in measured], "summary": summary(measured)}


def summary(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Per number of streams: medians of both servers, and the ratio ours/plain of each repetition."""
    rows = []
    for streams in sorted({one.result.streams for one in measured}):
        ours = [one for one in measured if one.server == "tempo" and one.result.streams == streams]
        plain = [one for one in measured if one.server == "plain" and one.result.streams == streams]
        row: dict[str, Any] = {"streams": streams}
        for name in RATIOS:
            pairs = [(getattr(a.result, name), getattr(b.result, name)) for a, b in zip(ours, plain, strict=True)]
            ratios = sorted(a / b for a, b in pairs)
            row[name] = {
                "tempo": round(statistics.median(a for a, _ in pairs), 2),
                "plain": round(statistics.median(b for _, b in pairs), 2),
                "difference": round(statistics.median(a - b for a, b in pairs), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
        tokens = sum(one.result.tokens for one in ours)
        row["tempo_cpu_us_per_token_by_role"] = {
            role: round(sum(one.cpu_s.get(role, 0.0) for one in ours) * 1e6 / tokens, 1) for role in ours[0].cpu_s
        }
        rows.append(row)
    return rows


def print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    """For people."""
    print(f"{'streams':>7}  {'':<17}{'tempo':>10}{'plain':>10}{'diff':>9}{'ratio':>8}   range of ratios")
    for row in rows:
        for name in RATIOS:
            one = row[name]
            low, high = one["ratio_range"]
            print(f"{row['streams']:>7}  {name:<17}{one['tempo']:>10}{one['plain']:>10}{one['difference']:>9}", end="")
            print(f"{one['ratio']:>8}   {low} .. {high}")
        print(f"{'':>9}CPU us per token: {row['tempo_cpu_us_per_token_by_role']}")


# ---- with the simulated engine


def with_simulated_engine(folder: Path, streams: int, seconds: float) -> dict[str, Any]:
    """Long answers at so many streams, then answers of one token at 64."""
    arguments = {"model": MODEL, "engine": SIMULATED_ENGINE, "default_tier": "background"}
    runs = {}
    with tempo_server(folder, arguments) as server:
        one_load(server, Load(streams=64, requests=512, max_tokens=32), -1)
        waves = max(1, round(seconds / 10))
        long = Load(streams=streams, requests=streams * waves, max_tokens=100)
        runs["streams"] = one_load(server, long, 0)
        short = Load(streams=64, requests=max(64, int(150 * seconds)), max_tokens=1)
        runs["one_token"] = one_load(server, short, 0)
    return {name: {**asdict(one), **_shares(one)} for name, one in runs.items()}


def _shares(one: Measured) -> dict[str, dict[str, float]]:
    result = one.result
    return {
        "cpu_us_per_token": {role: round(used * 1e6 / result.tokens, 1) for role, used in one.cpu_s.items()},
        "cpu_ms_per_request": {role: round(used * 1e3 / result.requests, 3) for role, used in one.cpu_s.items()},
        "cores_used": {role: round(used / result.wall_s, 2) for role, used in one.cpu_s.items()},
    }


def print_simulated(runs: dict[str, Any]) -> None:
    """For people."""
    for name, run in runs.items():
        result = run["result"]
        print(f"{name}: {result['streams']} streams, {result['tokens_per_s']} tokens/s, ", end="")
        print(f"{result['requests_per_s']} requests/s, TTFT p50 {result['ttft_p50_ms']} ms")
        for unit in ("cpu_us_per_token", "cpu_ms_per_request", "cores_used"):
            print(f"  {unit}: {run[unit]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "simulated"), default="vllm")
    add_json_option(parser)
    parser.add_argument(
        "--streams", type=at_least_one, nargs="+", help="default: 1 16 64, or 1000 with the simulated engine"
    )
    parser.add_argument("--repetitions", type=at_least_one, default=5)
    parser.add_argument("--scale", type=above_zero, default=1.0, help="length of each load against vLLM")
    parser.add_argument("--seconds", type=above_zero, default=20.0, help="length of the load on the simulated engine")
    parser.add_argument("--folder", type=Path, default=Path("bench-results"), help="for logs and the model")
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    began_s = time.monotonic()
    figures: dict[str, Any]
    if options.engine == "vllm":
        figures = against_vllm(folder, options.streams or [1, 16, 64], options.repetitions, options.scale)
        print_comparison(figures["summary"])
    else:
        figures = with_simulated_engine(folder, (options.streams or [1000])[0], options.seconds)
        print_simulated(figures)
    print(f"took {time.monotonic() - began_s:.0f} s")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
