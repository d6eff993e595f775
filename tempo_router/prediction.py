"""How long will an answer be? Learnt from the answers so far, as quantiles, given what is already generated.

An answer that was cut off (its client left) is not short: its true length is only known to be at least what was
seen. Such observations are kept as censored, and the distribution is the Kaplan-Meier estimate, which moves their
weight to the longer answers. What lies beyond the longest cut-off answer is taken from the parent distribution.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tempo_router.errors import InvalidSnapshotError
from tempo_router.request import RequestSpec

ATOMS = 20
UPPER_SHARE = 0.7
TAIL_ATOMS = 5.0
SNAPSHOT_VERSION = 2
MAX_NAME = 128
LAST_STAGE = 8
"""Later stages of a program share a histogram: few programs get there, and a chain of agent calls is alike by then."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of answer lengths: equally likely atoms, ascending, in tokens.

    Every method takes `generated`, the tokens that exist, and `limit`, the bound on the whole answer, and speaks of
    the atoms above `generated`, cut at `limit`. With no atom left the answer is longer than any seen before: what is
    left is then taken as exponential with mean max(16, 0.2 x generated). All cost O(log atoms).
    Source: docs/scheduling.md, "How long will it be".
    """

    atoms: tuple[float, ...]
    sums: tuple[float, ...] = field(init=False, repr=False, compare=False)
    row: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)
    mean: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sums = [0.0]
        for atom in self.atoms:
            sums.append(sums[-1] + atom)
        object.__setattr__(self, "sums", tuple(sums))
        object.__setattr__(self, "row", np.array(self.atoms))
        object.__setattr__(self, "mean", max(1.0, sums[-1] / len(self.atoms)))

    def mean_left(self, generated: int, limit: int) -> float:
        """Expected tokens still to come, at least 1."""
        atoms = self.atoms
        if not generated and atoms[-1] <= limit:
            return self.mean
        first = bisect_right(atoms, generated)
        left = len(atoms) - first
        if limit <= generated:
            return 1.0
        if left == 0:
            return min(_tail_mean(generated), float(limit - generated))
        return max(1.0, self._sum_from(first, limit) / left - generated)

    def upper_left(self, generated: int, limit: int) -> float:
        """Tokens still to come that are not exceeded with probability 0.7, at least 1."""
        atoms = self.atoms
        first = bisect_right(atoms, generated)
        left = len(atoms) - first
        if left == 0:
            upper = max(16.0, 0.35 * generated)
        else:
            upper = atoms[first + math.ceil(UPPER_SHARE * left) - 1] - generated
        return max(1.0, min(upper, float(limit - generated)))

    def shortest_left(self, generated: int, limit: int) -> float:
        """Tokens still to come in the shortest likely case, at least 1."""
        first = bisect_right(self.atoms, generated)
        shortest = self.atoms[first] - generated if first < len(self.atoms) else 1.0
        return max(1.0, min(shortest, float(limit - generated)))

    def longest_left(self, generated: int, limit: int) -> float:
        """Tokens still to come in the longest likely case, at least 1."""
        longest = self.atoms[-1] - generated
        if longest <= 0:
            longest = TAIL_ATOMS * _tail_mean(generated)
        return max(1.0, min(longest, float(limit - generated)))

    def probability_within(self, tokens: float, generated: int, limit: int) -> float:
        """P(tokens still to come <= tokens), interpolated between atoms; 0 for no tokens, 1 from the limit on."""
        if tokens <= 0:
            return 0.0
        if generated + tokens >= limit:
            return 1.0
        atoms = self.atoms
        first = bisect_right(atoms, generated)
        left = len(atoms) - first
        if left == 0:
            return 1.0 - math.exp(-tokens / _tail_mean(generated))
        end = generated + tokens
        index = bisect_right(atoms, end, first)
        if index == len(atoms):
            return 1.0
        below = atoms[index - 1] if index > first else float(generated)
        return (index - first + (end - below) / (atoms[index] - below)) / left

    def tokens_within(self, tokens: float, generated: int, limit: int) -> float:
        """Expected length of the whole answer, counting only answers that need at most `tokens` more tokens."""
        if tokens <= 0:
            return 0.0
        atoms = self.atoms
        first = bisect_right(atoms, generated)
        left = len(atoms) - first
        if left == 0:
            return self.probability_within(tokens, generated, limit) * (generated + self.mean_left(generated, limit))
        if generated + tokens >= limit:
            return self._sum_from(first, max(limit, generated + 1)) / left
        return (self.sums[bisect_right(atoms, generated + tokens, first)] - self.sums[first]) / left

    def mean_beyond(self, lost: float, generated: int, limit: int) -> float:
        """Expected tokens still to come after the next `lost` ones."""
        atoms = self.atoms
        if generated + lost >= limit:
            return 0.0
        first = bisect_right(atoms, generated)
        left = len(atoms) - first
        if left == 0:
            mean = self.mean_left(generated, limit)
            return mean * math.exp(-lost / mean) if lost < TAIL_ATOMS * mean else 0.0
        index = bisect_right(atoms, generated + lost, first)
        count = len(atoms) - index
        return (self._sum_from(index, limit) - count * (generated + lost)) / left

    def quantile(self, share: float) -> float:
        """The length that an answer does not exceed with this probability, interpolated between atoms; in tokens."""
        position = min(max(share * len(self.atoms) - 0.5, 0.0), len(self.atoms) - 1.0)
        index = min(int(position), len(self.atoms) - 2)
        low, high = self.atoms[index], self.atoms[index + 1]
        return low + (position - index) * (high - low)

    def _sum_from(self, first: int, limit: int) -> float:
        """Sum of the atoms from index `first` on, each cut at `limit`."""
        atoms, sums = self.atoms, self.sums
        if atoms[-1] <= limit:
            return sums[-1] - sums[first]
        cut = bisect_left(atoms, limit, first)
        return sums[cut] - sums[first] + (len(atoms) - cut) * limit


@dataclass(frozen=True, slots=True)
class LengthSample:
    """An answer ended with `tokens` in all; is_complete False: it was cut off there, its own end is unknown."""

    spec: RequestSpec
    tokens: int
    is_complete: bool


def _tail_mean(generated: int) -> float:
    return max(16.0, 0.2 * generated)


def _bin_edges() -> tuple[int, ...]:
    """Upper edges of the bins: exact up to 16 tokens, then eight to an octave up to 2^18, and powers of two exact.

    Bounds on answers are often powers of two, so many answers have just this length.
    """
    octaves = [round(16 * 2 ** (step / 8)) for step in range(1, 8 * 14 + 1)]
    return (*range(1, 17), *sorted([*octaves, *(2**power - 1 for power in range(5, 19))]))


BIN_EDGES = _bin_edges()
"""Upper edge of each bin of lengths, in tokens: the resolution of all that is learnt here."""
_Masses = dict[int, float]


def bin_of(tokens: int) -> int:
    """Index in BIN_EDGES of the bin that holds this length; longer ones than any are in the last."""
    return min(bisect_left(BIN_EDGES, max(tokens, 1)), len(BIN_EDGES) - 1)


def _lognormal(median: float, sigma: float) -> _Masses:
    def share_below(tokens: float) -> float:
        return 0.5 * (1 + math.erf(math.log(tokens / median) / (sigma * math.sqrt(2))))

    masses: _Masses = {}
    below = 0.0
    for index, edge in enumerate(BIN_EDGES):
        upto = share_below(edge + 0.5)
        masses[index] = upto - below
        below = upto
    return {index: mass / below for index, mass in masses.items()}


# Chat-like: mean about 230 tokens, 2.5 % below 15, 2.5 % above 1100. Guessed; the first answers outweigh it.
_PRIOR = _lognormal(median=130, sigma=1.1)


def _atoms_of(masses: _Masses) -> Lengths:
    atoms: list[float] = []
    ordered = sorted(masses)
    total = sum(masses[index] for index in ordered)
    position, below = 0, 0.0
    for number in range(ATOMS):
        wanted = (number + 0.5) / ATOMS * total
        while position < len(ordered) - 1 and below + masses[ordered[position]] < wanted:
            below += masses[ordered[position]]
            position += 1
        index = ordered[position]
        mass = masses[index]
        inside = min(1.0, max(0.0, (wanted - below) / mass)) if mass > 0 else 1.0
        low = BIN_EDGES[index - 1] if index else 0
        high = BIN_EDGES[index]
        # Some bins hold one length: nothing to interpolate.
        atoms.append(float(high) if high - low == 1 else low + inside * (high - low))
    return Lengths(tuple(atoms))


_Key = tuple[str, str | None, int, int]
"""(model, app or None for all, stage of a program or -1 for all, prompt bucket or -1 for all)."""


class _Histogram:
    """Decayed counts of ended and of cut-off answers per bin, and the distribution drawn from them."""

    __slots__ = ("censored", "drawn_at", "ended", "fresh", "lengths", "masses", "unit")

    def __init__(self) -> None:
        self.ended: _Masses = {}
        self.censored: _Masses = {}
        self.unit = 1.0
        self.fresh = 0
        self.drawn_at = 0
        self.lengths: Lengths | None = None
        self.masses: _Masses = _PRIOR

    def add(self, tokens: int, is_complete: bool, growth: float) -> None:
        counts = self.ended if is_complete else self.censored
        index = bin_of(tokens)
        # New observations gain weight, which is the same as old ones losing it, without touching them.
        self.unit *= growth
        counts[index] = counts.get(index, 0.0) + self.unit
        self.fresh += 1
        if self.unit > 1e9:
            self._rescale()

    def weight(self) -> float:
        """Ended answers, decayed, in units of one new answer."""
        return sum(self.ended.values()) / self.unit

    def own_masses(self, parent: _Masses) -> _Masses:
        """Kaplan-Meier estimate; mass beyond the last cut-off answer goes where the parent has it."""
        bins = sorted(self.ended.keys() | self.censored.keys())
        at_risk = sum(self.ended.values()) + sum(self.censored.values())
        surviving = 1.0
        masses: _Masses = {}
        for index in bins:
            ended = self.ended.get(index, 0.0)
            if ended > 0:
                masses[index] = surviving * min(1.0, ended / at_risk)
                surviving -= masses[index]
            at_risk = max(at_risk - ended - self.censored.get(index, 0.0), 1e-12)
        if surviving > 1e-9 and bins:
            _spread(masses, surviving, bins[-1], parent)
        return masses

    def _rescale(self) -> None:
        # Weights that have decayed to nothing go: they would only make the dict longer.
        for counts in (self.ended, self.censored):
            for index in list(counts):
                counts[index] /= self.unit
                if counts[index] < 1e-4:
                    del counts[index]
        self.unit = 1.0


def _spread(masses: _Masses, amount: float, beyond: int, parent: _Masses) -> None:
    tail = sum(parent[index] for index in sorted(parent) if index > beyond)
    if tail <= 0:
        # Nobody saw a longer one: an eighth of an octave longer than the longest seen.
        last = min(beyond + 1, len(BIN_EDGES) - 1)
        masses[last] = masses.get(last, 0.0) + amount
        return
    for index in sorted(parent):
        if index > beyond:
            masses[index] = masses.get(index, 0.0) + amount * parent[index] / tail


class LengthHistograms:
    """Learnt answer lengths per (model, app, stage, log2 bucket of the prompt), with back-off to less specific keys.

    A key's own answers count against `prior_weight` answers drawn from its parent: (model, app, stage), then
    (model, app), then (model), then a fixed prior. A request outside of programs has stage 0; the stages of one
    program can differ more than two apps do (docs/benchmarks.md, "Length estimates"). Old answers decay: after
    `window` newer ones of the same key one has lost 63 % of its weight. At most `max_keys` keys are kept; the one
    that was longest without a new answer goes first.
    """

    def __init__(self, *, max_keys: int = 1024, window: int = 512, prior_weight: float = 8.0) -> None:
        self._max_keys = max_keys
        self._growth = 1.0 / (1.0 - 1.0 / window)
        self._prior_weight = prior_weight
        self._histograms: dict[_Key, _Histogram] = {}
        self._observed = 0
        self._prior = _atoms_of(_PRIOR)

    def __len__(self) -> int:
        return len(self._histograms)

    def observe(self, spec: RequestSpec, output_tokens: int, *, is_complete: bool) -> None:
        """An answer ended with output_tokens in all. is_complete False: it was cut off there."""
        if output_tokens <= 0 and not is_complete:
            return
        self._observed += 1
        for key in _keys_of(spec):
            histogram = self._histograms.pop(key, None) or _Histogram()
            self._histograms[key] = histogram
            histogram.add(output_tokens, is_complete, self._growth)
        while len(self._histograms) > self._max_keys:
            del self._histograms[next(iter(self._histograms))]

    def lookup(self, spec: RequestSpec) -> Lengths:
        """The distribution for this request: of the most specific key with answers."""
        return self._of_first(_keys_of(spec))

    def of_stage(self, model: str, app: str, stage: int) -> Lengths:
        """Likewise, for a call that has not come yet."""
        return self._of_first(_keys(model, app, stage, -1)[1:])

    def _of_first(self, keys: tuple[_Key, ...]) -> Lengths:
        for key in keys:
            histogram = self._histograms.get(key)
            if histogram is not None:
                if self._is_stale(histogram):
                    self._draw(key, histogram)
                assert histogram.lengths is not None
                return histogram.lengths
        return self._prior

    def _is_stale(self, histogram: _Histogram) -> bool:
        if histogram.lengths is None:
            return True
        # Redrawing costs about 0.2 ms: when an eighth of the weight is new, or when the parents have moved on.
        if histogram.fresh > 8:
            return histogram.fresh - 8 > histogram.weight() / 8
        return self._observed - histogram.drawn_at > 1024

    def _draw(self, key: _Key, histogram: _Histogram) -> None:
        parent = self._parent_masses(key)
        own = histogram.own_masses(parent)
        weight = histogram.weight()
        share = weight / (weight + self._prior_weight)
        masses = {index: mass * share for index, mass in own.items()}
        for index, mass in parent.items():
            masses[index] = masses.get(index, 0.0) + mass * (1 - share)
        histogram.masses = masses
        histogram.lengths = _atoms_of(masses)
        histogram.fresh = 0
        histogram.drawn_at = self._observed

    def _parent_masses(self, key: _Key) -> _Masses:
        parent_key = _parent_of(key)
        if parent_key is None:
            return _PRIOR
        parent = self._histograms.get(parent_key)
        if parent is None:
            return self._parent_masses(parent_key)
        if self._is_stale(parent):
            self._draw(parent_key, parent)
        return parent.masses

    def snapshot(self, max_keys: int = 256) -> dict[str, Any]:
        """What was learnt, as JSON values: the max_keys keys with the newest answers, at most about 1 MB."""
        kept = list(self._histograms.items())[-max_keys:]
        return {
            "version": SNAPSHOT_VERSION,
            "observed": self._observed,
            "histograms": [
                {"key": list(key), "ended": _pairs(one.ended, one.unit), "censored": _pairs(one.censored, one.unit)}
                for key, one in kept
            ],
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Replace what was learnt by a snapshot. Raises InvalidSnapshotError and changes nothing if it is damaged."""
        if snapshot.get("version") != SNAPSHOT_VERSION:
            raise InvalidSnapshotError(
                f"snapshot of lengths has version {snapshot.get('version')!r}, this router reads {SNAPSHOT_VERSION}; "
                "delete the stored snapshot to start afresh"
            )
        try:
            histograms = {_read_key(entry["key"]): _read_histogram(entry) for entry in snapshot["histograms"]}
            observed = int(snapshot["observed"])
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise InvalidSnapshotError(f"snapshot of lengths is damaged ({e!r}); delete it to start afresh") from e
        self._histograms = dict(list(histograms.items())[-self._max_keys :])
        self._observed = observed


