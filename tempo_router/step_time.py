"""How long does an engine step take? Fitted online, so that costs and deadlines are in this machine's seconds.

    T = f(n) + row·D + d·C + e·A

n: all tokens of the step. D: decodes. C: their summed context. A: over the pieces of prompts, tokens times the context
before their middle. f is convex and piecewise linear with fixed knots: nearly flat while the GPU waits for its memory,
then rising in proportion to the work. That is ovh + max(a0, a1 + b·n) with a rounded knee, in a form
that least squares can fit, since only the slopes are unknown. The row term is for machines whose cost per sequence is
above that per token (CPUs). Everyone else reads a `Pace` or asks for a step's duration, and none knows the form.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

from tempo_router.events import StepReport

_KNOTS = (64, 128, 256)
"""GPUs change from memory-bound to compute-bound between some 100 (A100) and 300 tokens (H100) per step."""

_SCALES = (1.0, 100.0, 100.0, 100.0, 100.0, 10.0, 1e4, 1e6)
"""Typical sizes of what the coefficients multiply: the fit works on numbers near one."""

_RIDGE = 0.1
"""Weight of the last coefficients in the next fit, in observations: enough to hold still a direction that no recent
step has shown (with one mean context, decodes and context are one), too little to bias the others for long."""

_DECAY = 0.995
"""Per step of a memory's own kind: some 200 steps count."""
_DECAY_OTHER = 0.999
"""Per step of the other kind: a long stretch of pure decoding must not forget what prefill costs, but a machine that
became faster or slower must not be held back by it either."""
_REFIT_EVERY = 16
_SWEEPS = 2
"""The next fit goes on where this one ended; thirty sweeps predict no better."""
_WARM_UP = 16
_OUTLIER_RATIO = 5.0
_MAX_REJECTED_IN_A_ROW = 8
"""So many slow steps in a row are no stall: the machine is slower now. The next _WARM_UP steps are believed."""
_FAR_ABOVE = 10.0
_MAX_FAR_ABOVE = 32
_FAR_ABOVE_SHARE = 0.2
"""So many steps that were estimated at more than ten times what they took, and are so large a share of their kind: the
fit began with figures of another machine, or in another unit. It would not unlearn them: next to an estimate a thousand
times too large all measurements are alike, and weigh nothing against where the fit stands."""
_UPPER_SHARE = 0.9
_LEAST_RATIO, _USUAL_RATIO, _MOST_RATIO = 0.5, 1.5, 20.0
_MIN_DECODES = 8.0
_UNSURE_ABOVE = 0.30
_UNSURE_AFTER_S = 60.0
_LONGEST_COUNTED_S = 1.0
"""So much of one step's duration counts towards that minute: a compilation is not a minute of evidence."""
_BIASED_ABOVE = 0.1
_BIASED_SHARE = 0.6
"""Steps all slower or all faster than estimated by a fifth (0.1 of measured + estimated): the machine or the load has
changed, and what is remembered keeps this share at each fit until the estimates are right on average again."""
_MOST_TOKENS = 1 << 20


class Coefficients(NamedTuple):
    """Seconds per unit; none is negative, so every step's time grows with everything in it.

    fixed_s: a step with nothing in it. token_s: a token of any kind while there are few. over_64_s, over_128_s,
    over_256_s: what each token beyond so many costs in addition. decode_s: a decode, beyond its token.
    context_s: a token of context read by a decode. attention_s: a prompt token times a token before it.
    """

    fixed_s: float
    token_s: float
    over_64_s: float
    over_128_s: float
    over_256_s: float
    decode_s: float
    context_s: float
    attention_s: float

    def step_s(self, prefill_tokens: float, decodes: float, context_tokens: float, attention_tokens: float) -> float:
        """Duration of such a step; the arguments are those of a `StepReport`."""
        return (
            self.tokens_s(prefill_tokens + decodes)
            + self.decode_s * decodes
            + self.context_s * context_tokens
            + self.attention_s * attention_tokens
        )

    @property
    def step_token_s(self) -> float:
        """A token beyond the last knot, where the step is compute-bound."""
        return self.token_s + self.over_64_s + self.over_128_s + self.over_256_s

    @property
    def knee_tokens(self) -> float:
        """Where the flat start and the compute-bound line would meet; between 0 and the last knot."""
        late_s = self.over_64_s * _KNOTS[0] + self.over_128_s * _KNOTS[1] + self.over_256_s * _KNOTS[2]
        return late_s / max(self.step_token_s, 1e-12)

    def tokens_s(self, tokens: float) -> float:
        """f(n): a step of so many tokens, without what decodes and attention add."""
        # The knots written out: a loop over them takes three times as long, and this is asked at every step.
        time_s = self.fixed_s + self.token_s * tokens
        if tokens > 64:
            time_s += self.over_64_s * (tokens - 64)
            if tokens > 128:
                time_s += self.over_128_s * (tokens - 128)
                if tokens > 256:
                    time_s += self.over_256_s * (tokens - 256)
        return time_s


