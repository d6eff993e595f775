"""A record that cannot go on ends, and says so; the router goes on."""

from pathlib import Path

import structlog

from cluster.event_recorder import EventRecorder
from tempo_router.config import SchedulingConfig
from tempo_router.event_log import Beginning
from tempo_router.events import Ticked


def test_a_full_disk_ends_the_record_and_not_the_router(tmp_path):
    recorder = EventRecorder(tmp_path / "deep" / "events.jsonl", Beginning(SchedulingConfig(), epoch=3))
    recorder.told(Ticked(1.0), [])
    recorder.close()
    assert len((tmp_path / "deep" / "events-3.jsonl").read_text().splitlines()) == 2
    recorder.told(Ticked(2.0), [])

    full = EventRecorder(tmp_path / "events.jsonl", Beginning(SchedulingConfig(), epoch=4))
    full.close()
    full._file = Path("/dev/full").open("w", encoding="utf-8", buffering=1)  # noqa: SIM115 - the recorder closes it
    with structlog.testing.capture_logs() as logs:
        full.told(Ticked(1.0), [])
        full.told(Ticked(2.0), [])
        full.close()
    assert {entry["event"] for entry in logs} == {"record_cut"}
    assert "No space left" in logs[0]["problem"]
