"""What plans know of each job, kept from one plan to the next: only what is new or has moved is gathered again."""

from collections.abc import Sequence
from itertools import repeat
from operator import is_not

import numpy as np
import numpy.typing as npt

from tempo_router.columns import DENSITY, GENERATED_BEFORE, IS_RELEGATED, MISSING, Columns
from tempo_router.facts import GENERATED, LIMIT
from tempo_router.prediction import UPPER_SHARE, Lengths
from tempo_router.replicas import Call
from tempo_router.request import ProgramCall, ProgramId, RequestId, RequestSpec
from tempo_router.waiting import WaitingRequest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PlannedJob = WaitingRequest | Call
UnitName = tuple[ProgramId, bool] | RequestId
"""A program, or a request alone. Programs are told from requests that have the same name."""

PRODUCED = GENERATED_BEFORE
ABOVE, TAIL, MEAN, UPPER, UNIT = range(GENERATED_BEFORE + 1, GENERATED_BEFORE + 6)
"""Rows of the numbers after those of `Columns`.

PRODUCED: answer tokens, those of earlier attempts included. ABOVE: atoms of its length that are longer. TAIL: mean of
the exponential tail beyond the last atom. MEAN, UPPER: tokens that are left, expected and on the careful side.
UNIT: slot of its unit.
"""

_FIRST_CAPACITY = 64


def unit_name(spec: RequestSpec) -> UnitName:
    """What all calls of one unit share."""
    slo = spec.slo
    return (slo.program_id, True) if isinstance(slo, ProgramCall) else spec.request_id


