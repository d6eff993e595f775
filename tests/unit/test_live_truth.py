"""A profile fitted to a router's log: from whose steps, and how their speed changed meanwhile."""

from pathlib import Path

import pytest

from benchmarks import live_truth
from benchmarks.live_truth import Record, engines_of, errors, read_record, simulated_row
from tempo_router.config import SchedulingConfig
from tempo_router.event_log import Beginning, beginning_line, event_line
from tempo_router.events import Progressed, ReplicaAttached, ReplicaCapacity, ReplicaLoad, StepReport
from tempo_router.request import Deadline, ReplicaId
from tempo_router.simulation.report import Report
from tempo_router.simulation.simulator import Setup, simulate
from tempo_router.simulation.trace import Trace, TraceCall, Unit

GPU, OTHER = ReplicaId("gpu0"), ReplicaId("gpu1")
STEP_S = 0.004


def log_of(folder: Path, factors: dict[int, float]) -> Path:
    """Steps of equal work, back to back, so many times as long as usual by second of the log's clock, from 100 s on."""
    lines = [
        beginning_line(Beginning(SchedulingConfig(), 1)),
        event_line(ReplicaAttached(99.0, GPU, ReplicaCapacity(8, 512, 10_000), ()), ()),
    ]
    at_s = 100.0
    while int(at_s) - 100 in factors:
        duration_s = STEP_S * factors[int(at_s) - 100]
        at_s += duration_s
        step = StepReport(duration_s, 0, 8, 800, 0.0)
        lines.append(event_line(Progressed(at_s, GPU, ReplicaLoad(8, 0, 9000), step, (), ()), ()))
    path = folder / "events-1.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_steps_take_as_long_as_in_the_log_second_by_second(tmp_path: Path):
    (engine,) = engines_of(read_record(log_of(tmp_path, {0: 1.0, 1: 2.0, 2: 1.0})), 100.0, 103.0)
    drift = engine.profile.drift
    assert drift is not None
    plain_s = engine.profile.step_time.duration_s((), 8, 800)

    assert [drift(second + 0.5) * plain_s / STEP_S for second in range(3)] == pytest.approx([1, 2, 1], rel=0.02)
    assert engine.step_error < 0.02
    assert plain_s * drift(50.0) / STEP_S == pytest.approx(3.0 / 2.5, rel=0.05), "elsewhere as overall"


def test_only_steps_of_the_cell_count(tmp_path: Path):
    record = read_record(log_of(tmp_path, {0: 1.0, 1: 3.0, 2: 1.0}))
    (engine,) = engines_of(record, 101.1, 101.9)

    assert engine.profile.step_time.duration_s((), 8, 800) == pytest.approx(3.0 * STEP_S, rel=0.05)
    with pytest.raises(ValueError, match=r"no step was made by gpu0 between 200.0 and 300.0 s"):
        engines_of(record, 200.0, 300.0)


def two_engines(folder: Path, factor: float) -> Record:
    """The second takes `factor` times as long for the same steps, and has half the cache and slots."""
    lines = log_of(folder, {0: 1.0}).read_text().splitlines()
    lines.append(event_line(ReplicaAttached(99.5, OTHER, ReplicaCapacity(4, 512, 5_000), ()), ()))
    for number in range(100):
        step = StepReport(factor * STEP_S, 0, 8, 800, 0.0)
        at_s = 100.0 + 0.01 * number
        lines.append(event_line(Progressed(at_s, OTHER, ReplicaLoad(4, 0, 4000), step, (), ()), ()))
    log = folder / "events-2.jsonl"
    log.write_text("\n".join(lines) + "\n")
    return read_record(log)


def test_each_of_two_engines_has_its_own_steps_and_capacity(tmp_path: Path):
    first, second = engines_of(two_engines(tmp_path, 3.0), 100.0, 101.5)
    assert first.profile.step_time.duration_s((), 8, 800) == pytest.approx(STEP_S, rel=0.05)
    assert second.profile.step_time.duration_s((), 8, 800) == pytest.approx(3.0 * STEP_S, rel=0.05)
    assert (first.profile.shape.max_running, second.profile.shape.max_running) == (8, 4)
    assert (first.profile.shape.kv_tokens, second.profile.shape.kv_tokens) == (9984, 4992)
    assert (first.steps, second.steps) == (250, 100)


