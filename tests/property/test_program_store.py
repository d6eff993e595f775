"""Programs through desks and a real Redis: whatever dies, and whatever is told twice, no call is lost or counted twice.

Several ingresses ask, and die; the router is replaced, with or without a last word, while the old one still tries to
write; every ingress tells a new router again what it was not told to be stored, as `IngressLink` does; and Redis is
killed and comes back without what it acknowledged since some moment.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
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
from tempo_router.known_stages import KnownStage
from tempo_router.program_graph import CallStatus, NewCall, ProgramGraph
from tempo_router.program_ops import BeginCall, CancelProgram, CreateProgram, EndCall, ExtendProgram, FinishProgram
from tests.forgetful_redis import ForgetfulRedis

pytestmark = pytest.mark.redis

INGRESSES = st.integers(0, 2)
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
    """What Redis holds must come to what the router knows, and no client may be told otherwise.

    attempts: of each call that was let in, its last attempt and who serves it. told: tokens of its ended attempts.
    ends: its last end, as attempt, ingress and operation.
    """

    redis: ForgetfulRedis

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.app = f"programs-{next(_names)}"
        # A disk that stalls for seconds is not what is tested here.
        self.store = self.run(RedisStore.connect(self.redis.url, self.app, timeout_s=60.0))
        self.programs = ProgramStore(self.store, keep_s=600.0)
        self.ingress_names = itertools.count(3)
        self.ingresses = {name: Ingress(name) for name in ("ingress-0", "ingress-1", "ingress-2")}
        self.op_ids = itertools.count()
        self.began: dict[tuple[str, str], Ingress] = {}
        self.began_by: dict[tuple[str, str], str] = {}
        self.attempts: dict[tuple[str, str], tuple[int, str]] = {}
        self.told: dict[tuple[str, str], set[int]] = {}
        self.ends: dict[tuple[str, str], tuple[int, Ingress, str]] = {}
        self.deadlines: dict[str, set[float]] = {}
        self.closing: dict[str, list[tuple[Ingress, str]]] = {}
        self.outlines: dict[str, list[tuple[Ingress, str]]] = {}
        self.hopeless: set[str] = set()
        self.sent: list[tuple[str, wire.ProgramOp]] = []
        self.ids: list[str] = []
        self.creations: set[str] = set()
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
            least_left_s=lambda program_id: 1e9 if program_id in self.hopeless else 0.0,
        )  # fmt: skip
        await desk.restore()
        return desk

    def send(self, owner: str, message: wire.RouterToIngress) -> None:
        for answer in message.program_answers:
            if owner in self.ingresses:
                self.ingresses[owner].heard(answer)

    def name_of(self, number: int) -> str:
        return list(self.ingresses)[number]

    def ask(self, ingress: str, op: object) -> str | None:
        """The operation's name; None if it was refused."""
        op_id = f"{ingress}:{next(self.op_ids)}"
        message = wire.ProgramOp(op_id=op_id, kind=type(op).__name__, body=msgspec.json.encode(op))
        self.ingresses[ingress].kept[op_id] = message
        self.sent.append((ingress, message))
        self.deliver(ingress, message)
        return None if op_id in self.ingresses[ingress].errors else op_id

    def deliver(self, ingress: str, message: wire.ProgramOp) -> None:
        async def in_loop() -> None:
            self.desk.asked(ingress, message)

        self.run(in_loop())

    # ---- what clients do ----

    @rule(ingress=INGRESSES)
    def create(self, ingress: int) -> None:
        program_id = f"p{len(self.ids)}"
        deadline_s = time.time() + 3600.0
        op = CreateProgram(program_id, "tenant", "app", deadline_s=deadline_s, operation=f"op {program_id}")
        op_id = self.ask(self.name_of(ingress), op)
        assert op_id is not None
        self.creations.add(op_id)
        # Clients hear of a program when it is stored, so that every router knows it.
        self.flush()
        self.ids.append(program_id)
        self.deadlines[program_id] = {deadline_s}
        self.closing[program_id] = []

    @precondition(lambda self: self.ids)
    @rule(ingress=INGRESSES, which=st.integers(0, 20), follows=st.booleans())
    def begin(self, ingress: int, which: int, follows: bool) -> None:
        """follows: the last call of its program, which another ingress may have told of."""
        name = self.name_of(ingress)
        program_id, call_id = self.ids[which % len(self.ids)], f"c{len(self.sent)}"
        before = [call for program, call in self.attempts if program == program_id and self.is_told(program, call)]
        parents = tuple(before[-1:]) if follows else ()
        op_id = self.ask(name, BeginCall(program_id, "tenant", NewCall(call_id, parents=parents, owner=name)))
        if op_id is not None:
            call = program_id, call_id
            self.attempts[call] = 0, name
            self.began[call], self.began_by[call] = self.ingresses[name], op_id
            self.told[call] = set()

    def is_told(self, program_id: str, call_id: str) -> bool:
        """Whether somebody is left who could tell a new router of a call."""
        ingress = self.began[program_id, call_id]
        return ingress in self.ingresses.values() or self.began_by[program_id, call_id] in ingress.stored

    @precondition(lambda self: self.attempts)
    @rule(ingress=INGRESSES, which=st.integers(0, 50))
    def begin_again(self, ingress: int, which: int) -> None:
        """A client tries once more, perhaps while the attempt before still runs."""
        name = self.name_of(ingress)
        program_id, call_id = list(self.attempts)[which % len(self.attempts)]
        attempt = self.attempts[program_id, call_id][0] + 1
        again = BeginCall(program_id, "tenant", NewCall(call_id, attempt, owner=name))
        if self.ask(name, again) is not None:
            self.attempts[program_id, call_id] = attempt, name

    @precondition(lambda self: self.attempts)
    @rule(
        which=st.integers(0, 50),
        tokens=st.integers(0, 100),
        status=st.sampled_from(["completed", "completed", "failed", "cancelled"]),
    )
    def end(self, which: int, tokens: int, status: CallStatus) -> None:
        """By the ingress that served it; one that is gone says nothing."""
        program_id, call_id = list(self.attempts)[which % len(self.attempts)]
        attempt, name = self.attempts[program_id, call_id]
        if name in self.ingresses:
            self.told[program_id, call_id].add(tokens)
            op_id = self.ask(name, EndCall(program_id, call_id, attempt, status, 1, tokens))
            assert op_id is not None
            self.ends[program_id, call_id] = attempt, self.ingresses[name], op_id

    @precondition(lambda self: self.ids)
    @rule(ingress=INGRESSES, which=st.integers(0, 20), is_cancelled=st.booleans())
    def finish_or_cancel(self, ingress: int, which: int, is_cancelled: bool) -> None:
        name, program_id = self.name_of(ingress), self.ids[which % len(self.ids)]
        kind = CancelProgram if is_cancelled else FinishProgram
        op_id = self.ask(name, kind(program_id, "tenant", f"op{len(self.sent)}"))
        if op_id is not None:
            self.closing[program_id].append((self.ingresses[name], op_id))

    @precondition(lambda self: self.ids)
    @rule(ingress=INGRESSES, which=st.integers(0, 20), longer_s=st.integers(1, 5))
    def extend(self, ingress: int, which: int, longer_s: int) -> None:
        program_id = self.ids[which % len(self.ids)]
        deadline_s = time.time() + 3600.0 + 100.0 * longer_s
        self.deadlines[program_id].add(deadline_s)
        self.hopeless.discard(program_id)
        self.ask(self.name_of(ingress), ExtendProgram(program_id, "tenant", deadline_s))

    @precondition(lambda self: self.ids)
    @rule(ingress=INGRESSES, which=st.integers(0, 20), stages=st.integers(1, 2))
    def outline(self, ingress: int, which: int, stages: int) -> None:
        """A client says later how the program will go on; what it was told once, it keeps."""
        program_id = self.ids[which % len(self.ids)]
        graph = self.desk.book.find(program_id)
        assert graph is not None
        before, stages_said = graph.outline, tuple(KnownStage(stage) for stage in range(stages))
        op = CreateProgram(program_id, "tenant", "app", deadline_s=graph.deadline_s, outline=stages_said)
        name = self.name_of(ingress)
        op_id = self.ask(name, op)
        assert graph.outline == (before or stages_said if op_id is not None else before)
        if op_id is not None:
            self.outlines.setdefault(program_id, []).append((self.ingresses[name], op_id))

    @precondition(lambda self: self.ids)
    @rule(which=st.integers(0, 20))
    def becomes_hopeless(self, which: int) -> None:
        self.hopeless.add(self.ids[which % len(self.ids)])

        async def in_loop() -> None:
            self.desk._relegate_hopeless(time.time() + 1e6)

        self.run(in_loop())

    # ---- what happens to messages, ingresses, routers and Redis ----

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 1000))
    def tell_again(self, which: int) -> None:
        """A message that was answered long ago comes once more; of an ingress that is gone none comes any more."""
        name, message = self.sent[which % len(self.sent)]
        if name not in self.ingresses:
            return
        self.deliver(name, message)
        if message.op_id in self.creations:
            assert message.op_id not in self.ingresses[name].errors, "a creation that is told again is refused"

    @rule(ingress=INGRESSES)
    def lose_ingress(self, ingress: int) -> None:
        """With all that it kept, and with the clients of its calls."""
        name = self.name_of(ingress)
        del self.ingresses[name]
        newcomer = f"ingress-{next(self.ingress_names)}"
        self.ingresses[newcomer] = Ingress(newcomer)

        async def in_loop() -> None:
            self.desk.ingress_gone(name)

        self.run(in_loop())

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
            self.desk.owners_gone(self.ingresses)

        self.run(take_over())
        for call, op_id in self.began_by.items():
            assert op_id not in self.began[call].errors, "what was let in is not refused by a later router"

    @rule()
    def redis_is_in_sync(self) -> None:
        """What comes later is what can be lost."""
        self.redis.remember()

    @rule(is_idle=st.booleans(), does_old_write=st.booleans())
    def redis_forgets(self, is_idle: bool, does_old_write: bool) -> None:
        """The router finds out when it renews its lease, or when it writes; one before it may find out sooner."""
        restarts: list[bool] = []
        self.store.on_restart = lambda: restarts.append(True)
        self.redis.kill()
        self.redis.start(forgets=True)

        async def old_ones_write() -> None:
            for desk in self.old:
                desk.store_again()
                # What it lost its right to is refused, unless Redis has forgotten that.
                with suppress(LeaseLostError):
                    await desk.writer.flush()

        async def go_on() -> None:
            if not is_idle:
                await self.desk.writer.flush()
            if does_old_write:
                await old_ones_write()
            await self.store.renew("router", self.fence, 30.0)
            assert restarts
            self.desk.store_again()
            await old_ones_write()
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
        for program_id in self.ids:
            graph = self.stored(program_id)
            let_in = {call_id for program, call_id in self.attempts if program == program_id}
            acknowledged = {
                call_id
                for (program, call_id), ingress in self.began.items()
                if program == program_id and self.began_by[program, call_id] in ingress.stored
            }
            assert acknowledged <= graph.calls.keys() <= let_in
            assert graph.deadline_s in self.deadlines[program_id]
            for call in graph.calls.values():
                attempt, ingress, op_id = self.ends.get((program_id, call.call_id), (-1, None, ""))
                if ingress is not None and op_id in ingress.stored and attempt == call.attempt:
                    assert call.status != "running", "an end that was acknowledged counts"
                # Nothing but what a client was served; a call that was cut off counts for nothing.
                assert call.output_tokens in {0, *self.told[program_id, call.call_id]}
                assert call.attempt <= self.attempts[program_id, call.call_id][0]
            outlines = self.outlines.get(program_id, ())
            if any(op_id in ingress.stored and op_id not in ingress.errors for ingress, op_id in outlines):
                assert graph.outline, "what a client was told to be known is"
            if any(op_id in ingress.stored for ingress, op_id in self.closing[program_id]):
                assert graph.closed_by, "who was told that it is finished or cancelled must be able to rely on it"

    def stored(self, program_id: str) -> ProgramGraph:
        """A program as Redis has it, its counters right."""
        graph = self.run(self.programs.load(program_id))
        assert graph is not None
        done = [call for call in graph.calls.values() if call.status != "running"]
        tokens = sum(call.output_tokens for call in done)
        counters = self.run(self.programs.counters(program_id))
        assert counters == {"calls": len(graph.calls), "done": len(done), "tokens": tokens}
        return graph

    def teardown(self) -> None:
        try:
            self.flush()
            assert all(not ingress.kept for ingress in self.ingresses.values()), "something was never stored"
            self.what_was_stored_is_there_once()
            self.what_the_router_knows_is_stored()
        finally:
            self.run(self.store.close())
            self.runner.close()

    def what_the_router_knows_is_stored(self) -> None:
        """To the last field, and each program is listed as what it is."""
        live, over = self.run(self.store.members("programs")), self.run(self.store.ranked("ended"))
        for program_id in self.ids:
            stored, known = self.stored(program_id), self.desk.book.find(program_id)
            assert known is not None
            assert _fields(stored) == _fields(known)
            assert all(call.owner in self.ingresses for call in known.running), "nobody is left who could end it"
            assert (program_id.encode() in live) == (not known.is_over)
            assert (program_id.encode() in over) == known.is_over


