"""A real Redis that comes back without what it acknowledged last, as one that syncs once a second may."""

from pathlib import Path

import psutil

from cluster.embedded_redis import start_embedded_redis


class ForgetfulRedis:
    """Its log is kept as it was at one moment, and put in the place of the later one while the server is dead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "redis" / "appendonly.aof"
        self._server = start_embedded_redis(folder)
        self._kept = b""

    @property
    def url(self) -> str:
        """Where it answers, before and after."""
        return self._server.url

    def remember(self) -> None:
        """What is acknowledged by now is kept. It is in the log: our server syncs before it answers."""
        self._kept = self._log.read_bytes()

    def kill(self) -> None:
        """No last word."""
        psutil.Process(self._server.pid).kill()
        self._server.stop()

    def start(self, *, forgets: bool) -> None:
        """Again, with all that it had acknowledged, or with what it had at the moment that was kept."""
        if forgets:
            self._log.write_bytes(self._kept)
        self._server = start_embedded_redis(self._folder)

    def stop(self) -> None:
        """For good."""
        self._server.stop()
