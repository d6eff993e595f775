"""What outlines of finished programs tell of one that unfolds."""

import json
import random
from dataclasses import asdict

import pytest

from tempo_router.pattern_history import PatternHistory
from tempo_router.patterns import (
    REST_CHAIN,
    REST_STAGES,
    Outline,
    PatternBook,
    PatternTable,
    StageOutline,
    _features_of,
)
from tempo_router.program_history import ATOMS, ProgramHistory
from tempo_router.request import ProgramId
from tests.unit.test_program_history import RESEARCH, program, runs, truth


def stage(output: int, prompt: int = 100, calls: int = 1, gap_s: float = 1.0) -> StageOutline:
    return StageOutline(calls, prompt * calls, float(prompt**2 * calls), output * calls, output, prompt, gap_s)


def research(rng: random.Random) -> tuple[StageOutline, ...]:
    """A short verdict of its third stage ends the search; a long one starts another round."""
    rounds = rng.random() < 0.5
    head = (stage(rng.randint(50, 90)), stage(rng.randint(400, 900)), stage(rng.randint(70, 130) if rounds else 13))
    return (*head, stage(700), stage(90), stage(rng.randint(800, 1000))) if rounds else (*head, stage(900))


def table_of(programs, **said) -> PatternTable:
    table = PatternTable(5000)
    for one in programs:
        table.add(Outline("app", 60.0, one, **said))
    return table


def test_the_answer_that_decides_is_found():
    rng = random.Random(7)
    table = table_of(research(rng) for _ in range(200))
    head = (stage(70), stage(600))
    undecided = table.match((*head, stage(1)), 60.0)
    short = table.match((*head, stage(13)), 60.0, is_between=True)
    long = table.match((*head, stage(100)), 60.0, is_between=True)
    assert undecided is not None
    assert short is not None
    assert long is not None
    assert undecided.forecast.stages == pytest.approx(2.0, abs=0.2)
    assert short.forecast.stages == pytest.approx(1.0, abs=0.1)
    assert long.forecast.stages == pytest.approx(3.0, abs=0.1)
    assert short.quantile(REST_STAGES, 0.9) == 1.0
    assert long.quantile(REST_CHAIN, 0.1) > 1500


def test_where_nothing_tells_anything_the_mean_of_the_class_comes_out():
    rng = random.Random(3)
    programs = [(stage(rng.randint(10, 500)), stage(rng.randint(10, 500))) for _ in range(200)]
    match = table_of(programs).match((stage(20),), 60.0, is_between=True)
    assert match is not None
    assert match.forecast.chain_tokens == pytest.approx(sum(one[1].chain_tokens for one in programs) / 200, rel=0.1)


def test_of_many_outlines_the_most_alike_count():
    """More came as far than are looked at: those who are looked at are nearer than all others."""
    rng = random.Random(5)
    lengths = [rng.randint(10, 2000) for _ in range(2000)]
    measured = table_of((stage(length), stage(2 * length)) for length in lengths)._measured(0, is_between=True)
    for length in (20, 500, 1800):
        features = _features_of((stage(length),), 60.0, is_between=True)
        rows, weights = measured.nearest(features)
        away = measured.points - (features[measured.telling] * measured.unit)[:, None]
        distance = dict(zip(measured.rows.tolist(), (away**2).sum(axis=0).tolist(), strict=True))
        near = {row: distance.pop(row) for row in rows.tolist()}
        assert len(near) == 256
        assert max(near.values()) <= min(distance.values()) + 1e-9
        assert weights.argmax() == min(range(256), key=lambda place: near[int(rows[place])])


def test_a_forgotten_outline_says_nothing_of_those_that_take_its_place():
    table = PatternTable(100)
    for _ in range(100):
        table.add(Outline("app", 60.0, (stage(10), stage(5000), stage(5000), stage(5000))))
    for number in range(100):
        table.add(Outline("app", 60.0, (stage(10), stage(20), stage(30))[: 2 + number % 2]))
    match = table.match((stage(10),), 60.0, is_between=True)
    assert match is not None
    assert match.forecast.stages == pytest.approx(1.5)
    assert match.forecast.chain_tokens == pytest.approx(20 + 30 / 2)


