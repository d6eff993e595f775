"""Who fits: admission of units, densest first, against the GPU time that is left until each moment."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

BUCKETS_S: Floats = np.concatenate((np.full(20, 0.2), np.full(16, 1.0), np.full(8, 15.0)))
"""Lengths of the buckets, in seconds: fine where it is urgent."""

BUCKET_ENDS_S: Floats = np.cumsum(BUCKETS_S)
"""Their ends after now, 140 s in all."""

ALL_BUCKETS, LAST_BUCKET = slice(None), slice(-1, None)

_BLOCK = 128


def bucket_of(after_s: Floats) -> npt.NDArray[np.int64]:
    """The last bucket that ends no later than so many seconds from now; the first for what is nearer."""
    return np.maximum(np.searchsorted(BUCKET_ENDS_S, after_s, side="right") - 1, 0)


def due_in_bucket(amounts: Floats, after_s: Floats, buckets: slice = ALL_BUCKETS) -> Floats:
    """Cumulative demand, by some of the buckets, of work that must be done by a moment: (units, buckets)."""
    columns = np.arange(BUCKET_ENDS_S.size)[buckets]
    demand: Floats = amounts[:, None] * (columns[None, :] >= bucket_of(after_s)[:, None])
    return demand


class Timeline:
    """GPU time that is spoken for by the end of each bucket. Units come in blocks, densest first.

    used: (buckets,), cumulative GPU seconds of all that was admitted.
    """

    def __init__(self, buckets: int) -> None:
        self.used: Floats = np.zeros(buckets)

    def admit(self, demand: Floats, allowance: Floats) -> Bools:
        """Which units of a block are admitted, in the order of its rows.

        demand: (units, buckets), cumulative GPU seconds that a unit needs by the end of each bucket.
        allowance: (units, buckets), GPU seconds that all units up to this row may use by then. A unit is admitted if
        what was admitted before it leaves its demand in every bucket where it has any. Never admits beyond the
        allowance.
        """
        admitted = np.zeros(len(demand), dtype=np.bool_)
        rest, needed, room = np.arange(len(demand)), demand, np.where(demand > 0.0, allowance, np.inf)
        while rest.size:
            # What does not fit now will not fit later: `used` only grows.
            fits = ~np.any(self.used + needed > room, axis=1)
            if not fits.all():
                rest, needed, room = rest[fits], needed[fits], room[fits]
                if not rest.size:
                    break
            total = self.used + np.cumsum(needed, axis=0)
            fits = ~np.any(total > room, axis=1)
            good = rest.size if fits.all() else int(np.argmin(fits))
            admitted[rest[:good]] = True
            self.used = total[good - 1]
            rest, needed, room = rest[good + 1 :], needed[good + 1 :], room[good + 1 :]
        return admitted


def admit(
    demand_of: Callable[[Ints, slice], Floats],
    allowance_of: Callable[[Ints, slice], Floats],
    units: int,
    buckets: int = BUCKET_ENDS_S.size,
) -> Bools:
    """Which of so many units, densest first, are admitted; as if each were asked after the one before it.

    demand_of, allowance_of: rows of `Timeline.admit` for some units and buckets. They are asked for the last bucket of
    all units, and for the other buckets only of those that still fit there: under overload, few.
    """
    everybody = np.arange(units)
    last_demand, last_allowance = demand_of(everybody, LAST_BUCKET)[:, 0], allowance_of(everybody, LAST_BUCKET)[:, 0]
    admitted = np.zeros(units, dtype=np.bool_)
    timeline = Timeline(buckets)
    rest = everybody
    while rest.size:
        demand = last_demand[rest]
        rest = rest[(demand <= 0.0) | (timeline.used[-1] + demand <= last_allowance[rest])]
        block, rest = rest[:_BLOCK], rest[_BLOCK:]
        admitted[block] = timeline.admit(demand_of(block, ALL_BUCKETS), allowance_of(block, ALL_BUCKETS))
    return admitted
