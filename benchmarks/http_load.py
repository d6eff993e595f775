"""A closed-loop load of streamed completions over HTTP, and the CPU time that the server spent on it.

The generator shares the machine with the server, so only ratios between servers measured in one run mean anything.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import aiohttp
import psutil


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: `streams` at a time, `requests` in all, each with `max_tokens` tokens whatever the model says."""

    streams: int
    requests: int
    max_tokens: int
    prompt: str = "The quick brown fox jumps over the lazy dog. " * 4


@dataclass(frozen=True, slots=True)
class Result:
    """What came back. cpu_us_per_token: user + system time of the server's processes, per token delivered."""

    streams: int
    requests: int
    failures: int
    tokens: int
    wall_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tokens_per_s: float
    requests_per_s: float
    cpu_us_per_token: float
    cpu_ms_per_request: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One stream: seconds to its first token, and how many tokens came."""

    ttft_s: float
    tokens: int


async def drive(base_url: str, model: str, load: Load, processes: Sequence[psutil.Process]) -> Result:
    """Run the load to its end and measure. processes: the server's, all of them."""
    waiting = iter(range(load.requests))
    timings: list[Timing | None] = []
    cpu_before_s, started_s = cpu_seconds(processes), time.perf_counter()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def client() -> None:
            timings.extend([await one_stream(session, base_url, model, load, number) for number in waiting])

        await asyncio.gather(*(client() for _ in range(load.streams)))
    return _result(load, timings, time.perf_counter() - started_s, cpu_seconds(processes) - cpu_before_s)


async def one_stream(
    session: aiohttp.ClientSession, base_url: str, model: str, load: Load, number: int
) -> Timing | None:
    """Send one request and read its stream; None if it failed. The number makes each prompt's first block unlike."""
    body = {
        "model": model,
        "prompt": f"{number:06d} {load.prompt}",
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    first_s, tokens = 0.0, 0
    async with session.post(f"{base_url}/v1/completions", json=body) as response:
        if response.status != 200:
            return None
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if not first_s:
                first_s = time.perf_counter() - started_s
            if b'"usage":{' in line or b'"usage": {' in line:
                usage = json.loads(line[6:]).get("usage") or {}
                tokens = usage.get("completion_tokens", tokens)
    return Timing(first_s, tokens) if tokens else None


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """User + system time of these processes so far; one that ended counts as nothing."""
    total_s = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total_s += times.user + times.system
    return total_s


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def _result(load: Load, timings: Sequence[Timing | None], wall_s: float, cpu_s: float) -> Result:
    done = [timing for timing in timings if timing is not None]
    tokens = sum(timing.tokens for timing in done)
    ttfts_ms = sorted(timing.ttft_s * 1000 for timing in done) or [float("nan")]
    return Result(
        streams=load.streams,
        requests=len(timings),
        failures=len(timings) - len(done),
        tokens=tokens,
        wall_s=round(wall_s, 3),
        ttft_p50_ms=round(statistics.median(ttfts_ms), 2),
        ttft_p99_ms=round(ttfts_ms[min(len(ttfts_ms) - 1, int(len(ttfts_ms) * 0.99))], 2),
        tokens_per_s=round(tokens / wall_s, 1),
        requests_per_s=round(len(done) / wall_s, 2),
        cpu_us_per_token=round(cpu_s * 1e6 / max(1, tokens), 1),
        cpu_ms_per_request=round(cpu_s * 1e3 / max(1, len(done)), 3),
    )


def main() -> None:
    """Drive a server that already runs: python -m benchmarks.http_load --url ... --model ... --pid ..."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tempo-tiny")
    parser.add_argument("--pid", type=int, help="the server's main process; its whole tree is measured")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    load = Load(arguments.streams, arguments.requests, arguments.max_tokens)
    processes = process_tree(arguments.pid) if arguments.pid else []
    print(json.dumps(asdict(asyncio.run(drive(arguments.url, arguments.model, load, processes))), indent=2))


if __name__ == "__main__":
    main()
