"""Calls in numbers, so that an order over a thousand of them is computed in arrays instead of one by one.

A policy that `reads_columns` gets `Columns`: made from any jobs by `columns_of`, or kept up to date by a `LiveTable`,
which an engine's planner feeds with what changes, so that nothing is gathered when the order is looked at.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tempo_router.facts import BEST_EFFORT, DEADLINE_S, FIRST_DUE_S, KIND, LIMIT, TBT_S
from tempo_router.prediction import ATOMS, UPPER_SHARE, Lengths

if TYPE_CHECKING:
    from tempo_router.live_call import LiveCall
    from tempo_router.policies.base import Job

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ARRIVAL_S, DENSITY, IS_ADMITTED, LATER_S, IS_RELEGATED, MISSING, ATOM_COUNT, GENERATED_BEFORE = range(8, 16)
TICKET, KEY, PHASE, IS_PLACED = range(16, 20)
"""Rows of the numbers after those of `Facts`.

ATOM_COUNT: atoms of its distribution of lengths.
GENERATED_BEFORE: answer tokens; of a decoding call less the number of the step from which on it decodes.
KEY, IS_PLACED: the key by which the call stands in its engine's order of prompts, NaN before it has one, and whether it
stands there.
"""

PREFILLING, DECODING, HELD = 0.0, 1.0, 2.0
"""Phases of a live call."""

_FIRST_CAPACITY = 64


class Columns:
    """Jobs side by side. numbers: (rows as named above, jobs). generated: (jobs,). atoms: (atoms, jobs).

    atoms: lengths ascending, filled up with infinity where a distribution has fewer than others.
    """

    __slots__ = ("atoms", "generated", "numbers")

    def __init__(self, numbers: Floats, generated: Floats, atoms: Floats) -> None:
        self.numbers = numbers
        self.generated = generated
        self.atoms = atoms

    @property
    def kind(self) -> Floats:
        """What kind of target it has (facts.py)."""
        return self._row(KIND)

    @property
    def density(self) -> Floats:
        """Value per GPU second."""
        return self._row(DENSITY)

    @property
    def arrival_s(self) -> Floats:
        """When it came to the ingress."""
        return self._row(ARRIVAL_S)

    @property
    def is_admitted(self) -> Bools:
        """The plan has room for it."""
        is_admitted: Bools = self.numbers[IS_ADMITTED] != 0.0
        return is_admitted

    @property
    def is_last(self) -> Bools:
        """Best effort, and what can no longer meet its SLO."""
        is_last: Bools = (self.numbers[IS_RELEGATED] != 0.0) | (self.numbers[KIND] == BEST_EFFORT)
        return is_last

    @property
    def tbt_s(self) -> Floats:
        """Time between a stream's tokens."""
        return self._row(TBT_S)

    @property
    def due_s(self) -> Floats:
        """When a stream's next token is due; infinity for others."""
        due_s: Floats = self.numbers[FIRST_DUE_S] + self.generated * self.numbers[TBT_S]
        return due_s

    @property
    def deadline_s(self) -> Floats:
        """When the last token is due; infinity without a deadline."""
        return self._row(DEADLINE_S)

    @property
    def missing(self) -> Floats:
        """Context still to be computed, in tokens."""
        return self._row(MISSING)

    @property
    def later_s(self) -> Floats:
        """Expected time of its program's later stages."""
        return self._row(LATER_S)

    def _row(self, number: int) -> Floats:
        row: Floats = self.numbers[number]
        return row

    def taken(self, rows: Ints) -> "Columns":
        """Some of the jobs."""
        return Columns(self.numbers.take(rows, axis=1), self.generated.take(rows), self.atoms.take(rows, axis=1))

    def upper_left(self) -> Floats:
        """`Lengths.upper_left` of each job: tokens to come that are not exceeded with probability 0.7."""
        generated = self.generated
        first = (self.atoms <= generated).sum(axis=0)
        left = self.numbers[ATOM_COUNT] - first
        pick = np.where(left > 0, first + np.ceil(UPPER_SHARE * left) - 1, 0).astype(np.int64)
        known = self.atoms[pick, np.arange(pick.size)] - generated
        upper = np.where(left > 0, known, np.maximum(16.0, 0.35 * generated))
        bounded: Floats = np.maximum(np.minimum(upper, self.numbers[LIMIT] - generated), 1.0)
        return bounded


