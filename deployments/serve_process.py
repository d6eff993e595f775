"""The process behind `tempo serve`: starts Ray, deploys, waits until it answers, and drains at the end.

It does what `serve run` does, with what that leaves out: the file is checked strictly, a failure to start is said
and ends it, and its stop ends everything.
"""

import asyncio
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema

from cluster.redis_store import RedisStore
from deployments import app, descendants
from deployments.cli import EXIT_USAGE
from deployments.config_file import ConfigFile, load_config_file
from deployments.ports import describe_listener, is_free
from deployments.run_file import Run, RunFile
from tempo_router.config import TempoConfig
from tempo_router.errors import ConfigError, TempoError
from workers.default_model import resolve_model

_POLL_S = 0.25
# Requests never pass through Ray's object store.
_OBJECT_STORE_BYTES = 128 * 1024 * 1024


def main() -> int:
    """Serve as the JSON of the first argument says, until SIGTERM. Returns the exit status."""
    request = json.loads(sys.argv[1])
    stop = threading.Event()
    descendants.adopt_orphans()
    _on_sigterm(stop)
    try:
        loaded = load_config_file(Path(request["path"]), request["overrides"], request["port"])
        run_file = RunFile(Path(loaded.config.data_dir))
        with run_file.held():
            run_file.write(Run(pid=os.getppid()))
            _check_surroundings(loaded)
            _serve(loaded, run_file, stop)
    except ConfigError as e:
        print(f"tempo: {e}", file=sys.stderr)
        return EXIT_USAGE
    except TempoError as e:
        print(f"tempo: {e}", file=sys.stderr)
        return 1
    return 0


def _on_sigterm(stop: threading.Event) -> None:
    def note(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, note)


def _check_surroundings(loaded: ConfigFile) -> None:
    """Find now, in a second, what would otherwise fail in some process a minute later."""
    config = loaded.config
    if not is_free(loaded.host, loaded.port):
        raise TempoError(
            f"port {loaded.port} of {loaded.host} is in use{describe_listener(loaded.port)}; "
            "end that process or serve on another port (--port, http_options.port)"
        )
    redis_url = config.redis_url or os.environ.get(app.REDIS_URL_VARIABLE)
    if redis_url:
        asyncio.run(_check_redis(redis_url, config.name))
    if config.engine.kind == "vllm" and "RAY_ADDRESS" not in os.environ:
        resolve_model(config.model, Path(config.data_dir))


async def _check_redis(url: str, name: str) -> None:
    await (await RedisStore.connect(url, name)).close()


def _serve(loaded: ConfigFile, run_file: RunFile, stop: threading.Event) -> None:
    url = f"http://{_reachable(loaded.host)}:{loaded.port}{loaded.route_prefix}"
    print(f"tempo: starting; model {loaded.config.model_name}", flush=True)
    with _ray() as (ray_address, dashboard_url):
        _on_sigterm(stop)  # ray.init has put its own handler there
        run_file.write(Run(os.getppid(), url, dashboard_url, ray_address))
        try:
            _deploy(loaded.deploy)
            if _wait_until_ready(loaded.config.name, url, stop):
                print(_banner(loaded.config, url), flush=True)
                stop.wait()
        finally:
            _stop(loaded.config)


@contextmanager
def _ray() -> Iterator[tuple[str, str]]:
    """A Ray of our own, or the cluster that RAY_ADDRESS names. Yields its address and its dashboard's URL, or ""."""
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"address": "local", "object_store_memory": _OBJECT_STORE_BYTES}
    options = {"address": address} if address else own
    try:
        context = ray.init(namespace="serve", logging_level=logging.WARNING, **options)
    except Exception as e:  # Ray raises bare exceptions, and many kinds.
        raise TempoError(f"Ray could not be {'reached at ' + address if address else 'started'}: {e}") from e
    try:
        dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        yield str(ray.get_runtime_context().gcs_address), dashboard_url
    finally:
        ray.shutdown()


