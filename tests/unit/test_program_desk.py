"""What a router answers about programs, and what an ingress asks again: a desk and an ingress in one process."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from cluster import wire_pb2 as wire
from cluster.ingress_programs import IngressPrograms
from cluster.program_desk import ContinueResponse, ExplainRequest, ListPrograms, ViewConsole, ViewProgram
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import ProgramsConfig
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.program_graph import NewCall
from tempo_router.program_ops import (
    BeginCall,
    CallTicket,
    CancelGraph,
    CancelProgram,
    CreateProgram,
    DeliverOutput,
    EndCall,
    ExtendProgram,
    FinishProgram,
)
from tests.fleet import eventually
from tests.program_edge import Desk

MOST_BYTES = 10_000
NOW_S, LATE_S = 1000.0, 2000.0
QUESTIONS = (
    ViewProgram("p", ""),
    ListPrograms(""),
    ContinueResponse("", "resp"),
    ExplainRequest("r", ""),
    ViewConsole(),
)
CHANGES = (CreateProgram("p", "", deadline_s=LATE_S), CancelProgram("p", "", "op"), DeliverOutput("p", "", "node", "1"))


# ---- answers that are too large for a message ----


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    """Two programs: of one all that is known takes more than an answer may, of the other it does not."""
    desk = Desk(lambda: NOW_S, most_answer_bytes=MOST_BYTES)
    writing = asyncio.create_task(desk.desk.writer.run())
    programs = ProgramClient(desk.ingress)
    for name, calls in (("large", 100), ("small", 2)):
        await programs.ask(CreateProgram(name, "", "app", deadline_s=LATE_S))
        for number in range(calls):
            await programs.ask(BeginCall(name, "", NewCall(f"call-{number}", owner="ingress")))
    yield desk
    writing.cancel()


async def test_a_program_too_large_to_be_shown_is_an_error_that_says_so(desk: Desk) -> None:
    programs = ProgramClient(desk.ingress)
    with pytest.raises(ProgramError, match=rf"takes \d+ bytes, more than {MOST_BYTES} \(half of transport\.") as raised:
        await programs.ask(ViewProgram("large", ""))
    assert raised.value.code == "answer_too_large"
    assert len((await programs.ask(ViewProgram("small", "")))["calls"]) == 2
    listed = await programs.ask(ListPrograms(""))
    assert [(one["id"], one["call_count"]) for one in listed["data"]] == [("large", 100), ("small", 2)]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (ExtendProgram("large", "", LATE_S + 60), "running"),
        (FinishProgram("large", "", "op"), "finishing"),
        (CancelProgram("large", "", "op"), "cancelled"),
    ],
)
@pytest.mark.parametrize("is_store_away", [False, True])
async def test_a_change_of_a_large_program_is_answered_without_its_calls(
    desk: Desk, change: object, status: str, is_store_away: bool
) -> None:
    """It is carried out, so it must not be answered by an error."""
    desk.desk.writer.is_away = is_store_away
    told = await ProgramClient(desk.ingress).ask(change)
    assert (told["id"], told["status"], told["call_count"]) == ("large", status, 100)
    assert "calls" not in told


async def test_what_the_console_shows_fits_into_an_answer(desk: Desk) -> None:
    small, large = (msgspec.json.decode(one) for one in desk.desk.newest(2))
    assert (len(small["calls"]), small["call_count"]) == (2, 2)
    assert (large["calls"], large["call_count"], len(large["stages"])) == ([], 100, 1)


# ---- what is asked again of another router ----


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("has_left", [False, True])
async def test_a_question_that_nobody_waits_for_is_not_asked_again(question: object, has_left: bool) -> None:
    """Its answer may be what broke the stream."""
    assert await _asked_again(question, has_left=has_left) == []


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("has_left", [False, True])
async def test_a_change_is_told_to_the_next_router(change: object, has_left: bool) -> None:
    assert await _asked_again(change, has_left=has_left) == [type(change).__name__]


async def test_a_question_that_somebody_waits_for_is_asked_again() -> None:
    sent: list[str] = []
    ingress = IngressPrograms("ingress", send=_noting(sent), wait_s=60.0)
    asking = asyncio.create_task(ProgramClient(ingress).ask(ViewProgram("p", "")))
    await eventually(lambda: bool(sent), "it is asked")
    ingress.repeat()
    assert sent == ["ViewProgram"] * 2
    asking.cancel()


# ---- graphs that nobody runs ----

GRAPH = CreateProgram("p", "", deadline_s=LATE_S, operation="first", is_graph=True, runner="gone")


async def _apply(desk: Desk, *ops: object) -> None:
    """As another ingress asks it."""
    for number, op in enumerate(ops):
        name = f"{type(op).__name__}:{number}"
        message = wire.ProgramOp(op_id=name, kind=type(op).__name__, body=msgspec.json.encode(op))
        desk.desk.asked("other", message)


@pytest.mark.parametrize(
    ("calls", "status"),
    [
        ((), "cancelled"),
        ((BeginCall("p", "", NewCall("a", owner="gone")),), "cancelled"),
        (
            (BeginCall("p", "", NewCall("a", owner="gone")), EndCall("p", "a", 0, "completed")),
            "cancelled",
        ),
        ((BeginCall("p", "", NewCall("a", owner="other")),), "running"),
    ],
    ids=["before the first node", "in a node", "between two nodes", "beside another's call"],
)
@pytest.mark.parametrize("is_router_new", [False, True])
async def test_a_graph_whose_ingress_is_gone_is_cancelled_unless_something_of_it_runs_elsewhere(
    calls: tuple[object, ...], status: str, is_router_new: bool
) -> None:
    desk = Desk(lambda: NOW_S)
    plain = CreateProgram("plain", "", deadline_s=LATE_S)
    await _apply(desk, plain, GRAPH, *calls)
    if is_router_new:
        desk.desk.owners_gone(["other"])
    else:
        desk.desk.ingress_gone("gone")
    graph, other = desk.desk.book.find("p"), desk.desk.book.find("plain")
    assert graph is not None
    assert other is not None
    assert (graph.status, other.status) == (status, "running")
    assert ("(gone)" in graph.reason) == (status == "cancelled")


@pytest.mark.parametrize(("calls", "is_run"), [((), True), ((BeginCall("p", "", NewCall("a", owner="gone")),), False)])
async def test_the_name_of_a_graph_that_was_cancelled_before_its_first_call_is_free_for_a_graph(
    calls: tuple[object, ...], is_run: bool
) -> None:
    desk = Desk(lambda: NOW_S)
    await _apply(desk, GRAPH, *calls)
    desk.desk.ingress_gone("gone")
    plain = CreateProgram("p", "", deadline_s=LATE_S, operation="plain")
    again = CreateProgram("p", "", deadline_s=LATE_S + 1, operation="again", is_graph=True, runner="other")
    await _apply(desk, plain)
    assert not list(desk.desk.book.live)
    await _apply(desk, again, CancelGraph("p", "", "undo", "never run", run_by="first"))
    assert [graph.run_by for graph in desk.desk.book.live] == (["again"] if is_run else [])
    assert [graph.run_by for graph in desk.desk.book.ended] == ([] if is_run else ["first"])


async def test_a_new_router_frees_the_name_of_a_graph_that_was_never_run_at_once() -> None:
    """Whoever tries again should not have to wait until all had time to say what was not stored."""
    desk = Desk(lambda: NOW_S)
    desk.desk._deferred = []
    again = CreateProgram("p", "", deadline_s=LATE_S, operation="again", is_graph=True, runner="other")
    await _apply(desk, GRAPH, CancelGraph("p", "", "undo", "never run", run_by="first"), again)
    assert [graph.run_by for graph in desk.desk.book.live] == ["again"]


@pytest.mark.parametrize(
    ("change", "news"),
    [
        (CancelProgram("p", "", "op"), ["over"]),
        (ExtendProgram("p", "", LATE_S + 60), ["in time"]),
        (None, ["relegated"]),
    ],
    ids=["cancelled", "extended", "relegated"],
)
async def test_who_runs_a_graph_hears_of_it_before_its_first_call(change: object, news: list[str]) -> None:
    desk = Desk(lambda: NOW_S)
    told: list[str] = []
    desk.ingress.graphs.program_over = lambda program_id: told.append("over")
    desk.ingress.graphs.program_news = lambda program_id, *, is_relegated: told.append(
        "relegated" if is_relegated else "in time"
    )
    await _apply(desk, CreateProgram("p", "", deadline_s=LATE_S, is_graph=True, runner="ingress"))
    if change is not None:
        await _apply(desk, change)
    else:
        desk.desk._changed(desk.desk.book.overdue(LATE_S + 1))
    assert told == news


# ---- outputs of tools ----

TOOL_CALL = BeginCall("p", "", NewCall("t", label="tool: x", owner="ingress"))


def deliver(output: str) -> DeliverOutput:
    return DeliverOutput("p", "", "t", output)


@pytest.fixture
async def tool() -> AsyncIterator[tuple[Desk, ProgramClient, list[bytes]]]:
    """A tool of a graph runs; its outputs, as the ingress that runs the graph gets them, which says nothing to that."""
    desk = Desk(lambda: NOW_S)
    writing = asyncio.create_task(desk.desk.writer.run())
    programs = ProgramClient(desk.ingress)
    taken: list[bytes] = []
    desk.ingress.graphs.tool_output = lambda program_id, node, output: taken.append(output)
    await programs.ask(GRAPH)
    await programs.ask(TOOL_CALL)
    yield desk, programs, taken
    writing.cancel()


async def test_the_second_output_of_a_tool_is_refused_though_the_first_is_still_on_its_way(tool) -> None:
    _, programs, taken = tool
    first, second = await asyncio.gather(
        *(programs.ask(deliver(output)) for output in ("1", "2")), return_exceptions=True
    )
    assert (first, taken) == (None, [b"1"])
    assert isinstance(second, ProgramError)
    assert second.code == "call_ended"


@pytest.mark.parametrize("ending", [FinishProgram("p", "", "op"), CancelProgram("p", "", "op")])
async def test_an_output_for_a_program_that_is_over_is_refused_as_such(tool, ending: object) -> None:
    _, programs, _ = tool
    await programs.ask(ending)
    programs.end(EndCall("p", "t", 0, "completed"))
    with pytest.raises(ProgramError, match=r"'p' is (finished|cancelled): its graph takes no output of 't'") as raised:
        await programs.ask(deliver("1"))
    assert raised.value.code == "program_ended"


async def test_an_output_is_told_again_until_its_graph_has_taken_it(tool) -> None:
    """To the ingress that runs the graph when that is back, and by the one that was told it to the next router."""
    desk, programs, taken = tool
    carry = desk.desk._send
    desk.desk._send = lambda owner, message: None if message.tool_outputs else carry(owner, message)
    await programs.ask(deliver("1"))
    desk.desk._send = carry
    desk.desk.ingress_back("another")
    assert taken == []
    desk.desk.ingress_back("ingress")
    assert taken == [b"1"]
    assert desk.ingress.unstored == 1, "a new router is told"
    desk.ingress.repeat()
    assert taken == [b"1", b"1"]
    programs.end(EndCall("p", "t", 0, "completed"))
    await eventually(lambda: desk.ingress.unstored == 0, "nobody needs it any more")
    desk.desk.ingress_back("ingress")
    assert taken == [b"1", b"1"]


@pytest.mark.parametrize("ending", [None, FinishProgram("p", "", "op")], ids=["in progress", "over"])
async def test_an_output_whose_answer_was_lost_is_taken_though_its_graph_has_it_by_then(tool, ending) -> None:
    desk, programs, taken = tool
    carry = desk.desk._send
    desk.desk._send = lambda owner, message: None if message.program_answers else carry(owner, message)
    posting = asyncio.create_task(programs.ask(deliver("1")))
    await eventually(lambda: taken == [b"1"], "its graph has it")
    programs.end(EndCall("p", "t", 0, "completed"))
    if ending is not None:
        programs.tell(ending)
    desk.desk._send = carry
    desk.ingress.repeat()
    assert await posting is None
    assert taken == [b"1"]
    with pytest.raises(ProgramError):
        await programs.ask(deliver("1"))
    await eventually(lambda: desk.ingress.unstored == 0, "nothing is told again")


async def test_the_operations_of_outputs_that_were_taken_are_remembered_within_a_bound(tool, monkeypatch) -> None:
    desk, programs, _ = tool
    monkeypatch.setattr("cluster.program_desk.MOST_TAKEN", 2)
    for number in range(4):
        await programs.ask(BeginCall("p", "", NewCall(f"t{number}", label="tool: x", owner="ingress")))
        await programs.ask(DeliverOutput("p", "", f"t{number}", "1"))
        programs.end(EndCall("p", f"t{number}", 0, "completed"))
    assert list(desk.desk._taken) == [("p", "t2"), ("p", "t3")]


async def test_outputs_that_nobody_takes_are_kept_within_a_bound(tool, monkeypatch) -> None:
    _, programs, taken = tool
    monkeypatch.setattr("cluster.program_desk.MOST_OUTPUT_BYTES", 10)
    with pytest.raises(ProgramError, match=r"take 0 bytes; .* more than 10: post it again later") as raised:
        await programs.ask(deliver('"123456789"'))
    assert raised.value.code == "store_unavailable"
    await programs.ask(deliver('"12345678"'))
    assert taken == [b'"12345678"']
    programs.end(EndCall("p", "t", 0, "completed"))
    await programs.ask(BeginCall("p", "", NewCall("t2", label="tool: x", owner="ingress")))
    await programs.ask(DeliverOutput("p", "", "t2", '"12345678"'))


# ---- while nothing more can be stored ----


async def test_a_sub_agents_call_of_a_known_program_is_taken_while_new_programs_are_not() -> None:
    """Its session is known by another name: its parent's program, or the one in which that goes on."""
    desk = Desk(lambda: NOW_S, ProgramsConfig(max_unwritten=1))
    programs = ProgramClient(desk.ingress)
    ended = await _begin(programs, "s")
    await desk.desk.writer.flush()
    programs.end(EndCall(ended.program_id, ended.call_id, 0, "completed", is_last=True))
    await desk.desk.writer.flush()
    await _begin(programs, "s")
    await desk.desk.writer.flush()
    await _begin(programs, "sub", "s")
    assert desk.desk.writer.is_full
    assert {(await _begin(programs, name)).program_id for name in ("s", "sub")} == {"s.2"}
    assert (await _begin(programs, "below", "sub")).program_id == "s.2"
    for new, parent in (("new", ""), ("of nobody", "new")):
        with pytest.raises(ProgramError) as raised:
            await _begin(programs, new, parent)
        assert raised.value.code == "store_unavailable"


