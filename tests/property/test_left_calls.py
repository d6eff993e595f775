"""No call runs on whose client has left, and who waits is told: at any moment, in any session, over broken streams.

Sessions and their sub-agents' go on in programs of other names than the ones that their clients give; only the router
knows which.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from cluster import wire_pb2 as wire
from cluster.ingress_programs import IngressPrograms
from cluster.program_desk import ProgramDesk
from cluster.program_store import ProgramStore
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import ProgramsConfig
from tempo_router.program_ops import CallTicket, EndCall
from tests.program_edge import Memory

SESSIONS = {"main": "", "sub": "main", "sub of sub": "sub"}
"""Each with its parent's."""
_LOOP_TURNS = 10
"""In which all that can happen without a message happens."""


class LeavingClients(RuleBasedStateMachine):
    """One ingress, and routers one after the other. What is said waits in the streams until it is carried."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.to_router: list[wire.ProgramOp] = []
        self.to_ingress: list[wire.RouterToIngress] = []
        self.calls: list[asyncio.Task[CallTicket]] = []
        self.desk = self.new_desk()
        self.desk.settled()
        self.ingress = IngressPrograms("ingress", send=lambda one: self.to_router.extend(one.program_ops), wait_s=1e6)
        self.client = ProgramClient(self.ingress)

    def new_desk(self) -> ProgramDesk:
        return ProgramDesk(
            ProgramsConfig(), ProgramStore(Memory()), fence=1, handle=lambda event: None,
            send=lambda _, message: self.to_ingress.append(message), cancel_calls=lambda program_id: None,
            outlook=lambda graph, now_s: None,
        )  # fmt: skip

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        async def to_the_end() -> None:
            await work
            for _ in range(_LOOP_TURNS):
                await asyncio.sleep(0)

        self.runner.run(to_the_end())

    # ---- clients ----

    @rule(session=st.sampled_from(tuple(SESSIONS)))
    def begin(self, session: str) -> None:
        identity = Identity("session", session, parent_id=SESSIONS[session], agent=session)

        async def work() -> None:
            begin = self.client.begin(identity, tenant="", app="", now_epoch_s=0.0)
            self.calls.append(asyncio.create_task(begin))

        self.run(work())

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 10), is_last=st.booleans())
    def call_ends(self, which: int, is_last: bool) -> None:
        """is_last: and with it the program, as far as its client knows."""
        call = self.calls[which % len(self.calls)]
        if call.done():
            self.calls.remove(call)
            self.end(call.result(), is_last=is_last)

    def end(self, ticket: CallTicket, *, is_last: bool = False) -> None:
        self.client.end(EndCall(ticket.program_id, ticket.call_id, ticket.attempt, "completed", is_last=is_last))

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 10))
    def client_leaves(self, which: int) -> None:
        call = self.calls.pop(which % len(self.calls))

        async def work() -> None:
            call.cancel()

        if call.done():
            self.end(call.result())
        else:
            self.run(work())

    # ---- streams and routers ----

    @rule()
    def router_hears(self) -> None:
        heard, self.to_router = self.to_router, []

        async def work() -> None:
            for op in heard:
                self.desk.asked("ingress", op)

        self.run(work())

    @rule()
    def ingress_hears(self) -> None:
        heard, self.to_ingress = self.to_ingress, []

        async def work() -> None:
            for message in heard:
                self.ingress.router_said(message)

        self.run(work())

    @rule()
    def router_stores(self) -> None:
        self.run(self.desk.writer.flush())

    @rule()
    def stream_breaks(self) -> None:
        """What it carried is lost; the next one begins with all that may not be stored."""
        self.to_router, self.to_ingress = [], []
        self.ingress.repeat()

    def all_is_heard(self) -> None:
        self.router_hears()
        self.router_stores()
        self.ingress_hears()

    def teardown(self) -> None:
        try:
            self.all_is_heard()
            assert all(call.done() for call in self.calls), "somebody waits in vain"
            while self.calls:
                self.client_leaves(0)
            self.all_is_heard()
            running = {graph.program_id: [call.call_id for call in graph.running] for graph in self.desk.book.live}
            assert not any(running.values()), f"calls that nobody serves run on: {running}"
            assert self.ingress.unstored == 0
        finally:
            self.runner.close()


TestLeavingClients = LeavingClients.TestCase
TestLeavingClients.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