def _keys_of(spec: RequestSpec) -> tuple[_Key, _Key, _Key, _Key]:
    return _keys(spec.model, spec.app, spec.stage, spec.prompt_tokens.bit_length())


def _keys(model: str, app: str, stage: int, bucket: int) -> tuple[_Key, _Key, _Key, _Key]:
    model, app, stage = model[:MAX_NAME], app[:MAX_NAME], min(stage, LAST_STAGE)
    return (model, app, stage, bucket), (model, app, stage, -1), (model, app, -1, -1), (model, None, -1, -1)


def _parent_of(key: _Key) -> _Key | None:
    model, app, stage, bucket = key
    if bucket >= 0:
        return (model, app, stage, -1)
    if stage >= 0:
        return (model, app, -1, -1)
    return (model, None, -1, -1) if app is not None else None


def _pairs(counts: _Masses, unit: float) -> list[list[float]]:
    return [[index, round(counts[index] / unit, 4)] for index in sorted(counts)]


def _read_key(values: list[Any]) -> _Key:
    model, app, stage, bucket = values
    return (str(model)[:MAX_NAME], None if app is None else str(app)[:MAX_NAME], int(stage), int(bucket))


def _read_histogram(entry: Mapping[str, Any]) -> _Histogram:
    histogram = _Histogram()
    for counts, name in ((histogram.ended, "ended"), (histogram.censored, "censored")):
        for index, weight in entry[name]:
            if not 0 <= int(index) < len(BIN_EDGES) or not 0 <= float(weight) < 1e9:
                raise ValueError(f"bin {index!r} with weight {weight!r}")
            counts[int(index)] = float(weight)
    return histogram
