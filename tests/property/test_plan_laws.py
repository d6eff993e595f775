"""Laws of the plan: how density moves, that clocks cannot break it, and that the unit of value does not matter.

The invariants of the scheduler, and where each is tested:

1. Budgets of tokens, sequences and KV blocks; no call twice in a step: `test_step_planner` (`one_plan`).
2. Work conservation: `test_step_planner` (a step is empty only without calls), `test_router_core` (no replica idles).
3. No inversion by eviction, none out of its own step: `test_step_planner` (`WatchedPlanner`).
4. Determinism: twin planners in `test_step_planner`, replayed histories in `test_router_core`, equal reports in
   `tests/unit/test_simulator.py`.
5. Removing a unit never makes a denser one inadmissible: `test_timeline`.
6. Admitted demand stays within the allowance in every bucket: `test_timeline`.
7. Monotone densities: here.
8. Exact lengths at half load meet 99.5 %: `tests/unit/test_simulator.py`.
9. Good tokens are those delivered in time: `tests/unit/test_simulator.py`, by an account of its own.
10. Each unit ends once and nothing of it stays: `tests/unit/test_simulator.py`, `test_router_core` (`teardown`).
11. A factor of two on all values changes no decision: here for whole plans, `test_timeline` for the reserve.
12. Clocks that stand still or are set back: here, `test_step_planner` (`steps`), `test_router_core` (`time_passes`).
13. The reserve falls with density, is never negative and decays to nothing: `test_timeline`.
14. Gaps of streams at twice the capacity: `tests/unit/test_simulated_laws.py`.
"""

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_router.config import SchedulingConfig
from tempo_router.policies.base import Context
from tempo_router.policies.tempo import Tempo
from tempo_router.prediction import ATOMS, LengthHistograms, Lengths
from tempo_router.request import Deadline, Latency, Slo
from tempo_router.reserve import BINS_PER_OCTAVE
from tempo_router.step_time import Pace
from tempo_router.tempo_plan import TempoPlan
from tempo_router.value import expected_good
from tests.builders import AGENT, BACKGROUND, CHAT, PACE, TOOL, request
from tests.planned import PlannedJob, planned

LIMITS = settings(max_examples=200, deadline=None)

PACES = st.builds(
    Pace,
    prefill_token_s=st.floats(1e-6, 1e-3),
    share_s=st.floats(1e-5, 1e-2),
    decode_s=st.floats(0, 1e-3),
    context_token_s=st.floats(0, 1e-6),
    tau_s=st.floats(0.004, 0.08),
    alone_s=st.floats(0.004, 0.05),
    attention_s=st.floats(0, 1e-8),
)
OBJECTIVES: tuple[dict[str, Any], ...] = (
    {"request_weight": 0.0},
    {"request_weight": 0.75},
    {"request_weight": 1.0},
    {"objective": "gain"},
)
objectives = st.sampled_from(OBJECTIVES)
exact_lengths = st.integers(1, 3000).map(lambda tokens: Lengths((float(tokens),) * ATOMS))
estimated_lengths = st.lists(st.floats(1, 4000), min_size=ATOMS, max_size=ATOMS).map(
    lambda a: Lengths(tuple(sorted(a)))
)
any_slo = st.one_of(
    st.builds(Latency, st.floats(0.1, 10), st.floats(0.01, 0.3)),
    st.builds(Deadline, st.floats(0.5, 200)),
    st.just(AGENT),
)


def density(job: PlannedJob, pace: Pace, now_s: float, **config: Any) -> float:
    (standing,) = planned([job], pace, now_s, **config)
    return standing.density


# ---- how density moves ----


