"""What a plan keeps of its jobs from one plan to the next is what a new plan would find."""

import random

import pytest

from tempo_router.config import SchedulingConfig
from tempo_router.events import ReplicaCapacity
from tempo_router.ledger import Ledger
from tempo_router.plan_table import PlanTable
from tempo_router.policies.base import Context
from tempo_router.prediction import ATOMS, Lengths
from tempo_router.program_history import ProgramHistory
from tempo_router.replicas import Call, Replica
from tempo_router.request import DispatchId, ProgramCall, ProgramId, ReplicaId
from tempo_router.step_time import StepTimeModel
from tempo_router.tempo_plan import TempoPlan
from tempo_router.waiting import WaitingRequest
from tests.builders import BACKGROUND, CHAT, PACE, TOOL, request


def some_lengths(rng: random.Random) -> Lengths:
    return Lengths(tuple(sorted(float(rng.randint(1, 500)) for _ in range(ATOMS))))


class World:
    """Requests that come, get better estimates, start, produce tokens and leave."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 0.0
        self.count = 0
        self.waiting: list[WaitingRequest] = []
        self.running: list[Call] = []
        self.ledger = Ledger()
        self.replica = Replica(ReplicaId("gpu0"), 1, ReplicaCapacity(1000, 2048, 10**7), StepTimeModel())

    def turn(self, arrivals: int) -> list[WaitingRequest]:
        """Half a second passes. Returns who came."""
        rng = self.rng
        self.now_s += 0.5
        came = [self.arrive() for _ in range(rng.randint(0, arrivals))]
        for one in rng.sample(self.waiting, len(self.waiting) // 10):
            one.lengths = some_lengths(rng)
        for one in rng.sample(self.waiting, len(self.waiting) // 8):
            self.waiting.remove(one)
            self.start(one)
        for call in rng.sample(self.running, len(self.running) // 2):
            call.new_tokens += rng.randint(1, 60)
        for crowd in (self.waiting, self.running):
            for one in rng.sample(crowd, len(crowd) // 9):
                crowd.remove(one)
                self.ledger.left(one.spec, output_tokens=rng.choice((None, 5)))
        return came

    def arrive(self) -> WaitingRequest:
        self.count += 1
        program = ProgramCall(ProgramId(f"p{self.rng.randint(1, 30)}"), self.rng.uniform(5.0, 90.0))
        spec = request(
            f"r{self.count}",
            slo=self.rng.choice((CHAT, TOOL, program, program, BACKGROUND)),
            arrival_s=self.now_s,
            prompt_tokens=self.rng.randint(1, 20_000),
            max_output_tokens=self.rng.choice((50, 1000)),
        )
        one = WaitingRequest(spec, self.count, self.now_s, some_lengths(self.rng), 0.1, float("inf"))
        one.cached_tokens = self.rng.choice((0, 0, 7))
        self.waiting.append(one)
        self.ledger.arrived(one)
        return one

    def start(self, one: WaitingRequest) -> None:
        call = Call(DispatchId(one.ticket), one.spec, self.replica, one.lengths, 0, standing=one.standing)
        call.cached_tokens = one.cached_tokens
        self.running.append(call)
        self.ledger.started(call, self.replica.replica_id, 0.0)


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
