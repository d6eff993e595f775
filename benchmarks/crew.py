"""Processes that work through the cells of a comparison, and a bar that says how far they are."""

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import Any

from tempo_router.errors import ConfigError
from tempo_router.simulation.experiment import Cell, identity


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """Fresh interpreters: what a simulation remembers, another one must not find."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_leave_interrupts_to_the_parent)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class Crew:
    """Processes that work through lists of tasks, `jobs` at a time, and say how far they are."""

    pool: Executor
    jobs: int
    say: Callable[[str], None]

    def each(
        self,
        task: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        what: str,
        failures: list[dict[str, Any]],
        weights: Sequence[float] | None = None,
    ) -> Iterator[Any]:
        """Results as they come; the first argument is a cell. Failed tasks go to `failures`.

        weights: how long each is expected to take, in any unit; without them all are taken to be alike.
        """
        weights = [1.0] * len(arguments) if weights is None else weights
        bar = Bar(what, len(arguments), self.say, sum(weights))
        # One more than there are hands: a task carries its trace, and what waits here can be left undone.
        waiting = deque(zip(arguments, weights, strict=True))
        running: dict[Future[Any], tuple[Cell, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) <= self.jobs:
                    one, weight = waiting.popleft()
                    running[self.pool.submit(task, *one)] = one[0], weight
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in [future for future in running if future in done]:
                    cell, weight = running.pop(future)
                    try:
                        result = future.result()
                    except BrokenExecutor as e:
                        raise ConfigError(
                            f"a process was killed ({e}); is there memory for {self.jobs}? see --jobs"
                        ) from e
                    except Exception as e:  # noqa: BLE001  # one policy's bug must not cost the others' hours
                        failures.append({**identity(cell), "error": f"{type(e).__name__}: {e}"})
                        self.say(
                            f"failed: {cell.policy} on {cell.trace.name} at {cell.load:g}x: {failures[-1]['error']}"
                        )
                    else:
                        yield result
                    bar.step(f"{cell.trace.name} {cell.load:g}x {cell.policy}", weight)
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            # Else they would be waited for, to the end of what they are at.
            for child in active_children():
                child.terminate()
            raise


class Bar:
    """Progress: one line that changes on a terminal, a line now and then elsewhere.

    total_weight: of all steps; what is left is foretold by weight, since the longest come first.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None], total_weight: float) -> None:
        self._what = what
        self._total = total
        self._weight_left = total_weight
        self._weight_done = 0.0
        self._say = say
        self._done = 0
        self._began_s = time.monotonic()
        self._shown_s = -math.inf
        self._is_live = sys.stderr.isatty()

    def step(self, last: str, weight: float) -> None:
        """One more is done."""
        self._done += 1
        self._weight_done += weight
        self._weight_left = max(0.0, self._weight_left - weight)
        now_s = time.monotonic()
        is_last = self._done == self._total
        if not (is_last or self._is_live or now_s - self._shown_s > 20.0):
            return
        self._shown_s = now_s
        spent_s = now_s - self._began_s
        left_s = spent_s * self._weight_left / self._weight_done if self._weight_done > 0 else math.inf
        left = f", about {_duration(left_s)} left" if not is_last and left_s < math.inf else ""
        filled = round(24 * self._done / self._total)
        text = (
            f"{self._what} [{'#' * filled}{'.' * (24 - filled)}] {self._done}/{self._total}, {_duration(spent_s)}{left}"
        )
        if self._is_live:
            sys.stderr.write(f"\r\033[K{text}  {last}" + ("\n" if is_last else ""))
            sys.stderr.flush()
        else:
            self._say(text)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