def test_what_is_foretold_as_a_distribution_has_the_foretold_mean():
    rng = random.Random(7)
    match = table_of(research(rng) for _ in range(100)).match((stage(70),), 60.0)
    assert match is not None
    atoms = match.forecast.chain_atoms
    assert len(atoms) == ATOMS
    assert sum(atoms) / ATOMS == pytest.approx(match.forecast.chain_tokens)
    assert max(atoms) > 1.5 * min(atoms)


def test_programs_that_were_given_up_do_not_make_programs_look_short():
    """Overload gives up every long one after its third stage: nobody has seen one end, everybody saw them go on."""
    whole = [(stage(50), stage(50)) for _ in range(20)]
    table = table_of(whole)
    for _ in range(60):
        table.add(Outline("app", 60.0, (stage(50), stage(50), stage(50)), is_complete=False))
    match = table.match((stage(50),), 60.0)
    assert match is not None
    later = table.match((stage(50), stage(50)), 60.0)
    assert later is not None
    assert later.forecast.stages >= 0.75 * 1.0 - 1e-6
    assert later.forecast.unknown == pytest.approx(0.75, abs=0.01)


def test_programs_in_progress_count_for_what_they_left_behind():
    """A young service has seen only short programs end."""
    table = table_of([(stage(50),)] * 10)
    match = table.match((stage(50),), 60.0)
    assert match is not None
    assert match.forecast.stages == 0.0
    for number in range(30):
        table.progressed(f"p{number}", Outline("app", 60.0, (stage(50), stage(50)), is_complete=False))
    match = table.match((stage(50),), 60.0)
    assert match is not None
    assert match.forecast.stages == pytest.approx(0.75, abs=0.01)
    for number in range(30):
        table.over(f"p{number}")
        table.add(Outline("app", 60.0, (stage(50), stage(50))))
    assert len(table) == 40


def test_too_few_outlines_say_nothing():
    assert table_of([(stage(1), stage(1))] * 7).match((stage(1),), 60.0) is None
    assert table_of([(stage(1), stage(1))] * 100).match((stage(1),) * 3, 60.0) is None
    assert PatternBook().match("app", (stage(1),), 60.0) is None


def test_a_book_keeps_the_newest_outlines_of_all_applications():
    book = PatternBook(most=20)
    book.add_all(Outline("old", 60.0, (stage(1), stage(1))) for _ in range(20))
    book.add_all(Outline("new", 60.0, (stage(1), stage(1))) for _ in range(15))
    assert len(book) == 20
    assert book.match("old", (stage(1),), 60.0) is None
    assert book.match("new", (stage(1),), 60.0) is not None


def test_what_ended_too_long_ago_is_compared_with_no_more():
    book = PatternBook(most=30, age_s=100.0)
    for number in range(40):
        book.add(Outline("old" if number < 20 else "new", 60.0, (stage(1), stage(number)), at_s=float(number)))
    assert len(book) == 30
    book.forget_aged(110.0)
    assert len(book) == 30, "the oldest one that is left ended 100 s ago"
    book.forget_aged(120.0)
    assert len(book) == 20
    assert book.match("old", (stage(1),), 60.0) is None
    match = book.match("new", (stage(1),), 60.0)
    assert match is not None
    assert (match.outlines, match.forecast.stages) == (20, 1.0)
    book.forget_aged(133.0)
    assert book.match("new", (stage(1),), 60.0) is None, "seven are too few, as if there had never been more"
    book.forget_aged(1e9)
    assert len(book) == 0


