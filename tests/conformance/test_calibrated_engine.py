"""Calibration of a real engine: measured at the first start, read at the second."""

import pytest
import structlog

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("vllm")

from tempo_router.config import SchedulingConfig  # noqa: E402
from tests.contract.test_engine import Listener  # noqa: E402
from workers.default_model import ensure_default_model  # noqa: E402
from workers.vllm_engine import start_vllm_engine  # noqa: E402

ENGINE_KWARGS = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_model_len": 1024, "block_size": 32}


async def test_step_times_are_measured_once_for_the_same_engine(tmp_path):
    model = str(ensure_default_model(tmp_path))
    events = []
    found = []
    for _ in range(2):
        listener = Listener()
        with structlog.testing.capture_logs() as logs:
            engine = await start_vllm_engine(
                model,
                ENGINE_KWARGS,
                on_step=listener.on_step,
                on_death=listener.on_death,
                scheduling=SchedulingConfig(policy="tempo"),
                calibrations=tmp_path / "calibrations",
            )
        events.append([entry["event"] for entry in logs])
        found.append((engine.calibration, len(listener.steps)))
        await engine.shutdown()

    (first, steps), (second, later_steps) = found
    assert "calibrated" in events[0]
    assert "calibrated" not in events[1]
    assert steps > 100
    assert later_steps == 0
    assert second.coefficients == pytest.approx(first.coefficients)
    assert second.upper_ratio == pytest.approx(first.upper_ratio)
    assert len(list((tmp_path / "calibrations").iterdir())) == 1
