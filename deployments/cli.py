"""`tempo`: serve, check a configuration, ask for the state, stop.

`tempo serve` is two processes. This one is small and never blocks: it passes signals on and, whatever happens to the
other, ends everything that was started. The other (serve_process) talks to Ray.
"""

import argparse
import json
import os
import select
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import psutil

from cluster import die_with_parent
from deployments import descendants
from deployments.ports import free_port, is_free
from deployments.run_file import RunFile
from tempo_router.errors import ConfigError, TempoError

DEFAULT_CONFIG = "serve_config.yaml"
EXIT_USAGE = 2

# What has to be decided before Ray is imported or started; what the user has set stays.
ENVIRONMENT = {
    # Measured at 100 streams: time to first token 68 ms instead of 331 with Serve's Python proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Our code on the replica's own event loop: in a thread of its own, every part of every stream crosses from one
    # loop to the other. Ingress CPU per token at 64 streams, in separate runs: 191 and 154 us. Our
    # replicas never block their loop for long once they have started.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Ray runs all that it starts at niceness 15: on a busy machine every other program would go before our streams.
    "RAY_worker_niceness": "0",
    # A token file of some other Ray on this machine would switch authentication on for ours.
    "RAY_AUTH_MODE": "disabled",
    # Nobody is told that you run this.
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Ray would kill an engine, and all its streams, because of some other program's use of memory: engines take
    # theirs at the start. Real shortage is still met by the kernel.
    "RAY_memory_monitor_refresh_ms": "0",
}
# Only where Ray is ours and runs on this machine alone.
LOCAL_ENVIRONMENT = {
    # Loopback instead of the address of the network card: Ray lets whoever reaches its ports run any code. (Ray's
    # name for it is what it is: its default on desktop systems.)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Serve waits this long before it ends an ingress, for load balancers that look every few seconds; ours is told.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
# HAProxy and the proxy behind it share these silently with those of any other Ray on the machine.
SHARED_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `tempo` command; returns its exit status."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except ConfigError as e:
        print(f"tempo: {e}", file=sys.stderr)
        return EXIT_USAGE
    except TempoError as e:
        print(f"tempo: {e}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tempo", description="Serve LLM requests so that they meet their SLOs.")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="serve until Ctrl-C; ends everything that it started")
    serve.add_argument("--model", help="path or hub id; replaces `model` of the configuration")
    serve.add_argument("--calibrate", action="store_true", help="measure step times first; engine.calibrate: true")
    serve.add_argument("--port", type=_port, help="replaces http_options.port")
    serve.set_defaults(command=_serve)

    check = commands.add_parser("check", help="check a configuration, start nothing")
    check.set_defaults(command=_check)

    status = commands.add_parser("status", help="what is served from this data_dir, and how it is")
    status.set_defaults(command=_status)

    down = commands.add_parser("down", help="stop what `tempo serve` runs: drain, then end")
    down.add_argument("--now", action="store_true", help="do not wait for running answers")
    down.set_defaults(command=_down)

    for each in (serve, check, status, down):
        each.add_argument("config", nargs="?", default=DEFAULT_CONFIG, type=Path, help=f"default: {DEFAULT_CONFIG}")
        each.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="replaces a key of `args`, such as scheduling.policy=edf; may be repeated",
        )
    return parser


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else 0
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 1 to 65535")
    return port


# ---- serve


def _serve(options: argparse.Namespace) -> int:
    set_environment()
    descendants.adopt_orphans()
    request = {
        "path": str(options.config),
        "overrides": [
            *options.overrides,
            *([f"model={json.dumps(options.model)}"] if options.model else []),
            *(["engine.calibrate=true"] if options.calibrate else []),
        ],
        "port": options.port,
    }
    program = [sys.executable, "-m", "deployments.serve_process", json.dumps(request)]
    # A session of its own: Ctrl-C reaches us alone, and we decide what the others are told.
    server = psutil.Popen(die_with_parent.command(program, with_signal=signal.SIGTERM), start_new_session=True)
    _pass_signals_on(server)
    status = _wait_and_reap(server.pid)
    left = descendants.end_descendants(grace_s=5.0)
    if left and status == 0:
        print(f"tempo: ended what was left: {', '.join(left)}", file=sys.stderr)
    print("tempo: stopped" if status == 0 else f"tempo: ended with status {status}")
    return status


