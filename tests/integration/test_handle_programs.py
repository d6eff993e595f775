"""The handle's methods for programs on a real router and Redis. No Ray: what crosses the handle is pickled here."""

import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.http_edge import HttpEdge
from deployments.ingress import IngressReplica
from deployments.program_client import ProgramClient
from tempo_router.errors import TempoError
from tests import program_handle
from tests.fleet import fleet_over_redis
from tests.integration.test_graph_api import Model
from tests.integration.test_transport import CONFIG

pytestmark = pytest.mark.redis


class Replica(IngressReplica):
    """An ingress that was started already: it has no vLLM, so nothing but programs."""

    def __init__(self, edge: HttpEdge) -> None:
        self._edge = edge

    def __del__(self) -> None:
        """Its link is the fleet's."""


class LocalHandle:
    """Calls as Serve's handle makes them: arguments, results and errors come as copies."""

    def __init__(self, replica: Replica, *, is_streaming: bool = False) -> None:
        self._replica = replica
        self._is_streaming = is_streaming

    def options(self, *, stream: bool) -> "LocalHandle":
        return LocalHandle(self._replica, is_streaming=stream)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._replica, name)
        return SimpleNamespace(remote=self._streaming(method) if self._is_streaming else self._whole(method))

    def _whole(self, method: Any) -> Any:
        async def remote(*arguments: Any, **named: Any) -> Any:
            arguments, named = copied((arguments, named))
            try:
                return copied(await method(*arguments, **named))
            except TempoError as error:
                raise copied(error) from None

        return remote

    def _streaming(self, method: Any) -> Any:
        async def remote(*arguments: Any) -> AsyncIterator[Any]:
            async for each in method(*copied(arguments)):
                yield copied(each)

        return remote


def copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - what was pickled right here


@pytest.fixture
async def handle(tmp_path: Path) -> AsyncIterator[LocalHandle]:
    async with fleet_over_redis(CONFIG, tmp_path) as fleet:
        await fleet.start()
        programs = ProgramClient(fleet.clients[0].link.programs)
        yield LocalHandle(Replica(HttpEdge(Model(), CONFIG, not_ready_because=lambda: None, programs=programs)))


async def test_a_program_is_made_extended_and_finished(handle: LocalHandle) -> None:
    await program_handle.is_made_extended_and_finished(handle)


async def test_a_program_is_cancelled(handle: LocalHandle) -> None:
    await program_handle.is_cancelled(handle)


async def test_a_declared_graph_runs(handle: LocalHandle) -> None:
    await program_handle.runs_its_graph(handle)
