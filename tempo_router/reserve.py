"""How much work denser than a given density is still to come: what a plan must leave room for.

Without it a job that fits into today's timeline is started and later displaced by denser arrivals, and the work on it
is wasted. Source: docs/scheduling.md, "The reserve".
"""

import math

import numpy as np
import numpy.typing as npt

BINS_PER_OCTAVE = 16
BINS = 120
DECAY_S = 40.0

Floats = npt.NDArray[np.float64]


class Reserve:
    """Decayed histogram of arriving GPU seconds over log2(density), 16 bins to an octave, 120 bins.

    The range is centred on the first density seen; what falls outside counts in the end bins.
    """

    def __init__(self) -> None:
        self._work = np.zeros(BINS)
        self._lowest: int | None = None
        self._began_s: float | None = None
        self._at_s = 0.0

    def add(self, density: float, cost_s: float, now_s: float) -> None:
        """A unit arrived: its density and its expected cost in GPU seconds, both then. Zero density counts nowhere."""
        if not (density > 0.0 and 0.0 < cost_s < math.inf):
            return
        self._fade(now_s)
        number = math.floor(BINS_PER_OCTAVE * math.log2(density))
        if self._lowest is None:
            self._lowest = number - BINS // 2
        self._work[min(max(number - self._lowest, 0), BINS - 1)] += cost_s

    def rates(self, densities: Floats, now_s: float) -> Floats:
        """GPU seconds per second of arrivals denser than each of these; shape as given, never negative."""
        if self._lowest is None or self._began_s is None:
            return np.zeros_like(densities)
        self._fade(now_s)
        # The window that the decayed sum stands for, shorter at the start.
        window_s = DECAY_S * (1.0 - math.exp(-max(now_s - self._began_s, 1.0) / DECAY_S))
        denser = np.concatenate((np.cumsum(self._work[::-1])[::-1], [0.0]))
        with np.errstate(divide="ignore"):
            numbers = np.floor(BINS_PER_OCTAVE * np.log2(np.maximum(densities, 1e-300)))
        above = np.clip(numbers - self._lowest + 1, 0, BINS).astype(np.int64)
        rates: Floats = denser[above] / window_s
        return rates

    def _fade(self, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = self._at_s = now_s
        if now_s > self._at_s:
            self._work *= math.exp(-(now_s - self._at_s) / DECAY_S)
            self._at_s = now_s
