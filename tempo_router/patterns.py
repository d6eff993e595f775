"""Outlines of finished programs, and what they tell of one that is still unfolding.

An outline is a row of stages, each with its calls, lengths and the time before it; no text. A running program is laid
beside all outlines of its application that came as far: those that looked alike so far count most, and how they went on
is what is expected. What "alike" means is learnt, too: a feature counts by how much it has told about the rest (its
correlation with the tokens still to come), so where a stage's answer decides whether another round follows, that answer
decides here, and where nothing tells anything, all count alike and the class's mean is what comes out.

Programs that were given up are outlines without an end: they tell what stages look like and that a further one came,
but never that none did. Counting only complete ones would make programs look short, as overload gives up long ones.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log1p
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tempo_router.program_history import ATOMS, Forecast

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_STAGES = 64
_LOOK_BACK = 4
"""A program is compared by its last so many stages."""

_PRECISION_CAP = 60.0
_RIDGE = 0.02
_LEAST = 8
"""So many outlines must have come as far as a program before they say anything."""

_ATOM_SHARES = (np.arange(ATOMS) + 0.5) / ATOMS

_LEAST_KNOWN = 2.0
"""Weight of outlines that know whether a stage was the last; with less, the rest is unknown."""

_STEADY = 1.0
_MOST_NEAR = 256
_STALE_SHARE = 4
"""What is alike is measured anew when as much has changed as a quarter of the outlines."""

CALLS, PROMPT, SQUARED, OUTPUT, CHAIN, CHAIN_PROMPT, GAP = range(7)


class StageOutline(NamedTuple):
    """One stage: its calls; their prompts, squared prompts and answers, each summed; the longest answer and prompt.

    All in tokens. gap_s: seconds between the end of the stage before and its own first call.
    """

    calls: int
    prompt_tokens: int
    squared_prompts: float
    output_tokens: int
    chain_tokens: int
    chain_prompt_tokens: int
    gap_s: float


@dataclass(frozen=True, slots=True)
class Outline:
    """A program that ended. is_complete: its last stage was its last; otherwise it was given up there.

    span_s: its deadline, from its arrival; 0 without one. at_s: when it ended, in seconds since the epoch where it is
    stored, and on the router's clock in a router.
    """

    app: str
    span_s: float
    stages: tuple[StageOutline, ...]
    is_complete: bool = True
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Match:
    """How outlines continue a program: the expected rest, and the rests of the likeliest complete outlines.

    outlines: how many came as far. alike: how many of them count, weighed. rests: (weight, stages, calls, output
    tokens, longest answers summed), by outline. stages: each of the later stages that are likelier than not.
    """

    forecast: Forecast
    outlines: int
    alike: float
    rests: Floats
    stages: tuple[Forecast, ...]

    def quantile(self, column: int, share: float) -> float:
        """The value of a column of `rests` that is not exceeded with this probability; 0 if there are none."""
        if not self.rests.size:
            return 0.0
        order = np.argsort(self.rests[:, column], kind="stable")
        reached = np.cumsum(self.rests[order, 0])
        place = min(int(np.searchsorted(reached, share * reached[-1])), order.size - 1)
        return float(self.rests[order[place], column])


REST_STAGES, REST_CALLS, REST_TOKENS, REST_CHAIN = 1, 2, 3, 4


class PatternTable:
    """The outlines of one application: those that ended, the newest `most`, and those that still unfold.

    Programs in progress count, too, for the stages that they have left behind: while a service is young, only short
    programs have ended, and going by those alone every program would look short. Changes cost O(stages of a program).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._ended: deque[int] = deque()
        self._open: dict[str, int] = {}
        self._free: list[int] = []
        self._fresh = 0
        self._stages = np.zeros((0, MAX_STAGES, 7))
        self._rests = np.zeros((0, MAX_STAGES, 5))
        self._counts = np.zeros(0, dtype=np.int64)
        self._spans = np.zeros(0)
        self._complete = np.zeros(0, dtype=np.bool_)
        self._known: dict[tuple[int, bool], _Measured] = {}

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, outline: Outline) -> None:
        """One more program ended."""
        if len(self._ended) >= self._most:
            self.drop_oldest()
        row = self._take_row()
        self._ended.append(row)
        self._write(row, outline)

    def progressed(self, name: str, outline: Outline) -> None:
        """A program in progress has left another stage behind: `outline` is all of them, without an end."""
        row = self._open.get(name)
        if row is None:
            row = self._open[name] = self._take_row()
            if len(self._open) > self._most:
                self.over(next(iter(self._open)))
        self._write(row, outline)

    def over(self, name: str) -> None:
        """A program that was in progress is over."""
        row = self._open.pop(name, None)
        if row is not None:
            self._release(row)

    def drop_oldest(self) -> None:
        """Forget the program that ended first."""
        self._release(self._ended.popleft())
        self._fresh += 1

    def _take_row(self) -> int:
        if not self._free:
            before = self._counts.size
            more = max(64, before)
            self._free = list(range(before + more - 1, before - 1, -1))
            self._stages = np.concatenate((self._stages, np.zeros((more, MAX_STAGES, 7))))
            self._rests = np.concatenate((self._rests, np.zeros((more, MAX_STAGES, 5))))
            self._counts = np.concatenate((self._counts, np.zeros(more, dtype=np.int64)))
            self._spans = np.concatenate((self._spans, np.zeros(more)))
            self._complete = np.concatenate((self._complete, np.zeros(more, dtype=np.bool_)))
        return self._free.pop()

    def _release(self, row: int) -> None:
        self._counts[row] = 0
        self._complete[row] = False
        self._free.append(row)

    def _write(self, row: int, outline: Outline) -> None:
        count = min(len(outline.stages), MAX_STAGES)
        self._stages[row, :count] = outline.stages[:count]
        self._stages[row, count:] = 0.0
        self._counts[row] = count
        self._spans[row] = outline.span_s
        self._complete[row] = outline.is_complete and count == len(outline.stages)
        sums = np.zeros((count, 5))
        sums[:, 1] = 1.0
        sums[:, 2:] = self._stages[row, :count][:, (CALLS, OUTPUT, CHAIN)]
        self._rests[row, :count] = sums[::-1].cumsum(axis=0)[::-1] - sums
        self._fresh += 1

    def match(self, seen: Sequence[StageOutline], span_s: float, *, is_between: bool = False) -> Match | None:
        """How a program goes on after the last stage of `seen`; None if too few came so far.

        is_between: that stage has ended, so its answers tell something, too.
        """
        stage = len(seen) - 1
        if not 0 <= stage < MAX_STAGES:
            return None
        measured = self._measured(stage, is_between=is_between)
        if measured.rows.size < _LEAST:
            return None
        rows, weights = measured.nearest(_features_of(seen[-_LOOK_BACK:], span_s, is_between=is_between))
        whole = self._complete[rows]
        rests = self._rests[rows[whole], stage]
        rests[:, 0] = weights[whole]
        forecast, stages = self._forecast(rows, weights, stage, lambda mean: _atoms(rests, mean))
        alike = float(weights.sum() ** 2 / (weights @ weights))
        return Match(forecast, measured.rows.size, alike, rests, stages)

    # ---- alike ----

    def _measured(self, stage: int, *, is_between: bool) -> "_Measured":
        known = self._known.get((stage, is_between))
        if known is None or (self._fresh - known.fresh) * _STALE_SHARE > known.rows.size:
            known = self._known[stage, is_between] = self._measure(stage, is_between=is_between)
        return known

    def _measure(self, stage: int, *, is_between: bool) -> "_Measured":
        """The outlines that came so far, in units of how much each feature tells about the rest."""
        rows = np.nonzero(self._counts > stage)[0]
        first = max(0, stage + 1 - _LOOK_BACK)
        table = _features(self._stages[rows, first : stage + 1], self._spans[rows], is_between=is_between)
        if not rows.size:
            return _Measured(
                rows, table.T, np.zeros(0), np.zeros(table.shape[1]), np.arange(table.shape[1]), self._fresh
            )
        scale = np.maximum(table.std(axis=0), 1e-6)
        whole = self._complete[rows]
        precision = np.zeros(scale.size)
        rest = np.log1p(self._rests[rows[whole], stage, REST_CHAIN])
        if rest.size >= _LEAST and rest.std() > 1e-6:
            known = table[whole]
            centred = (known - known.mean(axis=0)) / scale
            told = np.minimum((centred.T @ ((rest - rest.mean()) / rest.std()) / rest.size) ** 2, 1.0)
            # By chance alone a feature tells 1/n.
            told = np.maximum(told - 2.0 / rest.size, 0.0)
            precision = np.minimum(told / (1.0 - told + _RIDGE), _PRECISION_CAP)
        unit = np.sqrt(precision) / scale
        telling = np.nonzero(unit)[0]
        points = np.ascontiguousarray((table[:, telling] * unit[telling]).T)
        squares = np.einsum("ij,ij->j", points, points)
        return _Measured(rows, points, squares, unit[telling], telling, self._fresh)

    # ---- the rest ----

    def _forecast(
        self, rows: Ints, weights: Floats, stage: int, atoms: Callable[[float], tuple[float, ...]]
    ) -> tuple[Forecast, tuple[Forecast, ...]]:
        """atoms: of the longest answers of later stages, summed, by their mean."""
        counts = self._counts[rows]
        by_count = np.bincount(counts, weights, minlength=MAX_STAGES + 1)
        going_on = (by_count[::-1].cumsum()[::-1] - by_count).tolist()
        ending = np.bincount(counts, weights * self._complete[rows], minlength=MAX_STAGES + 1).tolist()
        unknown = 0.0
        reached = 1.0
        reach: list[float] = []
        for number in range(stage + 1, MAX_STAGES):
            goes_on, ends = going_on[number], ending[number]
            if goes_on + ends <= _LEAST_KNOWN:
                unknown += reached
                break
            reached *= goes_on / (goes_on + ends)
            if reached < 1e-3:
                break
            reach.append(reached)
        # Past its end an outline holds zeros, so all count in the sums, and only those that go on in the means.
        later = self._stages[rows, stage + 1 : stage + 1 + len(reach)]
        sums = (weights[:, None, None] * later).sum(axis=0)
        means = sums / np.array(going_on[stage + 1 : stage + 1 + len(reach)])[:, None]
        total = (np.array(reach)[:, None] * means).sum(axis=0).tolist()
        forecast = Forecast(
            calls=total[CALLS],
            prompt_tokens=total[PROMPT],
            squared_prompts=total[SQUARED],
            output_tokens=total[OUTPUT],
            chain_tokens=total[CHAIN],
            chain_prompt_tokens=total[CHAIN_PROMPT],
            gaps_s=total[GAP],
            stages=sum(reach),
            unknown=unknown,
            chain_atoms=atoms(total[CHAIN]),
        )
        likely = sum(share > 0.5 for share in reach)
        return forecast, tuple(
            Forecast(chain_tokens=chain, chain_prompt_tokens=prompt, gaps_s=gap_s, stages=1.0)
            for chain, prompt, gap_s in means[:likely, (CHAIN, CHAIN_PROMPT, GAP)].tolist()
        )


