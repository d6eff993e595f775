"""The tempo command: its arguments, its messages, and that it ends what it started."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from deployments import cli, ports
from deployments.ports import free_port, is_free
from deployments.run_file import Run, RunFile
from tempo_router.errors import TempoError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A valid file whose data folder is the test's own."""
    deploy = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    deploy["applications"][0]["args"]["data_dir"] = str(tmp_path / "data")
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(deploy))
    return path


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


def tempo(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does; it must end by itself."""
    command = [sys.executable, "-m", "deployments.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


# --- check


def test_check_accepts_the_default_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(ROOT / "serve_config.yaml")]) == 0
    assert "serves tempo-tiny on http://127.0.0.1:8000" in capsys.readouterr().out


def test_check_refuses_a_misspelt_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("hopeless", "hopless"))
    assert cli.main(["check", str(config)]) == cli.EXIT_USAGE
    assert "unknown key 'hopless'; did you mean 'hopeless'?" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "-1", "web", "8000.5", ""])
def test_what_is_no_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--port", port])
    assert exit_.value.code == cli.EXIT_USAGE
    assert "is not a port" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["serv"], ["check", "--polcy", "x"]])
def test_an_unknown_command_or_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == cli.EXIT_USAGE
    assert "usage: tempo" in capsys.readouterr().err


# --- serve: what is found before anything starts


def test_serve_says_who_has_the_port(config: Path, listener: socket.socket) -> None:
    """HAProxy shares ports silently: without the check two servers would answer in turn."""
    port = listener.getsockname()[1]
    done = tempo("serve", config, "--port", port)

    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr
    assert f"(process {os.getpid()})" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_refuses_a_typo_before_it_starts_anything(config: Path) -> None:
    config.write_text(config.read_text().replace("hopeless", "hopless"))
    done = tempo("serve", config)
    assert done.returncode == cli.EXIT_USAGE
    assert "did you mean 'hopeless'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_says_that_redis_is_away(config: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"redis://:s3cret@127.0.0.1:{unused.getsockname()[1]}/0"
        done = tempo("serve", config, "--port", free_port(), "--set", f"redis_url={url}")
    assert done.returncode == 1
    assert "Redis at redis://***@127.0.0.1" in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_says_that_the_model_is_not_there(config: Path) -> None:
    done = tempo("serve", config, "--port", free_port(), "--model", "./no-such-model")
    assert done.returncode == 1
    assert "./no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_refuses_a_data_folder_that_is_served_already(config: Path, tmp_path: Path) -> None:
    run_file = RunFile(tmp_path / "data")
    with run_file.held():
        run_file.write(Run(pid=os.getpid()))
        done = tempo("serve", config, "--port", free_port())
    assert done.returncode == 1
    assert f"process {os.getpid()} already serves from {tmp_path / 'data'}" in done.stderr


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*cli.ENVIRONMENT, *cli.LOCAL_ENVIRONMENT, *cli.SHARED_PORTS, "RAY_ADDRESS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "0"

    cli.set_environment()

    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == "2"


def test_a_shared_ray_cluster_keeps_its_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*cli.ENVIRONMENT, *cli.LOCAL_ENVIRONMENT, *cli.SHARED_PORTS]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": "192.0.2.1:6379"})

    cli.set_environment()

    assert not cli.LOCAL_ENVIRONMENT.keys() & os.environ.keys()


def test_a_taken_ha_proxy_port_is_replaced(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(cli, "SHARED_PORTS", {"A_PORT": listener.getsockname()[1]})
    cli.set_environment()
    port = int(os.environ["A_PORT"])
    assert is_free("0.0.0.0", port)
    # HAProxy binds it some ten seconds later; until then the kernel must not give it to an outgoing connection.
    assert port < first_outgoing_port()


def test_no_two_taken_ports_get_the_same_in_place(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    taken, first = listener.getsockname()[1], free_port()
    monkeypatch.setattr(ports, "_QUIET_PORTS", range(first, first + 20))
    monkeypatch.setattr(ports.random, "sample", lambda numbers, _: list(numbers))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(cli, "SHARED_PORTS", dict.fromkeys(("A_PORT", "B_PORT", "C_PORT"), taken))
    cli.set_environment()
    assert len({os.environ[name] for name in ("A_PORT", "B_PORT", "C_PORT")}) == 3


def first_outgoing_port() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


# --- status and down


def test_status_and_down_of_nothing(config: Path) -> None:
    status, down = tempo("status", config), tempo("down", config)
    assert (status.returncode, down.returncode) == (1, 0)
    assert "not served from this data_dir" in status.stdout
    assert "nothing to stop" in down.stdout


def test_a_file_that_a_killed_run_left_is_nobody(tmp_path: Path) -> None:
    run_file = RunFile(tmp_path)
    with run_file.held():
        run_file.write(Run(pid=os.getpid(), url="http://127.0.0.1:1"))
        assert run_file.read() == Run(pid=os.getpid(), url="http://127.0.0.1:1")
        with pytest.raises(TempoError, match="already serves"), RunFile(tmp_path).held():
            pytest.fail("two hold one data folder")
    assert run_file.read() is None

    (tmp_path / "serve.json").write_text(json.dumps({"pid": os.getpid()}))
    assert run_file.read() is None
    with run_file.held():
        assert run_file.read() is None


SERVER = """
import fcntl, os, signal, subprocess, sys, time
from pathlib import Path
from deployments.run_file import Run, RunFile
run_file = RunFile(Path(sys.argv[1]))
with run_file.held():
    run_file.write(Run(pid=os.getpid()))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    print("SERVING", flush=True)
    got = [signal.sigwait({signal.SIGTERM, signal.SIGINT}).name]
    if sys.argv[2] == "--now":
        got.append(signal.sigwait({signal.SIGTERM, signal.SIGINT}).name)
    print(sorted(got), flush=True)
"""


@pytest.mark.parametrize(("option", "signals"), [("", "['SIGTERM']"), ("--now", "['SIGINT', 'SIGTERM']")])
def test_down_signals_the_process_and_waits_for_its_end(config: Path, option: str, signals: str) -> None:
    data_dir = config.parent / "data"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, data_dir, option], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "SERVING\n"
            down = tempo("down", config, *([option] if option else []))
            assert down.stdout == f"stopped process {server.pid}\n"
            assert server.stdout.readline().strip() == signals
        finally:
            server.kill()


# --- the process tree

# A server that leaves everything behind: a child that ignores SIGTERM, and a grandchild whose parent has ended.
LEAVES_ALL_BEHIND = """
import signal, subprocess, sys, threading
stubborn = "import signal, sys, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('UP', flush=True);"
stubborn += "threading.Event().wait()"
orphan = "import subprocess, sys; wait = 'import threading; threading.Event().wait()';"
orphan += "subprocess.Popen([sys.executable, '-c', wait], start_new_session=True)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
subprocess.run([sys.executable, "-c", orphan], check=True)
print("UP", flush=True)
if sys.argv[1] == "wait":
    threading.Event().wait()
"""

SUPERVISOR = """
import json, sys
import psutil
from deployments import cli, descendants
descendants.adopt_orphans()
server = psutil.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
cli._pass_signals_on(server)
status = cli._wait_and_reap(server.pid)
left = descendants.end_descendants(grace_s=0.5)
print(json.dumps({"status": status, "ended": len(left), "living": len(psutil.Process().children(recursive=True))}))
"""


def test_what_the_server_leaves_behind_is_ended(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, LEAVES_ALL_BEHIND, "go"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == {"status": 0, "ended": 2, "living": 0}


def test_a_second_signal_ends_everything_at_once() -> None:
    """The server does not answer the first one; nobody waits for it."""
    deaf = LEAVES_ALL_BEHIND.replace('print("UP"', 'signal.signal(signal.SIGTERM, signal.SIG_IGN); print("UP"', 1)
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, deaf, "wait"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as supervisor:  # fmt: skip
        try:
            assert supervisor.stdout is not None
            assert supervisor.stderr is not None
            assert supervisor.stdout.readline() == "UP\n"
            family = psutil.Process(supervisor.pid).children(recursive=True)
            assert len(family) == 3
            supervisor.send_signal(signal.SIGINT)
            assert "stopping" in supervisor.stderr.readline() + supervisor.stderr.readline()
            assert all(process.is_running() for process in family)
            supervisor.send_signal(signal.SIGTERM)
            result = json.loads(supervisor.stdout.readline())
        finally:
            supervisor.kill()
    assert result["status"] == 128 + signal.SIGKILL
    assert result["living"] == 0
    assert not any(process.is_running() for process in family)
