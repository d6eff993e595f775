"""Are the estimates of answer lengths right, and whose are the better ones? Kept per app, over recent answers.

The histograms and the forest (prediction.py, length_regressor.py) are judged side by side, on the same answers, by
what each said before the answer existed: the share of answers that stayed within the quantiles 0.5, 0.9 and 0.95,
which should be just that, and the pinball loss, the mean over all atoms' quantiles q of (q - [length < atom]) x
(length - atom) in tokens, which is least for the true distribution. The forest is used where it has the less loss.

An answer that was cut off has no length to compare with. Leaving these out would judge by the short ones alone, since
a long answer is more often cut off. So each answer that ended counts for all that would have been cut off before its
length: its weight is one by the share that is *not* cut off before it, the Kaplan-Meier estimate for the cutting
itself (inverse-probability-of-censoring weights), at most MAX_WEIGHT.
"""

from dataclasses import dataclass
from typing import Literal

from tempo_router.prediction import BIN_EDGES, MAX_NAME, Lengths, bin_of

LengthModel = Literal["histogram", "regressor"]

QUANTILES = (0.5, 0.9, 0.95)
MAX_WEIGHT = 10.0
"""Beyond it few answers would decide. Guessed."""
MIN_SCORED = 50
"""Answers that the forest must have foretold for an app before it can be used there. Guessed."""
MARGIN = 0.02
"""Share of the loss by which the other model must be better to take over, so that equals do not alternate."""
_REDRAWN_AFTER = 64


@dataclass(frozen=True, slots=True)
class ModelCalibration:
    """How one model did for one app, over recent answers.

    coverage: share of answers within each of QUANTILES. pinball: mean loss in tokens. error: mean absolute
    difference between length and median, in tokens.
    """

    coverage: tuple[float, ...]
    pinball: float
    error: float


@dataclass(frozen=True, slots=True)
class AppCalibration:
    """Both models for one app. scored: answers so far, of which cut_off were cut off; None: not foretold yet."""

    app: str
    scored: int
    cut_off: int
    used: LengthModel
    histogram: ModelCalibration | None
    regressor: ModelCalibration | None


def pinball_loss(lengths: Lengths, tokens: int) -> float:
    """Mean over the atoms, as quantiles, of the pinball loss of this answer; in tokens."""
    atoms = lengths.atoms
    loss = 0.0
    for number, atom in enumerate(atoms):
        share = (number + 0.5) / len(atoms)
        loss += share * (tokens - atom) if tokens >= atom else (1 - share) * (atom - tokens)
    return loss / len(atoms)


class RunningCalibration:
    """Scores of one model: means in which an answer counts less the more came after it."""

    __slots__ = ("_keep", "_sums", "_weight")

    def __init__(self, window: float = 500.0) -> None:
        self._keep = 1.0 - 1.0 / window
        self._weight = 0.0
        self._sums = [0.0] * (len(QUANTILES) + 2)

    def add(self, lengths: Lengths, tokens: int, weight: float = 1.0) -> None:
        """Judge what was said of an answer that ended with so many tokens."""
        scores = [float(tokens <= lengths.quantile(share)) for share in QUANTILES]
        scores += [pinball_loss(lengths, tokens), abs(tokens - lengths.quantile(0.5))]
        self._weight = self._weight * self._keep + weight
        for index, score in enumerate(scores):
            self._sums[index] = self._sums[index] * self._keep + weight * score

    def report(self) -> ModelCalibration | None:
        """The means; None before the first answer."""
        if not self._weight:
            return None
        *coverage, pinball, error = (total / self._weight for total in self._sums)
        return ModelCalibration(tuple(coverage), pinball, error)