def _deploy(deploy: dict[str, Any]) -> None:
    """As `serve run` does it, so that every key of the file acts: the public serve.run takes no file."""
    schema = ServeDeploySchema.model_validate(deploy)
    serve.start(
        proxy_location=schema.proxy_location,
        http_options=schema.http_options.model_dump(),
        grpc_options=schema.grpc_options.model_dump(),
        logging_config=schema.logging_config,
        tracing_config=schema.tracing_config,
        controller_options=schema.controller_options,
    )
    client: Any = _get_global_client()
    client.deploy_apps(schema, _blocking=False)


def _wait_until_ready(name: str, url: str, stop: threading.Event) -> bool:
    """Wait for 200 from /health; False when stopped before. Raises TempoError with the reason of a failed start.

    Without a limit: loading a model can take an hour. What is waited for is said whenever it changes.
    """
    said = ""
    while not stop.wait(_POLL_S):
        status = serve.status().applications.get(name)
        if status is None:
            continue
        messages = [f"{key}: {each.message}" for key, each in status.deployments.items() if each.message]
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise TempoError(_why_failed(f"{name} could not start. {status.message}", messages))
        if not _has_ingress(status):
            # The proxy would keep who asks waiting, and log each who gives up.
            continue
        is_ready, reason = _health(url)
        if is_ready:
            return True
        if reason not in ("", said):
            said = reason
            print(f"tempo: not ready yet: {reason}", flush=True)
    return False


def _has_ingress(status: ApplicationStatusOverview | None) -> bool:
    """Whether a replica of the ingress runs, so that requests may have been answered. status: of the application."""
    ingress = status.deployments.get("ingress") if status is not None else None
    states = ingress.replica_states if ingress is not None else {}
    # Typed as an enum, they are its values.
    return any(state == "RUNNING" and count > 0 for state, count in states.items())


def _why_failed(summary: str, messages: list[str]) -> str:
    """All that Serve says, tracebacks included, and at the end, where one looks first, the error itself."""
    errors = re.findall(r"^\S*(?:Error|Exception): .+$", "\n".join(messages), flags=re.MULTILINE)
    return "\n".join([summary, *messages, *([f"\ntempo: could not start: {errors[-1]}"] if errors else [])])


def _health(url: str) -> tuple[bool, str]:
    """Whether /health says 200; else what it says, "" when nothing answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:  # noqa: S310 - our own http:// URL
            return response.status == 200, ""
    except urllib.error.HTTPError as e:
        return False, e.read().decode(errors="replace").strip()
    except OSError:
        return False, ""


def _stop(config: TempoConfig) -> None:
    """Let running answers end, then take the application down; of a shared cluster nothing else."""
    if _has_ingress(serve.status().applications.get(config.name)) and not asyncio.run(app.drain(config)):
        print(f"tempo: some answers did not end within {config.ingress.drain_timeout_s:g} s", file=sys.stderr)
    if "RAY_ADDRESS" in os.environ:
        serve.delete(config.name)
    else:
        serve.shutdown()  # type: ignore[no-untyped-call]
    asyncio.run(app.stop_router(config))


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def _banner(config: TempoConfig, url: str) -> str:
    body = json.dumps(
        {
            "model": config.model_name,
            "stream": True,
            "messages": [{"role": "user", "content": "Tell me a story"}],
            "slo": {"ttft_ms": 1000, "tbt_ms": 100},
        }
    )
    return (
        f"\ntempo: ready at {url}  (model {config.model_name}; Ctrl-C stops)\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{body}'\n"
    )


if __name__ == "__main__":
    status = main()
    # Ray has ended what it knows of; HAProxy and others that lost their parent are ours by now.
    deadline_s = time.monotonic() + 5
    descendants.end_descendants(max(0.0, deadline_s - time.monotonic()))
    sys.exit(status)