def columns_of(jobs: Sequence["Job"]) -> Columns:
    """Any jobs as columns, gathered one by one."""
    rows = [
        (
            *job.facts, job.spec.arrival_s, *job.standing[:3], job.is_relegated,
            job.missing_tokens, len(job.lengths.atoms), job.generated_tokens,
        )
        for job in jobs
    ]  # fmt: skip
    numbers = np.array(rows, dtype=np.float64).reshape(len(jobs), GENERATED_BEFORE + 1).T
    atoms = np.full((max((len(job.lengths.atoms) for job in jobs), default=ATOMS), len(jobs)), np.inf)
    for number, job in enumerate(jobs):
        atoms[: len(job.lengths.atoms), number] = job.lengths.row
    return Columns(numbers, numbers[GENERATED_BEFORE], atoms)


class LiveTable:
    """The live calls of one engine as columns. Rows are kept dense: the last one moves where one was removed.

    Every change costs O(1): `add`, `remove`, `retune`, `note_phase`, `note_missing`. A call knows its `row`.
    """

    def __init__(self) -> None:
        self.size = 0
        self._calls = np.empty(_FIRST_CAPACITY, dtype=np.object_)
        self._numbers = np.zeros((IS_PLACED + 1, _FIRST_CAPACITY))
        self._atoms = np.full((ATOMS, _FIRST_CAPACITY), np.inf)

    def add(self, call: "LiveCall") -> None:
        """A call that nothing is computed of."""
        row = self.size
        if row == self._calls.size:
            self._grow(2 * row, len(self._atoms))
        self.size += 1
        call.row = row
        self._calls[row] = call
        spec, standing = call.spec, call.standing
        self._numbers[:, row] = (
            *call.facts, spec.arrival_s, *standing, call.missing_tokens, len(call.lengths.atoms),
            call.generated_tokens, call.ticket, np.nan, PREFILLING, 0.0,
        )  # fmt: skip
        self._set_atoms(row, call.lengths)

    def remove(self, call: "LiveCall") -> None:
        """The call left."""
        row, last = call.row, self.size - 1
        if row != last:
            moved: LiveCall = self._calls[last]
            moved.row = row
            self._calls[row] = moved
            self._numbers[:, row] = self._numbers[:, last]
            self._atoms[:, row] = self._atoms[:, last]
        self._calls[last] = None
        self.size = last

    def retune(self, call: "LiveCall") -> None:
        """Its standing changed."""
        self._numbers[DENSITY : IS_RELEGATED + 1, call.row] = call.standing

    def retarget(self, call: "LiveCall") -> None:
        """Its target changed."""
        self._numbers[: len(call.facts), call.row] = call.facts

    def note_phase(self, call: "LiveCall", phase: float) -> None:
        """It entered a phase; its count of tokens is that of this moment."""
        numbers, row = self._numbers, call.row
        numbers[PHASE, row] = phase
        if phase == PREFILLING:
            numbers[KEY, row] = np.nan
        numbers[MISSING, row] = call.missing_tokens
        base = call.spec.generated_tokens + call.produced
        numbers[GENERATED_BEFORE, row] = base - call.joined if phase == DECODING else base

    def note_missing(self, call: "LiveCall") -> None:
        """Some of its context was computed."""
        self._numbers[MISSING, call.row] = call.missing_tokens

    def rows(self) -> Ints:
        """All rows."""
        return np.arange(self.size)

    def columns(self, rows: Ints, steps: int) -> Columns:
        """Some rows, in the order given. steps: number of the current step."""
        if rows.size == self.size:
            # All of them: as often as not in the order in which they lie, and then nothing need be copied but the rest.
            numbers, atoms = self._numbers[:, : self.size], self._atoms[:, : self.size]
            if not np.array_equal(rows, self.rows()):
                numbers, atoms = numbers.take(rows, axis=1), atoms.take(rows, axis=1)
        else:
            numbers, atoms = self._numbers.take(rows, axis=1), self._atoms.take(rows, axis=1)
        generated = numbers[GENERATED_BEFORE] + steps * (numbers[PHASE] == DECODING)
        return Columns(numbers, generated, atoms)

    def calls(self, rows: Ints) -> list["LiveCall"]:
        """The calls in these rows, in this order."""
        calls: list[LiveCall] = self._calls.take(rows).tolist()
        return calls

    def in_phase(self, phase: float, rows: Ints | None = None) -> Ints:
        """Those of the rows, or of all, that are in a phase; the order stays."""
        if rows is None:
            return np.nonzero(self._numbers[PHASE, : self.size] == phase)[0]
        kept: Ints = rows[self._numbers[PHASE].take(rows) == phase]
        return kept

    def ranked(self, rows: Ints, keys: Floats | None = None, most: int | None = None) -> Ints:
        """The rows by key, then ticket. keys: of these rows; None: those that are stored.

        most: only so many of the first, and those that equal the last of them.
        """
        known = self._numbers[KEY].take(rows) if keys is None else keys
        if most is not None and rows.size > most:
            is_first = known <= np.partition(known, most - 1)[most - 1]
            rows, known = rows[is_first], known[is_first]
        ranked: Ints = rows[np.lexsort((self._numbers[TICKET].take(rows), known))]
        return ranked

    def store_keys(self, rows: Ints, keys: Floats) -> None:
        """What `ranked` will go by."""
        self._numbers[KEY, rows] = keys

    def store_key(self, call: "LiveCall", key: float) -> None:
        """The same for one call."""
        self._numbers[KEY, call.row] = key

    def keys(self, rows: Ints) -> list[float]:
        """The keys that are stored."""
        keys: list[float] = self._numbers[KEY].take(rows).tolist()
        return keys

    def place(self, rows: Ints) -> None:
        """These rows, and no others, stand in the order of prompts."""
        placed = self._numbers[IS_PLACED]
        placed[: self.size] = 0.0
        placed[rows] = 1.0

    def unplaced(self, rows: Ints) -> Ints:
        """Those of the rows that do not stand in the order of prompts."""
        missing: Ints = rows[self._numbers[IS_PLACED].take(rows) == 0.0]
        return missing

    def without_key(self, rows: Ints) -> Ints:
        """Those of the rows that came, or came back to the prompts, since keys were stored."""
        missing: Ints = rows[np.isnan(self._numbers[KEY].take(rows))]
        return missing

    def audit(self, calls: Sequence["LiveCall"], steps: int) -> None:
        """Check every row against its call. Raises AssertionError."""
        assert len(calls) == self.size, f"{self.size} rows for {len(calls)} live calls"
        generated = self.columns(self.rows(), steps).generated.tolist()
        for call in calls:
            row = call.row
            assert self._calls[row] is call, f"row {row} is not that of call {call.call_id}"
            kept = (*self._numbers[: MISSING + 1, row].tolist(), generated[row])
            known = (*call.facts, call.spec.arrival_s, *call.standing, call.missing_tokens)
            assert kept == (*known, call.generated_tokens), f"call {call.call_id} is {known}, its row says {kept}"

    def _set_atoms(self, row: int, lengths: Lengths) -> None:
        count = len(lengths.atoms)
        if count > len(self._atoms):
            self._grow(self._calls.size, count)
        self._atoms[:count, row] = lengths.row
        self._atoms[count:, row] = np.inf

    def _grow(self, capacity: int, width: int) -> None:
        size, old_width = self.size, len(self._atoms)
        calls = np.empty(capacity, dtype=np.object_)
        numbers = np.zeros((IS_PLACED + 1, capacity))
        atoms = np.full((width, capacity), np.inf)
        calls[:size] = self._calls[:size]
        numbers[:, :size] = self._numbers[:, :size]
        atoms[:old_width, :size] = self._atoms[:, :size]
        self._calls, self._numbers, self._atoms = calls, numbers, atoms
