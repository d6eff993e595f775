"""What is told of a program's chance is what the plan reckons with."""

import random

import pytest

from tempo_router.events import ProgramOutlined
from tempo_router.known_stages import KnownStage
from tempo_router.pattern_history import PatternHistory
from tempo_router.program_history import ProgramHistory
from tempo_router.request import ProgramCall, ProgramId
from tempo_router.router import RouterCore
from tempo_router.tempo_plan import _Units
from tests.builders import arrived, planned_replica, router
from tests.unit.test_program_history import program, runs

PROGRAM = ProgramId("p")


def core_of(history: ProgramHistory, left_s: float) -> RouterCore:
    """One call of one program waits or runs."""
    core = router(policy="tempo", program_model="patterns")
    history.lengths, core._history = core._lengths, history
    core.handle(planned_replica("gpu0"))
    core.handle(arrived("c", slo=ProgramCall(PROGRAM, left_s), app="research", prompt_tokens=400))
    return core


def planned_chance(core: RouterCore) -> float:
    plan = core._plan
    assert plan is not None
    running = list(core._fleet.running.values())
    rows = plan._table.update(running, [])
    return float(_Units(running, plan._table, rows, core._context(), core._history, core._config).chance[0])


def told_chance(core: RouterCore) -> float:
    outlook = core.outlook(PROGRAM, core.ledger.programs[PROGRAM].deadline_s - core._now_s)
    assert outlook is not None
    return outlook.probability


def taught(history: ProgramHistory) -> ProgramHistory:
    """Half of the programs end early, half go on for long: the mean is like none of them."""
    rng = random.Random(3)
    for number in range(60):
        stages = [[(400, 50)], [(160, rng.randint(3000, 4000))]] if number % 2 else [[(400, 50)], [(160, 20)]]
        runs(history, program(f"p{number}"), stages)
    return history


@pytest.mark.parametrize("left_s", [2.0, 8.0, 15.0, 25.0, 400.0])
@pytest.mark.parametrize("history", ["unknown", "means", "patterns"])
def test_what_is_told_of_a_programs_chance_is_what_the_plan_reckons_with(history: str, left_s: float):
    core = core_of(
        {"unknown": ProgramHistory, "means": lambda: taught(ProgramHistory()), "patterns": lambda: taught(
            PatternHistory()
        )}[history](), left_s,
    )  # fmt: skip
    assert told_chance(core) == pytest.approx(planned_chance(core), abs=1e-6)


def test_of_programs_of_two_kinds_the_chance_is_that_of_the_brief_kind():
    """Between both lengths, means would tell a chance of next to none."""
    chances = [told_chance(core_of(taught(PatternHistory()), left_s)) for left_s in (8.0, 12.0)]
    assert chances == pytest.approx([0.5, 0.5], abs=0.1)


def test_of_a_known_graph_it_is_the_same_too():
    core = router(policy="tempo")
    core.handle(planned_replica("gpu0"))
    core.handle(ProgramOutlined(0.0, PROGRAM, (KnownStage(0), KnownStage(1, 3, 500, 700, gap_s=4.0))))
    core.handle(arrived("c", slo=ProgramCall(PROGRAM, 11.0)))
    assert told_chance(core) == pytest.approx(planned_chance(core), abs=1e-6)
    assert 0.01 < told_chance(core) < 0.999
