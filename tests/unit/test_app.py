"""Stopping the application, whatever state its router is in."""

from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.constants import RAY_SERVE_HAPROXY_MAXCONN

from deployments import app
from deployments.ingress import ingress_deployment
from tempo_router.config import IngressConfig, TempoConfig


class DeadMethod:
    def remote(self, *_: Any) -> Any:
        async def fail() -> None:
            raise RayActorError

        return fail()


class DeadRouter:
    """The handle of an actor whose process has gone."""

    drain = DeadMethod()
    stop = DeadMethod()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which actors were ended; the application's router is dead."""
    killed: list[Any] = []
    monkeypatch.setattr(app, "existing_router", lambda _name: DeadRouter())
    monkeypatch.setattr(app.ray, "kill", lambda router, no_restart: killed.append(type(router)))
    return killed


async def test_a_dead_router_does_not_keep_the_application_from_being_stopped(killed: list[Any]) -> None:
    """In a shared cluster the application would go on running, and Ray would start the router again."""
    assert not await app.drain(TempoConfig())
    await app.stop_router(TempoConfig())
    assert killed == [DeadRouter]


def test_serve_lets_more_into_an_ingress_than_the_edge_admits() -> None:
    """What Serve keeps back waits unseen: no 503, its wait uncounted, and probes behind it."""
    deployment = ingress_deployment(TempoConfig(ingress=IngressConfig(max_open_requests=40)))
    assert deployment.max_ongoing_requests >= 40 + 100


def test_haproxy_takes_more_connections_than_an_ingress_holds_by_default() -> None:
    """Beyond its number HAProxy lets clients wait, for whom the edge's 503 would come too late."""
    assert IngressConfig().max_open_requests < RAY_SERVE_HAPROXY_MAXCONN
