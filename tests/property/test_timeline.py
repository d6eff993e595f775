"""Laws of admission on the capacity timeline, and of the reserve that is kept for arrivals still to come."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_router import timeline
from tempo_router.reserve import BINS_PER_OCTAVE, DECAY_S, Reserve
from tempo_router.timeline import ALL_BUCKETS, BUCKET_ENDS_S, BUCKETS_S, LAST_BUCKET, bucket_of, due_in_bucket

Floats = npt.NDArray[np.float64]

WIDTH = 5
LIMITS = settings(max_examples=150, deadline=None)


@st.composite
def workloads(draw: st.DrawFn, most: int = 200) -> tuple[Floats, Floats]:
    """(demand, allowance): rows that grow along the buckets; allowances that shrink from row to row.

    Eighths, so that sums are exact and the order of adding them does not matter.
    """
    units = draw(st.integers(0, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from((1, 8, 64)))
    demand = np.cumsum(rng.integers(0, size + 1, (units, WIDTH)) * (rng.random((units, WIDTH)) < 0.4), axis=1) / 8
    capacity = np.cumsum(rng.integers(0, draw(st.sampled_from((8, 200, 4000))), WIDTH)) / 8
    kept = np.cumsum(rng.integers(0, draw(st.sampled_from((1, 8))), (units, 1)), axis=0) / 8
    return demand.astype(np.float64), capacity[None, :] - kept * np.arange(1, WIDTH + 1)[None, :]


def admit(demand: Floats, allowance: Floats) -> npt.NDArray[np.bool_]:
    """Admission of rows that are known already."""
    return timeline.admit(
        lambda rows, buckets: demand[rows][:, buckets],
        lambda rows, buckets: allowance[rows][:, buckets],
        *demand.shape,
    )


def one_by_one(demand: Floats, allowance: Floats) -> list[bool]:
    """Admission as one would explain it."""
    used = [0.0] * demand.shape[1]
    verdicts = []
    for row, limits in zip(demand.tolist(), allowance.tolist(), strict=True):
        fits = all(before + need <= limit for before, need, limit in zip(used, row, limits, strict=True) if need > 0)
        verdicts.append(fits)
        if fits:
            used = [before + need for before, need in zip(used, row, strict=True)]
    return verdicts


@LIMITS
@given(workloads())
def test_admits_what_asking_one_after_the_other_would(workload: tuple[Floats, Floats]):
    demand, allowance = workload

    assert admit(demand, allowance).tolist() == one_by_one(demand, allowance)


@LIMITS
@given(workloads())
def test_never_admits_beyond_what_a_row_may_use_in_any_bucket(workload: tuple[Floats, Floats]):
    demand, allowance = workload
    admitted = admit(demand, allowance)
    used = np.cumsum(demand * admitted[:, None], axis=0)

    beyond = (used > allowance) & (demand > 0) & admitted[:, None]
    assert not beyond.any(), f"rows {np.nonzero(beyond.any(axis=1))[0]} are beyond their allowance"


@LIMITS
@given(workloads(), st.data())
def test_removing_a_unit_changes_nothing_for_the_denser_and_lets_the_next_rival_in(
    workload: tuple[Floats, Floats], data: st.DataObject
):
    demand, allowance = workload
    if not demand.shape[0]:
        return
    gone = data.draw(st.integers(0, demand.shape[0] - 1))
    whole = admit(demand, allowance)
    rest = admit(np.delete(demand, gone, axis=0), np.delete(allowance, gone, axis=0))

    assert rest[:gone].tolist() == whole[:gone].tolist()
    if not whole[gone]:
        assert rest[gone:].tolist() == whole[gone + 1 :].tolist(), "what was not admitted stood in somebody's way"
    elif not whole[gone + 1 :].all():
        # The first that is decided otherwise can only be one that got in instead.
        differ = np.nonzero(rest[gone:] != whole[gone + 1 :])[0]
        assert not differ.size or rest[gone + differ[0]]


@LIMITS
@given(workloads(), st.sampled_from((-20, -3, 5, 30)))
def test_admission_knows_no_unit_of_time(workload: tuple[Floats, Floats], octaves: int):
    demand, allowance = workload

    assert admit(demand * 2.0**octaves, allowance * 2.0**octaves).tolist() == admit(demand, allowance).tolist()


def test_a_unit_without_demand_is_admitted_even_when_nothing_is_left():
    demand = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    allowance = np.array([[1.0, 1.0], [-5.0, -5.0], [0.0, 1.0]])

    assert admit(demand, allowance).tolist() == [True, True, False]


@LIMITS
@given(st.floats(0.0, 500.0))
def test_work_is_due_in_the_last_bucket_that_ends_before_its_deadline(after_s: float):
    (bucket,) = bucket_of(np.array([after_s]))
    (demand,) = due_in_bucket(np.array([3.0]), np.array([after_s]))

    assert BUCKET_ENDS_S[bucket] <= after_s or bucket == 0
    assert bucket == BUCKET_ENDS_S.size - 1 or BUCKET_ENDS_S[bucket + 1] > after_s
    assert demand.tolist() == [0.0] * bucket + [3.0] * (BUCKET_ENDS_S.size - bucket)
    for some in (ALL_BUCKETS, LAST_BUCKET, slice(3, 30)):
        (part,) = due_in_bucket(np.array([3.0]), np.array([after_s]), some)
        assert part.tolist() == demand[some].tolist()


# ---- the reserve ----

ARRIVALS = st.lists(
    st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 50.0), st.floats(0.0, 5.0)), min_size=1, max_size=60
)
"""(density, cost, seconds since the one before)"""

HORIZON_S = float(BUCKET_ENDS_S[-1])


def at_once(cost_s: float) -> Floats:
    """The demand of a unit that needs all its GPU time when it comes."""
    return np.full(BUCKET_ENDS_S.size, cost_s)


def told(arrivals: list[tuple[float, float, float]], scale: float = 1.0) -> tuple[Reserve, float]:
    """A reserve that heard of these arrivals, and when the last one came."""
    reserve, now_s = Reserve(), 10.0
    for density, cost_s, gap_s in arrivals:
        now_s += gap_s
        reserve.add(density * scale, at_once(cost_s), now_s)
    return reserve, now_s


def kept(reserve: Reserve, densities: Floats, now_s: float) -> Floats:
    """What it keeps before each of these densities: (densities, buckets)."""
    return reserve.needs(densities, now_s).of(np.arange(densities.size), ALL_BUCKETS)


@LIMITS
@given(ARRIVALS, st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30), st.floats(0.0, 100.0))
def test_denser_work_leaves_room_for_less_to_come(
    arrivals: list[tuple[float, float, float]], densities: list[float], later_s: float
):
    reserve, now_s = told(arrivals)
    needs = kept(reserve, np.sort(np.array(densities)), now_s + later_s)

    assert np.all(needs >= 0.0)
    assert np.all(np.diff(needs, axis=0) <= 0.0), f"needs {needs} rise with density"
    assert np.all(np.diff(needs, axis=1) >= 0.0), f"needs {needs} fall with time"


@LIMITS
@given(ARRIVALS)
def test_the_whole_reserve_is_the_decayed_work_of_all_arrivals(arrivals: list[tuple[float, float, float]]):
    reserve, now_s = told(arrivals)
    ages_s = [0.0]
    for _, _, gap_s in reversed(arrivals):
        ages_s.append(ages_s[-1] + gap_s)
    work_s = sum(cost * np.exp(-age / DECAY_S) for (_, cost, _), age in zip(reversed(arrivals), ages_s, strict=False))
    lived_s = max(ages_s[-2], 1.0)
    window_s = DECAY_S * (1.0 - np.exp(-lived_s / DECAY_S))

    # Of a density below all that were heard of, all arrivals are denser. What is due at once comes at a steady rate,
    # but for the half of the first bucket in which it is not due yet.
    needed_s = work_s / window_s * (HORIZON_S - BUCKETS_S[0] / 2)
    assert kept(reserve, np.array([0.0]), now_s)[0, -1] == pytest.approx(needed_s, rel=1e-6)


@LIMITS
@given(st.floats(0.1, 50.0), st.integers(0, BUCKET_ENDS_S.size - 1))
def test_what_arrives_is_kept_for_when_it_is_due(cost_s: float, due: int):
    reserve = Reserve()
    demand_s = np.where(np.arange(BUCKET_ENDS_S.size) >= due, cost_s, 0.0)
    reserve.add(1.0, demand_s, 1.0)
    needs = kept(reserve, np.array([0.0]), 1.0)[0]

    assert np.all(needs[:due] == 0.0), f"{needs} is kept before bucket {due}"
    slack_s = BUCKET_ENDS_S[due] - BUCKETS_S[due] / 2
    at_once_s = cost_s / (DECAY_S * (1.0 - np.exp(-1.0 / DECAY_S))) * (HORIZON_S - slack_s)
    assert needs[-1] == pytest.approx(at_once_s, rel=1e-9)


@LIMITS
@given(ARRIVALS)
def test_without_arrivals_the_reserve_goes_away(arrivals: list[tuple[float, float, float]]):
    reserve, now_s = told(arrivals)
    lowest = np.zeros(1)
    needs = [float(kept(reserve, lowest, now_s + after_s)[0, -1]) for after_s in (0.0, 5.0, 40.0, 200.0, 2000.0)]

    assert all(later < earlier for earlier, later in itertools.pairwise(needs)), f"needs {needs} do not fall"
    assert needs[-1] < 1e-12 * max(needs[0], 1.0)


@LIMITS
@given(ARRIVALS, st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.sampled_from((-12, -1, 3, 20)))
def test_scaling_all_values_by_a_power_of_two_moves_nothing(
    arrivals: list[tuple[float, float, float]], densities: list[float], octaves: int
):
    plain, now_s = told(arrivals)
    moved, _ = told(arrivals, 2.0**octaves)
    asked = np.array(densities)
    # Within rounding of the logarithm a value may fall on either side of the edge between two bins.
    numbers = BINS_PER_OCTAVE * np.log2(np.concatenate((asked, [density for density, _, _ in arrivals])))
    if np.any(np.abs(numbers - np.round(numbers)) < 1e-6):
        return

    np.testing.assert_allclose(kept(moved, asked * 2.0**octaves, now_s), kept(plain, asked, now_s), rtol=1e-12)


@LIMITS
@given(
    st.lists(st.tuples(st.floats(1.0, 4.0), st.floats(0.1, 50.0), st.just(0.0)), min_size=1, max_size=40),
    st.floats(0.9, 4.5),
)
def test_the_reserve_before_a_density_is_the_work_that_is_denser(
    arrivals: list[tuple[float, float, float]], density: float
):
    reserve, now_s = told(arrivals)
    window_s = DECAY_S * (1.0 - np.exp(-1.0 / DECAY_S))
    rate = float(kept(reserve, np.array([density]), now_s)[0, -1]) / (HORIZON_S - BUCKETS_S[0] / 2)
    one_bin = 2 ** (1.001 / BINS_PER_OCTAVE)

    # All that is denser by more than a bin counts, and nothing that is less dense.
    assert rate * window_s >= sum(cost for other, cost, _ in arrivals if other > density * one_bin) * (1 - 1e-9)
    assert rate * window_s <= sum(cost for other, cost, _ in arrivals if other > density) * (1 + 1e-9)


def test_a_fresh_reserve_and_worthless_work_reserve_nothing():
    reserve = Reserve()
    asked = np.array([0.0, 1.0, 1e9])
    assert not kept(reserve, asked, 0.0).any()
    reserve.add(0.0, at_once(5.0), 1.0)
    reserve.add(2.0, at_once(0.0), 1.0)
    reserve.add(2.0, at_once(float("inf")), 1.0)

    assert not kept(reserve, asked, 2.0).any()
