"""`POST /v1/programs/{id}/extend` as the router carries it out: real gRPC and Redis, a simulated engine."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.program_ops import CancelProgram, CreateProgram, ExtendProgram, FinishProgram
from tempo_router.request import ProgramCall, ProgramId
from tests.fleet import Fleet, break_control_stream, call, eventually, fleet_over_redis, submit

pytestmark = pytest.mark.redis
PROGRAM = "moved"


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 1, "max_model_len": 4096}),
        scheduling=SchedulingConfig(policy="tempo", length_model="histogram", tick_s=0.02),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start()
        yield fleet


async def test_only_another_deadline_moves_what_runs(fleet: Fleet) -> None:
    client, programs = fleet.clients[0], ProgramClient(fleet.clients[0].link.programs)
    core = fleet.router._runner.core
    began_s = time.time()
    await programs.ask(CreateProgram(PROGRAM, "", "research", began_s + 300))
    specs = [
        call(name, output_tokens=2000, slo=ProgramCall(ProgramId(PROGRAM), 300.0)) for name in ("running", "waiting")
    ]
    for spec in specs:
        await submit(client, spec)
    await eventually(lambda: core.ledger.programs.get(ProgramId(PROGRAM)) is not None, "the calls are there")
    program = core.ledger.programs[ProgramId(PROGRAM)]

    await programs.ask(ExtendProgram(PROGRAM, "", began_s + 900))
    assert program.is_retargeted
    for spec in specs:
        known = core.spec_of(spec.request_id)
        assert known is not None
        assert isinstance(known.slo, ProgramCall)
        assert known.arrival_s + known.slo.ttlt_s == pytest.approx(program.deadline_s)
    moved_s = program.deadline_s
    assert moved_s - time.monotonic() == pytest.approx(began_s + 900 - time.time(), abs=1.0)

    # No further call will come, but these run: their deadline stays.
    await programs.ask(FinishProgram(PROGRAM, "", "finish"))
    assert program.deadline_s == moved_s


async def test_a_call_of_a_relegated_program_hears_of_more_time_and_so_does_a_router_that_did_not_see_it(
    fleet: Fleet,
) -> None:
    client, programs = fleet.clients[0], ProgramClient(fleet.clients[0].link.programs)
    began_s = time.time()
    await programs.ask(CreateProgram(PROGRAM, "", "research", began_s + 0.2))
    book = fleet.router.programs.book
    await eventually(lambda: book.of_tenant(PROGRAM, "").status == "relegated", "the program is late")
    ticket = await programs.begin(Identity("explicit", PROGRAM), tenant="", app="", now_epoch_s=time.time())
    assert ticket.is_relegated
    assert ticket.left_s is not None
    assert ticket.left_s < 0
    spec = call("late", output_tokens=2000, slo=ProgramCall(ProgramId(PROGRAM), ticket.left_s))
    assert (await submit(client, spec)).success_probability == 0.0
    await eventually(lambda: spec.request_id in client.relegations, "the client is told that it comes too late")

    await programs.ask(ExtendProgram(PROGRAM, "", began_s + 900))
    await eventually(lambda: [name for name, _ in client.redates] == [spec.request_id], "the client hears of more time")
    left_s = client.redates[0][1].ttlt_s
    assert left_s == pytest.approx(900 - (time.time() - began_s), abs=2.0)
    assert client.link.open[spec.request_id].spec.slo == ProgramCall(ProgramId(PROGRAM), left_s)

    # A router that died in between: its successor hears the old deadline from a client who missed the news.
    client.link.open[spec.request_id].spec = spec
    await fleet.replace_router()
    await eventually(lambda: len(client.redates) > 1, "the client hears of it from the next router")
    assert {name for name, _ in client.redates} == {spec.request_id}
    assert [slo.ttlt_s for _, slo in client.redates[1:]] == pytest.approx([left_s] * (len(client.redates) - 1), abs=2.0)
    program = fleet.router._runner.core.ledger.programs[ProgramId(PROGRAM)]
    assert not any(job.is_relegated for job in program.live.values())


async def test_an_ingress_that_was_away_when_a_program_was_relegated_hears_of_it_when_it_is_back(fleet: Fleet) -> None:
    client, programs = fleet.clients[0], ProgramClient(fleet.clients[0].link.programs)
    await programs.ask(CreateProgram(PROGRAM, "", "research", time.time() + 300))
    spec = call("running", output_tokens=2000, slo=ProgramCall(ProgramId(PROGRAM), 300.0))
    await submit(client, spec)
    await eventually(lambda: client.tokens.get(spec.request_id, 0) > 0, "it runs")

    session = fleet.router._peers._ingresses[client.link.ingress_id]
    session.is_connected = False
    desk = fleet.router.programs
    desk._changed(desk.book.relegate(desk.book.of_tenant(PROGRAM, ""), time.time()))
    assert fleet.router._runner.core.is_relegated(spec.request_id)
    assert client.relegations == [], "what was told meanwhile was lost"
    await break_control_stream(client.link)
    await eventually(lambda: client.relegations == [spec.request_id], "it hears of it")
    assert client.redates == []


async def test_an_extension_that_was_not_stored_is_not_undone_by_the_next_router(fleet: Fleet) -> None:
    client, programs = fleet.clients[0], ProgramClient(fleet.clients[0].link.programs)
    began_s = time.time()
    await programs.ask(CreateProgram(PROGRAM, "", "research", began_s + 0.2))
    first = fleet.router.programs
    await eventually(lambda: first.book.of_tenant(PROGRAM, "").status == "relegated", "the program is late")
    await eventually(lambda: first.writer.waiting == 0, "and that is stored")
    spec = call("late", output_tokens=2000, slo=ProgramCall(ProgramId(PROGRAM), began_s + 0.2 - time.time()))
    await submit(client, spec)
    await eventually(lambda: client.tokens.get(spec.request_id, 0) > 0, "it runs, late as it is")

    first.writer.put = lambda *_, **__: None  # type: ignore[method-assign]
    client.link.programs.tell("ExtendProgram", msgspec.json.encode(ExtendProgram(PROGRAM, "", began_s + 900)))
    await eventually(lambda: len(client.redates) == 1, "the client hears of more time")
    told = len(client.relegations)
    await fleet.replace_router()
    second = fleet.router.programs
    await eventually(lambda: second.book.of_tenant(PROGRAM, "").status == "running", "the next router is asked again")
    known = fleet.router._runner.core.ledger.programs
    await eventually(lambda: ProgramId(PROGRAM) in known, "it has the call")
    await eventually(lambda: fleet.router._peers.is_settled, "all is said")
    program = known[ProgramId(PROGRAM)]
    assert not program.is_lost
    assert program.deadline_s - time.monotonic() == pytest.approx(began_s + 900 - time.time(), abs=1.0)
    assert client.relegations[told:] == []
    assert [slo.ttlt_s for _, slo in client.redates] == pytest.approx([900 - 0.5] * len(client.redates), abs=2.0)


async def test_a_program_that_was_cancelled_while_an_ingress_was_away_stays_cancelled(fleet: Fleet) -> None:
    client, programs = fleet.clients[0], ProgramClient(fleet.clients[0].link.programs)
    await programs.ask(CreateProgram(PROGRAM, "", "research", time.time() + 300))
    slo = ProgramCall(ProgramId(PROGRAM), 300.0)
    running, waiting = (
        replace(call(name, output_tokens=2000, slo=slo), program_id=PROGRAM) for name in ("running", "waiting")
    )
    await submit(client, running)
    await eventually(lambda: client.tokens.get(running.request_id, 0) > 0, "one runs")
    await submit(client, waiting)

    fleet.router._peers._ingresses[client.link.ingress_id].is_connected = False
    desk = fleet.router.programs
    desk._changed(desk.book.apply(CancelProgram(PROGRAM, "", "cancel"), time.time())[1])
    assert client.ended == {}, "what was told meanwhile was lost"
    await break_control_stream(client.link)
    await eventually(lambda: len(client.ended) == 2, "it hears of it")
    assert set(client.ended.values()) == {"program cancelled"}
    assert client.resumed == []
    await eventually(lambda: fleet.router._runner.core.is_idle, "nothing of it goes on")
    assert not fleet.router._open
