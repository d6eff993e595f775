"""What a router learns of answer lengths, kept in Redis: histograms, and the answers that a forest is trained on."""

import asyncio
import json
from collections.abc import Awaitable
from functools import partial
from typing import Any

import structlog

from cluster.length_estimates import LengthEstimates
from cluster.redis_store import RedisStore
from tempo_router.errors import InvalidSnapshotError, StoreRefusedError, StoreUnavailableError
from tempo_router.prediction import LengthHistograms

log = structlog.get_logger()

LENGTHS_SNAPSHOT = "lengths"
ANSWERS_SNAPSHOT = "answers"


class LearntLengths:
    """Of one router's life. epoch: its number; only the newest can write. What cannot be read is learnt anew."""

    def __init__(self, store: RedisStore, epoch: int) -> None:
        self._store = store
        self._epoch = epoch
        self._refused: set[str] = set()

    async def histograms(self) -> tuple[LengthHistograms, Any]:
        """(what was learnt, the snapshot that says so or None). Raises StoreUnavailableError, StoreRefusedError."""
        lengths = LengthHistograms()
        saved = await self._store.load_snapshot(LENGTHS_SNAPSHOT)
        if saved is None:
            return lengths, None
        try:
            snapshot = json.loads(saved)
            lengths.restore(snapshot)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("snapshot_unreadable", problem=str(error), effect="lengths are learnt anew")
            return LengthHistograms(), None
        return lengths, snapshot

    async def restore_answers(self, estimates: LengthEstimates) -> None:
        """Give the forest the answers of earlier lives. Raises StoreUnavailableError, StoreRefusedError."""
        saved = await self._store.load_snapshot(ANSWERS_SNAPSHOT)
        if saved is None:
            return
        try:
            estimates.restore(saved)
        except InvalidSnapshotError as error:
            log.warning("snapshot_unreadable", problem=str(error), effect="answers are collected anew")

    async def save(self, lengths: LengthHistograms, estimates: LengthEstimates | None) -> None:
        """Write both; one that Redis refuses waits for the next time. Raises StoreUnavailableError, LeaseLostError."""
        await self._unless_refused(
            LENGTHS_SNAPSHOT, self._write(LENGTHS_SNAPSHOT, json.dumps(lengths.snapshot()).encode())
        )
        if estimates is not None:
            await self._unless_refused(ANSWERS_SNAPSHOT, estimates.save(partial(self._write, ANSWERS_SNAPSHOT)))

    async def _write(self, name: str, content: bytes) -> None:
        await self._store.save_snapshot(name, content, self._epoch)

    async def _unless_refused(self, name: str, saving: Awaitable[None]) -> None:
        """Wait for this. That Redis refuses it is said once, until it does not."""
        try:
            await saving
        except StoreRefusedError as error:
            if name not in self._refused:
                effect = "what is learnt ends with this router"
                log.exception("snapshot_refused", snapshot=name, problem=str(error), effect=effect)
            self._refused.add(name)
        else:
            self._refused.discard(name)

    async def keep(self, lengths: LengthHistograms, estimates: LengthEstimates | None, every_s: float) -> None:
        """Write both now and then, until cancelled; what cannot be written is written next time."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.save(lengths, estimates)
            except StoreUnavailableError:
                log.debug("snapshot_postponed")
