"""A second opinion on how long an answer will be: a forest over all that is known of a call when it arrives.

The histograms (prediction.py) split answers by model, app, stage and size of the prompt, in this order. The forest
finds by itself what tells answers apart: the tenant, the exact prompt, the bound that the client set, its targets.
It is fitted to a window of recent answers, in a process of its own (cluster/length_process.py), and used for an app
only while its recent loss is the smaller one (calibration.py).

A random forest and not boosted quantiles, by measurement (benchmarks/calibration.py; docs/benchmarks.md, "Length
estimates"): scikit-learn's quantile boosting needs one fit per quantile, 20 times the time, for the same loss.
quantile-forest was as accurate; we need scikit-learn's forest alone, because the leaves here do what that package
does not: they treat answers that were cut off as such.

**Answers cut off after g tokens** are neither dropped nor taken for short. Each leaf keeps two counts per bin of
lengths, ended and cut off; a prediction adds those of its leaf in every tree and takes the Kaplan-Meier estimate of
the sum, so a cut-off answer's weight moves to the longer answers *that are like it*. That needs cutting to be
independent of length only within a leaf, where inverse-probability weights would need a model of the cutting and
grow without bound where most long answers are cut. Only to choose the splits has a cut-off answer a single length:
its mean logarithm beyond g among the answers of its app (taking it again from the first forest changed nothing).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tempo_router.errors import InvalidSnapshotError
from tempo_router.prediction import ATOMS, BIN_EDGES, MAX_NAME, Lengths, LengthSample, bin_of
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, RequestSpec, SloClass, slo_class

SNAPSHOT_VERSION = 1
MIN_ENDED = 100
"""Ended answers below which no forest is fitted. Guessed."""
MIN_FRESH = 50
"""New answers since the last fit that make another one worth it. Guessed."""
MAX_APPS = 256
"""Apps that a window tells apart; a client may invent as many names as it likes."""

_TREES = 40
_MIN_LEAF = 10
_FEATURES_PER_SPLIT = 0.5
_NAME_WEIGHT = 5.0
"""Answers of the mean length that a name's own answers count against."""
_LIKELY_LONGER = 1.2
"""Length of an answer that was cut off after all others had ended, as a multiple of what was seen. Guessed."""
_CHUNK = 256
"""Calls foretold at once: each needs 40 kB meanwhile."""

_Array = NDArray[np.float64]


class CallFeatures(NamedTuple):
    """What a prediction may look at: plain values, small to store and to send, no text and no ids of requests.

    target_s: TTFT of a stream, TTLT of a deadline, else 0; the time left of a program says more about its past than
    about this call. tbt_s: of a stream, else 0.
    """

    model: str
    app: str
    tenant: str
    slo_class: SloClass
    target_s: float
    tbt_s: float
    prompt_tokens: int
    max_output_tokens: int
    stage: int
    group_size: int
    prefix_tokens: int


class TrainingRow(NamedTuple):
    """One answer to learn from."""

    features: CallFeatures
    tokens: int
    is_complete: bool


def features_of(spec: RequestSpec) -> CallFeatures:
    """The features of a request as it arrives."""
    target_s = tbt_s = 0.0
    match spec.slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            target_s = ttft_s
        case Deadline(ttlt_s=ttlt_s):
            target_s = ttlt_s
        case ProgramCall() | BestEffort():
            pass
    return CallFeatures(
        model=spec.model[:MAX_NAME],
        app=spec.app[:MAX_NAME],
        tenant=spec.tenant[:MAX_NAME],
        slo_class=slo_class(spec.slo),
        target_s=target_s,
        tbt_s=tbt_s,
        prompt_tokens=spec.prompt_tokens,
        max_output_tokens=spec.max_output_tokens,
        stage=spec.stage,
        group_size=spec.group_size,
        prefix_tokens=spec.prefix_tokens,
    )