_PRIOR = Coefficients(6e-3, 1e-5, 4e-6, 4e-6, 4e-6, 1e-5, 1e-7, 2e-9)
"""Between a laptop's toy model and a data-centre GPU. Guessed; the first steps outweigh it."""

_MOST_OVER_PRIOR = Coefficients(500.0, 2e4, 2e4, 2e4, 2e4, 2e4, 2e4, 2e4)
"""A step with nothing in it takes 3 s at most, a token 0.2 s: a model of 8 billion on two cores comes near that."""


def implausible(coefficients: Coefficients) -> list[str]:
    """Which of them no machine has, with their values; empty for what a fit may begin with."""
    return [
        f"{name}={value!r}"
        for name, value, prior, most in zip(Coefficients._fields, coefficients, _PRIOR, _MOST_OVER_PRIOR, strict=True)
        if not 0.0 <= value <= most * prior
    ]


_FEATURES = len(_PRIOR)
_RIDGES = tuple(_RIDGE / (value * scale) ** 2 for value, scale in zip(_PRIOR, _SCALES, strict=True))


@dataclass(frozen=True, slots=True)
class Pace:
    """What work costs on a replica now, in seconds. Everything is finite and above zero, except as said.

    prefill_token_s: one token of prefill, without attention.
    share_s: fixed part of a step that falls to one of the sequences decoding together.
    decode_s: one decoded token, without context; may be 0.
    context_token_s: one token of context read by one decode; may be 0.
    tau_s: mean step time, that is the time between two tokens of a running sequence.
    alone_s: step time of a sequence that has the replica to itself.
    attention_s: one token of prefill times one token before it; may be 0.
    fixed_s: a step with next to nothing in it; may be 0.
    knee_tokens: tokens in a step below which further tokens are nearly free; 0 where every token costs the same.
    step_token_s: one more token in a step beyond the knee. 0 stands for prefill_token_s, and becomes it.
    is_unsure: the model has been far off for a minute; widen what depends on it.
    """

    prefill_token_s: float
    share_s: float
    decode_s: float
    context_token_s: float
    tau_s: float
    alone_s: float
    attention_s: float = 0.0
    fixed_s: float = 0.0
    knee_tokens: float = 0.0
    step_token_s: float = 0.0
    is_unsure: bool = False

    def __post_init__(self) -> None:
        if not self.step_token_s:
            object.__setattr__(self, "step_token_s", self.prefill_token_s)

    def prefill_s(self, tokens: float, past: float = 0.0) -> float:
        """GPU seconds to bring in `tokens` missing tokens of context after `past` that are cached (`c_pre`)."""
        return tokens * (self.prefill_token_s + self.attention_s * (past + tokens / 2))


