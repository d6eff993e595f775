"""Estimates of answer lengths beside the decision path: collects answers, has the forest fitted and asked, judges it.

A request never waits for any of this. It is ordered at once by the histograms' estimate; when the forest's is the
better one for its app, it follows as the event `Predicted`, some milliseconds later or, while a fit runs (0.3 s every
`scheduling.length_training_s`), some hundred; one that comes too late changes nothing. When the forest cannot keep up,
requests go without; when its process fails, it is started again, later and later, and the histograms do alone.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import structlog

from cluster.length_process import LengthProcess
from tempo_router.calibration import AppCalibration, Calibration
from tempo_router.config import SchedulingConfig
from tempo_router.errors import InvalidSnapshotError, LengthModelError
from tempo_router.events import Predicted
from tempo_router.length_regressor import MIN_ENDED, MIN_FRESH, CallFeatures, TrainingRow, TrainingWindow, features_of
from tempo_router.prediction import Lengths, LengthSample
from tempo_router.request import RequestId, RequestSpec

log = structlog.get_logger()

_T = TypeVar("_T")

MAX_QUEUED = 1024
"""Requests that wait for a prediction; more go without."""
MAX_OPEN = 16_384
"""Requests whose estimates are kept until they end, to be judged; the oldest is forgotten first."""
_BATCH = 64
"""Predictions, or answers, that are dealt with before other work of the router gets its turn: 3 ms at most."""
_BATCHES = 8
"""Batches after which ended answers are looked at again, however many requests come."""
_LOOK_S = 0.5
_LAST_RETRY_S = 300.0


class LengthModel(Protocol):
    """What fits and asks the forest. Calls block, come from one thread, and raise LengthModelError."""

    def fit(self, rows: list[TrainingRow]) -> None:
        """Fit a forest to these answers; later predictions are its."""

    def foretell(self, calls: list[CallFeatures]) -> list[list[float]]:
        """Atoms for each call, in order."""

    def close(self) -> None:
        """End it; may come from any thread and ends a call that waits. Idempotent."""


@dataclass(slots=True)
class _Told:
    """What was said of a request at its arrival."""

    histogram: Lengths
    regressor: Lengths | None = None


@dataclass(frozen=True, slots=True)
class EstimatesSnapshot:
    """Counts since the start. dropped: requests that went without a prediction because too many waited."""

    answers: int
    fits: int
    predictions: int
    dropped: int
    failures: int
    is_fitted: bool
    apps: tuple[AppCalibration, ...]


class LengthEstimates:
    """Owns the forest's process, its training window and the calibration. `run` is its task; all on one event loop.

    drain: the answers that ended since it was last called. on_predicted: takes a prediction to the core.
    first_retry_s: pause after a failure; it doubles with each further one.
    """

    def __init__(
        self,
        config: SchedulingConfig,
        *,
        drain: Callable[[], list[LengthSample]],
        on_predicted: Callable[[Predicted], None],
        start_process: Callable[[], LengthModel] = LengthProcess,
        first_retry_s: float = 5.0,
    ) -> None:
        self._training_s = config.length_training_s
        self._drain = drain
        self._on_predicted = on_predicted
        self._start_process = start_process
        self._window = TrainingWindow(config.length_window)
        self._calibration = Calibration()
        self._told: dict[RequestId, _Told] = {}
        self._queue: deque[RequestSpec] = deque()
        self._wake = asyncio.Event()
        # The process ends with the thread that starts it: this one lives as long as we do.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="length-model")
        self._process: LengthModel | None = None
        self._is_closed = False
        self._is_fitted = False
        self._is_saved = True
        self._fresh = 0
        self._next_fit_s = 0.0
        self._first_retry_s = self._retry_s = first_retry_s
        self._answers = self._fits = self._predictions = self._dropped = self._failures = 0

    # ---- what the router says ----

    def arrived(self, spec: RequestSpec, histogram: Lengths) -> None:
        """A request entered, with this estimate. Returns at once; a prediction may follow."""
        self._told.pop(spec.request_id, None)
        self._told[spec.request_id] = _Told(histogram)
        if len(self._told) > MAX_OPEN:
            del self._told[next(iter(self._told))]
        if not self._is_fitted:
            return
        if len(self._queue) >= MAX_QUEUED:
            self._dropped += 1
            return
        self._queue.append(spec)
        self._wake.set()

    def snapshot(self) -> EstimatesSnapshot:
        """Counts, and how right the estimates were, by app."""
        return EstimatesSnapshot(
            answers=self._answers,
            fits=self._fits,
            predictions=self._predictions,
            dropped=self._dropped,
            failures=self._failures,
            is_fitted=self._is_fitted,
            apps=tuple(self._calibration.report()),
        )

    # ---- what is stored ----

    def rows(self) -> list[TrainingRow]:
        """The answers to learn from."""
        return self._window.rows()

    async def save(self, store: Callable[[bytes], Awaitable[None]]) -> None:
        """Have the answers to learn from stored, if there are new ones. What `store` raises comes out of here."""
        if self._is_saved:
            return
        # Before the wait: an answer that comes meanwhile is new again.
        self._is_saved = True
        try:
            await store(msgspec.json.encode(self._window.snapshot()))
        except BaseException:
            self._is_saved = False
            raise

    def restore(self, saved: bytes) -> None:
        """Learn from stored answers. Raises InvalidSnapshotError, with nothing changed."""
        try:
            snapshot = msgspec.json.decode(saved)
        except msgspec.MsgspecError as e:
            raise InvalidSnapshotError(f"snapshot of answers is damaged ({e}); delete it to start afresh") from e
        self._window.restore(snapshot)
        self._fresh = len(self._window)

    # ---- life ----

    async def run(self) -> None:
        """Learn and foretell until cancelled. A failing model is retried; nothing of it comes out of here."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            if not self._queue:
                self._wake.clear()
            await self._take_answers()
            try:
                if self._is_fit_due():
                    await self._fit()
                for _ in range(_BATCHES):
                    if self._queue:
                        await self._foretell()
            except LengthModelError as error:
                self._give_up_for_now(error)

    def close(self) -> None:
        """End the process; `run` must have been cancelled. Idempotent."""
        self._is_closed = True
        if self._process is not None:
            self._process.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---- inside ----

    async def _take_answers(self) -> None:
        samples = self._drain()
        for number, sample in enumerate(samples, start=1):
            self._take_answer(sample)
            if number % _BATCH == 0:
                await asyncio.sleep(0)

    def _take_answer(self, sample: LengthSample) -> None:
        self._window.add(sample)
        self._answers += 1
        self._fresh += 1
        self._is_saved = False
        told = self._told.pop(sample.spec.request_id, None)
        if told is not None:
            self._calibration.score(
                sample.spec.app,
                sample.tokens,
                is_complete=sample.is_complete,
                histogram=told.histogram,
                regressor=told.regressor,
            )

    def _is_fit_due(self) -> bool:
        return self._fresh >= MIN_FRESH and self._window.ended >= MIN_ENDED and time.monotonic() >= self._next_fit_s

    async def _fit(self) -> None:
        started_s = time.monotonic()
        rows, fresh = self._window.rows(), self._fresh
        await self._in_thread(lambda process: process.fit(rows))
        self._fresh -= fresh
        self._fits += 1
        self._is_fitted = True
        self._retry_s = self._first_retry_s
        now_s = time.monotonic()
        self._next_fit_s = now_s + self._training_s
        log.debug("length_model_fitted", answers=len(rows), duration_s=round(now_s - started_s, 3))

    async def _foretell(self) -> None:
        specs = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
        calls = [features_of(spec) for spec in specs]
        atoms = await self._in_thread(lambda process: process.foretell(calls))
        now_s = time.monotonic()
        for spec, own in zip(specs, atoms, strict=True):
            lengths = Lengths(tuple(own))
            self._predictions += 1
            told = self._told.get(spec.request_id)
            if told is not None:
                told.regressor = lengths
            if self._calibration.used(spec.app) == "regressor":
                self._on_predicted(Predicted(now_s, spec.request_id, spec.attempt, lengths))

    async def _in_thread(self, call: Callable[[LengthModel], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._with_process, call)

    def _with_process(self, call: Callable[[LengthModel], _T]) -> _T:
        """In the thread: start the process if there is none; after a failure there is none."""
        if self._process is None:
            self._process = self._start_process()
        if self._is_closed:
            # Closed while it started.
            self._process.close()
        try:
            return call(self._process)
        except LengthModelError:
            self._process.close()
            self._process = None
            raise

    def _give_up_for_now(self, error: LengthModelError) -> None:
        self._failures += 1
        self._is_fitted = False
        self._queue.clear()
        self._fresh = len(self._window)
        self._next_fit_s = time.monotonic() + self._retry_s
        log.warning(
            "length_model_failed", problem=str(error), effect="histograms do alone", retry_s=round(self._retry_s)
        )
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