def _atoms(rests: Floats, mean: float) -> tuple[float, ...]:
    """Equally likely longest answers of later stages, summed; with the mean that was foretold.

    The complete outlines know them, but too few of the long ones are complete: so the shape is theirs, not the mean.
    """
    total = rests[:, 0].sum()
    if not rests.size or total <= 0.0:
        return ()
    chains = rests[:, REST_CHAIN]
    order = chains.argsort(kind="stable")
    reached = rests[order, 0].cumsum() / total
    places = np.minimum(reached.searchsorted(_ATOM_SHARES), order.size - 1)
    values = chains[order[places]]
    own = values.sum() / values.size
    return tuple((values * (mean / own)).tolist()) if own > 0.0 else (mean,) * _ATOM_SHARES.size


@dataclass(frozen=True, slots=True)
class _Measured:
    """Outlines as points: `rows` of the table, (features, rows), of those features that tell something.

    squares: of each point's length. unit: scale of each feature. telling: which of all they are. fresh: changes of the
    table before this was measured.
    """

    rows: Ints
    points: Floats
    squares: Floats
    unit: Floats
    telling: Ints
    fresh: int

    def nearest(self, features: Floats) -> tuple[Ints, Floats]:
        """Rows of the outlines that are most alike, and what each counts."""
        here = features[self.telling] * self.unit
        rows, points = self.rows, self.points
        if rows.size > _MOST_NEAR:
            # |p - q|² without what is the same for all, |q|²: no table of differences is written.
            order = self.squares - np.einsum("ij,i->j", points, 2.0 * here)
            near = order.argpartition(_MOST_NEAR)[:_MOST_NEAR]
            rows, points = rows[near], points[:, near]
        away = points - here[:, None]
        distance = np.einsum("ij,ij->j", away, away)
        weights: Floats = np.exp(-0.5 * (distance - distance.min()))
        # A few outlines that happen to be near do not outweigh what all the others say.
        weights += _STEADY / weights.size
        return rows, weights