class TrainingWindow:
    """The answers to learn from: at most `size`, newest first to stay, and a rare app is not driven out by a busy one.

    Beyond `size` the oldest answer of the app with the most goes. This window is what is stored: a forest made anew
    from it costs a fraction of a second, is plain numbers and names that can be checked, and survives a change of
    scikit-learn. A stored forest would be a pickle, and reading one runs what is in it.
    """

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._rows: dict[str, deque[TrainingRow]] = {}
        self._count = 0
        self._ended = 0

    @property
    def ended(self) -> int:
        """Answers that ended by themselves."""
        return self._ended

    def __len__(self) -> int:
        return self._count

    def add(self, sample: LengthSample) -> None:
        """Learn from an answer. One that was cut off before its first token says nothing and is left out."""
        if sample.tokens > 0 or sample.is_complete:
            self._add(TrainingRow(features_of(sample.spec), max(1, sample.tokens), sample.is_complete))

    def rows(self) -> list[TrainingRow]:
        """All answers, app by app, oldest first."""
        return [row for rows in self._rows.values() for row in rows]

    def snapshot(self) -> dict[str, Any]:
        """The window as plain values; about 100 bytes an answer as JSON."""
        return {"version": SNAPSHOT_VERSION, "rows": [[*features, *rest] for features, *rest in self.rows()]}

    def restore(self, snapshot: Any) -> None:
        """Replace the window by a snapshot. Raises InvalidSnapshotError and changes nothing if it is damaged."""
        version = snapshot.get("version") if isinstance(snapshot, dict) else None
        if version != SNAPSHOT_VERSION:
            raise InvalidSnapshotError(
                f"snapshot of answers has version {version!r}, this router reads {SNAPSHOT_VERSION}; "
                "delete the stored snapshot to start afresh"
            )
        try:
            rows = [_read_row(values) for values in snapshot["rows"]]
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise InvalidSnapshotError(f"snapshot of answers is damaged ({e!r}); delete it to start afresh") from e
        self._rows, self._count, self._ended = {}, 0, 0
        for row in rows:
            self._add(row)

    def _add(self, row: TrainingRow) -> None:
        app = row.features.app
        if app not in self._rows and len(self._rows) >= MAX_APPS:
            app = ""
        self._rows.setdefault(app, deque()).append(row)
        self._count += 1
        self._ended += row.is_complete
        if self._count > self._size:
            largest = max(self._rows, key=lambda name: len(self._rows[name]))
            self._ended -= self._rows[largest].popleft().is_complete
            self._count -= 1
            if not self._rows[largest]:
                del self._rows[largest]


class LengthRegressor:
    """A fitted forest. It never changes: `fit` makes a new one."""

    def __init__(self, encoder: "_Encoder", forest: Any, leaves: "_Leaves") -> None:
        self._encoder = encoder
        self._forest = forest
        self._leaves = leaves

    @classmethod
    def fit(cls, rows: Sequence[TrainingRow], *, seed: int = 0) -> "LengthRegressor":
        """Fit a forest; equal rows in equal order and seed give an equal one. 0.2 s for 4096 rows.

        Raises ValueError with fewer than MIN_ENDED answers that ended by themselves.
        """
        bins = np.array([bin_of(row.tokens) for row in rows], dtype=np.intp)
        ended = np.array([row.is_complete for row in rows], dtype=np.bool_)
        if ended.sum() < MIN_ENDED:
            raise ValueError(f"{ended.sum()} answers ended by themselves; a forest needs {MIN_ENDED}")
        calls = [row.features for row in rows]
        logs: _Array = np.log(np.array([row.tokens for row in rows], dtype=np.float64))
        cut = np.flatnonzero(~ended)
        logs[cut] = _logs_beyond(_masses_by_app(calls, bins, ended)[cut], bins[cut])
        # Takes seconds and 100 MB: only where a forest is fitted.
        from sklearn.ensemble import RandomForestRegressor

        encoder = _Encoder(calls, logs)
        table = encoder.encode(calls)
        forest = RandomForestRegressor(
            _TREES, min_samples_leaf=_MIN_LEAF, max_features=_FEATURES_PER_SPLIT, random_state=seed, n_jobs=1
        )
        forest.fit(table, logs)
        return cls(encoder, forest, _Leaves(forest, table, bins, ended))

    def predict_many(self, specs: Iterable[RequestSpec]) -> list[Lengths]:
        """The distribution of each request's length, in order."""
        return [Lengths(tuple(atoms)) for atoms in self.atoms([features_of(spec) for spec in specs])]

    def atoms(self, calls: Sequence[CallFeatures]) -> list[list[float]]:
        """ATOMS equally likely lengths of each call, ascending, finite, at least 1; 1 ms and 50 us a call."""
        return [
            [float(atom) for atom in row]
            for start in range(0, len(calls), _CHUNK)
            for row in _atoms_of(self.masses(calls[start : start + _CHUNK]))
        ]

    def masses(self, calls: Sequence[CallFeatures]) -> _Array:
        """(calls, bins): the probability of each of BIN_EDGES."""
        return self._leaves.masses(_reached(self._forest, self._encoder.encode(calls)))


