"""Who is planned when more wait than a plan looks at."""

import random

from tempo_router.ledger import Ledger
from tempo_router.plan_turns import PlanTurns
from tempo_router.prediction import LengthHistograms
from tempo_router.request import ProgramCall, ProgramId
from tempo_router.standing import Standing
from tempo_router.waiting import WaitingRequest
from tests.builders import CHAT, request

MOST = 64


class Line:
    """Requests that wait, and a plan that ranks them by a density that the test knows."""

    def __init__(self) -> None:
        self.turns, self.ledger = PlanTurns(), Ledger()
        self.waiting: dict[int, WaitingRequest] = {}
        self.density: dict[int, float] = {}
        self.count = 0

    def come(self, density: float, program: str = "") -> WaitingRequest:
        self.count += 1
        slo = ProgramCall(ProgramId(program), 60.0) if program else CHAT
        spec = request(f"r{self.count}", slo=slo)
        one = WaitingRequest(spec, self.count, 0.0, LengthHistograms().lookup(spec), 0.1, float("inf"))
        one.is_in_line = True
        self.waiting[one.ticket], self.density[one.ticket] = one, density
        self.ledger.arrived(one)
        self.turns.enter(one, is_new=not program)
        return one

    def go(self, one: WaitingRequest) -> None:
        one.is_in_line = False
        del self.waiting[one.ticket]
        self.ledger.left(one.spec)

    def plan(self) -> list[int]:
        planned, _ = self.turns.next(self.waiting.values(), MOST, self.ledger)
        for one in planned:
            one.standing = Standing(self.density[one.ticket], is_admitted=self.density[one.ticket] > 1e3)
        self.turns.settle(planned, len(self.waiting), MOST)
        return [one.ticket for one in planned]


def test_while_few_wait_every_plan_looks_at_all_of_them_in_order_of_coming():
    line = Line()
    for number in range(MOST):
        line.come(float(number % 7))
    assert line.plan() == line.plan() == list(range(1, MOST + 1))


def test_a_plan_is_bounded_and_everybody_gets_a_turn_again_and_again():
    rng = random.Random(5)
    line = Line()
    for _ in range(40 * MOST):
        line.come(rng.uniform(0.0, 100.0))
    last = dict.fromkeys(line.waiting, 0)
    first_turns = 40 * MOST // (MOST // 4)
    longest = 0
    for number in range(1, first_turns + 2000):
        planned = line.plan()
        assert len(planned) <= MOST
        assert len(set(planned)) == len(planned), "planned twice at once"
        for ticket in planned:
            if last[ticket]:
                longest = max(longest, number - last[ticket])
            last[ticket] = number
    # 8 in a plan of 64 are others in rotation; those that came since the last turn go before.
    assert min(last.values()) > first_turns + 1000, "somebody was forgotten"
    assert longest <= 2 * 40 * MOST // (MOST // 8)


def test_the_densest_stay_in_every_plan():
    line = Line()
    for number in range(20 * MOST):
        line.come(float(number))
    for _ in range(20 * MOST // (MOST // 4) + 1):
        line.plan()
    best = set(range(20 * MOST - 20, 20 * MOST + 1))
    for _ in range(30):
        assert best <= set(line.plan())


def test_one_that_becomes_dense_is_found_by_the_rotation():
    line = Line()
    for number in range(10 * MOST):
        line.come(float(number))
    for _ in range(10 * MOST // (MOST // 4) + 1):
        line.plan()
    line.density[1] = 1e6
    others = 10 * MOST // (MOST // 8)
    assert any(1 in line.plan() for _ in range(others))
    assert all(1 in line.plan() for _ in range(5))


def test_calls_of_a_program_are_planned_together():
    line = Line()
    family = [line.come(0.5, "p").ticket]
    for number in range(10 * MOST):
        line.come(float(number))
    family += [line.come(0.5, "p").ticket for _ in range(2)]
    looked = 0
    for _ in range(400):
        planned = set(line.plan())
        looked += bool(planned & set(family))
        assert len(planned & set(family)) in (0, 3)
    assert looked > 2


def test_who_left_takes_no_turn_and_no_memory():
    line = Line()
    for number in range(50 * MOST):
        line.come(float(number))
    for _ in range(400):
        line.plan()
    for one in list(line.waiting.values())[MOST + 1 :]:
        line.go(one)
    for _ in range(60):
        assert set(line.plan()) <= set(line.waiting)
    assert len(line.turns._others) <= 3 * MOST + 64


def test_first_turns_are_told_once_even_of_those_that_left():
    line = Line()
    came = [line.come(1.0) for _ in range(3 * MOST)]
    line.go(came[0])
    told = []
    for _ in range(20):
        _, newcomers = line.turns.next(line.waiting.values(), MOST, line.ledger)
        told += [one.ticket for one, _ in newcomers]
    assert told == [one.ticket for one in came]
