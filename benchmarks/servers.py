"""Starts the servers that are compared over HTTP, and says what each of their processes costs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.http_load import cpu_seconds, process_tree
from deployments.ports import free_port

MODEL = "tempo-tiny"
ENGINE_KWARGS = {
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 * 1024 * 1024,
}
"""Where ours and plain vLLM are compared; ours would choose the last two by itself on a CPU."""

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
# What Ray and vLLM call their processes. The first that matches names the role; what is left is "other" (Ray's own).
_ROLES = (
    ("worker", re.compile(r"ray::\S*worker")),
    ("ingress", re.compile(r"ray::\S*ingress")),
    ("router", re.compile(r"ray::RouterActor")),
    ("serve controller", re.compile(r"ray::ServeController")),
    ("haproxy", re.compile(r"haproxy|ray::HAProxy")),
    ("engine", re.compile(r"VLLM::|EngineCore|multiprocessing\.spawn")),
    ("front end", re.compile(r"vllm\.entrypoints|APIServer")),
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. pid: the process to signal; all others descend from it."""

    name: str
    url: str
    pid: int

    def processes(self) -> list[psutil.Process]:
        """All of them, now."""
        return process_tree(self.pid)

    def cpu_seconds_by_role(self) -> dict[str, float]:
        """User + system time so far."""
        used: dict[str, float] = {}
        for process in self.processes():
            role = _role(process)
            used[role] = used.get(role, 0.0) + cpu_seconds([process])
        return used


def _role(process: psutil.Process) -> str:
    try:
        title = " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return "other"
    return next((role for role, pattern in _ROLES if pattern.search(title)), "other")


@contextlib.contextmanager
def tempo_server(folder: Path, arguments: Mapping[str, Any]) -> Iterator[Server]:
    """`tempo serve`. arguments: `args` of serve_config.yaml beyond the defaults."""
    port = free_port()
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "tempo",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {"name": "tempo", "data_dir": str(folder / "data"), **arguments},
            }
        ],
    }
    path = folder / "tempo.json"
    path.write_text(json.dumps(config, indent=1))
    program = [sys.executable, "-m", "deployments.cli", "serve", str(path)]
    with _running("tempo", program, port, folder / "tempo.log", {}) as server:
        yield server


@contextlib.contextmanager
def plain_vllm(
    folder: Path, model_path: str, engine_kwargs: Mapping[str, Any], *, model: str = "tempo-tiny"
) -> Iterator[Server]:
    """vLLM's own server. Its environment on a CPU is what our workers choose, so that only the server differs.

    model: as clients call it.
    """
    port = free_port()
    flags = [_flag(name, value) for name, value in engine_kwargs.items()]
    # The command `vllm` looks for a distribution of its own name and fails on the CPU build.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
    program += ["--served-model-name", model, "--host", "127.0.0.1", "--port", str(port), *flags]
    # Ours writes no line per request to the terminal either.
    program += ["--disable-uvicorn-access-log"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with _running("plain", program, port, folder / "plain.log", environment) as server:
        yield server


def _flag(name: str, value: object) -> str:
    """An argument of vLLM's engine as its command takes it."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed}={json.dumps(value) if isinstance(value, dict | list) else value}"


@contextlib.contextmanager
def _running(
    name: str, program: list[str], port: int, log_path: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    with log_path.open("w") as log:
        process = subprocess.Popen(
            program, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
        )
    server = Server(name, f"http://127.0.0.1:{port}", process.pid)
    try:
        _wait_until_ready(server, process, log_path)
        yield server
    finally:
        _stop(server, process)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log_path: Path) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while not _answers(f"{server.url}/health"):
        if process.poll() is not None or time.monotonic() > give_up_s:
            tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"the {server.name} server is not ready; the end of {log_path}:\n{tail}")
        time.sleep(0.5)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own http:// URL
            return bool(response.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def _stop(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Ask, then insist; whatever it started ends with it."""
    started = server.processes() if process.poll() is None else []
    for number in (signal.SIGTERM, signal.SIGINT):
        if process.poll() is None:
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            break
    for left in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait(STOP_TIMEOUT_S)
