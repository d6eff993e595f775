"""How long does an engine step take? Fitted online, so that costs and deadlines are in this machine's seconds.

This issue's model is linear: T = const + prefill·(prefill tokens) + decode·(decodes) + context·(summed context).
Everyone else reads a `Pace` and never the coefficients, so the fuller formula of scheduler.md section 2 (the knee at
the compute bound, attention inside prefill) can replace the inside of this file alone.
"""

import math
from dataclasses import dataclass

from tempo_router.events import StepReport

_SCALES = (1.0, 100.0, 10.0, 10_000.0)
"""Typical sizes of (1, prefill tokens, decodes, context tokens): the fit works on numbers near one."""

_PRIOR = (6e-3, 2e-5, 4e-5, 1e-7)
"""Seconds per unit, between a laptop's toy model and a data-centre GPU. Guessed; the first steps outweigh it."""

_RIDGE = 0.02
"""Weight of the last coefficients in the next fit, in observations: enough to hold still a direction that no recent
step has shown, too little to bias the others."""

_DECAY = 0.995
_REFIT_EVERY = 16
_SWEEPS = 30
_WARM_UP = 16
_OUTLIER_RATIO = 5.0
_MAX_REJECTED_IN_A_ROW = 8
"""So many slow steps in a row are no stall: the machine is slower now. The next _WARM_UP steps are believed."""
_UPPER_SHARE = 0.9
_MIN_DECODES = 8.0

Coefficients = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Pace:
    """What work costs on a replica now, in seconds. Everything is finite and above zero, except as said.

    prefill_token_s: one token of prefill.
    share_s: fixed part of a step that falls to one of the sequences decoding together.
    decode_s: one decoded token, without context; may be 0.
    context_token_s: one token of context read by one decode; may be 0.
    tau_s: mean step time, that is the time between two tokens of a running sequence.
    alone_s: step time of a sequence that has the replica to itself.
    """

    prefill_token_s: float
    share_s: float
    decode_s: float
    context_token_s: float
    tau_s: float
    alone_s: float

    def prefill_s(self, tokens: float) -> float:
        """GPU seconds to bring `tokens` missing tokens of context in (`c_pre` of scheduler.md section 3)."""
        return self.prefill_token_s * tokens


