"""The benchmark of the estimates replays a trace in the order in which a router would have seen it."""

import random

import pytest

from benchmarks.calibration import ALL_APPS, MODELS, main, patience_mean, releases, replay, service_s
from tempo_router.request import Deadline, Latency, ProgramCall
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.trace import Trace, TraceCall, Unit

PROGRAM = Unit(
    "p",
    10.0,
    Deadline(60.0),
    (
        TraceCall("a", 5, 100),
        TraceCall("b", 5, 300),
        TraceCall("c", 5, 10, stage=1, parents=(0, 1), gap_s=2.0),
    ),
    app="research",
    is_program=True,
)
CHAT = Unit("x", 11.0, Latency(2.0, 0.1), (TraceCall("x", 7, 20),), app="chat", tenant="t")


def test_calls_come_in_order_of_release_and_a_child_after_its_slowest_parent():
    told = list(releases(Trace("t", (PROGRAM, CHAT))))
    child_s = 10.0 + service_s(300) + 2.0
    assert [(at_s, spec.request_id, tokens) for at_s, spec, tokens in told] == [
        (10.0, "a", 100),
        (10.0, "b", 300),
        (11.0, "x", 20),
        (child_s, "c", 10),
    ]
    child = told[-1][1]
    assert (child.stage, child.app) == (1, "research")
    assert isinstance(child.slo, ProgramCall)
    assert child.slo.ttlt_s == pytest.approx(70.0 - child_s)


def test_clients_leave_as_often_as_was_asked():
    rng = random.Random(1)
    lengths = [rng.randrange(1, 500) for _ in range(2000)]
    mean = patience_mean(lengths, 0.3)
    cut = sum(rng.expovariate(1 / mean) < tokens for tokens in lengths)
    assert cut == pytest.approx(600, rel=0.1)


@pytest.mark.parametrize("censored", [0.0, 0.3])
def test_a_replay_judges_every_model_on_the_same_calls_and_repeats(censored):
    trace = generate(GeneratorConfig(duration_s=300.0), seed=4)
    rows, cost = replay(trace, censored, training_s=100.0)
    overall = [row for row in rows if row.app == ALL_APPS]
    assert [row.model for row in overall] == list(MODELS)
    assert len({row.calls for row in overall}) == 1
    assert 0 < overall[0].calls < trace.calls
    assert cost.fits == pytest.approx(2, abs=1)
    by_model = {row.model: row.pinball for row in overall}
    assert by_model["histograms"] < by_model["no stages"] < by_model["global"]
    assert replay(trace, censored, training_s=100.0)[0] == rows


def test_a_missing_trace_is_one_line_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["calibration", "--traces", "absent.csv"])
    with pytest.raises(SystemExit):
        main()
    assert "absent.csv: cannot be read: No such file or directory" in capsys.readouterr().err
