"""The forest inside a simulation: what it is told, when it speaks, and that a run with it is as repeatable as any."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tempo_router.config import SchedulingConfig
from tempo_router.prediction import LengthHistograms, LengthSample
from tempo_router.request import Deadline, RequestSpec
from tempo_router.simulation.foretelling import Foretelling
from tempo_router.simulation.report import Report
from tempo_router.simulation.simulator import Knowledge, Setup, _Run
from tempo_router.simulation.step_profiles import load_profile
from tempo_router.simulation.trace import Trace, TraceCall, Unit
from tests.builders import TOOL, request

PROFILE = load_profile("llama-3-8b:a100-80g:1")


def of_tenant(tenant: str, number: int) -> RequestSpec:
    return replace(request(f"{tenant}{number}", slo=TOOL, app="one", prompt_tokens=500), tenant=tenant)


def told(foretelling: Foretelling, count: int, now_s: float = 1.0, first: int = 0) -> None:
    """Answers of one app: brief ones to one tenant, long ones to the other. The histograms cannot tell them apart."""
    rng = random.Random(first)
    histograms = LengthHistograms()
    for number in range(first, first + count):
        tenant = rng.choice(("brief", "long"))
        spec = of_tenant(tenant, number)
        tokens = round((20 if tenant == "brief" else 600) * rng.lognormvariate(0, 0.2))
        foretelling.foretell(spec, histograms.lookup(spec))
        foretelling.learn([LengthSample(spec, tokens, is_complete=True)], now_s)
        histograms.observe(spec, tokens, is_complete=True)


def test_the_forest_speaks_once_it_has_learnt_and_has_been_the_better_one():
    foretelling = Foretelling(training_s=30.0, window=4096, seed=1)
    spec = of_tenant("brief", 10_000)
    told(foretelling, 99)
    assert foretelling.fits == 0
    assert foretelling.foretell(spec, LengthHistograms().lookup(spec)) is None

    told(foretelling, 10, first=100)
    assert foretelling.fits == 1
    assert foretelling.foretell(spec, LengthHistograms().lookup(spec)) is None, "it has proved nothing yet"

    told(foretelling, 120, now_s=10.0, first=200)
    assert foretelling.fits == 1, "the last fit was less than 30 s ago"
    brief, long = (
        foretelling.foretell(of_tenant(tenant, 10_001), LengthHistograms().lookup(spec)) for tenant in ("brief", "long")
    )
    assert brief is not None
    assert long is not None
    assert brief.quantile(0.9) < 50 < 300 < long.quantile(0.1)


def test_the_next_fit_waits_for_time_and_for_new_answers():
    foretelling = Foretelling(training_s=30.0, window=4096, seed=1)
    told(foretelling, 120)
    foretelling.learn([], 1000.0)
    assert foretelling.fits == 1, "only 20 answers are new"
    told(foretelling, 40, now_s=1001.0, first=200)
    assert foretelling.fits == 2


def two_tenants(seed: int) -> Trace:
    """Requests of one app that only the tenant tells apart, more than the replica can serve in time."""
    rng = random.Random(seed)
    units: list[Unit] = []
    at_s = rng.expovariate(45.0)
    while at_s < 30.0:
        name, tenant = f"u{len(units)}", rng.choice(("brief", "long"))
        tokens = round((20 if tenant == "brief" else 200) * rng.lognormvariate(0, 0.2))
        units.append(Unit(name, at_s, Deadline(6.0), (TraceCall(name, 200, tokens),), app="one", tenant=tenant))
        at_s += rng.expovariate(45.0)
    return Trace("two tenants", tuple(units))


def run(trace: Trace, knowledge: Knowledge, seed: int = 0) -> tuple[_Run, Report]:
    scheduling = SchedulingConfig(request_weight=1.0, length_training_s=4.0)
    one = _Run(trace, Setup("tempo", (PROFILE,), scheduling, seed=seed, max_running=64, knowledge=knowledge), None)
    return one, one.run()


def met(report: Report) -> int:
    return sum(unit.is_met is True for unit in report.units)


def test_a_run_with_the_forest_repeats_itself():
    (own, first), (_, second) = (run(two_tenants(1), "regressor", seed=3) for _ in range(2))

    assert own._foretelling is not None
    assert own._foretelling.fits > 2
    assert first.units == second.units
    assert np.array_equal(first.stream_gaps_s, second.stream_gaps_s)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_where_only_the_tenant_tells_lengths_apart_the_forest_beats_the_histograms(seed: int):
    trace = two_tenants(seed)
    forest, histograms, truth = (met(run(trace, knowledge)[1]) for knowledge in ("regressor", "learned", "true"))

    assert 1.05 * histograms < forest < truth, f"{histograms} met by histograms, {forest} by forest, {truth} at best"
