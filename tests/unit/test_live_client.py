"""The open-loop HTTP client of the live replay, against our real edge and against a plain server."""

import asyncio
import time
from dataclasses import replace

import aiohttp
import pytest

from benchmarks.live_client import Delivered, HttpSender, Target, _UnitClient, prompt_of, replay, replay_http
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall
from tempo_router.simulation.trace import Trace
from tests.live_replay import (
    ALL,
    CHAT,
    IDLE,
    MAIL,
    RESEARCH,
    BookLink,
    FakeVllm,
    Received,
    edge_before,
    is_as_in_trace,
    listening,
)

LIMIT_S = 60.0


def call_of(name: str, vllm: FakeVllm) -> Received:
    """The request whose prompt is that of this call of the trace."""
    call = next(call for unit in ALL.units for call in unit.calls if call.request_id == name)
    (found,) = [one for one in vllm.received if one.body["prompt"] == prompt_of(call)]
    return found


async def test_our_edge_learns_of_a_program_what_the_trace_says():
    vllm, link = FakeVllm(), BookLink()
    async with listening(edge_before(vllm, link)) as url:
        report = await replay_http(ALL, Target((url,), "m"), limit_s=LIMIT_S)

    (graph,) = link.book.ended
    is_as_in_trace(graph, RESEARCH)
    assert graph.deadline_s == pytest.approx(graph.created_s + 60.0, abs=30.0)
    for name, stage in (("plan", 0), ("search-a", 1), ("report", 2)):
        context = call_of(name, vllm).context
        assert isinstance(context.slo, ProgramCall)
        assert context.slo.program_id == graph.program_id
        assert context.slo.ttlt_s <= 60.0
        assert (context.app, context.tenant, context.program.stage) == ("research", "ann", stage)
    assert [unit.status for unit in report.units] == ["finished"] * 4
    assert [unit.is_met for unit in report.units] == [True, True, True, None]
    assert [unit.output_tokens for unit in report.units] == [14, 6, 2, 2]


async def test_calls_alone_have_targets_of_their_own_and_belong_to_no_program():
    vllm, link = FakeVllm(), BookLink()
    async with listening(edge_before(vllm, link)) as url:
        await replay_http(ALL, Target((url,), "m"), limit_s=LIMIT_S)

    chat, mail, night = (call_of(name, vllm).context for name in ("hello", "sort", "night"))
    assert (chat.slo, chat.app, chat.tenant, chat.is_streaming) == (Latency(30.0, 10.0), "chat", "bob", True)
    assert isinstance(mail.slo, Deadline)
    assert 10.0 < mail.slo.ttlt_s <= 40.0
    assert night.slo == BestEffort()
    assert (chat.program, mail.program, night.program) == (None, None, None)


async def test_a_program_without_a_deadline_is_best_effort():
    vllm, link = FakeVllm(), BookLink()
    async with listening(edge_before(vllm, link)) as url:
        await replay_http(Trace("free", (replace(RESEARCH, slo=BestEffort()),)), Target((url,), "m"), limit_s=LIMIT_S)
    (graph,) = link.book.ended
    is_as_in_trace(graph, RESEARCH)
    assert graph.deadline_s is None
    assert [one.context.slo for one in vllm.received] == [BestEffort()] * 4


async def test_programs_of_one_trace_replayed_twice_are_two():
    """A service remembers those that are over, and takes no further call of theirs."""
    link = BookLink()
    async with listening(edge_before(FakeVllm(), link)) as url:
        for _ in range(2):
            report = await replay_http(Trace("again", (RESEARCH,)), Target((url,), "m"), limit_s=LIMIT_S)
            assert report.units[0].status == "finished"
    assert len(list(link.book.ended)) == 2


async def test_when_a_call_is_refused_the_rest_of_its_program_is_withdrawn():
    """As in the simulator: what runs beside it is cut off, what would follow is not sent, and the router is told."""
    is_search_a, is_search_b = (
        lambda one, call=call: one.body["prompt"] == prompt_of(call) for call in RESEARCH.calls[1:3]
    )
    vllm, link = FakeVllm(stays_silent=is_search_a, refuses=is_search_b), BookLink()
    async with listening(edge_before(vllm, link)) as url:
        report = await replay_http(Trace("refused", (RESEARCH,)), Target((url,), "m"), limit_s=LIMIT_S)

    (unit,) = report.units
    assert (unit.status, unit.is_met) == ("refused", False)
    assert len(vllm.received) == 3
    assert vllm.left == 1
    (graph,) = link.book.ended
    assert (graph.status, graph.running) == ("cancelled", [])


