"""The online fit finds the machine's figures, stays non-negative and is not thrown by a stall."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.events import StepReport
from tempo_router.simulation.step_profiles import Prefill, load_profile
from tempo_router.step_time import Coefficients, Pace, StepTimeModel

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
        expected_s = model.step_s(unseen.prefill_tokens, unseen.decodes, unseen.context_tokens)
        below += unseen.duration_s <= model.upper_ratio * expected_s
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


# ---- the knee, attention, and what is asked of the model ----


def gpu_step(rng: random.Random, profile: str, mean_decodes: float, prefill_share: float, factor: float = 1.0):
    """A step of a GPU with a knee and attention in its prefills, with 5 % of noise."""
    decodes = min(256, max(1, round(rng.gauss(mean_decodes, 0.1 * mean_decodes))))
    context = round(decodes * rng.uniform(300, 1500))
    prefills = []
    if rng.random() < prefill_share:
        prefills = [Prefill(rng.randrange(16, 1024), rng.choice((0, rng.randrange(4000)))) for _ in range(2)]
    duration_s = factor * PROFILES[profile].duration_s(prefills, decodes, context)
    chunks = sum(prefill.chunk for prefill in prefills)
    attention = sum(prefill.chunk * (prefill.past + prefill.chunk / 2) for prefill in prefills)
    return StepReport(duration_s * rng.uniform(0.95, 1.05), chunks, decodes, context, attention)


PROFILES = {name: load_profile(name).step_time for name in ("llama-3-8b:a100-80g:1", "llama-3-8b:h100-80g:1")}
A100, H100 = PROFILES


def error(model: StepTimeModel, step: StepReport) -> float:
    estimated_s = model.step_s(step.prefill_tokens, step.decodes, step.context_tokens, step.attention_tokens)
    return abs(estimated_s - step.duration_s) / step.duration_s


def watched(profile: str, steps: int = 4000) -> StepTimeModel:
    """Stretches of different loads, as a replica sees them over a day."""
    rng, model = random.Random(7), StepTimeModel()
    for start in range(0, steps, 400):
        mean_decodes, share = (8, 64, 200, 30)[start // 400 % 4], (0.1, 0.5)[start // 400 % 2]
        for _ in range(400):
            model.observe(gpu_step(rng, profile, mean_decodes, share))
    return model


@pytest.mark.parametrize("profile", PROFILES)
def test_a_machine_with_a_knee_is_predicted_at_every_load(profile):
    model, rng = watched(profile), random.Random(8)
    for mean_decodes in (4, 32, 100, 250):
        for share in (0.0, 1.0):
            errors = [error(model, gpu_step(rng, profile, mean_decodes, share)) for _ in range(100)]
            assert sum(errors) / len(errors) < 0.15, (mean_decodes, share)
    assert model.relative_error < 0.1


def test_the_knee_lies_where_the_gpu_becomes_compute_bound():
    model = watched(A100)
    assert 40 < model.pace().knee_tokens < 256
    # Far beyond it a token costs what the tables say between 512 and 2048: 66 to 72 us.
    assert model.pace().step_token_s == pytest.approx(70e-6, rel=0.15)
    assert model.pace().attention_s == pytest.approx(32 * 1.3e-10, rel=0.3)


def test_a_long_stretch_of_decoding_does_not_forget_what_prefill_costs():
    model, rng = watched(A100), random.Random(9)
    prefill = StepReport(PROFILES[A100].duration_s([Prefill(1024, 0)], 20, 20_000), 1024, 20, 20_000, 1024**2 / 2)
    assert error(model, prefill) < 0.1
    for _ in range(2000):
        model.observe(gpu_step(rng, A100, 20, 0.0))
    assert error(model, prefill) < 0.1


@pytest.mark.parametrize("factor", [0.5, 1.5, 3.0])
def test_another_speed_is_learned_within_some_hundred_steps(factor):
    model, rng = watched(A100), random.Random(10)
    for _ in range(600):
        model.observe(gpu_step(rng, A100, 64, 0.3, factor))
    errors = [error(model, gpu_step(rng, A100, 64, 0.3, factor)) for _ in range(100)]
    assert sum(errors) / len(errors) < 0.1
    assert not model.is_unsure


@pytest.mark.parametrize("factor", [1e-3, 30.0, 1e3, 1e6])
def test_figures_of_another_machine_to_begin_with_are_unlearned(factor):
    """As in a file where milliseconds stand for seconds."""
    model, rng = (
        StepTimeModel(Coefficients(*(factor * value for value in watched(A100).coefficients))),
        random.Random(13),
    )
    for _ in range(400):
        model.observe(gpu_step(rng, A100, 64, 0.3))
    errors = [error(model, gpu_step(rng, A100, 64, 0.3)) for _ in range(100)]
    assert sum(errors) / len(errors) < 0.1
    assert 0.8 < model.upper_ratio < 1.6


@pytest.mark.parametrize("name", Coefficients._fields)
def test_one_figure_of_another_machine_is_unlearned(name):
    """Also where only prompts show it, and these are few."""
    right = watched(A100).coefficients
    wrong = right._replace(**{name: 1000 * max(getattr(right, name), 1e-8)})
    model, rng = StepTimeModel(wrong), random.Random(14)
    for _ in range(1500):
        model.observe(gpu_step(rng, A100, 64, 0.1))
    errors = [error(model, gpu_step(rng, A100, 64, 0.3)) for _ in range(100)]
    assert sum(errors) / len(errors) < 0.15


def test_some_steps_far_below_the_estimate_are_no_reason_to_forget_the_others():
    model, rng = watched(A100), random.Random(15)
    known = model.step_s(0, 64, 64_000)
    for number in range(2000):
        one = gpu_step(rng, A100, 64, 0.3)
        model.observe(replace(one, duration_s=one.duration_s / 50) if number % 20 == 0 else one)
        assert model.step_s(0, 64, 64_000) == pytest.approx(known, rel=0.35)


def test_a_minute_far_off_makes_it_unsure_and_recovery_sure_again():
    model, rng = watched(A100), random.Random(11)
    assert not model.pace().is_unsure
    erratic_s = 0.0
    while erratic_s < 50:
        step = StepReport(rng.choice((0.01, 0.1)), 0, 50, 50_000)
        erratic_s += step.duration_s
        model.observe(step)
    assert model.relative_error > 0.3
    assert not model.is_unsure
    for _ in range(1000):
        model.observe(StepReport(rng.choice((0.01, 0.1)), 0, 50, 50_000))
    assert model.is_unsure
    assert model.pace().is_unsure
    for _ in range(1000):
        model.observe(gpu_step(rng, A100, 64, 0.3))
    assert not model.is_unsure
    assert not model.pace().is_unsure


slopes = st.floats(0, 1e-4)
models = st.builds(
    lambda *values: StepTimeModel(Coefficients(*values)),
    st.floats(1e-6, 0.1), slopes, slopes, slopes, slopes, slopes, st.floats(0, 1e-6), st.floats(0, 1e-8),
)  # fmt: skip
decode_counts, context_counts, pasts = st.integers(0, 512), st.integers(0, 10**6), st.integers(0, 10**5)


@given(models, st.integers(0, 4096), decode_counts, context_counts, pasts, st.integers(1, 100))
def test_more_of_anything_never_takes_less_time(model, prefill, decodes, context, attention, more):
    base_s = model.step_s(prefill, decodes, context, attention)
    assert base_s > 0
    assert base_s <= model.step_s(prefill + more, decodes, context, attention)
    assert base_s <= model.step_s(prefill, decodes + more, context, attention)
    assert base_s <= model.step_s(prefill, decodes, context + more, attention)
    assert base_s <= model.step_s(prefill, decodes, context, attention + more)


@given(models, st.floats(0, 10), decode_counts, context_counts, pasts)
def test_the_budget_is_the_most_that_fits(model, cap_s, decodes, context, past):
    def takes_s(tokens: int) -> float:
        return model.step_s(tokens, decodes, context, tokens * (past + tokens / 2))

    tokens = model.budget_tokens(cap_s, decodes, context, past)
    assert 0 <= tokens <= 2**20
    if tokens:
        assert takes_s(tokens) <= cap_s
    if takes_s(0) > cap_s:
        assert tokens == 0
    elif tokens < 2**20:
        # One more does not fit, but for what rounding hides.
        assert takes_s(tokens + 2) >= cap_s * (1 - 1e-9)


@pytest.mark.parametrize(("cap_s", "tokens"), [(math.inf, 2**20), (0.0, 0), (-1.0, 0), (math.nan, 0)])
def test_the_budget_of_an_extreme_cap(cap_s, tokens):
    assert StepTimeModel().budget_tokens(cap_s, 10, 10_000) == tokens


def reported(draw_duration: st.SearchStrategy[float]) -> st.SearchStrategy[StepReport]:
    return st.builds(StepReport, draw_duration, st.integers(0, 8192), decode_counts, context_counts, st.floats(0, 1e8))


@given(st.lists(reported(st.floats(1e-7, 100)), max_size=100))
def test_whatever_is_observed_costs_stay_finite_and_non_negative(steps):
    model = StepTimeModel()
    for step in steps:
        model.observe(step)
    assert all(0 <= value < math.inf for value in model.coefficients)
    pace = model.pace()
    assert all(0 < value < math.inf for value in (pace.prefill_token_s, pace.share_s, pace.tau_s, pace.alone_s))
    assert 0 <= pace.knee_tokens <= 256
    assert model.budget_tokens(0.05, 10, 10_000) >= 0


def test_shares_and_tokens_add_up_to_the_mean_step():
    model = watched(A100)
    pace, decodes, tokens = model.pace(), model.mean_decodes, model.mean_tokens
    parts_s = decodes * (pace.share_s + pace.decode_s) + (tokens - decodes) * pace.prefill_token_s
    assert decodes > 8
    assert parts_s == pytest.approx(model.step_s(tokens - decodes, decodes, 0))


def test_attention_makes_a_prefill_after_a_long_past_dearer():
    pace = Pace(1e-4, 0.01, 0.01, 0.0, 0.1, 0.05, attention_s=1e-7)
    assert pace.prefill_s(100) == pytest.approx(100 * 1e-4 + 1e-7 * 100 * 50)
    assert pace.prefill_s(100, past=1000) == pytest.approx(100 * 1e-4 + 1e-7 * 100 * 1050)
    assert pace.step_token_s == pace.prefill_token_s


def test_a_fit_is_the_prior_of_the_next_machine():
    coefficients = watched(H100).coefficients
    assert StepTimeModel(coefficients).coefficients == coefficients


def test_steps_that_were_long_for_want_of_a_hurry_do_not_count_for_the_mean_step():
    model = fitted()
    for _ in range(300):
        model.observe(StepReport(0.1, 4200, 10, 2000), tau_at_most_s=0.02)
    assert model.pace().tau_s == pytest.approx(0.02, rel=0.01)
    assert model.step_s(4200, 10, 2000) == pytest.approx(0.1, rel=0.1), "their price is learnt all the same"
    for _ in range(300):
        model.observe(StepReport(0.1, 4200, 10, 2000))
    assert model.pace().tau_s == pytest.approx(0.1, rel=0.01)
