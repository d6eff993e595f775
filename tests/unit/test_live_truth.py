"""A profile fitted to a router's log: from whose steps, and how their speed changed meanwhile."""

from pathlib import Path

import pytest

from benchmarks.live_truth import engine_of, read_record
from tempo_router.config import SchedulingConfig
from tempo_router.event_log import Beginning, beginning_line, event_line
from tempo_router.events import Progressed, ReplicaAttached, ReplicaCapacity, ReplicaLoad, StepReport
from tempo_router.request import ReplicaId

GPU = ReplicaId("gpu0")
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
    engine = engine_of(read_record(log_of(tmp_path, {0: 1.0, 1: 2.0, 2: 1.0})), 100.0, 103.0)
    drift = engine.profile.drift
    assert drift is not None
    plain_s = engine.profile.step_time.duration_s((), 8, 800)

    assert [drift(second + 0.5) * plain_s / STEP_S for second in range(3)] == pytest.approx([1, 2, 1], rel=0.02)
    assert engine.step_error < 0.02
    assert plain_s * drift(50.0) / STEP_S == pytest.approx(3.0 / 2.5, rel=0.05), "elsewhere as overall"


def test_only_steps_of_the_cell_count(tmp_path: Path):
    record = read_record(log_of(tmp_path, {0: 1.0, 1: 3.0, 2: 1.0}))
    engine = engine_of(record, 101.1, 101.9)

    assert engine.profile.step_time.duration_s((), 8, 800) == pytest.approx(3.0 * STEP_S, rel=0.05)
    with pytest.raises(ValueError, match=r"no step was made between 200.0 and 300.0 s"):
        engine_of(record, 200.0, 300.0)
