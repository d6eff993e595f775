"""scripts/setup.sh: what it picks, what it passes on, what it says when it cannot, and that it does nothing twice.

Python and uv are small scripts here that record how they are called: the script's decisions are tested, not pip.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHONS = ("python3", "python3.11", "python3.12", "python3.13")

UNSUITABLE = "exit 1"
WITHOUT_VENV = """
case "$2" in
    *sys.exit*) exit 0 ;;
    *print*) echo 3.12 ;;
    *) exit 1 ;;
esac
"""
# Answers the script's questions with yes, and makes a venv whose programs are this one and a uv that records.
SUITABLE = """
case "$*" in
    *"-m venv"*)
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        printf '#!/bin/sh\\n[ "$1" = --version ] && { echo "uv 0.13.9"; exit; }\\necho "uv $*" >>calls\\n%s\\n' \
            "$FAKE_UV_DOES" >.venv/bin/uv
        chmod +x .venv/bin/uv
        echo "venv by $0" >>calls ;;
esac
exit 0
"""


@pytest.fixture
def setup(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the script in a copy of what it reads; `python` is the body of every Python on PATH."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def run(python: str = SUITABLE, **environment: str) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        for name in PYTHONS:
            (programs / name).write_text(f"#!/bin/sh\n{python}\n")
            (programs / name).chmod(0o755)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "PYTHON"))}
        path = f"{programs}:/usr/local/bin:/usr/bin:/bin"
        settings = {"TEMPO_DEVICE": "cpu", "FAKE_UV_DOES": "exit 0"}
        return subprocess.run(
            [tmp_path / "scripts" / "setup.sh"],
            env={**inherited, **settings, "PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def calls(tmp_path: Path) -> list[str]:
    """What Python and uv were asked to do since the last look."""
    log = tmp_path / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_it_installs_the_lock_and_then_does_nothing(setup, tmp_path: Path) -> None:
    assert setup().returncode == 0
    made, lock, project = calls(tmp_path)
    assert made.startswith("venv by")
    assert "--requirements requirements/cpu.lock --overrides requirements/overrides-cpu.txt --torch-backend cpu" in lock
    assert project.endswith("--no-deps --editable .")

    again = setup()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert calls(tmp_path) == []


def test_a_changed_lock_is_installed(setup, tmp_path: Path) -> None:
    setup()
    calls(tmp_path)
    with (tmp_path / "requirements" / "cpu.lock").open("a") as lock:
        lock.write("one-more==1.0\n")

    assert setup().returncode == 0
    assert [line.split()[:3] for line in calls(tmp_path)] == [["uv", "pip", "install"]] * 2


def test_wheels_of_ones_own_are_passed_to_uv(setup, tmp_path: Path) -> None:
    """Then they hold the CPU build of torch, and uv is not sent to an index for it."""
    setup(PIP_FIND_LINKS="/wheels /more")
    lock = calls(tmp_path)[1]
    assert "--find-links /wheels --find-links /more" in lock
    assert "--torch-backend" not in lock


def test_another_device_gets_a_new_environment(setup, tmp_path: Path) -> None:
    """Both builds of vLLM install the same files; one on top of the other breaks."""
    setup()
    (tmp_path / ".venv" / "left-over").touch()
    calls(tmp_path)

    assert setup(TEMPO_DEVICE="cuda").returncode == 0
    made, lock, _ = calls(tmp_path)
    assert made.startswith("venv by")
    assert "--requirements requirements/cuda.lock --torch-backend auto" in lock
    assert "overrides" not in lock
    assert not (tmp_path / ".venv" / "left-over").exists()


def test_a_failed_install_is_loud_and_is_tried_again(setup, tmp_path: Path) -> None:
    failed = setup(FAKE_UV_DOES="echo no such package; exit 3")
    assert failed.returncode != 0
    assert "no such package" in failed.stderr
    assert "setup: this failed: .venv/bin/uv pip install" in failed.stderr

    shutil.rmtree(tmp_path / ".venv")
    assert setup().returncode == 0


def test_without_a_suitable_python_it_says_which_it_needs(setup) -> None:
    failed = setup(UNSUITABLE)
    assert failed.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 on PATH" in failed.stderr


def test_a_python_that_is_asked_for_is_taken_or_refused(setup, tmp_path: Path) -> None:
    assert setup(PYTHON=str(tmp_path / "bin" / "python3.13")).returncode == 0
    assert calls(tmp_path)[0] == f"venv by {tmp_path / 'bin' / 'python3.13'}"
    shutil.rmtree(tmp_path / ".venv")

    failed = setup(PYTHON="/bin/false")
    assert failed.returncode != 0
    assert "PYTHON=/bin/false is not a Python 3.11, 3.12 or 3.13" in failed.stderr


def test_without_the_venv_module_it_says_what_to_install(setup) -> None:
    failed = setup(WITHOUT_VENV)
    assert failed.returncode != 0
    assert "apt install python3.12-venv" in failed.stderr


def test_an_unknown_device_is_refused(setup) -> None:
    failed = setup(TEMPO_DEVICE="tpu")
    assert failed.returncode != 0
    assert "TEMPO_DEVICE=tpu; set it to cpu or cuda" in failed.stderr


def test_the_locks_name_no_place_to_get_packages_from() -> None:
    for path in (ROOT / "requirements").glob("*.lock"):
        lines = path.read_text().splitlines()
        assert len(lines) > 100
        assert [line for line in lines if "://" in line or "@" in line or line.startswith(("-", "/", "."))] == []
