"""The second opinion on lengths comes from a process of its own, and whatever that does, nothing waits for it."""

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import psutil
import pytest

from cluster.embedded_redis import start_embedded_redis
from cluster.length_estimates import MAX_QUEUED, LengthEstimates, LengthModel
from cluster.length_process import LengthProcess
from cluster.redis_store import RedisStore
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.errors import InvalidSnapshotError, LeaseLostError, LengthModelError
from tempo_router.events import Predicted
from tempo_router.length_regressor import LengthRegressor, TrainingWindow, features_of
from tempo_router.prediction import ATOMS, LengthHistograms, LengthSample
from tempo_router.request import RequestId
from tests.builders import request
from tests.fleet import call, fleet_over_redis, submit

SEED = 11
WAIT_S = 120.0
CONFIG = SchedulingConfig(length_training_s=0.001)
HANGS = [sys.executable, "-c", "import threading; threading.Event().wait()"]
ENDS = [sys.executable, "-c", "pass"]


def answers(count: int, first: int = 0) -> list[LengthSample]:
    """Of two tenants of one app: one gets 20 tokens, the other 800, which the histograms cannot tell apart."""
    rng = random.Random(SEED)
    samples = []
    for number in range(first, first + count):
        tenant = number % 2
        spec = replace(request(f"r{number}", app="api"), tenant=f"t{tenant}")
        samples.append(LengthSample(spec, round((20, 800)[tenant] * rng.uniform(0.9, 1.1)), True))
    return samples


