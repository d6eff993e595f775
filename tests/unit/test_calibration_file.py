"""What is kept of an engine's step times, and the sweep that measures them."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import msgspec
import pytest
import structlog

from tempo_router.config import EngineConfig
from tempo_router.errors import EngineStartError
from tempo_router.events import StepReport
from tempo_router.step_time import Coefficients, StepTimeModel
from workers import calibration
from workers.calibration import Calibration, CalibrationFile, Swept, measure
from workers.call_facts import News
from workers.engine import Engine, EngineCall, EngineFacts, EngineStep
from workers.simulated_engine import SimulatedEngine, start_simulated_engine

FOUND = Calibration(Coefficients(0.002, 2e-5, 0.0, 0.0, 1e-6, 8e-5, 1e-7, 0.0), 1.3, 0.12, 400)


def file(folder, **arguments) -> CalibrationFile:
    return CalibrationFile(folder, model="m", device="cpu", arguments=arguments)


def test_what_was_measured_is_there_at_the_next_start(tmp_path):
    file(tmp_path, max_num_seqs=8).save(FOUND)
    assert file(tmp_path, max_num_seqs=8).load() == FOUND
    assert file(tmp_path, max_num_seqs=9).load() is None, "other arguments, other steps"


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "null", '{"coefficients": {"fixed_s": 1}}', '{"coefficients": 1}', "no json", "[" * 100_000],
)
def test_what_cannot_be_read_is_measured_anew(tmp_path, content):
    kept = file(tmp_path)
    kept.path.parent.mkdir(exist_ok=True)
    kept.path.write_text(content)
    assert kept.load() is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"coefficients": {"token_s": -1.0}}, "token_s=-1.0"),
        ({"coefficients": {"token_s": math.nan}}, "token_s=nan"),
        ({"coefficients": {"token_s": 1e308}}, "token_s=1e+308"),
        ({"coefficients": {"fixed_s": 1e9}}, "fixed_s=1000000000.0"),
        ({"coefficients": {"fixed_s": 6.0, "attention_s": 1.0}}, "fixed_s=6.0, attention_s=1.0"),
        ({"coefficients": {"token_s": [1.0]}}, "list"),
        ({"upper_ratio": -1.0}, "upper_ratio=-1.0"),
        ({"upper_ratio": 10**400}, "too large"),
        ({"relative_error": math.nan}, "relative_error=nan"),
        ({"steps": math.inf}, "infinity"),
    ],
)
def test_numbers_that_no_fit_gives_are_not_believed(tmp_path, changed, named):
    kept = file(tmp_path)
    kept.save(FOUND)
    values = json.loads(kept.path.read_text())
    coefficients = {**values["coefficients"], **changed.get("coefficients", {})}
    kept.path.write_text(json.dumps({**values, **changed, "coefficients": coefficients}))
    with structlog.testing.capture_logs() as logs:
        assert kept.load() is None
    assert [entry["event"] for entry in logs] == ["calibration_unusable"]
    assert named in logs[0]["problem"]


def test_the_slowest_and_the_fastest_machine_are_believed(tmp_path):
    kept = file(tmp_path)
    for coefficients in (Coefficients(2.0, 0.15, 0, 0, 0, 0.05, 1e-4, 1e-5), Coefficients(0, 0, 0, 0, 0, 0, 0, 0)):
        kept.save(replace(FOUND, coefficients=coefficients))
        assert kept.load() == replace(FOUND, coefficients=coefficients)


def test_what_was_kept_without_its_quantile_is_measured_anew(tmp_path):
    kept = file(tmp_path)
    kept.save(FOUND)
    values = json.loads(kept.path.read_text())
    del values["upper_ratio"]
    kept.path.write_text(json.dumps(values))
    assert kept.load() is None


async def test_the_sweep_goes_from_one_short_prompt_to_full_steps_and_leaves_nothing():
    steps: list[EngineStep] = []
    told: list[News] = []
    config = EngineConfig(
        kind="simulated", time_scale=0.02, engine_kwargs={"max_num_seqs": 8, "max_num_batched_tokens": 256}
    )
    engine = await start_simulated_engine(config, on_step=steps.append, on_death=lambda reason: None)
    assert isinstance(engine, SimulatedEngine)
    engine.tell = told.append  # type: ignore[method-assign]

    def encode(request_id: str, prompt_tokens: int, answer_tokens: int) -> tuple[bytes, ...]:
        return (msgspec.msgpack.encode([request_id, [1] * prompt_tokens, None, {"ignore_eos": True}]),)

    await measure(engine, encode)
    reports = [step.step for step in steps if step.step is not None]
    await engine.shutdown()

    assert engine.live_requests() == ()
    assert {report.decodes for report in reports} >= {0, 1, 2, 8}
    assert max(report.prefill_tokens for report in reports) > 200
    assert [news.step_cap_s for news in told] == [30.0, None]
    assert Counter(report.prefill_tokens > 0 for report in reports)[True] > 10
    assert_they_tell(FOUND.coefficients, reports)


class ScriptedEngine:
    """Finishes what it is given in the first `points` rounds, then nothing more: it is slow, or dies."""

    def __init__(self, points: int, dies: bool = False, **facts: int) -> None:
        known = {"max_model_len": 4096, "kv_tokens": 16384, "max_running": 8, "max_step_tokens": 256, **facts}
        self.facts = EngineFacts("fake", "0", "m", kv_blocks=1024, block_size=16, supported_tasks=(), **known)
        self.points = points
        self.dies = dies
        self.death: str | None = None
        self.calls: list[EngineCall] = []
        self.told: list[News] = []
        self._live: list[str] = []

    def tell(self, news: News) -> None:
        assert self.death is None, "an engine that died was called"
        self.told.append(news)

    def submit(self, call: EngineCall) -> None:
        assert call.prompt_tokens >= 1, f"{call.prompt_tokens} prompt tokens would end the engine"
        assert call.max_output_tokens >= 1
        assert call.prompt_tokens + call.max_output_tokens <= self.facts.max_model_len
        self.calls.append(call)
        self._live.append(call.request_id)

    def abort(self, request_ids: Sequence[str]) -> None:
        assert self.death is None, "an engine that died was called"
        self._live = [one for one in self._live if one not in request_ids]

    def live_requests(self) -> tuple[str, ...]:
        if self.points > 0:
            self.points -= 1
            self._live.clear()
        elif self.dies:
            self.death = "out of memory"
        return tuple(self._live)

    async def measured(self) -> Swept:
        return await measure(cast(Engine, self), lambda *call: (), lambda: self.death)

    def is_as_before(self) -> bool:
        return not self._live and [news.step_cap_s for news in self.told] == [30.0, None]


async def test_of_a_slow_engine_is_kept_what_was_measured_until_then(monkeypatch):
    monkeypatch.setattr(calibration, "_LIMIT_S", 0.05)
    engine = ScriptedEngine(points=5)
    swept = await engine.measured()

    assert (swept.points, swept.planned) == (5, 12)
    assert {call.prompt_tokens for call in engine.calls} == {8, 64, 128, 512}
    assert engine.is_as_before()


async def test_too_little_to_keep_leaves_nothing_in_the_engine_either(monkeypatch):
    monkeypatch.setattr(calibration, "_LIMIT_S", 0.05)
    engine = ScriptedEngine(points=3)
    with pytest.raises(TimeoutError, match="3 of 12 points"):
        await engine.measured()
    assert engine.is_as_before()


async def test_a_sweep_that_is_cancelled_leaves_nothing_in_the_engine():
    engine = ScriptedEngine(points=3)
    sweep = asyncio.create_task(engine.measured())
    await asyncio.sleep(0)
    sweep.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sweep
    assert engine.calls
    assert engine.is_as_before()


async def test_the_death_of_an_engine_ends_its_sweep_at_once():
    engine = ScriptedEngine(points=3, dies=True)
    with pytest.raises(EngineStartError, match="out of memory"):
        await engine.measured()
    assert [news.step_cap_s for news in engine.told] == [30.0]


@pytest.mark.parametrize("max_model_len", [2, 16, 24, 25, 40])
async def test_an_engine_for_the_shortest_contexts_is_measured_with_what_fits(max_model_len):
    engine = ScriptedEngine(points=99, max_model_len=max_model_len, max_running=2)
    swept = await engine.measured()

    assert swept.points == swept.planned > 0
    assert engine.is_as_before()


async def test_where_no_request_fits_nothing_is_measured():
    engine = ScriptedEngine(points=99, max_model_len=1)
    assert await engine.measured() == Swept(0, 0)
    assert engine.calls == []


def assert_they_tell(true: Coefficients, reports: list[StepReport]) -> None:
    """Had each of these steps taken exactly what `true` says, the fit would know steps of every kind afterwards."""
    exact, fit = StepTimeModel(true), StepTimeModel()
    for one in reports:
        took_s = exact.step_s(one.prefill_tokens, one.decodes, one.context_tokens, one.attention_tokens)
        fit.observe(replace(one, duration_s=took_s))
    for asked in ((0, 1, 100, 0.0), (0, 8, 2000, 0.0), (250, 0, 0, 250 * 125.0), (120, 7, 1500, 120 * 60.0)):
        assert fit.step_s(*asked) == pytest.approx(exact.step_s(*asked), rel=0.15)
