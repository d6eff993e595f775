"""How long may a step be? Long steps waste less on what every step costs; short ones keep chains of calls in time.

What is right depends on the GPU, the load and the deadlines: an A100 that serves agents of 2,500 serial tokens within
120 s must make a token every 40 ms at least, while its fixed cost of a step, 11 ms, eats half of a step of 20 ms. So
the cap is chosen by what the units that arrived lately would have been worth under each candidate: each unit has a
chance to be in time and a price under it, and the densest fill the GPU time of that window.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tempo_router.program_history import SPREAD
from tempo_router.program_time import SPREAD_S
from tempo_router.step_time import Pace

Floats = npt.NDArray[np.float64]

_SAMPLES = 384
_LEAST_SAMPLES = 24
_LEAST_WINDOW_S = 10.0
_EVERY_S = 4.0
_TOLERANCE = 0.03
"""Of caps that are worth as much, within this, the one nearest to the usual is taken: the worth is flat at its top, and
says no more."""

_HYSTERESIS = 0.03
"""The cap stays while it is worth as much as the best, within this: every change unsettles what was planned."""

_WITHOUT_STREAMS_S = 0.1
"""Time between tokens of which the candidates are shares where nobody streams."""

SHARES: Floats = np.array([0.12, 0.16, 0.2, 0.23, 0.26, 0.29, 0.32, 0.35, 0.38, 0.42, 0.46, 0.5, 0.6])
"""Candidates, as shares of the tightest time between tokens."""


@dataclass(frozen=True, slots=True)
class ArrivedUnit:
    """What a plan knew of a unit when it came.

    work_s: GPU seconds of its tokens, without the fixed cost of steps. prefill_s: of its longest chain of prompts.
    serial_tokens: output tokens of its longest chain; spread_tokens: by how much its call may be longer. gaps_s: tools'
    pauses, without waits: those grow with an overload, and a cap that they shorten adds to it. left_s: time to its
    deadline; infinity for streams. tbt_s: time between tokens of a stream; infinity for others. value: if it makes it.
    """

    at_s: float
    work_s: float
    prefill_s: float
    serial_tokens: float
    spread_tokens: float
    gaps_s: float
    left_s: float
    tbt_s: float
    value: float


class StepCap:
    """Chooses the cap of a step, in seconds. `note` each arrival; `choose` costs a millisecond every few seconds.

    usual_share: what to take where arrivals do not tell, as a share of the tightest time between tokens.
    """

    def __init__(self, usual_share: float) -> None:
        self._usual_share = usual_share
        self._units: deque[ArrivedUnit] = deque(maxlen=_SAMPLES)
        self._next_s = float("-inf")
        self.cap_s: float | None = None

    def note(self, unit: ArrivedUnit) -> None:
        """A unit with a target arrived."""
        self._units.append(unit)

    def choose(self, pace: Pace, replicas: int, now_s: float) -> float | None:
        """The cap for now; None while too little has been seen."""
        if now_s < self._next_s or len(self._units) < _LEAST_SAMPLES:
            return self.cap_s
        window_s = now_s - self._units[0].at_s
        if window_s < _LEAST_WINDOW_S:
            return self.cap_s
        self._next_s = now_s + _EVERY_S
        tightest_s = min(unit.tbt_s for unit in self._units)
        tightest_s = tightest_s if tightest_s < float("inf") else _WITHOUT_STREAMS_S
        caps = SHARES * tightest_s
        fixed_s = max(pace.fixed_s, 1e-4)
        caps = caps[caps > 1.25 * fixed_s]
        if not caps.size:
            return self.cap_s
        worth = self._worth(caps, fixed_s, window_s * replicas)
        best = float(worth.max())
        if best <= 0.0:
            return self.cap_s
        if self.cap_s is not None:
            now = float(np.interp(self.cap_s, caps, worth))
            if now >= (1.0 - _HYSTERESIS) * best:
                return self.cap_s
        distance = np.abs(np.log(caps / (self._usual_share * tightest_s)))
        self.cap_s = float(caps[np.argmin(np.where(worth >= (1.0 - _TOLERANCE) * best, distance, np.inf))])
        return self.cap_s

    def _worth(self, caps: Floats, fixed_s: float, capacity_s: float) -> Floats:
        """Value of the densest units that fill the capacity, under each cap. Shape (caps,)."""
        units = self._units
        work, prefill, serial, spread, gaps, left, tbt, value = np.array(
            [
                (u.work_s, u.prefill_s, u.serial_tokens, u.spread_tokens, u.gaps_s, u.left_s, u.tbt_s, u.value)
                for u in units
            ]
        ).T
        share = (caps - fixed_s) / caps
        # Prompts wait for each other: a chain's prefill takes about twice its GPU time.
        chain = serial * caps[:, None] + prefill / share[:, None] + gaps
        sigma = spread * caps[:, None] + SPREAD * chain + SPREAD_S
        with np.errstate(invalid="ignore"):
            z = np.where(np.isfinite(left), (left - chain) / sigma, 9.0)
        chance = 0.5 * (1.0 + np.tanh(0.7978845608 * (z + 0.044715 * np.clip(z, -9, 9) ** 3)))
        chance = np.where(caps[:, None] < 0.9 * tbt, chance, 0.0)
        cost = work / share[:, None]
        expected = value * chance
        order = np.argsort(-expected / cost, axis=1)
        costs = np.take_along_axis(cost, order, axis=1)
        gains = np.take_along_axis(expected, order, axis=1)
        before = np.cumsum(costs, axis=1) - costs
        fitting = np.clip((capacity_s - before) / costs, 0.0, 1.0)
        worth: Floats = (gains * fitting).sum(axis=1)
        return worth
