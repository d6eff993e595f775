"""What the solver of linear programs does besides solving them; its figures are tested with the bound."""

import itertools
import os
import signal
import threading
from typing import Any

import highspy
import pytest
from highspy._core import _Highs

from tempo_router.simulation import linear_program
from tempo_router.simulation.linear_program import LinearProgram


def large_program() -> LinearProgram:
    """A chain of unknowns of which neighbours share 1: more rows than those of a program that ends at once."""
    program = LinearProgram()
    columns = [program.column(1.0 + number % 7, 1.0) for number in range(1200)]
    for pair in itertools.pairwise(columns):
        program.row(pair, [1.0, 1.0], 0.0, 1.0)
    return program


def test_ctrl_c_is_told_at_once_and_ends_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be told when the solver was done: after twenty seconds, for half an hour of traffic."""
    solvers: list[_Highs] = []

    class Interrupted(_Highs):  # type: ignore[misc]
        """Ctrl-C is pressed at its first look, which ends when the main thread has heard of it."""

        def setCallback(self, look: Any, data: Any) -> Any:  # noqa: N802  # the solver's own name
            def look_and_interrupt(kind: Any, text: str, found: Any, answer: Any, data: Any) -> None:
                if not solvers:
                    solvers.append(self)
                    os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000):
                    look(kind, text, found, answer, data)
                    if answer.user_interrupt or threading.Event().wait(0.01):
                        break

            return super().setCallback(look_and_interrupt, data)

    monkeypatch.setattr(linear_program, "_Highs", Interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        large_program().solve(60.0)

    for thread in set(threading.enumerate()) - before:
        thread.join(20.0)
        assert not thread.is_alive()
    (solver,) = solvers
    assert solver.getModelStatus() == highspy.HighsModelStatus.kInterrupt


def test_a_large_program_is_solved_as_a_small_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, _, _, has_ended = large_program().solve(60.0)
    monkeypatch.setattr(linear_program, "_LARGE", 10**6)
    exact, _, _, _ = large_program().solve(60.0)

    assert has_ended
    assert exact == pytest.approx(2569)
    assert bound == pytest.approx(exact, rel=1e-3)
