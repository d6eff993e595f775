"""What tests of several files here share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.embedded_redis import EmbeddedRedis, start_embedded_redis


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that the test may end."""
    server = start_embedded_redis(tmp_path)
    yield server
    server.stop()