def test_an_engine_without_steps_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no step was made by gpu1 between 100\.995 and 102\.0 s"):
        engines_of(two_engines(tmp_path, 1.0), 100.995, 102.0)


def test_a_log_without_engines_is_refused(tmp_path: Path):
    log = tmp_path / "events-1.jsonl"
    log.write_text(beginning_line(Beginning(SchedulingConfig(), 1)) + "\n")
    with pytest.raises(ValueError, match="no engine attached"):
        read_record(log)


LIVE = {"replicas": 2, "slots": 8, "sheds": False, "seed": 0, "policy": "fcfs", "attainment": 0.5}
UNITS = tuple(
    Unit(f"u{number}", 0.0, Deadline(60.0), (TraceCall(f"c{number}", 10, 40),), app="mail") for number in range(40)
)


def test_a_cell_is_simulated_with_all_of_its_engines(tmp_path: Path):
    """All at once: a second engine, three times as slow, takes a share, and they end sooner than on the first alone."""
    engines = engines_of(two_engines(tmp_path, 3.0), 100.0, 101.5)
    trace = Trace("burst", UNITS)
    both = simulated_row(trace, LIVE, engines, "fcfs")
    alone = simulated_row(trace, LIVE | {"replicas": 1}, engines[:1], "fcfs")
    assert (both["policy"], both["profile"]) == ("fcfs", "fitted to the live engine")
    assert both["attainment"] == 1.0, "the simulator's, not that of the live row"
    assert both["units"] == 40
    assert both["ttlt_p95_s"] < alone["ttlt_p95_s"]
    with pytest.raises(ValueError, match="1 engines attached, 2 were to"):
        simulated_row(trace, LIVE, engines[:1], "fcfs")


def test_the_simulated_router_is_told_the_bound_that_the_live_one_was_told(tmp_path: Path, monkeypatch):
    """A live call says how long its answer may be, and that is how long it is: more than a bound of 4,096 tells."""
    setups = []

    def noting(trace: Trace, setup: Setup) -> Report:
        setups.append(setup)
        return simulate(trace, setup)

    monkeypatch.setattr(live_truth, "simulate", noting)
    engines = engines_of(two_engines(tmp_path, 1.0), 100.0, 101.5)
    simulated_row(Trace("burst", UNITS), LIVE, engines, "tempo")
    profiles = tuple(engine.profile for engine in engines)
    assert setups == [
        Setup("tempo", profiles, max_running=8, sheds=False, seed=0, knowledge="regressor", max_output_tokens=1)
    ]


def test_errors_are_relative_to_live_but_of_attainment_in_points():
    live = {
        "token_goodput": 200.0, "attainment": 0.80, "ttft_p50_s": 0.0, "ttft_p95_s": 0.5, "tbt_p50_s": None,
        "tbt_p99_s": 0.1, "ttlt_p95_s": 4.0,
    }  # fmt: skip
    simulated = {
        "token_goodput": 150.0, "attainment": 0.85, "ttft_p50_s": 0.1, "ttft_p95_s": 0.75, "tbt_p50_s": 0.1,
        "tbt_p99_s": None, "ttlt_p95_s": 3.0,
    }  # fmt: skip
    found = errors(live, simulated)
    assert list(found) == ["token_goodput", "attainment", "ttft_p50_s", "ttft_p95_s", "ttlt_p95_s"]
    assert {name: one["difference"] for name, one in found.items()} == {
        "token_goodput": -0.25, "attainment": pytest.approx(0.05), "ttft_p50_s": None, "ttft_p95_s": 0.5,
        "ttlt_p95_s": -0.25,
    }  # fmt: skip
    assert (found["ttft_p95_s"]["live"], found["ttft_p95_s"]["simulated"]) == (0.5, 0.75)
