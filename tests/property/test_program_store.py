"""Programs through desks and a real Redis: whatever dies, and whatever is told twice, no call is lost or counted twice.

Several ingresses ask; the router is replaced, with or without a last word, while the old one still tries to write;
every ingress tells a new router again what it was not told to be stored, as `IngressLink` does; and Redis is killed and
comes back without what it acknowledged since some moment of the router's life.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cluster import wire_pb2 as wire
from cluster.program_desk import ProgramDesk
from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from tempo_router.config import ProgramsConfig
from tempo_router.errors import LeaseLostError
from tempo_router.program_graph import NewCall
from tempo_router.program_ops import BeginCall, CreateProgram, EndCall, FinishProgram
from tests.forgetful_redis import ForgetfulRedis

pytestmark = pytest.mark.redis

INGRESSES = ("ingress-0", "ingress-1", "ingress-2")
_names = itertools.count()


class Ingress:
    """Keeps what it asked until it is stored; remembers what it was answered."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept: dict[str, wire.ProgramOp] = {}
        self.errors: dict[str, str] = {}
        self.stored: set[str] = set()

    def heard(self, answer: wire.ProgramAnswer) -> None:
        if answer.error_code:
            self.errors[answer.op_id] = answer.error_code
        if answer.is_stored:
            self.kept.pop(answer.op_id, None)
            self.stored.add(answer.op_id)