# ---- calls whose clients have left ----


async def test_a_call_that_begins_when_its_client_has_left_is_ended_in_whichever_program_its_session_goes_on() -> None:
    """A session that ended goes on in another program; a sub-agent's, at any depth, in its parent's."""
    desk = Desk(lambda: NOW_S)
    programs = ProgramClient(desk.ingress)
    ended = await _begin(programs, "s")
    programs.end(EndCall(ended.program_id, ended.call_id, 0, "completed", is_last=True))
    kept = [await _begin(programs, name, parent) for name, parent in (("s", ""), ("sub", "s"), ("below", "sub"))]
    assert {ticket.program_id for ticket in kept} == {"s.2"}

    carry, held = desk.ingress._send, []
    desk.ingress._send = held.append
    leaving = [asyncio.create_task(_begin(programs, name, parent)) for name, parent in (("s", ""), ("below", "sub"))]
    await eventually(lambda: len(held) == len(leaving), "they are asked for")
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    for message in held:
        carry(message)
    [graph] = desk.desk.book.live
    assert len(graph.calls) == len(kept) + len(leaving)
    assert [call.call_id for call in graph.running] == [ticket.call_id for ticket in kept]


async def test_who_waits_is_answered_although_the_first_answer_was_lost_with_its_stream() -> None:
    """That all of it is stored is told by itself, perhaps in the next stream."""
    desk = Desk(lambda: NOW_S)
    hear, heard = desk.ingress.router_said, []
    desk.ingress.router_said = heard.append
    asking = asyncio.create_task(_begin(ProgramClient(desk.ingress), "s"))
    await eventually(lambda: bool(heard), "it is answered")
    heard.clear()
    await desk.desk.writer.flush()
    desk.ingress.repeat()
    for message in heard:
        hear(message)
    async with asyncio.timeout(5):
        assert (await asking).program_id == "s"
    await desk.desk.writer.flush()
    hear(heard[-1])
    assert desk.ingress.unstored == 0


