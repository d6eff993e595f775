"""Stage budgets cut the deadline into pieces: nothing is lost and nothing is promised twice, whatever was re-split."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.stage_budgets import stage_budgets

times = st.floats(0, 1e6, allow_nan=False)
shares = st.lists(st.floats(0, 1e6, allow_nan=False), max_size=20)


@given(ended=st.lists(times, max_size=20), ahead=shares, now=times, deadline=st.floats(0.001, 1e6))
def test_the_budgets_add_up_to_the_deadline(ended, ahead, now, deadline):
    budgets = stage_budgets(sorted(ended), ahead, now, deadline)
    assert len(budgets) == len(ended) + len(ahead)
    assert all(budget >= 0 for budget in budgets)
    assert not budgets or math.isclose(sum(budgets), deadline, rel_tol=1e-9)


@given(
    durations=st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    expected=st.lists(st.floats(0.1, 10), min_size=9, max_size=9),
)
def test_it_stays_so_as_stages_end_early_or_late(durations, expected):
    """The whole life of a program: at each stage's end the rest is split anew."""
    deadline, ended = 40.0, []
    for number, duration in enumerate(durations):
        now = (ended[-1] if ended else 0.0) + duration
        ended.append(now)
        budgets = stage_budgets(ended, expected[number + 1 :], now, deadline)
        assert math.isclose(sum(budgets), deadline, rel_tol=1e-9)
        if now < deadline:
            assert math.isclose(sum(budgets[: number + 1]), now, rel_tol=1e-9)


def test_a_stage_that_ends_late_takes_its_time_from_those_ahead():
    early = stage_budgets([10.0], [10.0, 30.0], 10.0, 100.0)
    late = stage_budgets([60.0], [10.0, 30.0], 60.0, 100.0)
    assert early == [10.0, 22.5, 67.5]
    assert late == [60.0, 10.0, 30.0]


def test_the_first_stage_has_a_budget_of_its_own():
    assert stage_budgets([], [1.0, 3.0], 0.0, 40.0) == [10.0, 30.0]


def test_after_the_deadline_nothing_is_left():
    assert stage_budgets([50.0], [1.0, 1.0], 60.0, 40.0) == [40.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="cannot be split"):
        stage_budgets([], [1.0], 0.0, 0.0)
