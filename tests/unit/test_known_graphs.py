"""A program whose stages are known is foretold by them: not by the mean, and not by patterns."""

import json
from dataclasses import asdict

import pytest

from tempo_router.event_log import Beginning, beginning_line, event_line, read_line, replay
from tempo_router.events import ProgramFinished, ProgramOutlined, Ticked
from tempo_router.known_stages import KnownStage
from tempo_router.pattern_history import PatternHistory
from tempo_router.prediction import LengthHistograms
from tempo_router.program_history import NOTHING, ProgramHistory
from tempo_router.request import ProgramCall, ProgramId
from tests.builders import arrived, planned_replica, request, router
from tests.unit.test_program_history import GAP_S, RESEARCH, program, runs, truth, values

WHOLE = tuple(
    KnownStage(number, len(calls), max(prompt for prompt, _ in calls), max(output for _, output in calls), gap_s=GAP_S)
    for number, calls in enumerate([[(400, 50)], [(200, 700), (200, 700)], [(1300, 60)], [(2000, 600)]])
)
SAME = [[(400, 50)], [(200, 700), (200, 700)], [(1300, 60)], [(2000, 600)]]
SHAPE = (KnownStage(0), KnownStage(1, calls=2), KnownStage(2))


def taught(kind: type[ProgramHistory] = ProgramHistory, programs: int = 40) -> ProgramHistory:
    history = kind()
    for number in range(programs):
        runs(history, program(f"p{number}"), RESEARCH)
    return history


@pytest.mark.parametrize("kind", [ProgramHistory, PatternHistory])
@pytest.mark.parametrize("programs", [0, 40])
def test_only_the_stages_to_come_count_whatever_was_seen_of_others(kind, programs):
    history = taught(kind, programs)
    history.outlined(ProgramId("new"), WHOLE)
    for stage in range(5):
        one = program("new", stage=stage)
        history.call_came(one, stage, 100, 100.0 + stage)
        assert values(history.forecast(one)) == pytest.approx(values(truth(SAME[stage + 1 :])))
        ahead = history.stages_ahead(one)
        assert [each.chain_tokens for each in ahead] == [50, 700, 60, 600][stage + 1 :]
        different, of_unit = history.forecasts([None, program("other"), one])
        assert different[of_unit[0]] == NOTHING
        assert different[of_unit[2]] == history.forecast(one)
        told = history.match(one)
        assert told == {"kind": "known graph", "app": "research", "stage": stage, "stages": 4}
        assert json.loads(json.dumps([told, [asdict(each) for each in ahead]]))


def test_what_nobody_said_is_as_in_the_applications_stages():
    history = taught()
    history.outlined(ProgramId("new"), SHAPE)
    forecast = history.forecast(program("new"))
    assert forecast.calls == 3
    assert forecast.stages == 2
    assert forecast.unknown == 0
    assert forecast.chain_tokens == pytest.approx(700 + 60)
    assert forecast.output_tokens == pytest.approx(2 * 500 + 60, rel=0.01)
    assert forecast.gaps_s == pytest.approx(2 * GAP_S)


def test_of_an_application_that_was_never_seen_answers_are_as_long_as_answers_are():
    history = ProgramHistory()
    history.lengths = LengthHistograms()
    for number in range(200):
        history.lengths.observe(request(f"r{number}", app="other"), 80 + number % 40, is_complete=True)
    history.outlined(ProgramId("new"), (KnownStage(0), KnownStage(1, calls=3), KnownStage(2, max_tokens=20)))
    one = program("new")
    history.call_came(one, 0, 500, 0.0)
    forecast = history.forecast(one)
    assert forecast.prompt_tokens == 4 * 500, "prompts are like the program's last one"
    assert forecast.output_tokens == pytest.approx(3 * 100 + 20, rel=0.1)
    assert 100 + 20 + 5 < forecast.chain_tokens < 120 + 20, "the longest of three is longer than the mean"


def test_a_bound_on_the_answer_bounds_what_is_foretold():
    history = taught()
    history.outlined(ProgramId("new"), (KnownStage(0), KnownStage(1, calls=2, max_tokens=30)))
    forecast = history.forecast(program("new"))
    assert (forecast.output_tokens, forecast.chain_tokens) == (60, 30)


