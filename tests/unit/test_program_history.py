"""What is still to come of a program, learnt from the ones before it."""

import math
import random
from dataclasses import replace

import pytest

from tempo_router.ledger import Program
from tempo_router.program_history import NOTHING, Forecast, KnownGraphs, ProgramHistory
from tempo_router.request import ProgramCall, ProgramId
from tests.builders import request

Stage = list[tuple[int, int]]
"""Calls of one stage: (prompt tokens, output tokens)."""

RESEARCH: list[Stage] = [[(400, 50)], [(160, 700), (200, 300)], [(1300, 60)], [(2000, 600)]]
GAP_S = 3.0


def program(name: str, app: str = "research", ttlt_s: float = 60.0, stage: int = 0) -> Program:
    program_id = ProgramId(name)
    one = Program(request(name, slo=ProgramCall(program_id, ttlt_s), app=app), program_id, ttlt_s)
    one.stage = stage
    return one


def runs(history: ProgramHistory, one: Program, stages: list[Stage], given_up_after: int | None = None) -> None:
    """The program goes through its stages; it is given up when so many of them are over."""
    now_s = 0.0
    for number, calls in enumerate(stages):
        one.stage = number
        for prompt, _ in calls:
            history.call_came(one, number, prompt, now_s)
        if given_up_after == number:
            history.program_ended(one, now_s, is_complete=False)
            return
        for _, output in calls:
            now_s += 1.0
            history.call_ended(one, number, output, now_s)
        now_s += GAP_S
    history.program_ended(one, now_s, is_complete=True)


def truth(stages: list[Stage]) -> Forecast:
    """Of these stages, each GAP_S after the one before."""
    calls = [call for stage in stages for call in stage]
    return Forecast(
        calls=len(calls),
        prompt_tokens=sum(prompt for prompt, _ in calls),
        squared_prompts=sum(prompt**2 for prompt, _ in calls),
        output_tokens=sum(output for _, output in calls),
        chain_tokens=sum(max(output for _, output in stage) for stage in stages),
        chain_prompt_tokens=sum(max(prompt for prompt, _ in stage) for stage in stages),
        gaps_s=GAP_S * len(stages),
        stages=len(stages),
    )


def values(forecast: Forecast) -> list[float]:
    return [getattr(forecast, name) for name in Forecast.__dataclass_fields__ if name != "chain_atoms"]


def test_of_an_application_that_was_never_seen_nothing_is_known_but_that_it_may_go_on():
    assert ProgramHistory().forecast(program("p")) == replace(NOTHING, unknown=1.0)


def test_what_is_unknown_shrinks_with_every_program_seen_and_is_nothing_after_eight():
    history = ProgramHistory()
    unknown = [history.forecast(program("new")).unknown]
    for number in range(8):
        runs(history, program(f"p{number}"), RESEARCH)
        unknown.append(history.forecast(program("new")).unknown)
    assert unknown == sorted(unknown, reverse=True)
    assert len(set(unknown)) == 9
    assert unknown[-1] == 0.0


def test_stages_that_nobody_reached_yet_stay_unknown():
    history = ProgramHistory()
    for number in range(20):
        one = program(f"p{number}")
        history.call_came(one, 0, 100, 0.0)
        history.call_ended(one, 0, 50, 1.0)
        history.call_came(one, 1, 100, 1.0)
    assert history.forecast(program("new")).unknown == 1.0


@pytest.mark.parametrize("stage", range(4))
def test_the_forecast_of_a_program_that_repeats_is_the_truth(stage: int):
    history = ProgramHistory()
    for number in range(40):
        runs(history, program(f"p{number}"), RESEARCH)

    assert values(history.forecast(program("new", stage=stage))) == pytest.approx(
        values(truth(RESEARCH[stage + 1 :])), rel=0.01
    )


