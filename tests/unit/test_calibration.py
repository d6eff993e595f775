"""The better estimate is used, by what each had said before the answer existed."""

import random

import pytest

from tempo_router.calibration import MIN_SCORED, Calibration, CutShare, RunningCalibration, pinball_loss
from tempo_router.prediction import Lengths

SEED = 3
TENS = Lengths(tuple(float(10 * n) for n in range(1, 21)))
WIDE = Lengths(tuple(float(10 * n * n) for n in range(1, 21)))


def drawn(rng, lengths):
    """A length from a distribution, as a whole number."""
    return round(lengths.quantile(rng.random()))


def test_pinball_loss_is_that_of_its_definition():
    two = Lengths((10.0, 30.0))
    assert pinball_loss(two, 20) == pytest.approx((0.25 * 10 + 0.25 * 10) / 2)
    assert pinball_loss(two, 50) == pytest.approx((0.25 * 40 + 0.75 * 20) / 2)
    assert pinball_loss(two, 5) == pytest.approx((0.75 * 5 + 0.25 * 25) / 2)


def test_a_right_distribution_covers_what_it_says_and_has_the_least_loss():
    rng = random.Random(SEED)
    right, wrong = RunningCalibration(window=1e9), RunningCalibration(window=1e9)
    for _ in range(5000):
        tokens = drawn(rng, TENS)
        right.add(TENS, tokens)
        wrong.add(WIDE, tokens)
    report = right.report()
    assert report.coverage == pytest.approx((0.5, 0.9, 0.95), abs=0.02), f"seed {SEED}"
    assert report.pinball < wrong.report().pinball
    assert report.error == pytest.approx(50, rel=0.1)


def test_coverage_and_loss_stay_right_when_long_answers_are_cut_off():
    """Without the weights only short answers would be judged: 0.5 would read as 0.66."""
    rng = random.Random(SEED)
    cut, weighed, unweighed = CutShare(window=1e9), RunningCalibration(window=1e9), RunningCalibration(window=1e9)
    for _ in range(20_000):
        tokens, leaves = drawn(rng, TENS), rng.expovariate(1 / 150)
        is_complete = leaves >= tokens
        cut.add(tokens if is_complete else int(leaves), is_complete)
        if is_complete:
            weighed.add(TENS, tokens, cut.weight(tokens))
            unweighed.add(TENS, tokens)
    assert weighed.report().coverage == pytest.approx((0.5, 0.9, 0.95), abs=0.025), f"seed {SEED}"
    assert unweighed.report().coverage[0] > 0.6


def test_weights_are_one_without_cutting_and_never_beyond_their_bound():
    cut = CutShare()
    for tokens in range(1, 500):
        cut.add(tokens, True)
    assert cut.weight(400) == 1.0
    for _ in range(100_000):
        cut.add(10, False)
    assert cut.weight(400) == pytest.approx(10.0)
    assert cut.weight(1) == pytest.approx(1.0)


def test_the_forest_must_earn_its_place_and_can_lose_it():
    calibration = Calibration()
    rng = random.Random(SEED)

    def answers(count, truth, other):
        for _ in range(count):
            calibration.score("a", drawn(rng, truth), is_complete=True, histogram=other, regressor=truth)

    assert calibration.used("a") == "histogram"
    answers(MIN_SCORED - 1, TENS, WIDE)
    assert calibration.used("a") == "histogram"
    answers(50, TENS, WIDE)
    assert calibration.used("a") == "regressor"
    assert calibration.used("b") == "histogram"
    for _ in range(2000):
        calibration.score("a", drawn(rng, WIDE), is_complete=True, histogram=WIDE, regressor=TENS)
    assert calibration.used("a") == "histogram"


def test_equal_models_do_not_alternate():
    calibration = Calibration()
    for _ in range(500):
        calibration.score("a", 55, is_complete=True, histogram=TENS, regressor=TENS)
        assert calibration.used("a") == "histogram"


def test_losses_are_compared_over_the_same_answers():
    """Easy answers that only the histogram had foretold do not make it look better than the forest."""
    calibration = Calibration()
    for _ in range(200):
        calibration.score("a", 105, is_complete=True, histogram=TENS, regressor=None)
    for _ in range(100):
        calibration.score("a", 2000, is_complete=True, histogram=TENS, regressor=WIDE)
        calibration.score("a", 105, is_complete=True, histogram=TENS, regressor=None)
    (report,) = calibration.report()
    assert (report.scored, report.used) == (400, "regressor")
    assert report.histogram.pinball == pytest.approx(pinball_loss(TENS, 2000))


def test_the_report_counts_cut_off_answers_and_apps_are_bounded():
    calibration = Calibration(max_apps=3)
    for number in range(10):
        calibration.score(f"app{number}", 5, is_complete=False, histogram=TENS, regressor=None)
    report = calibration.report()
    assert [one.app for one in report] == ["app7", "app8", "app9"]
    assert {(one.scored, one.cut_off, one.histogram, one.regressor) for one in report} == {(1, 1, None, None)}