@pytest.mark.parametrize("kind", [ProgramHistory, PatternHistory])
def test_its_least_rest_is_below_what_was_said_and_never_of_stages_behind(kind):
    history = taught(kind)
    history.outlined(ProgramId("new"), WHOLE)
    least = [history.least_chain_tokens(program("new", stage=stage), 0.1) for stage in range(5)]
    expected = [1360, 660, 600, 0, 0]
    assert least == pytest.approx([0.68 * tokens for tokens in expected], rel=0.01)


def test_an_unsaid_length_counts_at_its_least_with_what_answers_are_at_their_shortest():
    history = ProgramHistory()
    for number in range(200):
        history.lengths.observe(request(f"r{number}", app="research"), 50 + number, is_complete=True)
    history.outlined(ProgramId("new"), (KnownStage(0), KnownStage(1), KnownStage(2, max_tokens=10)))
    usual = history.lengths.of_stage("m", "research", 1)
    assert history.least_chain_tokens(program("new"), 0.1) == pytest.approx(usual.quantile(0.1) + 10)
    assert 50 < usual.quantile(0.1) < 100


def test_means_tell_no_least_rest():
    assert taught().least_chain_tokens(program("new"), 0.1) == 0.0


def test_a_forgotten_graph_leaves_the_mean():
    history = taught()
    before = history.forecast(program("new"))
    history.outlined(ProgramId("new"), SHAPE)
    assert history.forecast(program("new")) != before
    history.outlined(ProgramId("new"), ())
    assert history.forecast(program("new")) == before


def outlined(core, name: str = "p", at_s: float = 0.0) -> ProgramOutlined:
    event = ProgramOutlined(at_s, ProgramId(name), WHOLE)
    core.handle(event)
    return event


@pytest.mark.parametrize("model", ["stages", "patterns"])
def test_the_plan_counts_the_stages_to_come(model):
    """Of two programs alike so far, the one that is known to go on is worth less for a GPU second: it costs more."""
    core = router(policy="tempo", program_model=model)
    core.handle(planned_replica("gpu0"))
    core.handle(ProgramOutlined(0.0, ProgramId("brief"), (KnownStage(0),)))
    outlined(core, "long")
    for name in ("brief", "long"):
        core.handle(arrived(name, slo=ProgramCall(ProgramId(name), 600.0), app="research"))
    brief, long = (core.outlook(ProgramId(name), 600.0) for name in ("brief", "long"))
    assert brief is not None
    assert long is not None
    assert (brief.calls, len(brief.ahead_s)) == (0, 1)
    assert (long.calls, len(long.ahead_s)) == (4, 4)
    assert long.left_s > brief.left_s + 3 * GAP_S
    core.handle(Ticked(1.0))
    standings = {name: core._fleet.running[name].standing for name in ("brief", "long")}
    assert standings["long"].later_s > standings["brief"].later_s == 0.0
    core.audit()


def test_budgets_follow_what_each_stage_takes_tools_included():
    core = router("gpu0", policy="tempo")
    stages = (KnownStage(0), KnownStage(1, 1, 10, 10, gap_s=90.0), KnownStage(2, 1, 10, 10, gap_s=0.0))
    core.handle(ProgramOutlined(0.0, ProgramId("p"), stages))
    core.handle(arrived("first", slo=ProgramCall(ProgramId("p"), 600.0)))
    outlook = core.outlook(ProgramId("p"), 600.0)
    assert outlook is not None
    assert outlook.ahead_s[1] == pytest.approx(90.0 + outlook.ahead_s[2])


def test_what_is_known_is_forgotten_with_the_program_even_if_no_call_of_it_came():
    core = router("gpu0", policy="tempo")
    outlined(core)
    core.handle(ProgramFinished(1.0, ProgramId("p"), is_complete=False))
    assert not core._history._known_graphs


def test_a_record_with_known_graphs_replays():
    core = router(policy="tempo")
    beginning = Beginning(core._config, 0)
    core = beginning.core()
    events = [
        planned_replica("gpu0"),
        ProgramOutlined(0.0, ProgramId("p"), WHOLE),
        *(arrived(f"c{number}", 0.1 * number, slo=ProgramCall(ProgramId("p"), 60.0)) for number in range(3)),
        arrived("alone", 0.5),
    ]
    lines = [beginning_line(beginning), *(event_line(event, core.handle(event)) for event in events)]
    read = read_line(lines[2])
    assert isinstance(read, tuple)
    assert read[0] == events[1]
    assert list(replay(lines)) == []
