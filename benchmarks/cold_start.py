"""How long a server takes from its start to the first token: ours with one worker, and plain vLLM, in turns.

    python -m benchmarks.cold_start [--json out.json] [--repetitions 3]

Both serve tempo-tiny with the same engine flags. The first start of each warms the file cache and vLLM's own caches,
and is not counted. Whether a server is ready is asked every half a second. Besides the seconds: the CPU seconds that
each role had used by then. With fewer cores than processes that import vLLM, those are what the time is made of.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.figures_file import add_json_option, write_figures
from benchmarks.http_load import Load, drive
from benchmarks.servers import ENGINE_KWARGS, MODEL, Server, plain_vllm, tempo_server
from tempo_router.option_values import at_least_one
from workers.default_model import resolve_model

ONE_TOKEN = Load(streams=1, requests=1, max_tokens=1)


@dataclass(frozen=True, slots=True)
class Start:
    """One start, from the command. ready_s: to the first good answer of /health; first_token_s: to the first token.

    cpu_s: used by then, by role.
    """

    server: str
    ready_s: float
    first_token_s: float
    cpu_s: dict[str, float]


def one_start(name: str, open_server: Callable[[], AbstractContextManager[Server]]) -> Start:
    """Start a server, ask it for a token, and end it. Raises RuntimeError if no token comes."""
    began_s = time.perf_counter()
    with open_server() as server:
        ready_s = time.perf_counter() - began_s
        result = asyncio.run(drive(server.url, MODEL, ONE_TOKEN, server.processes()))
        first_token_s = time.perf_counter() - began_s
        cpu_s = {role: round(used, 1) for role, used in server.cpu_seconds_by_role().items()}
    if result.failures:
        raise RuntimeError(f"{name} was ready and gave no token")
    return Start(name, round(ready_s, 1), round(first_token_s, 1), cpu_s)


def measure(folder: Path, repetitions: int) -> list[Start]:
    """Starts in turns, without the first of each."""
    model_path = resolve_model(MODEL, folder / "data")
    engine = {"kind": "vllm", "engine_kwargs": ENGINE_KWARGS}
    openers: dict[str, Callable[[], AbstractContextManager[Server]]] = {
        "tempo": partial(tempo_server, folder, {"model": MODEL, "engine": engine}),
        "plain": partial(plain_vllm, folder, model_path, ENGINE_KWARGS),
    }
    starts = []
    for repetition in range(-1, repetitions):
        for name in sorted(openers, reverse=repetition % 2 == 0):
            start = one_start(name, openers[name])
            print(".", end="", file=sys.stderr, flush=True)
            if repetition >= 0:
                starts.append(start)
    print(file=sys.stderr)
    return starts


def table(starts: Sequence[Start]) -> str:
    """A line per server: the range, and the median start (of an even number the later of the two in the middle)."""
    lines = []
    for name in sorted({start.server for start in starts}):
        own = sorted((start for start in starts if start.server == name), key=lambda start: start.first_token_s)
        middle = own[len(own) // 2]
        roles = ", ".join(f"{role} {used:g}" for role, used in sorted(middle.cpu_s.items(), key=lambda one: -one[1]))
        lines.append(
            f"{name:<6} ready {middle.ready_s:5.1f} s, first token {middle.first_token_s:5.1f} s "
            f"({own[0].first_token_s:.1f}..{own[-1].first_token_s:.1f}); CPU seconds: {roles}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--repetitions", type=at_least_one, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench-results"), help="for logs and the model")
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    starts = measure(folder, options.repetitions)
    print(table(starts))
    write_figures(options.json, {"engine_kwargs": ENGINE_KWARGS, "starts": [asdict(start) for start in starts]})


if __name__ == "__main__":
    main()
