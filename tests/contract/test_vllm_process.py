"""What happens to processes when a vLLM engine fails, dies or is killed. Each test starts a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from workers.default_model import ensure_default_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
IN_A_PROCESS = {"distributed_executor_backend": "mp", "max_num_seqs": 2, "max_model_len": 1024}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return ensure_default_model(tmp_path_factory.mktemp("data"))


@contextmanager
def engine_process(model: Path, engine_kwargs: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tests.contract.vllm_process", str(model), json.dumps(engine_kwargs)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The next thing it tells; vLLM's own log lines are not that."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            told: dict[str, Any] = json.loads(line)
            return told
    raise AssertionError(f"the process ended, {process.wait()}, and said nothing")


def gone(pids: list[int]) -> bool:
    """Whether these end by themselves within ten seconds."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_weights_that_do_not_fit_are_a_reason_not_a_hang(model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with engine_process(broken, {}) as process:
        told = heard(process)
        assert (told["failed"], told["children"]) == ("EngineStartError", [])
        assert str(broken) in told["reason"]
        assert "SafetensorError" in told["reason"]
        assert process.wait(timeout=30) == 0


def test_an_executor_that_is_killed_is_the_death_of_the_engine(model):
    with engine_process(model, IN_A_PROCESS) as process:
        pids = heard(process)["children"]
        assert pids
        for pid in pids:
            psutil.Process(pid).kill()
        told = heard(process)
        assert told["children"] == []
        assert told["died"]
        assert process.wait(timeout=60) == 0


def test_an_engine_that_is_killed_leaves_no_process(model):
    with engine_process(model, IN_A_PROCESS) as process:
        pids = heard(process)["children"]
        assert pids
        process.kill()
        process.wait(timeout=10)
        assert gone(pids)
