"""One key for the live calls of a program."""

import pytest

from tempo_router.policies.base import Context, Job
from tempo_router.policies.fcfs import FirstCome
from tempo_router.policies.programs import keys_by_program
from tempo_router.request import ProgramCall, ProgramId
from tests.builders import CHAT, context, live, request


class CountingTickets(FirstCome):
    """Keys are tickets; counts how many were asked for."""

    asked: list[int]

    def key(self, request: Job, context: Context) -> float:
        """The ticket."""
        type(self).asked.append(request.ticket)
        return float(request.ticket)


def call_of(program: str, ticket: int, *, is_relegated: bool = False) -> Job:
    slo = ProgramCall(program_id=ProgramId(program), ttlt_s=60.0)
    return live(request(f"{program}.{ticket}", slo=slo), ticket, is_relegated=is_relegated)


@pytest.fixture
def policy() -> CountingTickets:
    CountingTickets.asked = []
    return CountingTickets()


def test_calls_of_a_program_share_the_key_of_the_first_and_it_is_computed_once(policy: CountingTickets):
    jobs = [call_of("a", 1), live(request("alone", slo=CHAT), 2), call_of("b", 3), call_of("a", 4), call_of("b", 5)]
    assert keys_by_program(policy, jobs, context()) == [1.0, 2.0, 3.0, 1.0, 3.0]
    assert policy.asked == [1, 2, 3]


@pytest.mark.parametrize(("are_apart", "expected"), [(True, [1.0, 2.0, 2.0]), (False, [1.0, 1.0, 1.0])])
def test_relegated_calls_stand_apart_where_the_policy_wants_it(
    policy: CountingTickets, are_apart: bool, expected: list[float]
):
    jobs = [call_of("a", 1, is_relegated=True), call_of("a", 2), call_of("a", 3)]
    assert keys_by_program(policy, jobs, context(), are_relegated_apart=are_apart) == expected