class _Encoder:
    """Calls as rows of numbers. A name becomes the mean log length of its answers, drawn to the mean of all.

    Ordered in this way a tree finds the best two groups of names by one threshold (Breiman et al., Classification and
    Regression Trees, 1984), and a name never seen is one of middling length.
    """

    def __init__(self, calls: Sequence[CallFeatures], logs: _Array) -> None:
        self._mean = float(logs.mean())
        self._names: tuple[dict[str, float], ...] = tuple(
            self._means([names[position] for names in map(_names_of, calls)], logs) for position in range(_NAMES)
        )

    def encode(self, calls: Sequence[CallFeatures]) -> _Array:
        """One row a call."""
        names = zip(*map(_names_of, calls), strict=True)
        columns = [
            np.array([means.get(name, self._mean) for name in column])
            for means, column in zip(self._names, names, strict=True)
        ]
        # Logarithms: a threshold between two of them is a ratio, which is how lengths and times compare.
        numbers = np.array([call[4:] for call in calls], dtype=np.float64)
        columns.extend(np.log1p(np.maximum(numbers, 0.0)).T)
        return np.column_stack(columns)

    def _means(self, names: Sequence[str], logs: _Array) -> dict[str, float]:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        of_row = np.array([numbers[name] for name in names], dtype=np.intp)
        sums = np.bincount(of_row, weights=logs) + _NAME_WEIGHT * self._mean
        means = sums / (np.bincount(of_row) + _NAME_WEIGHT)
        return dict(zip(numbers, means.tolist(), strict=True))


_NAMES = 4


def _names_of(call: CallFeatures) -> tuple[str, str, str, str]:
    # Of an app, the tenants of one model and another's are different names.
    return call.model, call.app, f"{call.app}\0{call.tenant}", call.slo_class


class _Leaves:
    """Per leaf of the forest how many answers ended and were cut off in each bin of lengths."""

    def __init__(self, forest: Any, table: _Array, bins: NDArray[np.intp], ended: NDArray[np.bool_]) -> None:
        sizes = [tree.tree_.node_count for tree in forest.estimators_]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        nodes = _reached(forest, table) + self._offsets
        leaves, rows = np.unique(nodes, return_inverse=True)
        rows = rows.reshape(nodes.shape)
        self._row_of_node = np.full(sum(sizes), -1, dtype=np.intp)
        self._row_of_node[leaves] = np.arange(len(leaves))
        self._counts = np.zeros((2, len(leaves), len(BIN_EDGES)), dtype=np.float32)
        for tree in range(nodes.shape[1]):
            np.add.at(self._counts, (1 - ended.astype(np.intp), rows[:, tree], bins), 1.0)
        # A tree's opinion counts the same whatever the size of its leaf (Meinshausen, Quantile Regression Forests,
        # JMLR 2006).
        self._counts /= self._counts.sum(axis=(0, 2))[None, :, None]
        self._all = _kaplan_meier(_counts(bins[ended])[None], _counts(bins[~ended])[None])[0][0]

    def masses(self, reached: NDArray[np.intp]) -> _Array:
        """reached: (calls, trees), the leaf of each tree as scikit-learn numbers them. Returns (calls, bins)."""
        rows = self._row_of_node[reached + self._offsets]
        ended, cut = self._counts[:, rows].sum(axis=2, dtype=np.float64)
        masses, left = _kaplan_meier(ended, cut)
        for index in np.flatnonzero(left > 1e-9):
            longest = int(np.flatnonzero(ended[index] + cut[index])[-1])
            _spread_beyond(masses[index], float(left[index]), longest, self._all)
        return masses


def _reached(forest: Any, table: _Array) -> NDArray[np.intp]:
    """(rows, trees): the leaf of every tree. What `forest.apply` gives, without 5 ms of threads and checks."""
    numbers = np.ascontiguousarray(table, dtype=np.float32)
    return np.column_stack([tree.tree_.apply(numbers) for tree in forest.estimators_])