@settings(max_examples=60, deadline=None)
@given(
    pace=PACES,
    objective=objectives,
    output=st.integers(2, 2000),
    prompt=st.integers(1, 8000),
    chunks=st.integers(1, 6),
    slack_steps=st.floats(0.01, 0.99).flatmap(lambda part: st.integers(-3, 200).map(lambda whole: whole + part)),
    looks=st.integers(1, 30),
)
def test_a_deadline_call_that_progresses_on_time_does_not_lose_density(
    pace: Pace, objective: dict[str, Any], output: int, prompt: int, chunks: int, slack_steps: float, looks: int
):
    """With exact lengths. Its time passes as the plan expects: 1.3 GPU seconds of prefill, then a token a step."""
    lengths = Lengths((float(output),) * ATOMS)
    whole_s = 1.3 * pace.prefill_s(prompt) + output * pace.tau_s
    spec = request(slo=Deadline(whole_s + slack_steps * pace.tau_s), prompt_tokens=prompt, max_output_tokens=4096)
    job = PlannedJob(spec, lengths, missing_tokens=prompt)
    now_s, densities = 0.0, []
    while job.missing_tokens:
        densities.append(density(job, pace, now_s, **objective))
        tokens = min(-(-prompt // chunks), job.missing_tokens)
        now_s += 1.3 * pace.prefill_s(tokens, prompt - job.missing_tokens)
        job.missing_tokens -= tokens
    for generated in range(0, output, -(-output // looks)):
        job.generated_tokens = generated
        densities.append(density(job, pace, now_s + generated * pace.tau_s, **objective))

    assert (densities[0] > 0) == (slack_steps >= 0), "whether it can be in time is decided at the start"
    for earlier, later in itertools.pairwise(densities):
        assert later >= earlier * (1 - 1e-9), f"{densities}"


@LIMITS
@given(
    pace=PACES,
    objective=objectives,
    slo=any_slo,
    lengths=estimated_lengths,
    missing=st.tuples(st.integers(0, 8000), st.integers(0, 8000)),
    generated=st.integers(0, 500),
    now_s=st.floats(0, 30),
)
def test_density_does_not_rise_with_the_prompt_that_is_missing(
    pace: Pace,
    objective: dict[str, Any],
    slo: Slo,
    lengths: Lengths,
    missing: tuple[int, int],
    generated: int,
    now_s: float,
):
    spec = request(slo=slo, prompt_tokens=8000, max_output_tokens=4096)
    little, much = (
        density(PlannedJob(spec, lengths, generated, tokens), pace, now_s, **objective) for tokens in sorted(missing)
    )

    assert much <= little * (1 + 1e-9)


@LIMITS
@given(
    pace=PACES,
    slo=any_slo,
    rests=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    now_s=st.floats(0, 30),
)
def test_where_requests_count_density_does_not_rise_with_the_answer_that_is_left(
    pace: Pace, slo: Slo, rests: tuple[int, int], now_s: float
):
    """A success counts the same whatever its length, so what remains to be done is only cost."""
    spec = request(slo=slo, prompt_tokens=500, max_output_tokens=4096)
    short, long = (
        density(PlannedJob(spec, Lengths((float(rest),) * ATOMS), 0, 500), pace, now_s, request_weight=1.0)
        for rest in sorted(rests)
    )

    assert long <= short * (1 + 1e-9)


@LIMITS
@given(
    pace=PACES,
    objective=objectives,
    lengths=st.one_of(exact_lengths, estimated_lengths),
    slo=st.builds(Latency, st.floats(0.1, 10), st.floats(0.01, 0.3)),
    generated=st.integers(0, 2000),
    is_fresh=st.booleans(),
    moments=st.lists(st.floats(0, 400), min_size=2, max_size=12),
)
def test_a_streams_value_does_not_rise_with_its_lateness(
    pace: Pace,
    objective: dict[str, Any],
    lengths: Lengths,
    slo: Latency,
    generated: int,
    is_fresh: bool,
    moments: list[float],
):
    """Its cost does not depend on the clock, so its density moves as its value does."""
    spec = request(slo=slo, prompt_tokens=700, max_output_tokens=4096, generated_tokens=generated)
    job = PlannedJob(spec, lengths, generated, 700 + generated if is_fresh else 0)
    densities = [density(job, pace, now_s, **objective) for now_s in sorted(moments)]
    simple = [expected_good(spec, lengths, pace, now_s) for now_s in sorted(moments)]

    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(densities))
    for (good, chance), (later_good, later_chance) in itertools.pairwise(simple):
        assert later_good <= good * (1 + 1e-9)
        assert later_chance <= chance


def test_lateness_costs_a_stream_its_first_token_then_more_then_all():
    """The laws above would hold of a value that is always zero."""
    job = PlannedJob(request(slo=CHAT, prompt_tokens=100), Lengths((100.0,) * ATOMS), 0, 100)
    on_time, late, very_late, hopeless = (
        density(job, PACE, now_s, request_weight=0.0) for now_s in (0.0, 2.1, 6.0, 60.0)
    )

    assert on_time > late > very_late > hopeless == 0.0


# ---- clocks ----

CLOCKS = st.lists(
    st.one_of(st.floats(-1e9, 1e9), st.sampled_from((0.0, 0.0, 0.1, 5.0, -5.0, 1e-300, 1e12))), min_size=2, max_size=25
)


@LIMITS
@given(moments=CLOCKS, seed=st.integers(0, 2**32 - 1), objective=objectives)
def test_whatever_the_clock_does_standings_caps_and_orders_are_sane(
    moments: list[float], seed: int, objective: dict[str, Any]
):
    rng = random.Random(seed)
    plan = TempoPlan(SchedulingConfig.model_validate({"policy": "tempo", "tenant_exponent": 1.0, **objective}))
    jobs: list[PlannedJob] = []
    for number, now_s in enumerate(moments):
        for new in range(rng.choice((0, 1, 12))):
            jobs.append(any_job(rng, f"{number}.{new}", now_s))
            plan.arrived(jobs[-1], is_new=True)
        standings = planned(jobs, PACE, now_s, plan=plan)
        keys = Tempo().arrange(jobs, Context(now_s, PACE, 230.0))

        for standing in standings:
            assert 0.0 <= standing.density < math.inf
            assert 0.0 <= standing.later_s < math.inf
        assert all(math.isfinite(key) for key in keys)
        assert plan.step_cap_s is None or 0.0 < plan.step_cap_s < 10.0


def any_job(rng: random.Random, name: str, arrival_s: float) -> PlannedJob:
    prompt = rng.choice((1, 100, 8000))
    spec = request(name, slo=rng.choice((CHAT, TOOL, AGENT, BACKGROUND)), arrival_s=arrival_s, prompt_tokens=prompt)
    generated = rng.choice((0, 0, 1, 150))
    return PlannedJob(spec, LengthHistograms().lookup(spec), generated, 0 if generated else prompt)


# ---- the unit of value ----


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), octaves=st.sampled_from((-8, -2, 2, 6, 20)))
def test_a_power_of_two_on_all_values_changes_no_decision(seed: int, octaves: int):
    """Where only requests count, the mean length is the unit of value. Over plans that fill the reserve as they go."""
    rng = random.Random(seed)
    config = SchedulingConfig.model_validate({"policy": "tempo", "request_weight": 1.0})
    plans = [TempoPlan(config), TempoPlan(config)]
    worlds: list[list[PlannedJob]] = [[], []]
    for number in range(12):
        now_s = 1.5 * number
        for new in range(rng.randint(1, 12)):
            job = any_job(rng, f"{number}.{new}", now_s)
            for plan, jobs in zip(plans, worlds, strict=True):
                jobs.append(replace(job))
                plan.arrived(jobs[-1], is_new=True)
        plain, moved = (
            planned(jobs, PACE, now_s, plan=plan, mean_length=unit)
            for plan, jobs, unit in zip(plans, worlds, (256.0, 256.0 * 2.0**octaves), strict=True)
        )
        positive = np.array([one.density for one in plain if one.density > 0.0])
        bins = BINS_PER_OCTAVE * np.log2(positive)
        if np.any(np.abs(bins - np.round(bins)) < 1e-6):
            return  # Within rounding of the logarithm it may fall on either side of the edge between two bins.
        assert [one.density * 2.0**octaves for one in plain] == [one.density for one in moved]
        assert [one._replace(density=0.0) for one in plain] == [one._replace(density=0.0) for one in moved]
        assert plans[0].step_cap_s == plans[1].step_cap_s
        orders = [
            np.argsort(Tempo().arrange(jobs, Context(now_s, PACE, 230.0)), kind="stable").tolist() for jobs in worlds
        ]
        assert orders[0] == orders[1]


def test_the_law_above_sees_plans_that_refuse_room():
    """It would hold of plans that admit everything."""
    rng = random.Random(4)
    jobs = [any_job(rng, str(number), 0.0) for number in range(400)]
    verdicts = {one.is_admitted for one in planned(jobs, PACE, 0.0) if one.density > 0.0}

    assert verdicts == {True, False}


@pytest.mark.parametrize("is_unsure", [False, True])
def test_a_plan_over_nothing_is_no_plan(is_unsure: bool):
    assert planned([], replace(PACE, is_unsure=is_unsure), 3.0) == []
