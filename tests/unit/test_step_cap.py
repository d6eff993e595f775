"""The step cap: as usual where arrivals do not tell, shorter or longer where they do, and no spiral of waits."""

import random
from dataclasses import replace

import pytest

from tempo_router.config import SchedulingConfig
from tempo_router.policies.base import Context
from tempo_router.program_history import ProgramHistory
from tempo_router.step_cap import ArrivedUnit, StepCap
from tempo_router.step_time import Pace
from tempo_router.tempo_plan import TempoPlan
from tests.builders import PACE
from tests.plan_world import World

FIXED = Pace(
    prefill_token_s=5e-5, share_s=1e-4, decode_s=5e-5, context_token_s=0.0, tau_s=0.03, alone_s=0.01, attention_s=0.0,
    fixed_s=0.01, knee_tokens=64, step_token_s=5e-5, is_unsure=False,
)  # fmt: skip
STREAM = ArrivedUnit(
    at_s=0.0, work_s=0.05, prefill_s=0.02, serial_tokens=200.0, spread_tokens=20.0, gaps_s=0.0, left_s=float("inf"),
    tbt_s=0.1, value=200.0,
)  # fmt: skip
AGENT = replace(STREAM, work_s=0.3, serial_tokens=2000.0, left_s=90.0, tbt_s=float("inf"), value=2000.0)


def chosen(*units: ArrivedUnit, usual_share: float = 0.3) -> float:
    """The cap after an overload of a minute of these units in turn."""
    cap = StepCap(usual_share)
    for number in range(300):
        cap.note(replace(units[number % len(units)], at_s=0.2 * number))
    found = cap.choose(FIXED, 1, 60.0)
    assert found is not None
    return found


def test_before_enough_has_arrived_nothing_is_chosen():
    cap = StepCap(0.3)
    cap.note(STREAM)
    assert cap.choose(FIXED, 1, 60.0) is None


@pytest.mark.parametrize("usual_share", [0.29, 0.38])
def test_where_no_cap_is_worth_more_the_usual_one_is_taken(usual_share):
    few = [replace(STREAM, work_s=1e-5)]
    assert chosen(*few, usual_share=usual_share) == pytest.approx(usual_share * 0.1)


def test_chains_that_are_due_soon_shorten_it_and_streams_alone_make_it_longer():
    assert chosen(replace(AGENT, left_s=50.0), STREAM) < 0.03 < chosen(replace(STREAM, work_s=0.3))


def test_it_stays_while_it_is_worth_as_much_as_the_best():
    cap = StepCap(0.3)
    for number in range(400):
        cap.note(replace(STREAM, work_s=0.3, at_s=0.2 * number))
    long_s = cap.choose(FIXED, 1, 80.0)
    assert long_s is not None
    assert long_s > 0.04
    for number in range(400):
        cap.note(replace(STREAM, work_s=1e-5, at_s=80.0 + 0.2 * number))
    assert cap.choose(FIXED, 1, 160.0) == long_s, "no other one is worth more"


def test_how_long_calls_wait_makes_no_step_shorter():
    """Shorter steps serve less, so that calls wait longer: that would go on and on."""
    seen = []
    for wait_s in (0.0, 40.0):
        world, history = World(random.Random(7)), ProgramHistory()
        history.call_started(wait_s, 0.0)
        plan, caps = TempoPlan(SchedulingConfig(policy="tempo")), []
        for _ in range(120):
            for one in world.turn(12):
                plan.arrived(one, is_new=True)
            plan.make(
                world.waiting, world.running, Context(world.now_s, PACE, 230.0, world.ledger), history, replicas=1
            )
            history.call_started(wait_s, world.now_s)
            caps.append(plan.step_cap_s)
        seen.append(caps)
    assert seen[0] == seen[1]
    assert any(cap is not None for cap in seen[0])
