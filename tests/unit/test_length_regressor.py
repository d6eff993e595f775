"""The forest finds what the histograms cannot, and answers cut off do not read as short ones."""

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_router.calibration import pinball_loss
from tempo_router.errors import InvalidSnapshotError
from tempo_router.length_regressor import MAX_APPS, LengthRegressor, TrainingWindow, features_of
from tempo_router.prediction import ATOMS, LengthHistograms, Lengths, LengthSample
from tempo_router.request import RequestSpec
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL, request

SEED = 5


def window_of(samples):
    window = TrainingWindow()
    for sample in samples:
        window.add(sample)
    return window


def fit(samples):
    return LengthRegressor.fit(window_of(samples).rows(), seed=SEED)


def by_tenant(rng: random.Random, count: int) -> list[tuple[RequestSpec, int]]:
    """One app whose tenants differ tenfold, and in which a longer prompt gets a longer answer."""
    calls = []
    for number in range(count):
        tenant = rng.randrange(8)
        prompt = rng.randrange(1024, 2047)
        spec = replace(request(f"r{number}", app="api", prompt_tokens=prompt), tenant=f"client-{tenant}")
        mean = 30 * 1.4**tenant * (prompt / 1500) ** 2
        calls.append((spec, max(1, round(rng.lognormvariate(math.log(mean), 0.3)))))
    return calls


def test_the_forest_beats_the_histogram_where_tenants_and_prompts_tell():
    """All of these are one key of the histograms: same app, same octave of the prompt."""
    calls = by_tenant(random.Random(SEED), 3000)
    learnt, asked = calls[:2000], calls[2000:]
    histograms = LengthHistograms()
    for spec, tokens in learnt:
        histograms.observe(spec, tokens, is_complete=True)
    forest = fit(LengthSample(spec, tokens, True) for spec, tokens in learnt)

    by_histogram = statistics.mean(pinball_loss(histograms.lookup(spec), tokens) for spec, tokens in asked)
    told = forest.predict_many(spec for spec, _ in asked)
    by_forest = statistics.mean(pinball_loss(one, tokens) for one, (_, tokens) in zip(told, asked, strict=True))

    assert by_forest < 0.6 * by_histogram, f"seed {SEED}: forest {by_forest:.1f}, histogram {by_histogram:.1f}"
    within = statistics.mean(tokens <= one.quantile(0.9) for one, (_, tokens) in zip(told, asked, strict=True))
    assert within == pytest.approx(0.9, abs=0.03), f"seed {SEED}"


def test_cut_off_answers_do_not_bias_the_forest():
    """Half of the clients leave at a random moment: taken for complete, answers would look a third shorter."""
    rng = random.Random(SEED)
    honest, naive = [], []
    for spec, tokens in by_tenant(rng, 4000):
        leaves = rng.expovariate(1 / 100)
        is_complete = leaves >= tokens
        seen = tokens if is_complete else max(1, int(leaves))
        honest.append(LengthSample(spec, seen, is_complete))
        naive.append(LengthSample(spec, seen, True))
    assert 0.3 < statistics.mean(not one.is_complete for one in honest) < 0.7
    for tenant, factor in ((0, 1.0), (4, 1.4**4)):
        asked = [
            replace(request(app="api", prompt_tokens=prompt), tenant=f"client-{tenant}")
            for prompt in range(1030, 2040, 50)
        ]
        medians = [30 * factor * (spec.prompt_tokens / 1500) ** 2 for spec in asked]
        ratios = [
            statistics.geometric_mean(
                one.quantile(0.5) / median for one, median in zip(forest.predict_many(asked), medians, strict=True)
            )
            for forest in (fit(honest), fit(naive))
        ]
        assert ratios[0] == pytest.approx(1.0, abs=0.08), f"client {tenant}, seed {SEED}: {ratios}"
        assert ratios[1] < 0.93, f"client {tenant}, seed {SEED}: {ratios}"


def test_answers_that_are_all_cut_off_are_longer_than_what_was_seen():
    """Nobody of this app ever came to an end: what is beyond is taken from the apps that did."""
    ended = [LengthSample(request(app="chat"), tokens, True) for tokens in range(100, 1100)]
    cut = [LengthSample(request(app="stream", prompt_tokens=9000), 400, False)] * 300
    atoms = fit([*ended, *cut]).predict_many([request(app="stream", prompt_tokens=9000)])[0].atoms
    assert min(atoms) > 390
    assert max(atoms) < 1200


@pytest.fixture(scope="module")
def mixed_forest() -> LengthRegressor:
    rng = random.Random(SEED)
    return fit(
        LengthSample(spec, tokens, rng.random() < 0.8)
        for slo in (CHAT, TOOL, AGENT, BACKGROUND)
        for spec, tokens in ((replace(one, slo=slo), tokens) for one, tokens in by_tenant(rng, 300))
    )