def _counts(bins: NDArray[np.intp]) -> _Array:
    return np.bincount(bins, minlength=len(BIN_EDGES)).astype(np.float64)


def _kaplan_meier(ended: _Array, cut: _Array) -> tuple[_Array, _Array]:
    """(rows, bins) of counts: the share of lengths in each bin, and what is left beyond the last cut-off answer."""
    both = ended + cut
    at_risk = np.cumsum(both[:, ::-1], axis=1)[:, ::-1]
    hazard = np.divide(ended, at_risk, out=np.zeros_like(ended), where=at_risk > 1e-12)
    surviving = np.cumprod(1.0 - np.minimum(hazard, 1.0), axis=1)
    before = np.concatenate([np.ones((len(ended), 1)), surviving[:, :-1]], axis=1)
    return before - surviving, surviving[:, -1]


def _spread_beyond(masses: _Array, amount: float, longest: int, everywhere: _Array) -> None:
    """Put what is left where all answers beyond it ended; an eighth of an octave further where none did."""
    tail = everywhere.copy()
    tail[: longest + 1] = 0.0
    if tail.sum() > 0:
        masses += amount * tail / tail.sum()
    else:
        masses[min(longest + 1, len(masses) - 1)] += amount


def _masses_by_app(calls: Sequence[CallFeatures], bins: NDArray[np.intp], ended: NDArray[np.bool_]) -> _Array:
    """(calls, bins): of each call's app."""
    apps = np.array([call.app for call in calls], dtype=object)
    masses = np.empty((len(calls), len(BIN_EDGES)))
    for app in dict.fromkeys(apps):
        of_app = apps == app
        masses[of_app] = _kaplan_meier(_counts(bins[of_app & ended])[None], _counts(bins[of_app & ~ended])[None])[0]
    return masses


def _logs_beyond(masses: _Array, bins: NDArray[np.intp]) -> _Array:
    """The mean log length of answers beyond bins[i], of those distributed as masses[i]."""
    centres = np.log(np.array(BIN_EDGES, dtype=np.float64))
    beyond = np.where(np.arange(len(centres)) > bins[:, None], masses, 0.0)
    totals = beyond.sum(axis=1)
    known = totals > 1e-9
    return np.where(known, beyond @ centres / np.where(known, totals, 1.0), centres[bins] + np.log(_LIKELY_LONGER))


def _atoms_of(masses: _Array) -> _Array:
    """(calls, bins) to (calls, ATOMS) quantiles, interpolated inside a bin as the histograms do."""
    edges = np.array(BIN_EDGES, dtype=np.float64)
    lows = np.concatenate([[0.0], edges[:-1]])
    upto = np.cumsum(masses, axis=1)
    wanted = (np.arange(ATOMS) + 0.5) / ATOMS * upto[:, -1:]
    index = np.minimum((upto[:, None, :] < wanted[:, :, None]).sum(axis=2), len(edges) - 1)
    mass = np.take_along_axis(masses, index, axis=1)
    below = np.take_along_axis(upto, index, axis=1) - mass
    inside = np.clip((wanted - below) / np.maximum(mass, 1e-12), 0.0, 1.0)
    widths = (edges - lows)[index]
    atoms = np.where(widths == 1, edges[index], lows[index] + inside * widths)
    return np.maximum.accumulate(np.maximum(atoms, 1.0), axis=1)


def _read_row(values: Any) -> TrainingRow:
    *features, tokens, is_complete = values
    model, app, tenant, name, *numbers = features
    kind = _CLASSES[name]
    target_s, tbt_s = float(numbers[0]), float(numbers[1])
    counts = [int(number) for number in numbers[2:]]
    if len(counts) != len(CallFeatures._fields) - 6:
        raise ValueError(f"{len(values)} values in a row")
    if not (0 <= target_s < 1e9 and 0 <= tbt_s < 1e9 and 1 <= tokens < 1e9 and all(0 <= one < 1e12 for one in counts)):
        raise ValueError(f"values out of range in {values!r}")
    call = CallFeatures(_name(model), _name(app), _name(tenant), kind, target_s, tbt_s, *counts)
    return TrainingRow(call, int(tokens), bool(is_complete))


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value[:MAX_NAME]


_CLASSES: dict[str, SloClass] = {
    "latency": "latency",
    "deadline": "deadline",
    "program": "program",
    "best_effort": "best_effort",
}
