"""What a plan keeps of its jobs from one plan to the next is what a new plan would find."""

import random

import pytest

from tempo_router.config import SchedulingConfig
from tempo_router.plan_table import PlanTable
from tempo_router.policies.base import Context
from tempo_router.program_history import ProgramHistory
from tempo_router.request import ProgramCall, ProgramId
from tempo_router.tempo_plan import TempoPlan
from tempo_router.waiting import WaitingRequest
from tests.builders import PACE, request
from tests.plan_world import World, some_lengths


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_that_remembers_says_what_one_that_does_not_says(seed: int):
    """Units are numbered alike in both, so equal densities are broken alike, too."""
    rng = random.Random(seed)
    world = World(rng)
    config = SchedulingConfig.model_validate({"policy": "tempo", "tenant_exponent": rng.choice((0.0, 1.0))})
    switches = config.switches.model_copy(update={"reserve": False, "adaptive_cap": False})
    plan, history = TempoPlan(config.model_copy(update={"switches": switches})), ProgramHistory()
    seen = set()
    for _ in range(60):
        for one in world.turn(12):
            plan.arrived(one, is_new=True)
        context = Context(world.now_s, PACE, 230.0, world.ledger)
        jobs = [*world.running, *world.waiting]
        plan.make(world.waiting, world.running, context, history, replicas=1)
        remembered = [job.standing for job in jobs]
        fresh = TempoPlan(config.model_copy(update={"switches": switches}))
        fresh.make(world.waiting, world.running, context, history, replicas=1)
        assert remembered == [job.standing for job in jobs]
        assert len(plan._table) == len(jobs)
        plan._table.audit()
        seen.update((one.is_admitted, one.density > 0.0) for one in remembered)
    assert seen == {(True, True), (False, True), (False, False)}, "everything was alike: this test tests little"


def test_who_is_not_in_the_next_plan_leaves_no_trace():
    world, table = World(random.Random(3)), PlanTable()
    for _ in range(20):
        world.turn(30)
    rows = table.update(world.running, world.waiting)
    assert sorted(rows.tolist()) == sorted(set(rows.tolist()))
    assert table.capacity > 64, "the table never grew: this test tests little"

    table.update([], [])
    table.audit()

    assert (len(table), [table.slot_of(one.spec) for one in world.waiting[:3]]) == (0, [None] * 3)
    assert table.program_ids(rows) == [None] * rows.size


def test_a_program_and_a_request_of_the_same_name_are_two_units():
    table = PlanTable()
    specs = [request("x", slo=ProgramCall(ProgramId("x"), 9.0)), request("y"), request("x")]
    jobs = [WaitingRequest(spec, n, 0.0, some_lengths(random.Random(n)), 0.1, 9.0) for n, spec in enumerate(specs)]
    table.update([], jobs)

    assert len({table.slot_of(spec) for spec in specs}) == 3
