"""Laws of the plan: how density moves, that clocks cannot break it, and that the unit of value does not matter.

The invariants of the scheduler, and where each is tested:

1. Budgets of tokens, sequences and KV blocks; no call twice in a step: `test_step_planner` (`one_plan`).
2. Work conservation: `test_step_planner` (a step is empty only without calls), `test_router_core` (no replica idles).
3. No inversion by eviction, none out of its own step: `test_step_planner` (`WatchedPlanner`).
4. Determinism: twin planners in `test_step_planner`, replayed histories in `test_router_core`, equal reports in
   `tests/unit/test_simulator.py`.
5. Removing a unit never makes a denser one inadmissible: `test_timeline`; of whole plans, here.
6. Admitted demand stays within the allowance in every bucket: `test_timeline`; of whole plans, here.
7. Monotone densities: here.
8. Exact lengths at load 0.75 meet 99.5 %: `tests/unit/test_simulated_laws.py`.
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_router.config import SchedulingConfig
from tempo_router.ledger import Ledger
from tempo_router.policies.base import Context
from tempo_router.policies.tempo import Tempo
from tempo_router.prediction import ATOMS, LengthHistograms, Lengths
from tempo_router.request import Deadline, Latency, ProgramCall, ProgramId, Slo
from tempo_router.reserve import BINS_PER_OCTAVE
from tempo_router.step_time import Pace
from tempo_router.tempo_plan import TempoPlan, _Units
from tempo_router.timeline import ALL_BUCKETS, BUCKET_ENDS_S
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


def check_same_decisions(
    seed: int, octaves: int, objective: dict[str, Any], plan_moved: Callable[[list[PlannedJob], float, TempoPlan], Any]
) -> None:
    """plan_moved: plans with all values times 2**octaves. Over plans that fill the reserve as they go."""
    rng = random.Random(seed)
    config = SchedulingConfig.model_validate({"policy": "tempo", **objective})
    plans = [TempoPlan(config), TempoPlan(config)]
    worlds: list[list[PlannedJob]] = [[], []]
    for number in range(12):
        now_s = 1.5 * number
        for new in range(rng.randint(1, 12)):
            job = any_job(rng, f"{number}.{new}", now_s)
            for plan, jobs in zip(plans, worlds, strict=True):
                jobs.append(replace(job))
                plan.arrived(jobs[-1], is_new=True)
        plain = planned(worlds[0], PACE, now_s, plan=plans[0], mean_length=256.0)
        moved = plan_moved(worlds[1], now_s, plans[1])
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


SEEDS = st.integers(0, 2**32 - 1)
OCTAVES = st.sampled_from((-8, -2, 2, 6, 20))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, octaves=OCTAVES)
def test_a_power_of_two_on_all_values_changes_no_decision(seed: int, octaves: int):
    """Where only requests count, the mean length is the unit of value."""
    unit = 256.0 * 2.0**octaves
    check_same_decisions(
        seed,
        octaves,
        {"request_weight": 1.0},
        lambda jobs, now_s, plan: planned(jobs, PACE, now_s, plan=plan, mean_length=unit),
    )


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, octaves=OCTAVES, objective=objectives)
def test_a_power_of_two_on_all_values_changes_no_decision_under_any_objective(
    seed: int, octaves: int, objective: dict[str, Any]
):
    value = _Units._value

    def scaled(units: _Units, *given: Any) -> Any:
        return value(units, *given) * 2.0**octaves

    def plan_moved(jobs: list[PlannedJob], now_s: float, plan: TempoPlan) -> Any:
        with patch.object(_Units, "_value", scaled):
            return planned(jobs, PACE, now_s, plan=plan, mean_length=256.0)

    check_same_decisions(seed, octaves, objective, plan_moved)


def test_the_law_above_sees_plans_that_refuse_room():
    """It would hold of plans that admit everything."""
    rng = random.Random(4)
    jobs = [any_job(rng, str(number), 0.0) for number in range(400)]
    verdicts = {one.is_admitted for one in planned(jobs, PACE, 0.0) if one.density > 0.0}

    assert verdicts == {True, False}


# ---- admission, on whole plans ----


def overload(rng: random.Random, plans: Sequence[TempoPlan]) -> list[PlannedJob]:
    """Jobs that came over three seconds, programs of several calls among them; each plan has planned over all of them.

    The plans have a reserve of denser work to come, and promise what is left.
    """
    jobs: list[PlannedJob] = []
    for number in range(4):
        for new in range(rng.choice((1, 10, 60))):
            job = any_job(rng, f"{number}.{new}", float(number))
            is_program = isinstance(job.spec.slo, ProgramCall)
            name = ProgramId(f"p{rng.randint(0, 40)}")
            if is_program:
                job.spec = replace(job.spec, slo=ProgramCall(name, rng.choice((10.0, 60.0, 200.0))))
            is_new = not (is_program and any(program_of(one) == name for one in jobs))
            jobs.append(job)
            for plan in plans:
                plan.arrived(job, is_new=is_new)
        for plan in plans:
            planned(jobs, PACE, float(number), plan=plan)
    return jobs


def program_of(job: PlannedJob) -> ProgramId | None:
    return job.spec.slo.program_id if isinstance(job.spec.slo, ProgramCall) else None


CONFIGS = st.fixed_dictionaries({
    "capacity_factor": st.sampled_from((0.3, 0.7, 1.2)),
    "reserve_factor": st.sampled_from((0.0, 0.5, 1.0)),
    "switches": st.fixed_dictionaries({"serial_demand": st.booleans(), "reserve": st.booleans()}),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, objective=objectives, config=CONFIGS)
def test_what_a_plan_admits_needs_no_more_than_it_may_promise_by_any_bucket_end(
    seed: int, objective: dict[str, Any], config: dict[str, Any]
):
    rng = random.Random(seed)
    plan = TempoPlan(SchedulingConfig.model_validate({"policy": "tempo", **objective, **config}))
    jobs = overload(rng, [plan])
    seen: list[_Units] = []
    worth = _Units._worth

    def noted(units: _Units, context: Context) -> None:
        worth(units, context)
        seen.append(units)

    with patch.object(_Units, "_worth", noted):
        standings = planned(jobs, PACE, 4.0, plan=plan)
    (units,) = seen
    admitted = np.zeros(units.count, dtype=np.bool_)
    admitted[units.unit_of] = [one.is_admitted for one in standings]
    demand = units.demand(np.arange(units.count), ALL_BUCKETS)[admitted].sum(axis=0)

    assert np.all(demand <= config["capacity_factor"] * BUCKET_ENDS_S * (1 + 1e-9))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, objective=objectives, config=CONFIGS)
def test_without_one_unit_no_denser_one_is_refused_by_a_plan(
    seed: int, objective: dict[str, Any], config: dict[str, Any]
):
    rng = random.Random(seed)
    plans = [TempoPlan(SchedulingConfig.model_validate({"policy": "tempo", **objective, **config})) for _ in range(2)]
    jobs = overload(rng, plans)
    gone = rng.choice(jobs)
    name = program_of(gone)
    rest = [job for job in jobs if job is not gone and (name is None or program_of(job) != name)]
    whole = {id(job): one for job, one in zip(jobs, planned(jobs, PACE, 4.0, plan=plans[0]), strict=True)}
    ledger = Ledger()
    for job in jobs:
        ledger.arrived(job)
    without = {
        id(job): one for job, one in zip(rest, planned(rest, PACE, 4.0, plan=plans[1], ledger=ledger), strict=True)
    }

    for job in rest:
        before, after = whole[id(job)], without[id(job)]
        assert before.density == after.density
        if before.density > whole[id(gone)].density:
            assert before.is_admitted == after.is_admitted


@pytest.mark.parametrize("is_unsure", [False, True])
def test_a_plan_over_nothing_is_no_plan(is_unsure: bool):
    assert planned([], replace(PACE, is_unsure=is_unsure), 3.0) == []
