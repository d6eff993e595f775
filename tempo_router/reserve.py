"""How much work denser than a given density is still to come: what a plan must leave room for.

Without it a job that fits into today's timeline is started and later displaced by denser arrivals, and the work on it
is wasted. What is to come needs its GPU time when it is due, not when it arrives: a program that comes in ten seconds
with a deadline of two minutes takes nothing from the next half minute. So what is kept is the demand of recent arrivals
along the timeline, not their rate. Source: docs/scheduling.md, "The reserve".
"""

import math

import numpy as np
import numpy.typing as npt

from tempo_router.timeline import BUCKET_ENDS_S, BUCKETS_S

BINS_PER_OCTAVE = 16
BINS = 120
DECAY_S = 40.0

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Reserve:
    """Decayed histogram over log2(density), 16 bins to an octave, 120 bins, of the demand that arrives.

    The range is centred on the first density seen; what falls outside counts in the end bins.
    """

    def __init__(self) -> None:
        self._work = np.zeros((BINS, BUCKET_ENDS_S.size))
        self._lowest: int | None = None
        self._began_s: float | None = None
        self._at_s = 0.0

    def add(self, density: float, demand_s: Floats, now_s: float) -> None:
        """A unit arrived: its density, and the GPU seconds that it needs by the end of each bucket after its arrival.

        demand_s: (buckets,), cumulative. A density of zero, or a demand that is not finite, counts nowhere.
        """
        if not density > 0.0 or not np.isfinite(demand_s).all():
            return
        self._fade(now_s)
        number = math.floor(BINS_PER_OCTAVE * math.log2(density))
        if self._lowest is None:
            self._lowest = number - BINS // 2
        # Of units that come one a second from now on, this much is due by each bucket's end.
        before = np.concatenate(([0.0], demand_s[:-1]))
        self._work[min(max(number - self._lowest, 0), BINS - 1)] += np.cumsum((before + demand_s) / 2 * BUCKETS_S)

    def needs(self, densities: Floats, now_s: float) -> "Needs":
        """What arrivals denser than each of these will need by the end of each bucket from now."""
        if self._lowest is None or self._began_s is None:
            return Needs(np.zeros((1, BUCKET_ENDS_S.size)), np.zeros(densities.shape, dtype=np.int64))
        self._fade(now_s)
        # The window that the decayed sum stands for, shorter at the start.
        window_s = DECAY_S * (1.0 - math.exp(-max(now_s - self._began_s, 1.0) / DECAY_S))
        denser = np.concatenate((np.cumsum(self._work[::-1], axis=0)[::-1], np.zeros((1, BUCKET_ENDS_S.size))))
        with np.errstate(divide="ignore"):
            numbers = np.floor(BINS_PER_OCTAVE * np.log2(np.maximum(densities, 1e-300)))
        return Needs(denser / window_s, np.clip(numbers - self._lowest + 1, 0, BINS).astype(np.int64))

    def _fade(self, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = self._at_s = now_s
        if now_s > self._at_s:
            self._work *= math.exp(-(now_s - self._at_s) / DECAY_S)
            self._at_s = now_s


class Needs:
    """GPU seconds that arrivals still to come will need, for many densities; looked up where they are asked for."""

    def __init__(self, denser: Floats, levels: Ints) -> None:
        self._denser = denser
        self._levels = levels

    def of(self, ranks: Ints, buckets: slice) -> Floats:
        """Before these of the densities, by the end of each of these buckets: (ranks, buckets), never negative."""
        needs: Floats = self._denser[:, buckets][self._levels[ranks]]
        return needs