async def eventually(holds: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < give_up_s, f"not within {WAIT_S} s: {what}"
        await asyncio.sleep(0.005)


# --- the process


@pytest.fixture
def process() -> Iterator[LengthProcess]:
    process = LengthProcess()
    yield process
    process.close()


def test_the_process_says_what_the_forest_itself_would(process):
    window = TrainingWindow()
    for sample in answers(300):
        window.add(sample)
    calls = [features_of(sample.spec) for sample in answers(4)]

    process.fit(window.rows())

    assert process.foretell(calls) == LengthRegressor.fit(window.rows()).atoms(calls)
    process.close()
    assert not psutil.pid_exists(process.pid)
    process.close()


def test_what_cannot_be_answered_is_said_and_the_process_lives_on(process):
    with pytest.raises(LengthModelError, match="nothing was fitted"):
        process.foretell([features_of(request())])
    with pytest.raises(LengthModelError, match="0 answers ended"):
        process.fit([])
    assert psutil.pid_exists(process.pid)


@pytest.mark.parametrize(("command", "problem"), [(HANGS, "timed out"), (ENDS, "")])
def test_a_process_that_hangs_or_ends_is_an_error_in_time(command, problem):
    process = LengthProcess(command, patience_s=0.5)
    started_s = time.monotonic()
    with pytest.raises(LengthModelError, match=f"gave no answer.*{problem}"):
        process.foretell([features_of(request())])
    assert time.monotonic() - started_s < 10
    process.close()


def test_closing_ends_a_call_that_waits():
    process = LengthProcess(HANGS)
    failures = []

    def ask():
        try:
            process.foretell([features_of(request())])
        except LengthModelError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    process.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert len(failures) == 1


def test_the_router_itself_does_not_load_what_fits_forests():
    """It is seconds of its start and 100 MB of its memory."""
    program = "import sys, cluster.router_server; print(sorted({'sklearn', 'scipy'} & sys.modules.keys()))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert told.stdout == "[]\n"


# --- beside the decision path


class Router:
    """What the estimates see of a router: answers that ended, and predictions that come."""

    def __init__(self) -> None:
        self.ended: list[LengthSample] = []
        self.predicted: list[Predicted] = []
        self.histograms = LengthHistograms()

    def drain(self) -> list[LengthSample]:
        ended, self.ended = self.ended, []
        return ended

    def finish(self, samples: list[LengthSample]) -> None:
        for sample in samples:
            self.histograms.observe(sample.spec, sample.tokens, is_complete=sample.is_complete)
        self.ended += samples


@asynccontextmanager
async def running(
    router: Router, start_process: Callable[[], LengthModel] = LengthProcess, config: SchedulingConfig = CONFIG
) -> AsyncIterator[LengthEstimates]:
    estimates = LengthEstimates(
        config,
        drain=router.drain,
        on_predicted=router.predicted.append,
        start_process=start_process,
        first_retry_s=0.01,
    )
    task = asyncio.create_task(estimates.run())
    try:
        yield estimates
        assert not task.done(), "nothing may end the estimates"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        estimates.close()


async def test_once_the_forest_is_the_better_one_predictions_come_as_events():
    router = Router()
    async with running(router) as estimates:
        router.finish(answers(300))
        await eventually(lambda: estimates.snapshot().is_fitted, "the first fit")

        judged = answers(200, first=300)
        for sample in judged:
            estimates.arrived(sample.spec, router.histograms.lookup(sample.spec))
        await eventually(lambda: estimates.snapshot().predictions == 200, "all are foretold")
        assert router.predicted == [], "unproven, it has no say"
        router.finish(judged)
        await eventually(lambda: estimates.snapshot().answers == 500, "all have ended")
        (calibration,) = estimates.snapshot().apps
        assert calibration.used == "regressor"
        assert calibration.regressor.pinball < 0.2 * calibration.histogram.pinball

        asked = replace(request("asked", app="api", attempt=2), tenant="t1")
        estimates.arrived(asked, router.histograms.lookup(asked))
        await eventually(lambda: len(router.predicted) == 1, "the prediction comes")
    (event,) = router.predicted
    assert (event.request_id, event.attempt) == (RequestId("asked"), 2)
    assert len(event.lengths.atoms) == ATOMS
    assert event.lengths.quantile(0.5) == pytest.approx(800, rel=0.1)


class Stuck:
    """A model that fits at once and foretells only when it is let."""

    def __init__(self) -> None:
        self.let = threading.Event()
        self.asked = 0

    def fit(self, rows):
        pass

    def foretell(self, calls):
        self.let.wait(WAIT_S)
        self.asked += len(calls)
        return [[7.0] * ATOMS for _ in calls]

    def close(self):
        self.let.set()


async def test_while_the_model_is_stuck_nothing_waits_and_what_it_cannot_take_is_counted():
    router, stuck = Router(), Stuck()
    async with running(router, lambda: stuck) as estimates:
        router.finish(answers(200))
        await eventually(lambda: estimates.snapshot().is_fitted, "the first fit")
        prior = router.histograms.lookup(request())

        longest_s = 0.0
        for number in range(3 * MAX_QUEUED):
            started_s = time.perf_counter()
            estimates.arrived(request(f"q{number}"), prior)
            longest_s = max(longest_s, time.perf_counter() - started_s)
            if number % 100 == 0:
                await asyncio.sleep(0)  # Other work of the loop has its turn.

        assert longest_s < 0.5
        dropped = estimates.snapshot().dropped
        assert MAX_QUEUED <= dropped <= 2 * MAX_QUEUED
        assert estimates.snapshot().predictions == 0
        stuck.let.set()
        await eventually(
            lambda: estimates.snapshot().predictions == 3 * MAX_QUEUED - dropped, "what was taken is foretold"
        )
        assert stuck.asked == 3 * MAX_QUEUED - dropped


async def test_a_model_that_fails_is_started_again_and_the_histograms_do_alone_meanwhile():
    router = Router()
    failing = 3

    def start() -> LengthModel:
        nonlocal failing
        failing -= 1
        return LengthProcess(ENDS) if failing >= 0 else LengthProcess()

    async with running(router, start) as estimates:
        router.finish(answers(200))
        await eventually(lambda: estimates.snapshot().failures > 0, "the first failure")
        estimates.arrived(request("meanwhile"), router.histograms.lookup(request()))
        await eventually(lambda: estimates.snapshot().is_fitted, "a process that works")
        assert estimates.snapshot().failures == 3
        estimates.arrived(request("later"), router.histograms.lookup(request()))
        await eventually(lambda: estimates.snapshot().predictions == 1, "it foretells")


async def test_a_process_that_is_killed_is_replaced():
    router = Router()
    started: list[LengthProcess] = []

    def start() -> LengthModel:
        started.append(LengthProcess())
        return started[-1]

    async with running(router, start) as estimates:
        router.finish(answers(200))
        await eventually(lambda: estimates.snapshot().is_fitted, "the first fit")
        psutil.Process(started[0].pid).kill()
        estimates.arrived(request("lost"), router.histograms.lookup(request()))
        await eventually(lambda: estimates.snapshot().failures == 1, "the failure is seen")
        await eventually(lambda: estimates.snapshot().is_fitted, "another one is fitted from the same answers")
    assert len(started) == 2
    assert not any(psutil.pid_exists(process.pid) for process in started)


async def test_too_few_answers_start_no_process():
    router = Router()

    def start() -> LengthModel:
        raise AssertionError("there is nothing to fit")

    async with running(router, start) as estimates:
        router.finish(answers(50))
        await eventually(lambda: estimates.snapshot().answers == 50, "the answers are taken")
        estimates.arrived(request(), router.histograms.lookup(request()))
        await asyncio.sleep(0)
        assert estimates.snapshot().dropped == 0


# --- what is stored


@pytest.mark.redis
async def test_answers_outlive_the_router_and_a_router_that_was_replaced_cannot_write_them(tmp_path):
    server = await asyncio.to_thread(start_embedded_redis, tmp_path)
    store = await RedisStore.connect(server.url, "app")
    try:
        fence = await store.acquire_lease("old", 30.0)
        router = Router()

        async def save(content: bytes) -> None:
            await store.save_snapshot("answers", content, fence)

        async with running(router, Stuck) as old:
            router.finish(answers(200))
            await eventually(lambda: old.snapshot().answers == 200, "the answers are taken")
            await old.save(save)
            saved = await store.load_snapshot("answers")
            await old.save(save)

            await store.acquire_lease("new", 30.0)
            router.finish(answers(10, first=200))
            await eventually(lambda: old.snapshot().answers == 210, "more answers")
            for _ in range(2):  # What was not written stays to be written.
                with pytest.raises(LeaseLostError):
                    await old.save(save)
        assert await store.load_snapshot("answers") == saved

        newer = Router()
        estimates = LengthEstimates(CONFIG, drain=newer.drain, on_predicted=newer.predicted.append)
        estimates.restore(saved)
        task = asyncio.create_task(estimates.run())
        await eventually(lambda: estimates.snapshot().is_fitted, "it is fitted from what was stored")
        task.cancel()
        estimates.close()
    finally:
        await store.close()
        await asyncio.to_thread(server.stop)


@pytest.mark.redis
@pytest.mark.parametrize("length_model", ["auto", "histogram"])
async def test_the_router_collects_answers_and_finds_them_again_after_its_end(tmp_path, length_model):
    config = TempoConfig(
        scheduling=SchedulingConfig(settle_s=0.0, length_model=length_model),
        engine=EngineConfig(kind="simulated", time_scale=0.01),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start()
        for number in range(3):
            await submit(fleet.clients[0], call(f"r{number}", output_tokens=7))
        await eventually(lambda: len(fleet.clients[0].ended) == 3, "the answers end")
        if length_model == "histogram":
            assert fleet.router.estimates is None
            await fleet.router._save_lengths()
            assert await fleet.store.load_snapshot("answers") is None
            return
        await eventually(lambda: fleet.router.snapshot()["length_estimates"].answers == 3, "they are collected")
        assert [app.scored for app in fleet.router.snapshot()["length_estimates"].apps] == [3]
        await fleet.router._save_lengths()
        kept = fleet.router.estimates.rows()
        await fleet.replace_router()
        assert fleet.router.estimates.rows() == kept
        assert [row.tokens for row in kept] == [7, 7, 7]


@pytest.mark.parametrize("damaged", [b"", b"\x80\x04no pickle", b"[1]", b'{"version": 1, "rows": [[1]]}', b"{" * 1000])
def test_stored_answers_that_are_damaged_are_refused(damaged):
    router = Router()
    estimates = LengthEstimates(CONFIG, drain=router.drain, on_predicted=router.predicted.append)
    with pytest.raises(InvalidSnapshotError, match="delete"):
        estimates.restore(damaged)
    estimates.close()