async def test_a_program_that_is_open_when_the_run_ends_is_cut_and_cancelled():
    vllm, link = FakeVllm(stays_silent=lambda _: True), BookLink()
    async with listening(edge_before(vllm, link)) as url, aiohttp.ClientSession() as session:
        client = _UnitClient(RESEARCH, HttpSender(Target((url,), "m"), session), time.perf_counter())
        running = asyncio.create_task(client.run())
        await vllm.has_received.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert client.outcome().status == "cut"
    (graph,) = link.book.ended
    assert graph.status == "cancelled"


async def test_a_server_that_knows_no_programs_gets_the_same_calls_and_nothing_else():
    vllm = FakeVllm()
    began_s = time.time()
    async with listening(vllm) as url:
        report = await replay_http(ALL, Target((url,), "m", has_programs=False), limit_s=LIMIT_S)

    assert [unit.status for unit in report.units] == ["finished"] * 4
    assert {one.path for one in vllm.received} == {"/v1/completions"}
    sent = call_of("report", vllm)
    assert {name: sent.headers[f"x-tempo-{name}"] for name in ("app", "call", "stage", "parents")} == {
        "app": "research", "call": "call-3", "stage": "2", "parents": "call-1,call-2",
    }  # fmt: skip
    assert float(sent.headers["x-tempo-deadline"]) == pytest.approx(began_s + 60.0, abs=30.0)
    assert sent.body == {
        "model": "m", "prompt": prompt_of(RESEARCH.calls[3]), "max_tokens": 5, "ignore_eos": True, "temperature": 0,
        "stream": False, "user": "ann",
    }  # fmt: skip
    chat = call_of("hello", vllm).body
    assert (chat["stream"], chat["return_token_ids"]) == (True, True)
    assert chat["slo"] == {"ttft_ms": 30_000.0, "tbt_ms": 10_000.0}
    assert "x-tempo-program" not in call_of("hello", vllm).headers


async def test_vllms_priority_is_the_earliest_deadline_with_best_effort_last():
    vllm = FakeVllm()
    units = tuple(replace(unit, arrival_s=0.01 * number) for number, unit in enumerate((RESEARCH, CHAT, MAIL, IDLE)))
    target = ("m", False, True)
    async with listening(vllm) as url:
        await replay_http(Trace("moved", units), Target((url,), *target), limit_s=LIMIT_S)
    found = {name: call_of(name, vllm).body["priority"] for name in ("hello", "sort", "plan", "report", "night")}
    assert found == {"hello": 30_010, "sort": 40_020, "plan": 60_000, "report": 60_000, "night": 10**9 + 30}


async def test_calls_go_to_the_server_with_the_fewest_open_ones():
    silent, quick = FakeVllm(stays_silent=lambda _: True), FakeVllm()
    async with listening(silent) as first, listening(quick) as second, aiohttp.ClientSession() as session:
        sender = HttpSender(Target((first, second), "m", has_programs=False), session)
        kept = asyncio.create_task(sender.send(IDLE, IDLE.calls[0], Delivered(IDLE.calls[0]), time.perf_counter))
        await silent.has_received.wait()
        for unit in (CHAT, MAIL):
            await sender.send(unit, unit.calls[0], Delivered(unit.calls[0]), time.perf_counter)
        kept.cancel()
    assert (len(silent.received), len(quick.received)) == (1, 2)


async def test_an_answer_that_is_no_refusal_ends_the_replay_with_what_the_server_said():
    async def broken(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"out of order"})

    async with listening(broken) as url:
        with pytest.raises(RuntimeError, match="sort: 500 out of order"):
            await replay_http(Trace("broken", (MAIL,)), Target((url,), "m", has_programs=False), limit_s=LIMIT_S)


class Failing:
    """A way to a server that fails the calls of one unit, answers no other, and takes no word about programs."""

    def __init__(self, unit_id: str) -> None:
        self.unit_id = unit_id
        self.ended: list[tuple[str, bool]] = []

    async def send(self, unit, call, delivered, now_s) -> None:
        if unit.unit_id == self.unit_id:
            raise RuntimeError("the server is gone")
        await asyncio.Event().wait()

    async def end_program(self, unit, *, is_complete: bool) -> None:
        self.ended.append((unit.unit_id, is_complete))
        raise RuntimeError(f"cancel {unit.unit_id}: the server is gone")


async def test_a_failed_call_ends_the_replay_at_once_and_is_what_is_told_of():
    """Not after the last arrival, and not hidden by what fails because of it."""
    late = replace(IDLE, unit_id="late", arrival_s=1e6)
    sender = Failing(MAIL.unit_id)
    async with asyncio.timeout(60.0):
        with pytest.raises(RuntimeError, match=r"^the server is gone"):
            await replay(Trace("broken", (RESEARCH, MAIL, late)), sender, limit_s=LIMIT_S)
    assert sender.ended == [(RESEARCH.unit_id, False)]