def test_a_running_history_forgets_with_time_and_the_newest_programs_count():
    history = PatternHistory(most=100, age_s=1000.0)
    history.restore(Outline("research", 60.0, (stage(50), stage(2000)), at_s=float(number)) for number in range(20))
    early, late = program("early"), program("late")
    history.call_came(early, 0, 100, 900.0)
    assert history.match(early)["kind"] == "patterns"
    history.call_came(late, 0, 100, 2000.0)
    assert history.match(late)["kind"] == "stage means"

    for number in range(20):
        one = program(f"p{number}")
        history.call_came(one, 0, 100, 2000.0)
        history.call_ended(one, 0, 50, 2001.0)
        history.program_ended(one, 2001.0 + number, is_complete=True)
    assert {outline.at_s for outline in history.drain_learnt()} == {2001.0 + number for number in range(20)}
    again = program("again")
    history.call_came(again, 0, 100, 2500.0)
    assert history.match(again)["outlines"] == 20
    assert history.forecast(again).stages == 0.0


def test_a_book_that_is_full_keeps_as_many_as_it_may():
    book = PatternBook(most=20)
    book.add_all(Outline("app", 60.0, (stage(1), stage(1))) for _ in range(50))
    match = book.match("app", (stage(1),), 60.0)
    assert match is not None
    assert match.outlines == len(book) == 20


def test_equal_histories_foretell_equally():
    def told() -> list[float]:
        rng = random.Random(5)
        table = table_of(research(rng) for _ in range(300))
        match = table.match((stage(60), stage(500)), 60.0)
        assert match is not None
        return [match.forecast.chain_tokens, match.forecast.calls, match.quantile(REST_CHAIN, 0.5)]

    assert told() == told()


def test_a_history_by_patterns_answers_as_one_by_means_until_it_knows_enough():
    by_means, by_patterns = ProgramHistory(), PatternHistory()
    for number in range(7):
        for history in (by_means, by_patterns):
            runs(history, program(f"p{number}"), RESEARCH)
    for history in (by_means, by_patterns):
        history.call_came(program("new"), 0, 400, 0.0)
    assert by_patterns.forecast(program("new")) == by_means.forecast(program("new"))


def test_a_history_of_equal_programs_foretells_the_truth():
    history = PatternHistory()
    for number in range(20):
        runs(history, program(f"p{number}"), RESEARCH)
    for current in range(len(RESEARCH)):
        name = f"new{current}"
        for number in range(current + 1):
            for prompt, output in RESEARCH[number]:
                history.call_came(program(name, stage=number), number, prompt, 10.0 * number)
                if number < current:
                    history.call_ended(program(name, stage=number), number, output, 10.0 * number + 1)
        forecast = history.forecast(program(name, stage=current))
        true = truth(RESEARCH[current + 1 :])
        assert forecast.stages == pytest.approx(true.stages)
        assert forecast.chain_tokens == pytest.approx(true.chain_tokens)
        assert forecast.calls == pytest.approx(true.calls)
        assert forecast.gaps_s == pytest.approx(true.gaps_s)


def test_a_program_that_is_resumed_is_foretold_as_before():
    rng = random.Random(7)
    outlines = [Outline("research", 60.0, research(rng)) for _ in range(100)]
    before, after = PatternHistory(), PatternHistory()
    for history in (before, after):
        history.restore(outlines)
    seen = (stage(70), stage(600), stage(100))
    for number, one in enumerate(seen):
        at_s = 2.0 * number
        before.call_came(program("p", stage=number), number, one.prompt_tokens, at_s)
        before.call_ended(program("p", stage=number), number, one.output_tokens, at_s + 1)
    after.resume(ProgramId("p"), enumerate(seen), 5.0)
    assert after.forecast(program("p", stage=2)) == before.forecast(program("p", stage=2))


def test_what_is_told_of_a_match_is_plain_json():
    """It crosses processes; numbers of arrays would not."""
    history = PatternHistory()
    for number in range(20):
        runs(history, program(f"p{number}"), RESEARCH)
    history.call_came(program("new"), 0, 400, 0.0)
    told = [
        history.match(program("new")),
        [asdict(one) for one in history.stages_ahead(program("new"))],
        asdict(history.forecast(program("new"))),
    ]
    assert json.loads(json.dumps(told))
    assert {type(value) for value in vars_of(told)} <= {int, float, str}


def vars_of(value) -> list[object]:
    if isinstance(value, dict):
        return [each for one in value.values() for each in vars_of(one)]
    return [each for one in value for each in vars_of(one)] if isinstance(value, list | tuple) else [value]