@settings(max_examples=40, deadline=None)
@given(
    slo=st.sampled_from([CHAT, TOOL, AGENT, BACKGROUND]),
    app=st.text(max_size=300),
    tenant=st.text(max_size=300),
    prompt=st.integers(0, 10**7),
    bound=st.integers(1, 10**7),
    stage=st.integers(0, 10**6),
)
def test_whatever_a_client_says_it_gets_twenty_ordered_finite_lengths(
    mixed_forest, slo, app, tenant, prompt, bound, stage
):
    spec = replace(request(slo=slo, app=app, prompt_tokens=prompt, max_output_tokens=bound), tenant=tenant, stage=stage)
    atoms = mixed_forest.predict_many([spec])[0].atoms
    assert len(atoms) == ATOMS
    assert all(math.isfinite(atom) and atom >= 1 for atom in atoms)
    assert list(atoms) == sorted(atoms)


def test_a_batch_says_the_same_as_one_by_one_and_equal_rows_give_an_equal_forest(mixed_forest):
    specs = [spec for spec, _ in by_tenant(random.Random(1), 20)]
    assert mixed_forest.predict_many(specs) == [mixed_forest.predict_many([spec])[0] for spec in specs]
    assert mixed_forest.predict_many([]) == []
    samples = [LengthSample(spec, tokens, True) for spec, tokens in by_tenant(random.Random(2), 300)]
    assert fit(samples).predict_many(specs) == fit(samples).predict_many(specs)


def test_atoms_of_one_constant_length_are_that_length_within_a_bin():
    forest = fit([LengthSample(request(), 7, True)] * 200)
    assert forest.predict_many([request()]) == [Lengths((7.0,) * ATOMS)]


def test_too_few_ended_answers_are_refused_by_name():
    rows = window_of([LengthSample(request(), 7, False)] * 500).rows()
    with pytest.raises(ValueError, match="0 answers ended"):
        LengthRegressor.fit(rows)


def test_a_busy_app_does_not_drive_out_a_rare_one():
    window = TrainingWindow(100)
    for number in range(10):
        window.add(LengthSample(request(app="rare"), 1 + number, True))
    for number in range(1000):
        window.add(LengthSample(request(app="busy"), 1 + number, True))
    rows = window.rows()
    assert len(window) == len(rows) == 100
    assert [row.tokens for row in rows if row.features.app == "rare"] == list(range(1, 11))
    assert [row.tokens for row in rows if row.features.app == "busy"] == list(range(911, 1001))


def test_invented_app_names_and_long_ones_stay_bounded():
    window = TrainingWindow(4 * MAX_APPS)
    for number in range(3 * MAX_APPS):
        window.add(LengthSample(request(app=f"{number}" + "x" * 10_000), 5, True))
    assert len(window) == 3 * MAX_APPS
    assert len(json.dumps(window.snapshot())) < len(window) * 300


def test_an_answer_cut_off_before_its_first_token_says_nothing():
    window = window_of([LengthSample(request(), 0, False)])
    assert len(window) == 0
    window.add(LengthSample(request(), 0, True))
    assert [row.tokens for row in window.rows()] == [1]


def test_a_window_survives_a_restart_as_json_and_gives_the_same_forest():
    rng = random.Random(SEED)
    window = window_of(LengthSample(spec, tokens, rng.random() < 0.7) for spec, tokens in by_tenant(rng, 500))
    again = TrainingWindow()
    again.restore(json.loads(json.dumps(window.snapshot())))

    assert again.rows() == window.rows()
    specs = [spec for spec, _ in by_tenant(random.Random(1), 20)]
    was, is_now = (LengthRegressor.fit(one.rows(), seed=SEED).predict_many(specs) for one in (window, again))
    assert is_now == was


GOOD_ROW = [*features_of(request()), 5, True]


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {"version": 99, "rows": []},
        {"version": 1},
        {"version": 1, "rows": 5},
        {"version": 1, "rows": [GOOD_ROW, []]},
        {"version": 1, "rows": [GOOD_ROW[:-1]]},
        {"version": 1, "rows": [[*GOOD_ROW, 1]]},
        {"version": 1, "rows": [[*GOOD_ROW[:-2], 0, True]]},
        {"version": 1, "rows": [[*GOOD_ROW[:-2], float("nan"), True]]},
        {"version": 1, "rows": [[7, *GOOD_ROW[1:]]]},
        {"version": 1, "rows": [[*GOOD_ROW[:3], "vip", *GOOD_ROW[4:]]]},
        {"version": 1, "rows": [[*GOOD_ROW[:4], float("inf"), *GOOD_ROW[5:]]]},
        {"version": 1, "rows": [[*GOOD_ROW[:6], -1, *GOOD_ROW[7:]]]},
        {"version": 1, "rows": [[*GOOD_ROW[:6], float("inf"), *GOOD_ROW[7:]]]},
    ],
)
def test_a_damaged_window_is_refused_and_changes_nothing(damaged):
    window = window_of([LengthSample(request(), 77, True)])
    before = window.rows()
    with pytest.raises(InvalidSnapshotError, match="delete"):
        window.restore(damaged)
    assert window.rows() == before