class Programs(RuleBasedStateMachine):
    """What clients did is in `began` and `ended`; what Redis holds must come to the same."""

    redis: ForgetfulRedis

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.app = f"programs-{next(_names)}"
        # A disk that stalls for seconds is not what is tested here.
        self.store = self.run(RedisStore.connect(self.redis.url, self.app, timeout_s=60.0))
        self.programs = ProgramStore(self.store, keep_s=600.0)
        self.ingresses = {name: Ingress(name) for name in INGRESSES}
        self.op_ids = itertools.count()
        self.began: dict[tuple[str, str], tuple[str, str]] = {}
        self.ended: dict[tuple[str, str], int] = {}
        self.sent: list[tuple[str, wire.ProgramOp]] = []
        self.ids: list[str] = []
        self.old: list[ProgramDesk] = []
        self.desk = self.run(self.new_desk())
        self.desk.settled()

    def run(self, work):
        return self.runner.run(work)

    async def new_desk(self) -> ProgramDesk:
        self.fence = await self.store.acquire_lease("router", 30.0)
        desk = ProgramDesk(
            ProgramsConfig(), self.programs, fence=self.fence, handle=lambda event: None, send=self.send,
            cancel_calls=lambda program_id: None, outlook=lambda graph, now_s: None,
        )  # fmt: skip
        await desk.restore()
        self.store.on_restart = desk.store_again
        # What is lost was acknowledged to this router: who comes later knows only what is stored.
        self.redis.remember()
        return desk

    def send(self, owner: str, message: wire.RouterToIngress) -> None:
        for answer in message.program_answers:
            self.ingresses[owner].heard(answer)

    def ask(self, ingress: str, op: object) -> str:
        op_id = f"{ingress}:{next(self.op_ids)}"
        message = wire.ProgramOp(op_id=op_id, kind=type(op).__name__, body=msgspec.json.encode(op))
        self.ingresses[ingress].kept[op_id] = message
        self.sent.append((ingress, message))

        async def deliver() -> None:
            self.desk.asked(ingress, message)

        self.run(deliver())
        return op_id

    # ---- what clients do ----

    @rule(ingress=st.sampled_from(INGRESSES))
    def create(self, ingress: str) -> None:
        program_id = f"p{len(self.ids)}"
        self.ask(ingress, CreateProgram(program_id, "tenant", "app", deadline_s=time.time() + 3600.0))
        # Clients hear of a program when it is stored, so that every router knows it.
        self.flush()
        self.ids.append(program_id)

    @precondition(lambda self: self.ids)
    @rule(ingress=st.sampled_from(INGRESSES), which=st.integers(0, 20))
    def begin(self, ingress: str, which: int) -> None:
        program_id, call_id = self.ids[which % len(self.ids)], f"c{len(self.began)}"
        op_id = self.ask(ingress, BeginCall(program_id, "tenant", NewCall(call_id, owner=ingress)))
        if op_id not in self.ingresses[ingress].errors:
            self.began[program_id, call_id] = (ingress, op_id)

    @precondition(lambda self: len(self.began) > len(self.ended))
    @rule(which=st.integers(0, 50), tokens=st.integers(0, 100))
    def end(self, which: int, tokens: int) -> None:
        running = [name for name in self.began if name not in self.ended]
        program_id, call_id = running[which % len(running)]
        ingress, _ = self.began[program_id, call_id]
        self.ended[program_id, call_id] = tokens
        self.ask(ingress, EndCall(program_id, call_id, 0, "completed", 1, tokens))

    @precondition(lambda self: self.ids)
    @rule(ingress=st.sampled_from(INGRESSES), which=st.integers(0, 20))
    def finish(self, ingress: str, which: int) -> None:
        op = FinishProgram(self.ids[which % len(self.ids)], "tenant", f"op{len(self.sent)}")
        self.ask(ingress, op)

    # ---- what happens to messages and routers ----

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 1000))
    def tell_again(self, which: int) -> None:
        """A message that was answered long ago comes once more."""
        ingress, message = self.sent[which % len(self.sent)]

        async def deliver() -> None:
            self.desk.asked(ingress, message)

        self.run(deliver())

    @rule()
    def flush(self) -> None:
        self.run(self.desk.writer.flush())

    @rule(has_last_word=st.booleans())
    def replace_router(self, has_last_word: bool) -> None:
        """Killed, or merely overtaken: then it still holds changes that it will try to write."""
        if has_last_word:
            self.run(self.desk.stop())
        else:
            self.old.append(self.desk)

        async def take_over() -> None:
            self.desk = await self.new_desk()
            for ingress in self.ingresses.values():
                for message in list(ingress.kept.values()):
                    self.desk.asked(ingress.name, message)
            self.desk.settled()

        self.run(take_over())

    @rule()
    def redis_is_in_sync(self) -> None:
        """What comes later is what can be lost."""
        self.redis.remember()

    @rule(is_idle=st.booleans())
    def redis_forgets(self, is_idle: bool) -> None:
        """The router finds out when it renews its lease, or when it writes."""
        self.redis.kill()
        self.redis.start(forgets=True)

        async def go_on() -> None:
            if is_idle:
                await self.store.renew("router", self.fence, 30.0)
            await self.desk.writer.flush()
            await self.store.renew("router", self.fence, 30.0)
            await self.desk.writer.flush()

        self.run(go_on())

    @precondition(lambda self: self.old)
    @rule()
    def an_old_router_writes(self) -> None:
        desk = self.old.pop()
        if not any(entry.script for entry in desk.writer._queue):
            return
        with pytest.raises(LeaseLostError):
            self.run(desk.writer.flush())

    # ---- what must hold ----

    @invariant()
    def what_was_stored_is_there_once(self) -> None:
        self.check(only_stored=True)

    def teardown(self) -> None:
        try:
            self.flush()
            assert all(not ingress.kept for ingress in self.ingresses.values()), "something was never stored"
            self.check(only_stored=False)
        finally:
            self.run(self.store.close())
            self.runner.close()

    def check(self, *, only_stored: bool) -> None:
        for program_id in self.ids:
            graph = self.run(self.programs.load(program_id))
            counters = self.run(self.programs.counters(program_id))
            assert graph is not None
            done = [call for call in graph.calls.values() if call.status != "running"]
            assert counters == {
                "calls": len(graph.calls), "done": len(done), "tokens": sum(call.output_tokens for call in done)
            }  # fmt: skip
            expected = {
                call_id
                for (program, call_id), (ingress, op_id) in self.began.items()
                if program == program_id and (not only_stored or op_id in self.ingresses[ingress].stored)
            }
            assert expected <= graph.calls.keys()
            assert graph.calls.keys() <= {call_id for program, call_id in self.began if program == program_id}
            if not only_stored:
                tokens = {call_id: count for (program, call_id), count in self.ended.items() if program == program_id}
                assert {call.call_id: call.output_tokens for call in done} == tokens


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForgetfulRedis]:
    server = ForgetfulRedis(Path(tmp_path_factory.mktemp("redis")))
    yield server
    server.stop()


def test_no_call_is_lost_or_counted_twice(redis: ForgetfulRedis) -> None:
    Programs.redis = redis
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_a_late_message_does_not_begin_a_program_anew_that_ended_under_an_earlier_router(redis: ForgetfulRedis) -> None:
    Programs.redis = redis
    machine = Programs()
    machine.create(INGRESSES[0])
    machine.begin(INGRESSES[0], 0)
    machine.end(0, 7)
    machine.finish(INGRESSES[1], 0)
    machine.flush()
    machine.replace_router(has_last_word=True)
    for number in range(len(machine.sent)):
        machine.tell_again(number)
    machine.begin(INGRESSES[2], 0)
    assert machine.ingresses[INGRESSES[2]].errors
    machine.teardown()
