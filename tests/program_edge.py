"""The HTTP edge over a desk of programs in the same process: everything of programs but processes and Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from cluster import wire_pb2 as wire
from cluster.ingress_programs import IngressPrograms
from cluster.program_desk import ExplainRequest, ProgramDesk
from cluster.program_store import ProgramStore
from cluster.redis_store import ScriptCall
from deployments.asgi import AsgiApp
from deployments.http_edge import HttpEdge
from deployments.program_client import ProgramClient
from tempo_router.config import ProgramsConfig, TempoConfig
from tests.http_edge import Vllm, whole

PROGRAMS = "/v1/programs"


class Memory:
    """Stands for Redis: takes every script, and knows of no program that the desk does not know."""

    async def run(self, scripts: Sequence[ScriptCall]) -> list[int]:
        return [1] * len(scripts)

    async def hashes(self, keys: Sequence[str]) -> list[dict[bytes, bytes]]:
        return [{} for _ in keys]


class Desk:
    """A router's desk and one ingress's side of it. epoch_s: the clock of both. most_answer_bytes: of one answer."""

    def __init__(
        self,
        epoch_s: Callable[[], float] = time.time,
        programs: ProgramsConfig | None = None,
        most_answer_bytes: int = 1024 * 1024,
    ) -> None:
        self.desk = ProgramDesk(
            programs or ProgramsConfig(), ProgramStore(Memory()), fence=1,
            handle=lambda event: None, send=self._to_ingress,
            cancel_calls=lambda program_id: None, outlook=lambda graph, now_s: None, epoch_s=epoch_s,
            questions={ExplainRequest: lambda question: [{"asked": question.name}]},
            most_answer_bytes=most_answer_bytes,
        )  # fmt: skip
        self.desk.settled()
        self.ingress = IngressPrograms("ingress", send=self._to_router, wait_s=5.0)

    def _to_router(self, message: wire.IngressToRouter) -> None:
        for op in message.program_ops:
            self.desk.asked("ingress", op)

    def _to_ingress(self, owner: str, message: wire.RouterToIngress) -> None:
        self.ingress.router_said(message)


@asynccontextmanager
async def served_by(
    app: AsgiApp, config: TempoConfig, epoch_s: Callable[[], float] = time.time, **edge_options: Any
) -> AsyncIterator[Any]:
    """(an HTTP client of the edge, the desk behind it)."""
    desk = Desk(epoch_s, config.programs)
    edge = HttpEdge(
        app, config, not_ready_because=lambda: None, programs=ProgramClient(desk.ingress), epoch_s=epoch_s,
        **edge_options,
    )  # fmt: skip
    writing = asyncio.create_task(desk.desk.writer.run())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://test") as http:
        yield http, desk
    writing.cancel()


async def answer(vllm: Vllm, scope: Any, receive: Any, send: Any) -> None:
    """As vLLM would, whatever is asked."""
    await whole(send, {"choices": [{"text": "yes"}]})


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    """(status, code, field) of a refusal."""
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]
