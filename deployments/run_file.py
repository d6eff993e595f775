"""What `tempo serve` leaves in the data folder while it runs, so that `tempo status` and `tempo down` find it.

A lock says that somebody serves from this folder; it goes with the process, whatever ends it. A file beside it says
who and where.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tempo_router.errors import TempoError


@dataclass(frozen=True, slots=True)
class Run:
    """A running `tempo serve`. pid: the process to signal. The others are "" until they are known.

    ray_address: host:port for `ray.init(address=...)`, for programs that use the Python handle.
    """

    pid: int
    url: str = ""
    dashboard_url: str = ""
    ray_address: str = ""


class RunFile:
    """serve.json and serve.lock of one data folder."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "serve.json"
        self._lock_path = data_dir / "serve.lock"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one who serves from this folder. Raises TempoError when somebody else is, or it cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise TempoError(f"data_dir {self._path.parent} cannot be used: {e}; choose another one") from e
        try:
            if not _try_lock(fd):
                raise TempoError(self._taken())
            self._path.unlink(missing_ok=True)
            yield
            self._path.unlink(missing_ok=True)
        finally:
            os.close(fd)

    def write(self, run: Run) -> None:
        """Say who serves; only while held."""
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(run)))
        temporary.replace(self._path)

    def read(self) -> Run | None:
        """Who serves from this folder, or None. A file that a killed run left is nobody."""
        if self._is_unlocked():
            return None
        with contextlib.suppress(FileNotFoundError):
            return Run(**json.loads(self._path.read_text()))
        return None

    def _is_unlocked(self) -> bool:
        try:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return _try_lock(fd)
        finally:
            os.close(fd)

    def _taken(self) -> str:
        run = self.read()
        who = f"process {run.pid}" if run is not None else "another process"
        return f"{who} already serves from {self._path.parent}; stop it (`tempo down`) or add `--set data_dir=PATH`"


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