def set_environment() -> None:
    """Fill in what the user has not set, for this process and all that it starts."""
    is_local = "RAY_ADDRESS" not in os.environ
    for name, value in {**ENVIRONMENT, **(LOCAL_ENVIRONMENT if is_local else {})}.items():
        os.environ.setdefault(name, value)
    chosen: set[int] = set()
    for name, port in SHARED_PORTS.items():
        if name not in os.environ and not is_free("0.0.0.0", port):
            chosen.add(other := free_port(besides=chosen))
            os.environ[name] = str(other)


def _pass_signals_on(server: psutil.Popen) -> None:
    signals_seen = 0

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal signals_seen
        signals_seen += 1
        if signals_seen == 1:
            os.write(2, b"\ntempo: stopping; running answers may end first (again: stop at once)\n")
            server.terminate()
            return
        # Everything at once, the serving process too; then _wait_and_reap returns.
        for process in descendants.living_descendants():
            process.kill()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)


def _wait_and_reap(pid: int) -> int:
    """Wait for one child; collect all others that end meanwhile, since orphans become ours."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


# ---- check, status, down


def _check(options: argparse.Namespace) -> int:
    from deployments.config_file import load_config_file

    loaded = load_config_file(options.config, options.overrides)
    print(f"{options.config}: serves {loaded.config.model_name} on http://{loaded.host}:{loaded.port}")
    return 0


def _run_file(options: argparse.Namespace) -> RunFile:
    from deployments.config_file import load_config_file

    return RunFile(Path(load_config_file(options.config, options.overrides).config.data_dir))


def _status(options: argparse.Namespace) -> int:
    run = _run_file(options).read()
    if run is None:
        print("not served from this data_dir (`serve status` shows what runs in a Ray cluster)")
        return 1
    print(f"process {run.pid} at {run.url or 'an address not known yet'}")
    if not run.url:
        return 1
    health, reason = _get(f"{run.url}/health")
    print("ready" if health == 200 else f"not ready: {reason or 'no answer'}")
    if run.dashboard_url:
        _print_deployments(run.dashboard_url)
    return 0 if health == 200 else 1


def _print_deployments(dashboard_url: str) -> None:
    status, body = _get(f"{dashboard_url}/api/serve/applications/")
    if status != 200:
        print(f"Ray's dashboard at {dashboard_url} does not answer: {body}")
        return
    for name, application in json.loads(body)["applications"].items():
        print(f"application {name}: {application['status']} {application['message']}".rstrip())
        for deployment in application["deployments"].values():
            states = [replica["state"] for replica in deployment["replicas"]]
            print(f"  {deployment['name']}: {deployment['status']}; replicas {', '.join(states) or 'none'}")
            if deployment["message"]:
                print(f"    {deployment['message']}")


def _get(url: str) -> tuple[int | None, str]:
    """Status and body; (None, reason) when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own http:// URLs
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode(errors="replace")
    except OSError as e:
        return None, str(e)


def _down(options: argparse.Namespace) -> int:
    run = _run_file(options).read()
    if run is None:
        print("nothing to stop: not served from this data_dir")
        return 0
    try:
        # Readable when the process has ended, also while nobody has collected its exit status.
        handle = os.pidfd_open(run.pid)
    except ProcessLookupError:
        print(f"process {run.pid} has just ended by itself")
        return 0
    signal.pidfd_send_signal(handle, signal.SIGTERM)
    if options.now:
        # Another signal: two of one kind may arrive as one.
        signal.pidfd_send_signal(handle, signal.SIGINT)
    select.select([handle], [], [])
    os.close(handle)
    print(f"stopped process {run.pid}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
