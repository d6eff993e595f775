"""Calls as columns say the same as the calls themselves."""

import random

import pytest

from tempo_router.columns import DECODING, HELD, PREFILLING, LiveTable, columns_of
from tempo_router.live_call import LiveCall, StepClock
from tempo_router.prediction import ATOMS, Lengths
from tempo_router.request import DispatchId
from tempo_router.standing import Standing
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL, live, request

SLOS = (CHAT, TOOL, AGENT, BACKGROUND)


def some_lengths(rng: random.Random, atoms: int = ATOMS) -> Lengths:
    return Lengths(tuple(sorted(float(rng.randint(1, 500)) for _ in range(atoms))))


def some_standing(rng: random.Random) -> Standing:
    return Standing(rng.choice((0.0, rng.uniform(0.1, 900.0))), rng.random() < 0.5, rng.random(), rng.random() < 0.2)


@pytest.mark.parametrize("seed", range(5))
def test_careful_rest_of_many_calls_is_that_of_each(seed: int):
    """Distributions of different numbers of atoms among them, and answers longer than any that was seen."""
    rng = random.Random(seed)
    jobs = [
        live(
            request(f"r{n}", max_output_tokens=rng.randint(1, 800)),
            n,
            some_lengths(rng, rng.choice((1, 3, ATOMS, 27))),
            generated_tokens=rng.choice((0, 1, rng.randint(0, 600))),
        )
        for n in range(200)
    ]

    expected = [job.lengths.upper_left(job.generated_tokens, job.spec.max_output_tokens) for job in jobs]

    assert columns_of(jobs).upper_left().tolist() == expected


def test_no_jobs_are_columns_of_length_zero():
    assert columns_of([]).upper_left().tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_a_table_follows_its_calls_through_every_change(seed: int):
    rng = random.Random(seed)
    clock, table = StepClock(), LiveTable()
    calls: list[LiveCall] = []
    for number in range(1500):
        what = rng.random()
        if what < 0.35 or not calls:
            lengths = some_lengths(rng, rng.choice((ATOMS, ATOMS, 25)) if number > 700 else ATOMS)
            spec = request(f"r{number}", slo=rng.choice(SLOS), prompt_tokens=rng.randint(1, 900))
            call = LiveCall(DispatchId(number), spec, lengths, some_standing(rng), number, 0.0, clock)
            table.add(call)
            calls.append(call)
        elif what < 0.6:
            table.remove(calls.pop(rng.randrange(len(calls))))
        elif what < 0.7:
            call = rng.choice(calls)
            call.standing = some_standing(rng)
            table.retune(call)
        elif what < 0.8:
            clock.steps += 1
        else:
            move(rng.choice(calls), rng, clock, table)
        if number % 10 == 0:
            table.audit(calls, clock.steps)
    rows = table.rows()
    assert len(table.calls(rows)) == len(calls) > 64, "the table never grew: this test tests little"
    from_calls, from_table = columns_of(table.calls(rows)), table.columns(rows, clock.steps)
    assert from_table.upper_left().tolist() == from_calls.upper_left().tolist()
    backwards = rows[::-1]
    assert table.columns(backwards, clock.steps).generated.tolist() == from_calls.generated.tolist()[::-1]
    assert table.columns(backwards[:7], clock.steps).generated.tolist() == from_calls.generated.tolist()[::-1][:7]


def move(call: LiveCall, rng: random.Random, clock: StepClock, table: LiveTable) -> None:
    """As a planner does: some of the prompt, then decoding, held, and again."""
    if call.is_decoding:
        call.produced, call.is_decoding = call.new_tokens, False
        call.to_compute = call.computed = call.spec.context_tokens + call.produced
        table.note_phase(call, HELD)
        return
    if call.missing_tokens:
        call.computed += rng.randint(1, call.missing_tokens)
        table.note_missing(call)
        return
    call.joined, call.is_decoding = clock.steps, True
    table.note_phase(call, DECODING)


def test_rows_are_found_by_phase_and_ranked_by_key_then_ticket():
    clock, table = StepClock(), LiveTable()
    calls = [
        LiveCall(DispatchId(n), request(f"r{n}"), some_lengths(random.Random(1)), Standing(1.0, True), n, 0.0, clock)
        for n in (3, 1, 2, 4)
    ]
    for call in calls:
        table.add(call)
    table.note_phase(calls[3], HELD)
    rows = table.rows()
    keys = columns_of(calls).density * 0.0
    keys[3] = -1.0
    table.store_keys(rows, keys)

    assert [call.ticket for call in table.calls(table.ranked(rows))] == [4, 1, 2, 3]
    assert [call.ticket for call in table.calls(table.ranked(rows[:3], keys[:3]))] == [1, 2, 3]
    assert [call.ticket for call in table.calls(table.in_phase(HELD))] == [4]
    assert [call.ticket for call in table.calls(table.in_phase(PREFILLING, rows[::-1]))] == [2, 1, 3]
    table.place(rows[:2])
    assert table.unplaced(rows).tolist() == [2, 3]
    table.remove(calls[0])
    assert table.unplaced(table.rows()).tolist() == [0, 2], "a row that moved took its place along"