class _Memory:
    """Decayed sums of one kind of steps: X'X and X'y of the relative least squares."""

    __slots__ = ("far_above", "rows", "xx", "xy")

    def __init__(self) -> None:
        self.far_above = 0.0
        self.rows: list[tuple[float, ...]] = []
        self.xx = [[0.0] * _FEATURES for _ in range(_FEATURES)]
        self.xy = [0.0] * _FEATURES

    def fade(self, share: float) -> None:
        self.xx = [[value * share for value in row] for row in self.xx]
        self.xy = [value * share for value in self.xy]

    def absorb(self, steps: int) -> None:
        """Take the rows in; `steps` of all kinds have passed since the last time."""
        own = len(self.rows)
        self.fade(_DECAY**own * _DECAY_OTHER ** (steps - own))
        if not own:
            return
        # Column by column: sums over 16 steps at once cost a fifth of 16 updates.
        *columns, measured = zip(*self.rows, strict=True)
        self.rows.clear()
        for i, column in enumerate(columns):
            if not any(column):
                continue
            self.xy[i] += sum(map(mul, column, measured))
            for j in range(i, _FEATURES):
                value = sum(map(mul, column, columns[j]))
                self.xx[i][j] += value
                if i != j:
                    self.xx[j][i] += value


class StepTimeModel:
    """Online fit of the step time by decayed, relative least squares with coefficients that are never negative.

    Steps with prefill and without are remembered apart, so that long stretches of one do not wash out the other.
    Steps far above the estimate (compilation, a stalled host) are left out, unless they keep coming.
    Each observation costs microseconds; the coefficients are refitted on every 16th.

    prior, upper_ratio: what a machine of the same kind had found.
    """

    def __init__(self, prior: Coefficients = _PRIOR, upper_ratio: float = _USUAL_RATIO) -> None:
        self._coefficients = Coefficients(*prior)
        self._decoding = _Memory()
        self._prefilling = _Memory()
        self._since_fit = 0
        self._observed = 0
        self._rejected = 0
        self._rejected_in_a_row = 0
        self._lenient = _WARM_UP
        self._relative_error = 0.0
        self._far_off_s = 0.0
        self._bias = 0.0
        self._upper_ratio = min(max(upper_ratio, _LEAST_RATIO), _MOST_RATIO)
        self._decodes = _MIN_DECODES
        self._tokens = _MIN_DECODES
        self._tau_s = self.step_s(0, int(_MIN_DECODES), int(_MIN_DECODES) * 512)
        self._pace: Pace | None = None

    @property
    def coefficients(self) -> Coefficients:
        """The fit as it is now; also the prior for a machine of the same kind."""
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
        """Running mean of |measured - estimated| / measured, at most 1 for each step; 1 for a step left out."""
        return self._relative_error

    @property
    def is_unsure(self) -> bool:
        """The relative error has been above 30 % for the last minute of steps, by their own durations."""
        return self._far_off_s >= _UNSURE_AFTER_S

    @property
    def upper_ratio(self) -> float:
        """measured / estimated that nine in ten steps do not exceed."""
        return self._upper_ratio

    @property
    def tau_s(self) -> float:
        """Mean step time, not below the fixed part of a step."""
        return max(self._tau_s, self._coefficients.fixed_s, 1e-6)

    @property
    def mean_decodes(self) -> float:
        """Mean of the sequences decoding in a step."""
        return self._decodes

    @property
    def mean_tokens(self) -> float:
        """Mean of the tokens in a step, prefill included."""
        return self._tokens

    def step_s(
        self, prefill_tokens: float, decodes: float, context_tokens: float, attention_tokens: float = 0.0
    ) -> float:
        """Expected duration of such a step; the arguments are those of a `StepReport`."""
        return self._coefficients.step_s(prefill_tokens, decodes, context_tokens, attention_tokens)

    def budget_tokens(self, cap_s: float, decodes: int, context_tokens: int, past: float = 0.0) -> int:
        """The most prefill tokens beside these decodes with which the step is expected to stay within cap_s.

        past: context before the prefill, which is reckoned as one piece. 0 if not even the decodes fit; 2**20 at most.
        """
        left_s = cap_s - self.step_s(0, decodes, context_tokens)
        if not left_s >= 0:
            return 0
        tokens = int(min(self._affordable(left_s, decodes, past), _MOST_TOKENS))
        # The sums above and those of step_s may round to different sides of the cap.
        if tokens and self.step_s(tokens, decodes, context_tokens, tokens * (past + tokens / 2)) > cap_s:
            tokens -= 1
        return tokens

    def _affordable(self, left_s: float, decodes: int, past: float) -> float:
        """Walk along f from knot to knot until left_s is spent."""
        c = self._coefficients
        slope_s, tokens = c.token_s, 0.0
        for knot, over_s in zip(_KNOTS, (c.over_64_s, c.over_128_s, c.over_256_s), strict=True):
            width = knot - decodes - tokens
            if width > 0:
                piece_s = width * (slope_s + c.attention_s * (past + tokens + width / 2))
                if piece_s >= left_s:
                    break
                left_s -= piece_s
                tokens += width
            slope_s += over_s
        # attention/2 x² + rate x = left, in the form that neither cancels nor needs attention above zero.
        rate_s = slope_s + c.attention_s * (past + tokens)
        spread = rate_s + math.sqrt(rate_s * rate_s + 2 * c.attention_s * left_s)
        return tokens + 2 * left_s / spread if 0 < spread < math.inf else math.inf

    def pace(self) -> Pace:
        """The costs that follow from the fit and the running means."""
        if self._pace is None:
            c = self._coefficients
            token_s = c.step_token_s
            # The mean step without the part that grows with its tokens. The shares of all sequences and the price of
            # all tokens add up to that step.
            apart_s = c.tokens_s(self._tokens) - token_s * self._tokens
            self._pace = Pace(
                prefill_token_s=max(token_s, 1e-9),
                share_s=max(apart_s / max(self._decodes, _MIN_DECODES), 1e-9),
                decode_s=token_s + c.decode_s,
                context_token_s=c.context_s,
                tau_s=self.tau_s,
                alone_s=max(c.tokens_s(1) + c.decode_s, 1e-6),
                attention_s=c.attention_s,
                fixed_s=c.fixed_s,
                knee_tokens=c.knee_tokens,
                step_token_s=max(token_s, 1e-9),
                is_unsure=self.is_unsure,
            )
        return self._pace

    def observe(self, step: StepReport, *, tau_at_most_s: float = math.inf) -> None:
        """Learn from one step. Steps without tokens, and durations that no clock measures, are ignored.

        tau_at_most_s: for the mean step no more than this, of a step that was long because nobody was in a hurry: those
        who are will have shorter ones.
        """
        duration_s = step.duration_s
        if not 0 < duration_s < math.inf or step.prefill_tokens + step.decodes <= 0:
            return
        estimated_s = self.step_s(step.prefill_tokens, step.decodes, step.context_tokens, step.attention_tokens)
        estimated_s = max(estimated_s, 1e-9)
        if self._is_outlier(duration_s, estimated_s):
            self._rejected += 1
            self._rejected_in_a_row += 1
            self._follow_error(1.0, duration_s)
            self._pace = None
            if self._rejected_in_a_row == _MAX_REJECTED_IN_A_ROW:
                self._start_afresh()
            return
        self._rejected_in_a_row = 0
        self._lenient = max(0, self._lenient - 1)
        self._observed += 1
        self._follow_means(step, tau_at_most_s)
        self._follow_error(min(1.0, abs(duration_s - estimated_s) / duration_s), duration_s)
        self._follow_residuals(duration_s, estimated_s)
        self._remember(step, estimated_s)
        if self._was_far_above(step, estimated_s):
            self._begin_anew()
        elif self._since_fit == _REFIT_EVERY or self._observed in (2, 4, 8):
            self._refit()
        self._pace = None

    def _start_afresh(self) -> None:
        """What was measured before says little now: keep a hundredth of its weight."""
        self._lenient = _WARM_UP
        self._decoding.fade(0.01)
        self._prefilling.fade(0.01)

    def _was_far_above(self, step: StepReport, estimated_s: float) -> bool:
        """Estimates have been of no use for long, and the prior would have been nearer to the truth."""
        memory = self._memory_of(step)
        if estimated_s > _FAR_ABOVE * step.duration_s:
            prior_s = _PRIOR.step_s(step.prefill_tokens, step.decodes, step.context_tokens, step.attention_tokens)
            memory.far_above += 2 * prior_s < estimated_s
        elif memory.far_above:
            memory.far_above = max(0.0, memory.far_above - _FAR_ABOVE_SHARE / (1 - _FAR_ABOVE_SHARE))
        return memory.far_above >= _MAX_FAR_ABOVE

    def _begin_anew(self) -> None:
        """Forget what was measured, and the figures that the fit began with."""
        self._coefficients = _PRIOR
        self._decoding, self._prefilling = _Memory(), _Memory()
        self._since_fit = 0
        self._lenient = _WARM_UP
        self._bias = 0.0
        self._upper_ratio = _USUAL_RATIO

    def _is_outlier(self, duration_s: float, estimated_s: float) -> bool:
        return not self._lenient and duration_s > _OUTLIER_RATIO * max(self._upper_ratio, 1.0) * estimated_s

    def _follow_means(self, step: StepReport, tau_at_most_s: float) -> None:
        self._tau_s += 0.05 * (min(step.duration_s, tau_at_most_s) - self._tau_s)
        self._tokens += 0.02 * (step.prefill_tokens + step.decodes - self._tokens)
        self._decodes += 0.02 * (step.decodes - self._decodes)

    def _follow_error(self, error: float, duration_s: float) -> None:
        smoothing = max(0.02, 1.0 / max(self._observed, 1))
        self._relative_error += smoothing * (error - self._relative_error)
        if self._relative_error > _UNSURE_ABOVE:
            self._far_off_s += min(duration_s, _LONGEST_COUNTED_S)
        else:
            self._far_off_s = 0.0

    def _follow_residuals(self, duration_s: float, estimated_s: float) -> None:
        self._bias += 0.1 * ((duration_s - estimated_s) / (duration_s + estimated_s) - self._bias)
        # Stochastic quantile: moves up 9 for each 1 down, so it rests where one in ten is above.
        is_above = duration_s > self._upper_ratio * estimated_s
        self._upper_ratio *= 1 + 0.02 * (_UPPER_SHARE if is_above else _UPPER_SHARE - 1)
        self._upper_ratio = min(max(self._upper_ratio, _LEAST_RATIO), _MOST_RATIO)

    def _remember(self, step: StepReport, estimated_s: float) -> None:
        # Errors count relative to the step: a long prefill must not drown a hundred decode steps.
        scale = 2.0 / (step.duration_s + estimated_s)
        tokens, per_100 = step.prefill_tokens + step.decodes, scale / 100
        row = (
            scale,
            tokens * per_100,
            (tokens - 64) * per_100 if tokens > 64 else 0.0,
            (tokens - 128) * per_100 if tokens > 128 else 0.0,
            (tokens - 256) * per_100 if tokens > 256 else 0.0,
            step.decodes * scale / 10,
            step.context_tokens * scale / 1e4,
            step.attention_tokens * scale / 1e6,
            step.duration_s * scale,
        )
        self._memory_of(step).rows.append(row)
        self._since_fit += 1

    def _memory_of(self, step: StepReport) -> _Memory:
        return self._prefilling if step.prefill_tokens else self._decoding

    def _refit(self) -> None:
        """Non-negative least squares by coordinate descent, from the last solution and weakly drawn to it."""
        for memory in (self._decoding, self._prefilling):
            if abs(self._bias) > _BIASED_ABOVE:
                memory.fade(_BIASED_SHARE)
            memory.absorb(self._since_fit)
        self._since_fit = 0
        xx = [
            [a + b for a, b in zip(*rows, strict=True)]
            for rows in zip(self._decoding.xx, self._prefilling.xx, strict=True)
        ]
        xy = [a + b for a, b in zip(self._decoding.xy, self._prefilling.xy, strict=True)]
        start = [value * scale for value, scale in zip(self._coefficients, _SCALES, strict=True)]
        solution = _descend(xx, xy, start)
        self._coefficients = Coefficients(*(value / scale for value, scale in zip(solution, _SCALES, strict=True)))


def _descend(xx: Sequence[Sequence[float]], xy: Sequence[float], start: Sequence[float]) -> list[float]:
    """Each coordinate in turn goes to its best value at or above zero."""
    solution = list(start)
    drawn = [target + ridge * value for target, ridge, value in zip(xy, _RIDGES, start, strict=True)]
    for _ in range(_SWEEPS):
        for i, row in enumerate(xx):
            own = row[i]
            value = drawn[i] - sum(map(mul, row, solution)) + own * solution[i]
            solution[i] = value / (own + _RIDGES[i]) if value > 0 else 0.0
    return solution
