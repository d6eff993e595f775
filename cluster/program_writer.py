"""Changes of programs on their way into Redis: in order, many in one round trip, kept while Redis is away.

A change that Redis refuses for good is dropped (program_store.py says so) and counts as told: kept, it would hold up
all others.

What Redis acknowledged and then lost can be given to `write_again`; that comes in small parts beside the changes.

Bounded: beyond `most` changes only *which* programs changed is remembered, and each is written whole later. That is
bounded by the programs in progress, of which the desk then takes no new ones.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from cluster.program_store import MISSING, MOST_AT_ONCE, REFUSED, ProgramStore
from cluster.redis_store import ScriptCall
from tempo_router.errors import StoreUnavailableError
from tempo_router.program_graph import ProgramGraph

log = structlog.get_logger()

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
CALLS_AGAIN = 200
"""Calls of programs that `write_again` gives to one round trip. All requests wait while their scripts are made, half
a millisecond for ten calls on a busy machine."""

OnTold = Callable[[], None]
"""Called when Redis was told: it has stored the change, or refused it for good."""
Again = tuple[int, Callable[[], ScriptCall]]
"""What is written once more: about how many calls it holds, and what makes its script."""


@dataclass(slots=True)
class _Entry:
    """graph: None for what is not about one program."""

    script: ScriptCall | None
    graph: ProgramGraph | None
    on_told: OnTold | None


class ProgramWriter:
    """Writes with one task; `put` never waits.

    whole: makes the script that writes all of a program as it is now. on_away: told when Redis is found to be away.
    """

    def __init__(
        self,
        store: ProgramStore,
        whole: Callable[[ProgramGraph], ScriptCall],
        *,
        most: int,
        on_away: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._whole = whole
        self._most = most
        self._on_away = on_away
        self._queue: deque[_Entry] = deque()
        self._changed: dict[str, ProgramGraph] = {}
        self._then: list[OnTold] = []
        self._again: deque[Again] = deque()
        self._has_some = asyncio.Event()
        self.is_away = False
        self.round_trips = 0
        self.written = 0
        self.refused = 0

    @property
    def waiting(self) -> int:
        """Changes and whole programs that are still to be written, those for the second time included."""
        return len(self._queue) + len(self._changed) + len(self._again)

    @property
    def is_full(self) -> bool:
        """No further change is kept by itself."""
        return bool(self._changed) or len(self._queue) >= self._most

    def put(self, script: ScriptCall | None, graph: ProgramGraph | None = None, on_told: OnTold | None = None) -> None:
        """Write this after all that was put before. script None: nothing, only tell when that has come so far."""
        if self.is_full and graph is not None:
            self._changed[graph.program_id] = graph
            if on_told is not None:
                self._then.append(on_told)
        else:
            self._queue.append(_Entry(script, graph, on_told))
        self._has_some.set()

    def write_again(self, parts: Iterable[Again]) -> None:
        """Write these beside the changes, each as it is when its turn comes. What an earlier call left is dropped."""
        self._again = deque(parts)
        self._has_some.set()

    async def run(self) -> None:
        """Write until cancelled. Raises LeaseLostError."""
        retry_s = FIRST_RETRY_S
        while True:
            await self._has_some.wait()
            try:
                await self.flush()
            except StoreUnavailableError as error:
                if not self.is_away:
                    log.warning("programs_not_stored", problem=str(error), effect="changes wait until Redis is back")
                    self.is_away = True
                    self._on_away()
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            else:
                if self.is_away:
                    log.warning("programs_stored_again")
                self.is_away, retry_s = False, FIRST_RETRY_S

    async def flush(self) -> None:
        """Write all that waits. Raises StoreUnavailableError, with what was not written kept, or LeaseLostError."""
        while self._queue or self._changed or self._again:
            if not self._queue:
                self._gather_changed()
            batch = list(itertools.islice(self._queue, MOST_AT_ONCE))
            written = [entry for entry in batch if entry.script is not None]
            # Another call of `write_again` may come while this is being written, perhaps to a server that is gone.
            again = self._again
            scripts = _part(again)
            codes = await self._write([*(entry.script for entry in written if entry.script), *scripts])
            for _ in batch:
                self._queue.popleft()
            for _ in scripts:
                again.popleft()
            self._mend(written, codes[: len(written)])
            for entry in batch:
                if entry.on_told is not None:
                    entry.on_told()
        self._has_some.clear()

    async def _write(self, scripts: Sequence[ScriptCall]) -> list[int]:
        if not scripts:
            return []
        codes = await self._store.write(scripts)
        self.round_trips += 1
        refused = codes.count(REFUSED)
        self.refused += refused
        self.written += len(scripts) - refused
        return codes

    def _gather_changed(self) -> None:
        """The queue is empty: now whole programs, and then whoever waits for them."""
        for graph in self._changed.values():
            self._queue.append(_Entry(self._whole(graph), graph, None))
        self._queue.extend(_Entry(None, None, then) for then in self._then)
        self._changed.clear()
        self._then.clear()

    def _mend(self, entries: Sequence[_Entry], codes: Sequence[int]) -> None:
        """Redis has lost a program that we know (it was restarted without its data): give it all of it."""
        lost = {
            entry.graph.program_id: entry.graph
            for entry, code in zip(entries, codes, strict=True)
            if code == MISSING and entry.graph is not None
        }
        for graph in lost.values():
            log.warning("program_stored_anew", program_id=graph.program_id)
            self._queue.append(_Entry(self._whole(graph), graph, None))


def _part(again: Iterable[Again]) -> list[ScriptCall]:
    """Scripts for the first of these, one at least."""
    scripts: list[ScriptCall] = []
    calls = 0
    for weight, make in itertools.islice(again, MOST_AT_ONCE):
        calls += weight
        if scripts and calls > CALLS_AGAIN:
            break
        scripts.append(make())
    return scripts