def _fields(graph: ProgramGraph) -> tuple[object, ...]:
    calls = [
        (call.call_id, call.attempt, call.status, call.stage, call.parents, call.owner, call.output_tokens)
        for call in graph.calls.values()
    ]
    return (
        graph.status,
        graph.deadline_s,
        graph.closed_by,
        graph.reason,
        graph.relegated_s,
        graph.ended_s,
        graph.outline,
        graph.run_by,
        sorted(calls),
    )


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
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_a_late_message_does_not_begin_a_program_anew_that_ended_under_an_earlier_router(redis: ForgetfulRedis) -> None:
    Programs.redis = redis
    machine = Programs()
    machine.create(0)
    machine.begin(0, 0, follows=False)
    machine.end(0, 7, "completed")
    machine.finish_or_cancel(1, 0, is_cancelled=False)
    machine.flush()
    machine.replace_router(has_last_word=True)
    for number in range(len(machine.sent)):
        machine.tell_again(number)
    calls = dict(machine.attempts)
    machine.begin(2, 0, follows=False)
    assert machine.attempts == calls, "it is over"
    machine.teardown()


def test_an_outline_of_a_program_that_was_given_more_time_outlives_the_router(redis: ForgetfulRedis) -> None:
    """Neither was stored; the extension is carried out only when all had time to tell again."""
    Programs.redis = redis
    machine = Programs()
    machine.create(0)
    machine.extend(0, 0, 2)
    machine.outline(1, 0, 2)
    machine.replace_router(has_last_word=False)
    [graph] = machine.desk.book.live
    assert len(graph.outline) == 2
    machine.teardown()


