"""A whole served application, started as a user starts it: `tempo serve` on a configuration file."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from deployments.ports import free_port

START_S = 240.0


@dataclass
class Served:
    """A running `tempo serve`. url: where clients connect."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    config: Path

    @property
    def log(self) -> str:
        """All that it printed so far."""
        return (self.folder / "serve.log").read_text(errors="replace")

    def processes(self, title: str) -> list[psutil.Process]:
        """Its processes whose title holds this text, such as "ServeReplica:tempo:worker"."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> int:
        """Ctrl-C, then wait for the end. Returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=120)


def write_config(folder: Path, arguments: dict[str, Any], port: int) -> Path:
    """A serve_config.yaml with these `args`."""
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "tempo",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": {"data_dir": str(folder / "data"), **arguments},
            }
        ],
    }
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(folder: Path, arguments: dict[str, Any]) -> Served:
    """Start, without waiting until it is ready."""
    port = free_port()
    config = write_config(folder, arguments, port)
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", "serve", str(config)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    return Served(process, f"http://127.0.0.1:{port}", folder, config)


@contextlib.contextmanager
def served(folder: Path, arguments: dict[str, Any]) -> Iterator[Served]:
    """Serve until the block ends. Fails with the log when it does not become ready within START_S."""
    server = launch(folder, arguments)
    try:
        wait_until_ready(server)
        yield server
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.stop()
        if server.process.poll() is None:
            server.process.kill()


@contextlib.contextmanager
def launched(folder: Path, arguments: dict[str, Any]) -> Iterator[Served]:
    """Start, for a test of what happens then; end whatever runs when the block ends."""
    server = launch(folder, arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def wait_until_ready(server: Served) -> None:
    """Wait for 200 from /health."""
    give_up_s = time.monotonic() + START_S
    while True:
        assert server.process.poll() is None, f"`tempo serve` ended:\n{server.log}"
        assert time.monotonic() < give_up_s, f"not ready within {START_S} s:\n{server.log}"
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.25)
