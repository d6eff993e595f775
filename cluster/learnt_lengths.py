"""What a router learns of answer lengths, kept in Redis: histograms, and the answers that a forest is trained on."""

import asyncio
import json
from typing import Any

import structlog

from cluster.length_estimates import LengthEstimates
from cluster.redis_store import RedisStore
from tempo_router.errors import InvalidSnapshotError, StoreUnavailableError
from tempo_router.prediction import LengthHistograms

log = structlog.get_logger()

LENGTHS_SNAPSHOT = "lengths"
ANSWERS_SNAPSHOT = "answers"


class LearntLengths:
    """Of one router's life. epoch: its number; only the newest can write. What cannot be read is learnt anew."""

    def __init__(self, store: RedisStore, epoch: int) -> None:
        self._store = store
        self._epoch = epoch

    async def histograms(self) -> tuple[LengthHistograms, Any]:
        """(what was learnt, the snapshot that says so or None). Raises StoreUnavailableError."""
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
        """Give the forest the answers that earlier lives have collected. Raises StoreUnavailableError."""
        saved = await self._store.load_snapshot(ANSWERS_SNAPSHOT)
        if saved is None:
            return
        try:
            estimates.restore(saved)
        except InvalidSnapshotError as error:
            log.warning("snapshot_unreadable", problem=str(error), effect="answers are collected anew")

    async def save(self, lengths: LengthHistograms, estimates: LengthEstimates | None) -> None:
        """Write both. Raises StoreUnavailableError, LeaseLostError."""
        snapshot = json.dumps(lengths.snapshot()).encode()
        await self._store.save_snapshot(LENGTHS_SNAPSHOT, snapshot, self._epoch)
        if estimates is not None:
            await estimates.save(lambda answers: self._store.save_snapshot(ANSWERS_SNAPSHOT, answers, self._epoch))

    async def keep(self, lengths: LengthHistograms, estimates: LengthEstimates | None, every_s: float) -> None:
        """Write both now and then, until cancelled; what cannot be written is written next time."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.save(lengths, estimates)
            except StoreUnavailableError:
                log.debug("snapshot_postponed")