@pytest.mark.parametrize("tokens", [0, 7])
def test_another_attempt_is_stored_and_takes_the_tokens_of_the_first_back(redis: ForgetfulRedis, tokens: int) -> None:
    Programs.redis = redis
    machine = Programs()
    machine.create(0)
    machine.begin(0, 0, follows=False)
    machine.flush()
    machine.end(0, tokens, "failed")
    machine.flush()
    machine.begin_again(1, 0)
    machine.flush()
    machine.end(0, 5, "completed")
    machine.teardown()


def test_a_sub_agents_session_stays_in_its_program_under_another_router(redis: ForgetfulRedis) -> None:
    """One that says its parent no more, and one whose parent is itself a sub-agent."""
    Programs.redis = redis
    machine = Programs()

    def begin(program_id: str, call_id: str, agent: str, alias: str = "") -> None:
        call = NewCall(call_id, branch=agent, owner="ingress-0")
        op = BeginCall(program_id, "tenant", call, is_new_allowed=True, may_restart=True, alias=alias)
        assert machine.ask("ingress-0", op) is not None

    begin("main", "a", "main")
    begin("main", "b", "sub", alias="sub")
    begin("unheard", "c", "its sub", alias="its sub")
    machine.replace_router(has_last_word=True)
    begin("sub", "d", "sub")
    begin("sub", "e", "below", alias="below")
    begin("its sub", "f", "its sub")
    assert {graph.program_id: set(graph.calls) for graph in machine.desk.book.live} == {
        "main": {"a", "b", "d", "e"}, "unheard": {"c", "f"}
    }  # fmt: skip
    machine.teardown()


