"""A linear program, made row by row, with a bound on its maximum that holds however precise the solver was."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import highspy
import numpy as np
from highspy._core import _Highs
from numpy.typing import NDArray

Floats = NDArray[np.float64]


_LARGE = 1000
"""Rows from which on a program may take long."""


def _run_interruptibly(solver: _Highs) -> None:
    """Run in a thread, so that Ctrl-C is told to the caller at once; the solver then ends at its next look.

    While the solver runs in the main thread no signal is handled.
    """
    is_unwanted, has_ended = threading.Event(), threading.Event()

    def look(_kind: object, _text: str, _found: object, answer: Any, _data: object) -> None:
        answer.user_interrupt = is_unwanted.is_set()

    def run() -> None:
        try:
            solver.run()
        finally:
            has_ended.set()

    solver.setCallback(look, None)
    solver.startCallback(highspy.cb.HighsCallbackType.kCallbackIpmInterrupt)
    try:
        threading.Thread(target=run).start()
        # Not join(): a thread whose join() was interrupted counts as ended. Timed: the signal may go to the other one.
        while not has_ended.wait(0.1):
            pass
    except BaseException:
        is_unwanted.set()
        raise


@dataclass(slots=True)
class LinearProgram:
    """Maximise costs @ x subject to low <= A x <= high and 0 <= x <= top, top finite."""

    costs: list[float] = field(default_factory=list)
    tops: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    indices: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many constraints there are."""
        return len(self.lows)

    @property
    def columns(self) -> int:
        """How many unknowns there are."""
        return len(self.costs)

    @property
    def nonzeros(self) -> int:
        """How many coefficients there are."""
        return len(self.values)

    def column(self, cost: float, top: float) -> int:
        """One more unknown, between 0 and `top`. Returns its number."""
        self.costs.append(cost)
        self.tops.append(top)
        return len(self.costs) - 1

    def row(self, columns: Iterable[int], coefficients: Iterable[float], low: float, high: float) -> None:
        """One more constraint: low <= the sum of these columns times their coefficients <= high."""
        self.indices.extend(columns)
        self.values.extend(coefficients)
        self.starts.append(len(self.indices))
        self.lows.append(low)
        self.highs.append(high)

    def solve(self, time_limit_s: float) -> tuple[float, Floats, float, bool]:
        """An upper bound on the maximum, a nearly feasible point near it, the solver's seconds, and whether it ended.

        Where the time was over first the bound holds, but is loose.
        """
        if not self.costs:
            return 0.0, np.zeros(0), 0.0, True
        # The class that highspy.Highs builds on: that one prints a banner on the standard output when it is made.
        solver = _Highs()
        for name, option in {
            "output_flag": False,
            "threads": 1,
            "solver": "ipm" if self.rows > _LARGE else "simplex",
            "run_crossover": "off",
            "ipm_optimality_tolerance": 1e-4,
            "time_limit": time_limit_s,
        }.items():
            solver.setOptionValue(name, option)
        solver.passModel(self._model())
        if self.rows > _LARGE:
            _run_interruptibly(solver)
        else:
            solver.run()
        solution = solver.getSolution()
        duals = np.asarray(solution.row_dual if solution.dual_valid else [0.0] * self.rows)
        point = np.asarray(solution.col_value if solution.value_valid else [0.0] * self.columns)
        has_ended = solver.getModelStatus() != highspy.HighsModelStatus.kTimeLimit
        return self._lagrangian(duals), point, float(solver.getRunTime()), has_ended

    def _model(self) -> highspy.HighsLp:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.columns, self.rows
        lp.sense_ = highspy.ObjSense.kMinimize
        lp.col_cost_ = -np.asarray(self.costs)
        lp.col_lower_ = np.zeros(self.columns)
        lp.col_upper_ = np.asarray(self.tops)
        lp.row_lower_, lp.row_upper_ = np.asarray(self.lows), np.asarray(self.highs)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.num_col_, lp.a_matrix_.num_row_ = self.columns, self.rows
        lp.a_matrix_.start_ = np.asarray(self.starts)
        lp.a_matrix_.index_ = np.asarray(self.indices)
        lp.a_matrix_.value_ = np.asarray(self.values)
        return lp

    def _lagrangian(self, duals: Floats) -> float:
        """Upper bound from any prices of the rows: weak duality, with every column at its better end."""
        lows, highs = np.asarray(self.lows), np.asarray(self.highs)
        sides = np.where(duals > 0, lows, highs)
        prices = np.where(np.isfinite(sides), duals, 0.0)
        fixed = float(np.sum(np.where(np.isfinite(sides), sides, 0.0) * prices))
        reduced = -np.asarray(self.costs) - self._transposed(prices)
        return -(fixed + float(np.sum(np.minimum(0.0, reduced * np.asarray(self.tops)))))

    def _transposed(self, prices: Floats) -> Floats:
        row_of = np.repeat(np.arange(self.rows), np.diff(self.starts))
        weights = np.asarray(self.values) * prices[row_of]
        sums: Floats = np.bincount(np.asarray(self.indices, dtype=np.int64), weights, self.columns).astype(np.float64)
        return sums

    def violation(self, point: Floats) -> float:
        """The most that a row misses its limits by."""
        row_of = np.repeat(np.arange(self.rows), np.diff(self.starts))
        products = np.asarray(self.values) * point[np.asarray(self.indices, dtype=np.int64)]
        sums = np.bincount(row_of, products, minlength=self.rows)
        return float(np.max(np.maximum(np.asarray(self.lows) - sums, sums - np.asarray(self.highs)), initial=0.0))