def test_what_varies_is_forecast_by_its_mean():
    history = ProgramHistory()
    rng = random.Random(5)
    for number in range(400):
        stages = RESEARCH if rng.random() < 0.6 else RESEARCH[:2]
        runs(history, program(f"p{number}"), stages)
    forecast = history.forecast(program("new"))

    # Of each program the second stage comes, and of six in ten two more.
    assert forecast.stages == pytest.approx(1 + 0.6 * 2, rel=0.15)
    assert forecast.output_tokens == pytest.approx(1000 + 0.6 * 660, rel=0.15)


def test_programs_that_were_given_up_do_not_make_programs_look_short():
    history = ProgramHistory()
    for number in range(100):
        runs(history, program(f"p{number}"), RESEARCH, given_up_after=None if number % 4 == 0 else 1 + number % 3)

    assert values(history.forecast(program("new"))) == pytest.approx(values(truth(RESEARCH[1:])), rel=0.01)


def test_a_program_that_changes_is_learnt_anew():
    history = ProgramHistory()
    later: list[Stage] = [[(400, 50)], [(160, 90)]]
    for number in range(50):
        runs(history, program(f"p{number}"), RESEARCH)
    for number in range(400):
        runs(history, program(f"q{number}"), later)

    assert values(history.forecast(program("new"))) == pytest.approx(values(truth(later[1:])), rel=0.05)


def test_applications_do_not_mix():
    history = ProgramHistory()
    for number in range(30):
        runs(history, program(f"p{number}"), RESEARCH)
        runs(history, program(f"q{number}", app="short"), RESEARCH[:1])

    assert history.forecast(program("new", app="short")).calls == 0.0
    assert history.forecast(program("new")).calls == pytest.approx(4.0)


def test_the_deadline_tells_programs_of_one_application_apart_once_enough_were_seen():
    history = ProgramHistory()
    for number in range(30):
        runs(history, program(f"p{number}", ttlt_s=240.0), RESEARCH)
        runs(history, program(f"q{number}", ttlt_s=20.0), RESEARCH[:2])

    assert history.forecast(program("long", ttlt_s=240.0)).stages == pytest.approx(3.0)
    assert history.forecast(program("short", ttlt_s=20.0)).stages == pytest.approx(1.0)
    # Of a deadline never seen, the application as a whole is what is known.
    assert 1.0 < history.forecast(program("unseen", ttlt_s=5000.0)).stages < 3.0


def test_a_clairvoyant_tells_the_true_rest_of_each_program():
    known = [[(prompt, output, GAP_S) for prompt, output in stage] for stage in RESEARCH]
    graphs = KnownGraphs({ProgramId("p"): known})

    for stage in range(len(RESEARCH)):
        rest = graphs.forecast(program("p", stage=stage))
        assert (rest.calls, rest.output_tokens) == (
            truth(RESEARCH[stage + 1 :]).calls,
            truth(RESEARCH[stage + 1 :]).output_tokens,
        )
        assert rest.gaps_s == pytest.approx(GAP_S * (len(RESEARCH) - stage - 1))
    assert graphs.forecast(program("p", stage=99)) == NOTHING


def test_waits_are_a_running_mean():
    history = ProgramHistory()
    for _ in range(1000):
        history.call_started(2.0, now_s=5.0)

    assert history.wait_s(5.0) == pytest.approx(2.0, rel=1e-3)
    assert history.wait_s(15.0) == history.wait_s(5.0)


def test_waits_that_nobody_confirms_are_expected_no_longer():
    history = ProgramHistory()
    for _ in range(1000):
        history.call_started(2.0, now_s=5.0)

    assert history.wait_s(75.0) == pytest.approx(2.0 / math.e, rel=1e-3)
    assert history.wait_s(1000.0) < 1e-6


def test_ended_programs_are_forgotten():
    history = ProgramHistory()
    for number in range(20):
        runs(history, program(f"p{number}"), RESEARCH, given_up_after=2 if number % 2 else None)

    assert not history._seen