class CutShare:
    """Share of answers that are not cut off before a length: Kaplan-Meier for the cutting, decayed."""

    __slots__ = ("_cut", "_ended", "_fresh", "_growth", "_reached", "_unit")

    def __init__(self, window: float = 500.0) -> None:
        self._growth = 1.0 / (1.0 - 1.0 / window)
        self._unit = 1.0
        self._ended = [0.0] * len(BIN_EDGES)
        self._cut = [0.0] * len(BIN_EDGES)
        self._fresh = 0
        self._reached: list[float] | None = None

    def add(self, tokens: int, is_complete: bool) -> None:
        """An answer ended, or was cut off, with so many tokens."""
        self._unit *= self._growth
        (self._ended if is_complete else self._cut)[bin_of(tokens)] += self._unit
        self._fresh += 1
        if self._unit > 1e9:
            self._ended = [count / self._unit for count in self._ended]
            self._cut = [count / self._unit for count in self._cut]
            self._unit = 1.0

    def weight(self, tokens: int) -> float:
        """For how many answers one counts that ended with so many tokens; 1 to MAX_WEIGHT."""
        if self._reached is None or self._fresh >= _REDRAWN_AFTER:
            self._reached = self._draw()
            self._fresh = 0
        return 1.0 / max(self._reached[bin_of(tokens)], 1.0 / MAX_WEIGHT)

    def _draw(self) -> list[float]:
        reached: list[float] = []
        share = 1.0
        at_risk = sum(self._ended) + sum(self._cut)
        for ended, cut in zip(self._ended, self._cut, strict=True):
            reached.append(share)
            # Of one bin those that ended come before those that were cut off.
            can_be_cut = at_risk - ended
            if cut > 0 and can_be_cut > 1e-9:
                share *= max(0.0, 1.0 - cut / can_be_cut)
            at_risk -= ended + cut
        return reached


class _App:
    __slots__ = ("cut", "cut_off", "foretold", "histogram", "regressor", "scored", "used")

    def __init__(self) -> None:
        self.histogram = RunningCalibration()
        self.regressor = RunningCalibration()
        self.cut = CutShare()
        self.scored = 0
        self.cut_off = 0
        self.foretold = 0
        self.used: LengthModel = "histogram"


class Calibration:
    """Both models by app. At most max_apps are kept; the one that was longest without an answer goes first."""

    def __init__(self, *, max_apps: int = 256) -> None:
        self._max_apps = max_apps
        self._apps: dict[str, _App] = {}

    def score(self, app: str, tokens: int, *, is_complete: bool, histogram: Lengths, regressor: Lengths | None) -> None:
        """Judge what both said of an answer when it arrived. regressor None: it said nothing, or not in time.

        The losses are compared over answers of which both had spoken. About 15 us.
        """
        name = app[:MAX_NAME]
        one = self._apps.pop(name, None) or _App()
        self._apps[name] = one
        if len(self._apps) > self._max_apps:
            del self._apps[next(iter(self._apps))]
        one.scored += 1
        one.cut.add(tokens, is_complete)
        if not is_complete:
            one.cut_off += 1
            return
        weight = one.cut.weight(tokens)
        if regressor is None:
            if not one.foretold:
                one.histogram.add(histogram, tokens, weight)
            return
        if not one.foretold:
            one.histogram = RunningCalibration()
        one.foretold += 1
        one.histogram.add(histogram, tokens, weight)
        one.regressor.add(regressor, tokens, weight)
        if one.foretold >= MIN_SCORED:
            one.used = _better(one)

    def used(self, app: str) -> LengthModel:
        """The model whose estimates count for this app now."""
        one = self._apps.get(app[:MAX_NAME])
        return "histogram" if one is None else one.used

    def report(self) -> list[AppCalibration]:
        """All apps, by name."""
        return [
            AppCalibration(app, one.scored, one.cut_off, one.used, one.histogram.report(), one.regressor.report())
            for app, one in sorted(self._apps.items())
        ]


def _better(one: _App) -> LengthModel:
    histogram, regressor = one.histogram.report(), one.regressor.report()
    if histogram is None or regressor is None:
        return one.used
    if one.used == "histogram":
        return "regressor" if regressor.pinball < (1 - MARGIN) * histogram.pinball else "histogram"
    return "histogram" if histogram.pinball < (1 - MARGIN) * regressor.pinball else "regressor"
