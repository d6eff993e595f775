"""The online fit finds the machine's figures, stays non-negative and is not thrown by a stall."""

import math
import random

import pytest

from tempo_router.events import StepReport
from tempo_router.step_time import StepTimeModel

MACHINE = (8e-3, 2e-5, 5e-5, 6e-8)


def step(rng: random.Random, noise: float = 0.0, machine: tuple[float, ...] = MACHINE) -> StepReport:
    prefill, decodes = rng.choice((0, 0, rng.randrange(2048))), rng.randrange(1, 128)
    context = decodes * rng.randrange(100, 2000)
    exact = machine[0] + machine[1] * prefill + machine[2] * decodes + machine[3] * context
    return StepReport(exact * (1 + rng.uniform(-noise, noise)), prefill, decodes, context)


def fitted(steps: int = 2000, noise: float = 0.1, machine: tuple[float, ...] = MACHINE) -> StepTimeModel:
    rng, model = random.Random(3), StepTimeModel()
    for _ in range(steps):
        model.observe(step(rng, noise, machine))
    return model


def test_prior_is_usable_before_any_step():
    pace = StepTimeModel().pace()
    assert all(0 < value < 1 for value in (pace.prefill_token_s, pace.share_s, pace.tau_s, pace.alone_s))


@pytest.mark.parametrize("machine", [MACHINE, (1.8e-3, 1.8e-5, 8e-5, 1.5e-7), (0.02, 2e-4, 1e-3, 0.0)])
def test_fit_predicts_steps_that_it_has_not_seen(machine):
    model, rng = fitted(noise=0.1, machine=machine), random.Random(4)
    errors = []
    for _ in range(200):
        unseen = step(rng, machine=machine)
        predicted = model.step_s(unseen.prefill_tokens, unseen.decodes, unseen.context_tokens)
        errors.append(abs(predicted - unseen.duration_s) / unseen.duration_s)
    assert sum(errors) / len(errors) < 0.05
    assert model.relative_error < 0.1
    assert all(coefficient >= 0 for coefficient in model.coefficients)


def test_nine_in_ten_steps_stay_below_the_upper_quantile():
    model, rng = fitted(noise=0.3), random.Random(5)
    below = 0
    for _ in range(1000):
        unseen = step(rng, noise=0.3)
        below += unseen.duration_s <= model.upper_step_s(unseen.prefill_tokens, unseen.decodes, unseen.context_tokens)
    assert 840 <= below <= 960


def test_stalls_are_left_out_but_a_slower_machine_is_believed():
    model, rng = fitted(), random.Random(6)
    before = model.step_s(0, 64, 64_000)
    for index in range(200):
        one = step(rng, 0.1)
        model.observe(
            StepReport(one.duration_s * 100, one.prefill_tokens, one.decodes, one.context_tokens)
            if index % 20 == 0
            else one
        )
    assert model.rejected == 10
    assert model.step_s(0, 64, 64_000) == pytest.approx(before, rel=0.1)

    slower = tuple(20 * value for value in MACHINE)
    for _ in range(1500):
        model.observe(step(rng, 0.1, slower))
    assert model.step_s(0, 64, 64_000) == pytest.approx(20 * before, rel=0.15)


@pytest.mark.parametrize("duration_s", [0.0, -1.0, math.nan, math.inf])
def test_impossible_durations_teach_nothing(duration_s):
    model = fitted(steps=50)
    before = (model.coefficients, model.observed)
    model.observe(StepReport(duration_s, 10, 10, 100))
    assert (model.coefficients, model.observed) == before


def test_empty_steps_teach_nothing():
    model = StepTimeModel()
    model.observe(StepReport(0.001, 0, 0, 0))
    assert model.observed == 0


def test_running_means_follow_the_load():
    model = StepTimeModel()
    for _ in range(500):
        model.observe(StepReport(0.05, 100, 40, 40_000))
    assert model.tau_s == pytest.approx(0.05, rel=0.01)
    assert model.mean_decodes == pytest.approx(40, rel=0.01)
    assert model.mean_tokens == pytest.approx(140, rel=0.01)
    assert model.pace().tau_s == model.tau_s
