"""Tells the server that a task is over, beside the task: a task must not wait for its bookkeeping, nor fail with it."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx


class Endings:
    """Finishes and cancels programs of a server. base_url: with `/v1`."""

    def __init__(self, base_url: str, extra: Mapping[str, str]) -> None:
        self._server = httpx.Client(base_url=base_url, headers=dict(extra), timeout=10.0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tempo endings")

    def finish(self, program: str) -> None:
        """No further call will come."""
        self._thread.submit(self._post, f"/programs/{quote(program, safe='')}/finish", {})

    def cancel(self, program: str, reason: str) -> None:
        """The task failed."""
        self._thread.submit(self._post, f"/programs/{quote(program, safe='')}/cancel", {"reason": reason[:128]})

    def close(self) -> None:
        """Wait until all is told."""
        self._thread.shutdown()
        self._server.close()

    def _post(self, path: str, body: dict[str, Any]) -> None:
        try:
            self._server.post(path, json=body)
        except httpx.HTTPError:
            return  # The server closes what nobody finishes.
