"""A world for plans: requests that come, start and leave, without a router."""

import random

from tempo_router.events import ReplicaCapacity
from tempo_router.ledger import Ledger
from tempo_router.prediction import ATOMS, Lengths
from tempo_router.replicas import Call, Replica
from tempo_router.request import DispatchId, ProgramCall, ProgramId, ReplicaId
from tempo_router.step_time import StepTimeModel
from tempo_router.waiting import WaitingRequest
from tests.builders import BACKGROUND, CHAT, TOOL, request


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
        self.replica = Replica(ReplicaId("gpu0"), 1, ReplicaCapacity(1000, 2048, 10**7), StepTimeModel(), set())

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