async def _begin(programs: ProgramClient, session: str, parent: str = "") -> CallTicket:
    identity = Identity("session", session, parent_id=parent, agent=session)
    return await programs.begin(identity, tenant="", app="", now_epoch_s=NOW_S)


async def _asked_again(op: object, *, has_left: bool) -> list[str]:
    """Kinds that a router hears after one was asked of which no router answered."""
    sent: list[str] = []
    ingress = IngressPrograms("ingress", send=_noting(sent), wait_s=60.0 if has_left else 0.001)
    asking = asyncio.create_task(ProgramClient(ingress).ask(op))
    await eventually(lambda: bool(sent), "it is asked")
    if has_left:
        asking.cancel()
    with pytest.raises(asyncio.CancelledError if has_left else RouterUnavailableError):
        await asking
    sent.clear()
    ingress.repeat()
    return sent


@pytest.mark.parametrize(
    ("op", "next_step"),
    [
        (QUESTIONS[0], "ask again"),
        (CHANGES[0], "try again"),
        (BeginCall("p", "", NewCall("a")), "try again"),
        (CHANGES[1], "what was asked is carried out once one is back"),
    ],
)
async def test_without_an_answer_who_asked_is_told_what_comes_of_it(op: object, next_step: str) -> None:
    """A call is ended, should it begin yet, and the program of a graph is cancelled: so these are not carried out."""
    ingress = IngressPrograms("ingress", send=lambda message: None, wait_s=0.001)
    with pytest.raises(RouterUnavailableError, match=rf"^no router answered within 0\.001 s; {next_step}$"):
        await ProgramClient(ingress).ask(op)


def _noting(sent: list[str]):
    def send(message: wire.IngressToRouter) -> None:
        sent.extend(op.kind for op in message.program_ops)

    return send
