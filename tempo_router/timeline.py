"""Who fits: admission of units, densest first, against the GPU time that is left until each moment."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BUCKET_ENDS_S: Floats = np.cumsum(np.concatenate((np.full(20, 0.2), np.full(16, 1.0), np.full(8, 15.0))))
"""Ends of the buckets after now, in seconds: fine where it is urgent, 140 s in all."""

_BLOCK = 64


def bucket_of(after_s: Floats) -> npt.NDArray[np.int64]:
    """The last bucket that ends no later than so many seconds from now; the first for what is nearer."""
    return np.maximum(np.searchsorted(BUCKET_ENDS_S, after_s, side="right") - 1, 0)


def due_in_bucket(amounts: Floats, after_s: Floats) -> Floats:
    """Cumulative demand of work that must be done by a moment. Shapes (units,), (units,) -> (units, buckets)."""
    columns = np.arange(BUCKET_ENDS_S.size)
    demand: Floats = amounts[:, None] * (columns[None, :] >= bucket_of(after_s)[:, None])
    return demand


def admit(demand: Floats, allowance: Floats) -> Bools:
    """Which units are admitted, in the order of the rows.

    demand: (units, buckets), cumulative GPU seconds that a unit needs by the end of each bucket.
    allowance: (units, buckets), GPU seconds that all units up to this row may use by then. A unit is admitted if what
    was admitted before it leaves its demand in every bucket where it has any. Never admits beyond the allowance.
    """
    units = demand.shape[0]
    admitted = np.zeros(units, dtype=np.bool_)
    used = np.zeros(demand.shape[1])
    needs = demand > 0.0
    rest = np.arange(units)
    while rest.size:
        # What does not fit now will not fit later: `used` only grows.
        rest = rest[~np.any(needs[rest] & (used + demand[rest] > allowance[rest]), axis=1)]
        block = rest[:_BLOCK]
        total = used + np.cumsum(demand[block], axis=0)
        fits = ~np.any(needs[block] & (total > allowance[block]), axis=1)
        good = block.size if fits.all() else int(np.argmin(fits))
        if good:
            admitted[block[:good]] = True
            used = total[good - 1]
        rest = rest[good + (0 if good == block.size else 1) :]
    return admitted
