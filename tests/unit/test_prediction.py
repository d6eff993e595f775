"""What is said about lengths follows from the answers that ended, and those cut off do not read as short ones."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.errors import InvalidSnapshotError
from tempo_router.prediction import LengthHistograms, Lengths
from tests.builders import request

TENS = Lengths(tuple(float(10 * n) for n in range(1, 21)))
NO_LIMIT = 10**6


def call(stage, prompt_tokens=100):
    """A call of a program."""
    return replace(request(app="research", prompt_tokens=prompt_tokens), stage=stage)


def test_quantities_are_those_of_the_atoms_above_what_is_generated():
    """After 95 tokens the atoms 100, 110, ..., 200 are left: eleven of them."""
    assert TENS.mean_left(95, NO_LIMIT) == pytest.approx(150 - 95)
    assert TENS.upper_left(95, NO_LIMIT) == pytest.approx(170 - 95)
    assert TENS.shortest_left(95, NO_LIMIT) == pytest.approx(5)
    assert TENS.longest_left(95, NO_LIMIT) == pytest.approx(105)
    assert TENS.probability_within(15, 95, NO_LIMIT) == pytest.approx(2 / 11)
    assert TENS.probability_within(10, 95, NO_LIMIT) == pytest.approx(1.5 / 11)
    assert TENS.tokens_within(15, 95, NO_LIMIT) == pytest.approx((100 + 110) / 11)
    assert TENS.mean_beyond(100, 95, NO_LIMIT) == pytest.approx((200 - 195) / 11)


def test_with_no_atom_left_the_tail_rule_holds():
    assert TENS.mean_left(200, NO_LIMIT) == pytest.approx(40)
    assert TENS.mean_left(1000, NO_LIMIT) == pytest.approx(200)
    assert TENS.upper_left(1000, NO_LIMIT) == pytest.approx(350)
    assert TENS.probability_within(200, 1000, NO_LIMIT) == pytest.approx(1 - 2.718281828**-1)


def test_limit_bounds_everything():
    assert TENS.mean_left(0, 30) == pytest.approx((10 + 20 + 18 * 30) / 20)
    assert TENS.upper_left(0, 30) == 30
    assert TENS.longest_left(0, 30) == 30
    assert TENS.probability_within(30, 0, 30) == 1.0
    assert TENS.mean_beyond(30, 0, 30) == 0.0
    assert TENS.mean_left(200, 204) == 4
    assert TENS.mean_left(30, 30) == 1.0


atoms = st.lists(st.floats(1, 5000), min_size=20, max_size=20).map(lambda values: Lengths(tuple(sorted(values))))


@given(
    lengths=atoms,
    generated=st.integers(0, 6000),
    limit=st.integers(1, 8000),
    less=st.floats(0, 5000),
    more=st.floats(0, 5000),
)
def test_laws_of_any_distribution(lengths, generated, limit, less, more):
    """Probabilities rise with room, nothing is negative, and what can be saved never exceeds what is to come."""
    less, more = min(less, more), max(less, more)
    low = lengths.probability_within(less, generated, limit)
    high = lengths.probability_within(more, generated, limit)
    assert 0 <= low <= high + 1e-12 <= 1 + 2e-12
    assert lengths.tokens_within(less, generated, limit) <= lengths.tokens_within(more, generated, limit) + 1e-6
    assert lengths.mean_beyond(more, generated, limit) <= lengths.mean_beyond(less, generated, limit) + 1e-6
    assert -1e-6 <= lengths.mean_beyond(less, generated, limit) <= lengths.mean_left(generated, limit) + 1e-6
    shortest, longest = lengths.shortest_left(generated, limit), lengths.longest_left(generated, limit)
    assert 1 <= shortest <= longest
    assert lengths.mean_left(generated, limit) <= max(1.0, float(limit))


def test_without_answers_the_prior_is_told():
    lengths = LengthHistograms().lookup(request())
    assert len(lengths.atoms) == 20
    assert 150 < lengths.mean < 300
    assert list(lengths.atoms) == sorted(lengths.atoms)


def test_a_key_learns_its_own_lengths_and_others_back_off_to_it():
    histograms = LengthHistograms()
    for _ in range(300):
        histograms.observe(request(app="code", prompt_tokens=100), 1000, is_complete=True)
        histograms.observe(request(app="title", prompt_tokens=100), 8, is_complete=True)

    assert histograms.lookup(request(app="code", prompt_tokens=100)).mean == pytest.approx(1000, rel=0.1)
    assert histograms.lookup(request(app="title", prompt_tokens=100)).mean == pytest.approx(8, rel=0.3)
    assert histograms.lookup(request(app="code", prompt_tokens=5000)).mean == pytest.approx(1000, rel=0.1)
    assert 300 < histograms.lookup(request(app="new")).mean < 700
    assert histograms.lookup(request(model="another")).mean == LengthHistograms().lookup(request()).mean


def test_the_stages_of_a_program_learn_apart_and_an_unseen_one_backs_off_to_all():
    histograms = LengthHistograms()
    for _ in range(300):
        histograms.observe(call(0), 60, is_complete=True)
        histograms.observe(call(1), 900, is_complete=True)

    assert histograms.lookup(call(0)).mean == pytest.approx(60, rel=0.15)
    assert histograms.lookup(call(1)).mean == pytest.approx(900, rel=0.15)
    assert histograms.lookup(call(1, prompt_tokens=9000)).mean == pytest.approx(900, rel=0.15)
    assert 200 < histograms.lookup(call(4)).mean < 700


def test_a_long_chain_of_calls_uses_few_histograms():
    histograms = LengthHistograms()
    for stage in range(500):
        histograms.observe(call(stage), 100, is_complete=True)
    assert len(histograms) <= 2 * 9 + 2


def test_a_bound_that_many_answers_reach_is_an_atom_of_its_own():
    """A third of the answers end at 1024, which the bin below must not blur: they would all read as longer."""
    histograms = LengthHistograms()
    for index in range(600):
        histograms.observe(request(), 1024 if index % 3 == 0 else 950 + index % 70, is_complete=True)
    atoms = histograms.lookup(request()).atoms
    assert 5 <= sum(atom == 1024 for atom in atoms) <= 8


def test_few_answers_move_the_estimate_a_little():
    histograms = LengthHistograms()
    prior = histograms.lookup(request()).mean
    for _ in range(4):
        histograms.observe(request(), 4000, is_complete=True)
    assert prior * 1.5 < histograms.lookup(request()).mean < 4000


def test_old_answers_are_forgotten():
    histograms = LengthHistograms(window=100)
    for _ in range(500):
        histograms.observe(request(), 1000, is_complete=True)
    for _ in range(500):
        histograms.observe(request(), 20, is_complete=True)
    assert histograms.lookup(request()).mean < 60


def test_answers_cut_off_do_not_shorten_the_estimate():
    """True lengths are 400; half of the clients leave after 50 tokens. Counted as complete they would halve it."""
    honest, naive = LengthHistograms(), LengthHistograms()
    for index in range(1000):
        leaves = index % 2 == 0
        honest.observe(request(), 50 if leaves else 400, is_complete=not leaves)
        naive.observe(request(), 50 if leaves else 400, is_complete=True)
    assert honest.lookup(request()).mean == pytest.approx(400, rel=0.1)
    assert naive.lookup(request()).mean < 300


def test_censored_estimate_recovers_a_distribution():
    """Exponential lengths with independent, equally likely departures: Kaplan-Meier gives the mean back."""
    rng = random.Random(7)
    histograms = LengthHistograms(window=100_000)
    for _ in range(20_000):
        true, leaves = rng.expovariate(1 / 200), rng.expovariate(1 / 300)
        histograms.observe(request(), round(min(true, leaves)), is_complete=true <= leaves)
    assert histograms.lookup(request()).mean == pytest.approx(200, rel=0.12)


def test_only_cut_off_answers_still_give_a_distribution():
    histograms = LengthHistograms()
    for _ in range(100):
        histograms.observe(request(), 3000, is_complete=False)
    lengths = histograms.lookup(request())
    assert len(lengths.atoms) == 20
    assert lengths.mean > 100


def test_number_of_keys_and_snapshot_are_bounded():
    histograms = LengthHistograms(max_keys=50)
    for index in range(500):
        histograms.observe(request(app=f"app{index}" + "x" * 10_000), 1 + index, is_complete=True)
    assert len(histograms) == 50
    assert len(json.dumps(histograms.snapshot(max_keys=20))) < 20 * 1000


def test_snapshot_survives_a_restart_as_json():
    histograms = LengthHistograms()
    for index in range(200):
        histograms.observe(request(app="a"), 100 + index, is_complete=index % 3 > 0)
    again = LengthHistograms()
    again.restore(json.loads(json.dumps(histograms.snapshot())))
    assert again.lookup(request(app="a")).mean == pytest.approx(histograms.lookup(request(app="a")).mean, rel=0.05)
    again.observe(request(app="a"), 5, is_complete=True)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 99},
        {"histograms": [{"key": ["m"]}]},
        {"histograms": [{"key": ["m", None, -1, -1], "ended": [[100_000, 1]], "censored": []}]},
        {"histograms": [{"key": ["m", None, -1, -1], "ended": [[3, float("nan")]], "censored": []}]},
        {"observed": None},
    ],
)
def test_damaged_snapshot_is_refused_and_changes_nothing(damage):
    histograms = LengthHistograms()
    histograms.observe(request(), 77, is_complete=True)
    before = histograms.snapshot()
    with pytest.raises(InvalidSnapshotError, match="delete"):
        histograms.restore({**before, **damage})
    assert histograms.snapshot() == before


def test_very_many_answers_keep_the_weights_finite():
    histograms = LengthHistograms(window=16)
    for _ in range(2000):
        histograms.observe(request(), 300, is_complete=True)
    assert histograms.lookup(request()).mean == pytest.approx(300, rel=0.25)
    assert json.dumps(histograms.snapshot(), allow_nan=False)
