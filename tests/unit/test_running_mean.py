"""The mean that starts plain and then forgets."""

import pytest

from tempo_router.running_mean import RunningMean


def test_few_values_have_equal_weight():
    mean = RunningMean(least_weight=0.1)
    for value in (4.0, 8.0, 0.0):
        mean.add(value)
    assert mean.value == pytest.approx(4.0)
    assert mean.count == 3


def test_after_many_values_the_newest_keeps_its_least_weight():
    mean = RunningMean(least_weight=0.1)
    for _ in range(1000):
        mean.add(1.0)
    mean.add(2.0)
    assert mean.value == pytest.approx(1.1)


def test_nothing_seen_is_zero_of_none():
    mean = RunningMean(least_weight=0.5)
    assert (mean.value, mean.count) == (0.0, 0)