def test_a_session_that_went_on_in_another_program_takes_its_sub_agents_there(redis: ForgetfulRedis) -> None:
    Programs.redis = redis
    machine = Programs()
    for call_id in ("a", "b"):
        op = BeginCall(
            "main", "tenant", NewCall(call_id, owner="ingress-0"), is_new_allowed=True, may_restart=True, alias="sub"
        )
        machine.ask("ingress-0", op)
        if call_id == "a":
            machine.ask("ingress-0", EndCall("main", "a", 0, "completed", is_last=True))
    machine.replace_router(has_last_word=True)
    op = BeginCall("sub", "tenant", NewCall("c", owner="ingress-0"), is_new_allowed=True, may_restart=True)
    machine.ask("ingress-0", op)
    assert {graph.program_id: set(graph.calls) for graph in machine.desk.book.live} == {"main.2": {"b", "c"}}
    machine.teardown()


def test_a_call_is_ended_by_the_name_that_its_client_gave_its_program_under_another_router(
    redis: ForgetfulRedis,
) -> None:
    """A client that left before it heard where its call began knows no other; and what is told again began there."""
    Programs.redis = redis
    machine = Programs()

    def begin(name: str, call_id: str, alias: str = "") -> None:
        call = NewCall(call_id, owner="ingress-0")
        op = BeginCall(name, "tenant", call, is_new_allowed=True, may_restart=True, alias=alias)
        assert machine.ask("ingress-0", op) is not None

    begin("main", "first")
    machine.ask("ingress-0", EndCall("main", "first", 0, "completed", is_last=True))
    begin("main", "again", alias="sub")
    begin("sub", "below")
    begun_below = machine.sent[-1]
    machine.ask("ingress-0", EndCall("main.2", "again", 0, "completed", is_last=True))
    begin("main", "later", alias="sub")
    machine.replace_router(has_last_word=True)

    def running() -> dict[str, list[str]]:
        return {graph.program_id: [call.call_id for call in graph.running] for graph in machine.desk.book.live}

    assert running() == {"main.2": ["below"], "main.3": ["later"]}
    machine.deliver(*begun_below)
    assert running() == {"main.2": ["below"], "main.3": ["later"]}
    machine.ask("ingress-0", EndCall("sub", "below", 0, "cancelled"))
    machine.ask("ingress-0", EndCall("main", "later", 0, "cancelled"))
    assert running() == {"main.3": []}
    machine.teardown()


