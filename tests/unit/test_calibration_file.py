"""What is kept of an engine's step times, and the sweep that measures them."""

import json
from collections import Counter
from dataclasses import replace

import msgspec
import pytest

from tempo_router.config import EngineConfig
from tempo_router.events import StepReport
from tempo_router.step_time import Coefficients, StepTimeModel
from workers.calibration import Calibration, CalibrationFile, measure
from workers.call_facts import News
from workers.engine import EngineStep
from workers.simulated_engine import SimulatedEngine, start_simulated_engine

FOUND = Calibration(Coefficients(0.002, 2e-5, 0.0, 0.0, 1e-6, 8e-5, 1e-7, 0.0), 1.3, 0.12, 400)


def file(folder, **arguments) -> CalibrationFile:
    return CalibrationFile(folder, model="m", device="cpu", arguments=arguments)


def test_what_was_measured_is_there_at_the_next_start(tmp_path):
    file(tmp_path, max_num_seqs=8).save(FOUND)
    assert file(tmp_path, max_num_seqs=8).load() == FOUND
    assert file(tmp_path, max_num_seqs=9).load() is None, "other arguments, other steps"


@pytest.mark.parametrize("content", ["", "{}", '{"coefficients": {"fixed_s": 1}}', "no json"])
def test_what_cannot_be_read_is_measured_anew(tmp_path, content):
    kept = file(tmp_path)
    kept.path.parent.mkdir(exist_ok=True)
    kept.path.write_text(content)
    assert kept.load() is None


@pytest.mark.parametrize("changed", [{"coefficients": {"token_s": -1.0}}, {"upper_ratio": -1.0}])
def test_numbers_that_no_fit_gives_are_not_believed(tmp_path, changed):
    kept = file(tmp_path)
    kept.save(FOUND)
    values = json.loads(kept.path.read_text())
    coefficients = {**values["coefficients"], **changed.get("coefficients", {})}
    kept.path.write_text(json.dumps({**values, **changed, "coefficients": coefficients}))
    assert kept.load() is None


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


def assert_they_tell(true: Coefficients, reports: list[StepReport]) -> None:
    """Had each of these steps taken exactly what `true` says, the fit would know steps of every kind afterwards."""
    exact, fit = StepTimeModel(true), StepTimeModel()
    for one in reports:
        took_s = exact.step_s(one.prefill_tokens, one.decodes, one.context_tokens, one.attention_tokens)
        fit.observe(replace(one, duration_s=took_s))
    for asked in ((0, 1, 100, 0.0), (0, 8, 2000, 0.0), (250, 0, 0, 250 * 125.0), (120, 7, 1500, 120 * 60.0)):
        assert fit.step_s(*asked) == pytest.approx(exact.step_s(*asked), rel=0.15)