class PlanTable:
    """A row of numbers for each job of the last plan, and a slot for each of its units.

    A waiting request is looked at once, and again when its estimated length is another; a running call at every plan.
    """

    def __init__(self) -> None:
        # By identity: a request and the call that it becomes are two jobs. The table holds on to them meanwhile.
        self._row_of: dict[int, int] = {}
        self._jobs = np.empty(_FIRST_CAPACITY, dtype=np.object_)
        self._free: list[int] = list(range(_FIRST_CAPACITY))
        self._numbers = np.zeros((UNIT + 1, _FIRST_CAPACITY))
        self._atoms = np.zeros((_FIRST_CAPACITY, 0))
        self._lengths = np.empty(_FIRST_CAPACITY, dtype=np.object_)
        self._slots: dict[UnitName, int] = {}
        self._calls_of = [0] * _FIRST_CAPACITY
        self._free_slots: list[int] = list(range(_FIRST_CAPACITY))
        self._program_ids = np.empty(_FIRST_CAPACITY, dtype=np.object_)

    def __len__(self) -> int:
        return len(self._row_of)

    def update(self, running: Sequence[Call], waiting: Sequence[WaitingRequest]) -> Ints:
        """The jobs of the next plan: their rows, in this order. Who is not among them is forgotten."""
        jobs: list[PlannedJob] = [*running, *waiting]
        ids = list(map(id, jobs))
        known = list(map(self._row_of.get, ids))
        fresh = [job for job, row in zip(jobs, known, strict=True) if row is None] if None in known else []
        if len(self._row_of) + len(fresh) > len(jobs):
            self._forget_others(ids)
        stale = {self._add(job) for job in fresh}
        rows = np.fromiter(map(self._row_of.__getitem__, ids), np.int64, len(jobs))
        stale.update(self._relearnt(rows[len(running) :], waiting))
        stale.update(self._progressed(rows[: len(running)], running))
        if stale:
            self._measure(np.array(sorted(stale), dtype=np.int64))
        return rows

    def retarget(self, job: PlannedJob) -> None:
        """The job has another target."""
        row = self._row_of.get(id(job))
        if row is not None:
            facts = job.facts
            self._numbers[: len(facts), row] = facts

    def numbers(self, rows: Ints) -> Floats:
        """(numbers, jobs)."""
        numbers: Floats = self._numbers.take(rows, axis=1)
        return numbers

    def atoms(self, rows: Ints) -> Floats:
        """Equally likely lengths of each job's whole answer, cut at its limit: (jobs, atoms)."""
        atoms: Floats = self._atoms.take(rows, axis=0)
        return atoms

    def columns(self, rows: Ints, standings: Floats) -> Columns:
        """Jobs for a policy. standings: of each its density, whether it is admitted, later_s, whether it goes last."""
        numbers = self.numbers(rows)[: GENERATED_BEFORE + 1]
        numbers[DENSITY : IS_RELEGATED + 1] = standings
        return Columns(numbers, numbers[PRODUCED], self.atoms(rows).T)

    def slot_of(self, spec: RequestSpec) -> int | None:
        """The slot of a request's unit, if a job of it is here."""
        return self._slots.get(unit_name(spec))

    def program_ids(self, slots: Ints) -> list[ProgramId | None]:
        """Which program each slot is; None for requests alone."""
        ids: list[ProgramId | None] = self._program_ids.take(slots).tolist()
        return ids

    @property
    def capacity(self) -> int:
        """Rows and slots are below this."""
        return len(self._calls_of)

    def audit(self) -> None:
        """Check that rows and slots are given out once. Raises AssertionError."""
        used = sorted(self._row_of.values())
        assert sorted([*used, *self._free]) == list(range(self.capacity)), "a row is used twice, or lost"
        slots = sorted(self._slots.values())
        assert sorted([*slots, *self._free_slots]) == list(range(self.capacity)), "a slot is used twice, or lost"
        counts = np.bincount(self._numbers[UNIT, used].astype(np.int64), minlength=self.capacity)
        assert counts.tolist() == self._calls_of, "the calls of units are miscounted"
        for job in self._jobs.take(used).tolist():
            slot = self._numbers[UNIT, self._row_of[id(job)]]
            assert self._slots.get(unit_name(job.spec)) == slot, f"{job.spec.request_id!r} is in no unit"

    # ---- rows ----

    def _add(self, job: PlannedJob) -> int:
        if not self._free:
            self._grow()
        row = self._row_of[id(job)] = self._free.pop()
        self._jobs[row] = job
        name = unit_name(job.spec)
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = self._free_slots.pop()
            self._program_ids[slot] = name[0] if isinstance(name, tuple) else None
        self._calls_of[slot] += 1
        self._numbers[:, row] = (
            *job.facts, job.spec.arrival_s, *job.standing, job.missing_tokens, len(job.lengths.atoms),
            job.generated_tokens, 0, 0, 0, 0, slot,
        )  # fmt: skip
        self._learn(row, job.lengths)
        return row

    def _learn(self, row: int, lengths: Lengths) -> None:
        self._lengths[row] = lengths
        if self._atoms.shape[1] != lengths.row.size:
            # Before the first one. All distributions have the same number of atoms.
            self._atoms = np.zeros((self.capacity, lengths.row.size))
        self._atoms[row] = np.minimum(lengths.row, self._numbers[LIMIT, row])

    def _forget_others(self, ids: Sequence[int]) -> None:
        for gone in self._row_of.keys() - set(ids):
            row = self._row_of.pop(gone)
            job: PlannedJob = self._jobs[row]
            self._free.append(row)
            self._jobs[row] = self._lengths[row] = None
            slot = int(self._numbers[UNIT, row])
            self._calls_of[slot] -= 1
            if not self._calls_of[slot]:
                del self._slots[unit_name(job.spec)]
                self._free_slots.append(slot)
                self._program_ids[slot] = None

    def _relearnt(self, rows: Ints, waiting: Sequence[WaitingRequest]) -> list[int]:
        """Rows of waiting requests whose length is now estimated otherwise."""
        lengths = [request.lengths for request in waiting]
        differ = list(map(is_not, lengths, self._lengths.take(rows).tolist()))
        changed: list[int] = []
        if True in differ:
            for row, known, is_other in zip(rows.tolist(), lengths, differ, strict=True):
                if is_other:
                    self._learn(row, known)
                    changed.append(row)
        return changed

    def _progressed(self, rows: Ints, running: Sequence[Call]) -> list[int]:
        """Rows of calls that have produced tokens since the last plan."""
        produced = np.array([call.new_tokens for call in running], dtype=np.float64) + self._numbers[GENERATED].take(
            rows
        )
        moved = produced != self._numbers[PRODUCED].take(rows)
        changed = rows[moved]
        self._numbers[PRODUCED, changed] = produced[moved]
        # A call misses its context until its first token.
        self._numbers[MISSING, changed] = 0.0
        found: list[int] = changed.tolist()
        return found

    def _measure(self, rows: Ints) -> None:
        """What is left of each answer, given the tokens that exist."""
        atoms, generated = self._atoms.take(rows, axis=0), self._numbers[PRODUCED].take(rows)
        count = atoms.shape[1]
        is_above = atoms > generated[:, None]
        above = is_above.sum(axis=1)
        some = above > 0
        sums = np.where(is_above, atoms, 0.0).sum(axis=1)
        tail = np.maximum(16.0, 0.2 * generated)
        mean = np.maximum(np.where(some, sums / np.maximum(above, 1) - generated, tail), 1.0)
        pick = np.minimum(count - above + np.ceil(UPPER_SHARE * above).astype(np.int64) - 1, count - 1)
        upper = np.take_along_axis(atoms, np.maximum(pick, 0)[:, None], axis=1)[:, 0] - generated
        upper = np.maximum(np.where(some, upper, np.maximum(16.0, 0.35 * generated)), 1.0)
        self._numbers[ABOVE : UPPER + 1, rows] = np.stack((above, tail, mean, upper))

    def _grow(self) -> None:
        before = self.capacity
        self._free.extend(range(before, 2 * before))
        self._free_slots.extend(range(before, 2 * before))
        self._calls_of.extend(repeat(0, before))
        self._numbers = np.concatenate((self._numbers, np.zeros_like(self._numbers)), axis=1)
        self._atoms = np.concatenate((self._atoms, np.zeros_like(self._atoms)))
        none = np.empty(before, dtype=np.object_)
        self._jobs = np.concatenate((self._jobs, none))
        self._lengths = np.concatenate((self._lengths, none))
        self._program_ids = np.concatenate((self._program_ids, none))