@pytest.mark.parametrize("was_made_before", [False, True])
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_graph_runs_once_though_no_node_of_it_has_begun(
    redis: ForgetfulRedis, was_made_before: bool, is_stored: bool
) -> None:
    """Equal graphs are sent at the same moment to two ingresses: the second one is refused, by a later router, too."""
    Programs.redis = redis
    machine = Programs()
    deadline_s, stages = time.time() + 3600.0, (KnownStage(0),)

    def create(ingress: str, operation: str, *, is_graph: bool = True) -> str | None:
        runner = ingress if is_graph else ""
        op = CreateProgram("p", "tenant", "app", deadline_s, "deadline", "p", operation, None, stages, is_graph, runner)
        return machine.ask(ingress, op)

    if was_made_before:
        create("ingress-0", "made", is_graph=False)
    first = create("ingress-0", "first")
    assert first is not None
    assert create("ingress-1", "second") is None
    machine.replace_router(has_last_word=is_stored)
    assert create("ingress-1", "third") is None
    assert create("ingress-0", "first") is not None, "told again it is the same"
    assert first not in machine.ingresses["ingress-0"].errors
    machine.teardown()


@pytest.mark.parametrize("was_made_before", [False, True])
def test_a_later_router_cancels_a_graph_whose_ingress_died_with_the_one_before(
    redis: ForgetfulRedis, was_made_before: bool
) -> None:
    """No node of it has begun, so no call tells who ran it. Its name is free then, and stays with who has it next."""
    Programs.redis = redis
    machine = Programs()
    deadline_s = time.time() + 3600.0
    if was_made_before:
        machine.ask("ingress-1", CreateProgram("p", "tenant", "app", deadline_s, name="p", operation="made"))
    graph = CreateProgram("p", "tenant", "app", deadline_s, name="p", operation="a", is_graph=True, runner="ingress-0")
    assert machine.ask("ingress-0", graph) is not None
    machine.flush()
    del machine.ingresses["ingress-0"]
    machine.replace_router(has_last_word=True)
    (unrun,) = machine.desk.book.ended
    assert (unrun.status, unrun.reason) == ("cancelled", "the ingress that ran its graph is gone (ingress-0)")
    machine.flush()
    again = replace(graph, operation="b", runner="ingress-1", deadline_s=deadline_s + 1.0)
    assert machine.ask("ingress-1", again) is not None
    machine.replace_router(has_last_word=True)
    (known,) = machine.desk.book.live
    assert (known.run_by, known.runner, known.deadline_s) == ("b", "ingress-1", deadline_s + 1.0)
    assert not list(machine.desk.book.ended)
    machine.teardown()
