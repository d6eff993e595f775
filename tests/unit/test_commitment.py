"""Gambles stand behind all but best effort in the queue until the plan admits them or their program has begun."""

import random

import pytest

from tempo_router.columns import columns_of
from tempo_router.commitment import HELD_BACK_KEY, HoldingBack, held_back, is_gamble
from tempo_router.ledger import Ledger
from tempo_router.policies.tempo import Tempo
from tempo_router.request import ProgramCall, ProgramId
from tempo_router.slo_queue import SloQueue
from tempo_router.standing import UNRANKED, Standing
from tempo_router.waiting import WaitingRequest
from tests.builders import BACKGROUND, CHAT, TOOL, context, produced, request, waiting

DEFERRED, ADMITTED = Standing(5.0, is_admitted=False), Standing(5.0, is_admitted=True)


def one_of(slo: object, standing: Standing, name: str = "r", generated_tokens: int = 0) -> WaitingRequest:
    one = waiting(request(name, slo=slo, generated_tokens=generated_tokens))
    one.standing = standing
    return one


@pytest.mark.parametrize(
    ("slo", "standing", "generated", "expected"),
    [
        (TOOL, DEFERRED, 0, True),
        (TOOL, ADMITTED, 0, False),
        (TOOL, UNRANKED, 0, False),
        (TOOL, DEFERRED._replace(density=0.0), 0, False),
        (TOOL, DEFERRED, 3, False),
        (CHAT, DEFERRED, 0, False),
    ],
)
def test_only_deferred_answers_that_have_not_begun_are_gambles(
    slo: object, standing: Standing, generated: int, expected: bool
):
    assert is_gamble(one_of(slo, standing, generated_tokens=generated), Ledger()) == expected


def test_a_program_that_has_begun_is_no_gamble():
    ledger, slo = Ledger(), ProgramCall(ProgramId("p"), 60.0)
    first, second = one_of(slo, DEFERRED, "first"), one_of(slo, DEFERRED, "second")
    for one in (first, second):
        ledger.arrived(one)
    assert is_gamble(second, ledger)
    produced(ledger, first.spec, 1)
    assert not is_gamble(second, ledger)


@pytest.mark.parametrize("seed", range(4))
def test_keys_of_many_are_those_of_each(seed: int):
    rng = random.Random(seed)
    ledger = Ledger()
    jobs = []
    for number in range(120):
        slo = rng.choice((CHAT, TOOL, BACKGROUND, ProgramCall(ProgramId(f"p{number % 9}"), 60.0)))
        one = one_of(slo, rng.choice((DEFERRED, ADMITTED, UNRANKED)), f"r{number}", rng.choice((0, 0, 4)))
        one.is_given_up = rng.random() < 0.2
        ledger.arrived(one)
        jobs.append(one)
        if rng.random() < 0.05:
            produced(ledger, one.spec, 2)
    at, columns = context(1.0, ledger=ledger), columns_of(jobs)
    expected = [HoldingBack(Tempo()).key(one, at) for one in jobs]

    assert held_back(Tempo().arrange_columns(columns, at), columns, jobs, ledger).tolist() == expected
    assert any(key >= HELD_BACK_KEY for key in expected)
    assert any(key < HELD_BACK_KEY for key in expected)


def test_a_gamble_goes_before_best_effort_and_an_admitted_answer_before_both():
    queue, at = SloQueue(HoldingBack(Tempo())), context(1.0)
    jobs = [one_of(TOOL, DEFERRED, "gamble"), one_of(BACKGROUND, UNRANKED, "late"), one_of(TOOL, ADMITTED, "sure")]
    for ticket, one in enumerate(jobs):
        one.ticket = ticket
        queue.push(one, at)
    given = [queue.pop(at) for _ in jobs]
    assert [one and one.spec.request_id for one in given] == ["sure", "gamble", "late"]