def _features_of(last: Sequence[StageOutline], span_s: float, *, is_between: bool) -> Floats:
    """Those of one program; as `_features`, without the price of small arrays."""
    ended = last if is_between else last[:-1]
    values = [log1p(span_s), log1p(sum(one.output_tokens for one in ended))]
    for number, one in enumerate(last):
        values += [log1p(one.calls), log1p(one.chain_prompt_tokens)]
        if number < len(ended):
            values += [log1p(one.chain_tokens), log1p(one.output_tokens)]
    return np.array(values)


def _features(last: Floats, spans: Floats, *, is_between: bool) -> Floats:
    """What programs are compared by: their last stages, all they have put out, the deadline. (programs, features).

    The answers of the very last stage are not among them while it is still running.
    """
    ended = last.shape[1] - (not is_between)
    parts = [np.log1p(spans)[:, None], np.log1p(last[:, :ended, OUTPUT].sum(axis=1))[:, None]]
    for number in range(last.shape[1]):
        columns = (CALLS, CHAIN_PROMPT, CHAIN, OUTPUT) if number < ended else (CALLS, CHAIN_PROMPT)
        parts.append(np.log1p(last[:, number][:, columns]))
    return np.concatenate(parts, axis=1)


class PatternBook:
    """Outlines by application. most: of all together; when there are more, the oldest go.

    age_s: older ones go, too, when they are looked for. Costs O(1) while none does.
    """

    def __init__(self, most: int = 5000, age_s: float = math.inf) -> None:
        self._most = most
        self._age_s = age_s
        self._tables: dict[str, PatternTable] = {}
        self._order: deque[tuple[str, float]] = deque()

    def __len__(self) -> int:
        return len(self._order)

    def add(self, outline: Outline) -> None:
        """One more program ended."""
        self._table(outline.app).add(outline)
        self._order.append((outline.app, outline.at_s))
        if len(self._order) > self._most:
            self._forget_oldest()

    def forget_aged(self, now_s: float) -> None:
        """Forget programs that ended longer ago than `age_s`. now_s: by the clock of the outlines' at_s."""
        while self._order and self._order[0][1] < now_s - self._age_s:
            self._forget_oldest()

    def progressed(self, name: str, outline: Outline) -> None:
        """As `PatternTable.progressed`."""
        self._table(outline.app).progressed(name, outline)

    def over(self, name: str, app: str) -> None:
        """As `PatternTable.over`."""
        table = self._tables.get(app)
        if table is not None:
            table.over(name)

    def add_all(self, outlines: Iterable[Outline]) -> None:
        """Oldest first."""
        for outline in outlines:
            self.add(outline)

    def match(self, app: str, seen: Sequence[StageOutline], span_s: float, *, is_between: bool = False) -> Match | None:
        """As `PatternTable.match`."""
        table = self._tables.get(app)
        return table.match(seen, span_s, is_between=is_between) if table is not None and seen else None

    def _table(self, app: str) -> PatternTable:
        table = self._tables.get(app)
        if table is None:
            # One more than there are ever: what is forgotten is decided here alone.
            table = self._tables[app] = PatternTable(self._most + 1)
        return table

    def _forget_oldest(self) -> None:
        app, _ = self._order.popleft()
        table = self._tables[app]
        table.drop_oldest()
        if not len(table):
            del self._tables[app]