class StepTimeModel:
    """Online fit of the step time by decayed, relative least squares with coefficients that are never negative.

    Steps far above the estimate (compilation, a stalled host) are left out, unless they keep coming.
    Each observation costs microseconds; the coefficients are refitted on every 16th.
    """

    def __init__(self, prior: Coefficients = _PRIOR) -> None:
        self._coefficients = prior
        self._ridge = [_RIDGE / (value * s) ** 2 for value, s in zip(_PRIOR, _SCALES, strict=True)]
        # Upper triangle of X'X, and X'y, both decayed.
        self._xx = [0.0] * 10
        self._xy = [0.0] * 4
        self._observed = 0
        self._rejected = 0
        self._rejected_in_a_row = 0
        self._lenient = _WARM_UP
        self._relative_error = 0.0
        self._upper_ratio = 1.5
        self._decodes = _MIN_DECODES
        self._tokens = _MIN_DECODES
        self._tau_s = self.step_s(0, int(_MIN_DECODES), int(_MIN_DECODES) * 512)
        self._pace: Pace | None = None

    @property
    def coefficients(self) -> Coefficients:
        """Seconds per (step, prefill token, decode, context token); none is negative."""
        return self._coefficients

    @property
    def observed(self) -> int:
        """Steps used for the fit."""
        return self._observed

    @property
    def rejected(self) -> int:
        """Steps left out as outliers."""
        return self._rejected

    @property
    def relative_error(self) -> float:
        """Running mean of |measured - estimated| / measured of the steps used."""
        return self._relative_error

    @property
    def upper_ratio(self) -> float:
        """measured / estimated that nine in ten steps do not exceed."""
        return self._upper_ratio

    @property
    def tau_s(self) -> float:
        """Mean step time, not below the fixed part of a step."""
        return max(self._tau_s, self._coefficients[0], 1e-6)

    @property
    def mean_decodes(self) -> float:
        """Mean of the sequences decoding in a step."""
        return self._decodes

    @property
    def mean_tokens(self) -> float:
        """Mean of the tokens in a step, prefill included."""
        return self._tokens

    def step_s(self, prefill_tokens: int, decodes: int, context_tokens: int) -> float:
        """Expected duration of such a step."""
        fixed, prefill, decode, context = self._coefficients
        return fixed + prefill * prefill_tokens + decode * decodes + context * context_tokens

    def upper_step_s(self, prefill_tokens: int, decodes: int, context_tokens: int) -> float:
        """Duration that such a step does not exceed nine times in ten."""
        return self._upper_ratio * self.step_s(prefill_tokens, decodes, context_tokens)

    def pace(self) -> Pace:
        """The costs that follow from the fit and the running means."""
        if self._pace is None:
            fixed, prefill, decode, context = self._coefficients
            self._pace = Pace(
                prefill_token_s=max(prefill, 1e-9),
                share_s=max(fixed / max(self._decodes, _MIN_DECODES), 1e-9),
                decode_s=decode,
                context_token_s=context,
                tau_s=self.tau_s,
                alone_s=max(fixed + decode, 1e-6),
            )
        return self._pace

    def observe(self, step: StepReport) -> None:
        """Learn from one step. Steps without tokens, and durations that no clock measures, are ignored."""
        duration_s = step.duration_s
        if not 0 < duration_s < math.inf or step.prefill_tokens + step.decodes <= 0:
            return
        estimated_s = max(self.step_s(step.prefill_tokens, step.decodes, step.context_tokens), 1e-9)
        if self._is_outlier(duration_s, estimated_s):
            self._rejected += 1
            self._rejected_in_a_row += 1
            if self._rejected_in_a_row == _MAX_REJECTED_IN_A_ROW:
                self._start_afresh()
            return
        self._rejected_in_a_row = 0
        self._lenient = max(0, self._lenient - 1)
        self._observed += 1
        self._follow_means(step)
        self._follow_errors(duration_s, estimated_s)
        self._accumulate(step, duration_s, estimated_s)
        if self._observed % _REFIT_EVERY == 0 or self._observed in (2, 4, 8):
            self._refit()
        self._pace = None

    def _start_afresh(self) -> None:
        """What was measured before says little now: keep a hundredth of its weight."""
        self._lenient = _WARM_UP
        self._xx = [value / 100 for value in self._xx]
        self._xy = [value / 100 for value in self._xy]

    def _is_outlier(self, duration_s: float, estimated_s: float) -> bool:
        return not self._lenient and duration_s > _OUTLIER_RATIO * max(self._upper_ratio, 1.0) * estimated_s

    def _follow_means(self, step: StepReport) -> None:
        self._tau_s += 0.05 * (step.duration_s - self._tau_s)
        self._tokens += 0.02 * (step.prefill_tokens + step.decodes - self._tokens)
        self._decodes += 0.02 * (step.decodes - self._decodes)

    def _follow_errors(self, duration_s: float, estimated_s: float) -> None:
        smoothing = max(0.02, 1.0 / self._observed)
        self._relative_error += smoothing * (abs(duration_s - estimated_s) / duration_s - self._relative_error)
        # Stochastic quantile: moves up 9 for each 1 down, so it rests where one in ten is above.
        is_above = duration_s > self._upper_ratio * estimated_s
        self._upper_ratio *= 1 + 0.02 * (_UPPER_SHARE if is_above else _UPPER_SHARE - 1)
        self._upper_ratio = min(max(self._upper_ratio, 0.5), 20.0)

    def _accumulate(self, step: StepReport, duration_s: float, estimated_s: float) -> None:
        # Errors count relative to the step: a long prefill must not drown a hundred decode steps.
        scale = 2.0 / (duration_s + estimated_s)
        x1 = step.prefill_tokens * scale / _SCALES[1]
        x2 = step.decodes * scale / _SCALES[2]
        x3 = step.context_tokens * scale / _SCALES[3]
        y = duration_s * scale
        xx = self._xx
        self._xx = [
            _DECAY * xx[0] + scale * scale,
            _DECAY * xx[1] + scale * x1,
            _DECAY * xx[2] + scale * x2,
            _DECAY * xx[3] + scale * x3,
            _DECAY * xx[4] + x1 * x1,
            _DECAY * xx[5] + x1 * x2,
            _DECAY * xx[6] + x1 * x3,
            _DECAY * xx[7] + x2 * x2,
            _DECAY * xx[8] + x2 * x3,
            _DECAY * xx[9] + x3 * x3,
        ]
        xy = self._xy
        self._xy = [
            _DECAY * xy[0] + scale * y,
            _DECAY * xy[1] + x1 * y,
            _DECAY * xy[2] + x2 * y,
            _DECAY * xy[3] + x3 * y,
        ]

    def _refit(self) -> None:
        """Non-negative least squares by coordinate descent, from the last solution and weakly drawn to it."""
        ff, fp, fd, fc, pp, pd, pc, dd, dc, cc = self._xx
        fy, py, dy, cy = self._xy
        f0, p0, d0, c0 = (value * s for value, s in zip(self._coefficients, _SCALES, strict=True))
        fr, pr, dr, cr = self._ridge
        f, p, d, c = f0, p0, d0, c0
        # Written out: this runs in the router's event loop, and a loop over rows takes ten times as long.
        for _ in range(_SWEEPS):
            f = max(0.0, (fy - fp * p - fd * d - fc * c + fr * f0) / (ff + fr))
            p = max(0.0, (py - fp * f - pd * d - pc * c + pr * p0) / (pp + pr))
            d = max(0.0, (dy - fd * f - pd * p - dc * c + dr * d0) / (dd + dr))
            c = max(0.0, (cy - fc * f - pc * p - dc * d + cr * c0) / (cc + cr))
        fixed, prefill, decode, context = (value / s for value, s in zip((f, p, d, c), _SCALES, strict=True))
        self._coefficients = (fixed, prefill, decode, context)
