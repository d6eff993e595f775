"""Requests through router, workers and ingresses over real gRPC and Redis; engines are simulated, failures are not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
import structlog

from cluster import wire_pb2 as wire
from cluster.embedded_redis import start_embedded_redis
from cluster.learnt_lengths import LENGTHS_SNAPSHOT
from cluster.program_desk import ViewConsole, ViewProgram
from cluster.router_server import RouterServer
from deployments.program_client import ProgramClient
from tempo_router.actions import Action
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig, TransportConfig
from tempo_router.errors import (
    InvalidEventError,
    LeaseLostError,
    ProgramError,
    RequestTooLargeError,
    RouterUnavailableError,
    TempoError,
)
from tempo_router.events import Arrived, Event, Progressed, ReplicaLoad, Settled
from tempo_router.program_graph import NewCall
from tempo_router.program_ops import BeginCall, CancelProgram, CreateProgram
from tempo_router.request import DispatchId, Latency, ProgramId, ReplicaId, RequestId
from tempo_router.router import RouterCore
from tests.fleet import (
    WAIT_S,
    Fleet,
    break_control_stream,
    break_token_streams,
    call,
    eventually,
    fleet_over_redis,
    submit,
)

CONFIG = TempoConfig(
    engine=EngineConfig(
        kind="simulated", engine_kwargs={"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 4096}
    ),
    scheduling=SchedulingConfig(settle_s=0.1, tick_s=0.02),
    transport=TransportConfig(inline_payload_bytes=64, attach_timeout_s=2, lease_s=0.6, snapshot_s=0.1),
)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet_over_redis(CONFIG, tmp_path) as fleet:
        yield fleet


async def test_a_request_streams_to_its_end_and_leaves_nothing(fleet: Fleet) -> None:
    await fleet.start()
    client = fleet.clients[0]
    verdict = await submit(client, call("one", output_tokens=20, slo=Latency(5, 0.5)))
    assert verdict.is_admitted
    assert 0 <= verdict.success_probability <= 1
    await eventually(lambda: "one" in client.ended, "the answer ends")
    assert client.tokens[RequestId("one")] == 20
    await eventually(fleet.is_empty, "nothing is left of it")


async def test_tokens_that_overtake_the_verdict_admit_the_request(fleet: Fleet) -> None:
    """They come on another stream; a short answer may end before its verdict is read, or the router may be gone."""
    await fleet.start()
    client = fleet.clients[0]
    hear = client.link.router_said

    def hear_no_verdict(message: wire.RouterToIngress) -> None:
        message.ClearField("verdicts")
        hear(message)

    client.link.router_said = hear_no_verdict  # type: ignore[method-assign]
    async with asyncio.timeout(10):
        verdict = await submit(client, call("short", output_tokens=1))
    assert verdict.is_admitted
    assert client.ended == {"short": "length"}
    await eventually(fleet.is_empty, "nothing is left of it")


async def test_a_token_stream_that_cannot_go_on_is_a_failure_of_the_ingress(fleet: Fleet) -> None:
    """It would not be opened again, and all its requests would hang."""
    await fleet.start()
    client = fleet.clients[0]

    def fail(worker_id: str, frame: wire.WorkerToIngress) -> None:
        raise ValueError(f"cannot read {len(frame.deltas)} deltas from {worker_id}")

    client.frame_received = fail  # type: ignore[method-assign]
    assert client.link.failure() is None
    await submit(client, call("unreadable", output_tokens=1000))
    await eventually(lambda: isinstance(client.link.failure(), ValueError), "health tells")


async def test_a_large_payload_is_fetched_from_the_ingress(fleet: Fleet) -> None:
    """It does not pass through the router, whose memory would grow with the prompts that wait."""
    await fleet.start()
    client = fleet.clients[0]
    await submit(client, call("large"), padding_tokens=100_000)
    assert fleet.router.snapshot()["payloads"] == 0
    await eventually(lambda: "large" in client.ended, "the answer ends")
    await eventually(fleet.is_empty, "nothing is left of it")


async def test_a_cancelled_request_leaves_the_engine_and_every_table(fleet: Fleet) -> None:
    await fleet.start()
    client = fleet.clients[0]
    for number in range(20):
        await submit(client, call(f"r{number}", output_tokens=3000))
    await eventually(lambda: client.tokens.get(RequestId("r0"), 0) > 3, "tokens flow")
    for number in range(20):
        client.link.cancel(RequestId(f"r{number}"))
    await eventually(fleet.is_empty, "nothing is left")


async def test_streams_of_a_killed_worker_continue_on_another(fleet: Fleet) -> None:
    """The tokens that were sent are kept: every answer has its full length, none has more."""
    await fleet.start(workers=2)
    client = fleet.clients[0]
    names = [f"r{number}" for number in range(12)]
    for name in names:
        await submit(client, call(name, output_tokens=300))
    await eventually(lambda: len(client.tokens) == len(names), "all stream")
    victim = max(fleet.workers, key=lambda worker_id: fleet.workers[worker_id].live_calls)
    await fleet.kill_worker(victim)
    await eventually(lambda: len(client.ended) == len(names), "all end")
    assert client.resumed
    for name in names:
        length = client.tokens[RequestId(name)]
        assert length == 300, name
    await eventually(fleet.is_empty, "nothing is left")


async def test_streams_of_a_worker_whose_engine_died_continue_on_another(fleet: Fleet) -> None:
    """And it can be stopped at once: nobody is left to drain for, and its engine is not asked for anything."""
    await fleet.start(workers=2)
    client = fleet.clients[0]
    names = [f"r{number}" for number in range(12)]
    for name in names:
        await submit(client, call(name, output_tokens=300))
    await eventually(lambda: len(client.tokens) == len(names), "all stream")
    victim = fleet.workers.pop(max(fleet.workers, key=lambda worker_id: fleet.workers[worker_id].live_calls))
    aborted: list[str] = []
    victim._live_engine.abort = aborted.extend  # type: ignore[method-assign]
    victim.on_death("out of memory")
    assert await victim.drain(WAIT_S / 2)
    await eventually(lambda: len(client.ended) == len(names), "all end")
    assert client.resumed
    assert all(client.tokens[RequestId(name)] == 300 for name in names)
    assert not aborted
    await victim.stop()
    await eventually(fleet.is_empty, "nothing is left")


async def test_a_killed_router_costs_running_streams_nothing_and_waiting_requests_a_moment(fleet: Fleet) -> None:
    await fleet.start()
    client = fleet.clients[0]
    names = [f"r{number}" for number in range(30)]
    for name in names:
        await submit(client, call(name, output_tokens=200))
    await eventually(lambda: len(client.tokens) >= 8, "some stream, others wait")
    old_epoch = fleet.router.epoch
    await fleet.replace_router()
    assert fleet.router.epoch > old_epoch
    await submit(client, call("late", output_tokens=5))
    await eventually(lambda: len(client.ended) == len(names) + 1, "all end")
    assert not client.resumed, "no stream had to start again"
    assert all(client.tokens[RequestId(name)] == 200 for name in names)
    await eventually(fleet.is_empty, "nothing is left")


async def test_an_admitted_request_that_a_new_router_refuses_goes_on(fleet: Fleet) -> None:
    """What waits is told again to a new router, whose queue may be full or which may find the deadline impossible."""
    await fleet.start()
    client = fleet.clients[0]
    names = [f"r{number}" for number in range(30)]
    for name in names:
        await submit(client, call(name, output_tokens=200))
    fleet.config = CONFIG.model_copy(
        update={"scheduling": CONFIG.scheduling.model_copy(update={"max_waiting_requests": 2})}
    )
    await fleet.replace_router()
    await eventually(lambda: len(client.ended) == len(names), "all end")
    assert all(client.tokens[RequestId(name)] == 200 for name in names)
    await eventually(fleet.is_empty, "nothing is left")


async def test_requests_of_a_vanished_ingress_are_aborted(fleet: Fleet) -> None:
    await fleet.start(clients=2)
    leaving, staying = fleet.clients
    await submit(leaving, call("gone", output_tokens=3000))
    await submit(staying, call("stays", output_tokens=50))
    await eventually(lambda: leaving.tokens.get(RequestId("gone"), 0) > 0, "tokens flow")
    await leaving.link.stop()
    leaving.link.open.clear()
    await eventually(lambda: "stays" in staying.ended, "the other ingress is not disturbed")
    await eventually(fleet.is_empty, "the aborted request is forgotten everywhere")


async def test_what_a_router_shows_of_programs_has_the_same_parts_before_its_start_and_after(fleet: Fleet) -> None:
    before = fleet.router.snapshot()["programs"]
    await fleet.start()
    assert fleet.router.snapshot()["programs"] == before


async def test_an_outdated_router_steps_down_when_a_peer_has_seen_a_newer_one(fleet: Fleet) -> None:
    """Also while Redis is away, which would tell it otherwise."""
    await fleet.start()
    fleet.redis.stop()
    worker = fleet.workers["worker-1"]
    worker._epoch = fleet.router.epoch + 1
    await break_control_stream(worker)
    await eventually(lambda: isinstance(fleet.router.failure(), LeaseLostError), "the worker told it")
    assert not fleet.router.snapshot()["workers"]


async def test_a_worker_leaves_an_outdated_router_which_learns_of_the_newer_one_from_redis(fleet: Fleet) -> None:
    await fleet.start()
    newer = RouterServer(CONFIG, fleet.store, owner="newer", host="127.0.0.1")
    await newer.start()
    old, fleet.router = fleet.router, newer
    for stream in list(fleet.workers.values()):
        stream._router._ends._epoch = newer.epoch  # it has met the newer router
    await old._server.stop(grace=None)
    await eventually(lambda: set(newer.snapshot()["workers"]) == {"worker-1"}, "the worker goes to the newer router")
    with pytest.raises(LeaseLostError):
        await fleet.store.renew("router-1", old.epoch, 1.0)
    await eventually(lambda: isinstance(old.failure(), LeaseLostError), "the old router learns it from Redis")
    for task in old._tasks:
        task.cancel()


@pytest.mark.parametrize("event_type", [Settled, Arrived])
async def test_a_router_whose_core_fails_on_an_event_tells_so(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, event_type: type
) -> None:
    """An event half done may leave a request nowhere, or everything waiting; only a new router mends that."""
    handle = RouterCore.handle

    def fail(core: RouterCore, event: Event) -> list[Action]:
        if isinstance(event, event_type):
            raise KeyError("a mistake in the core")
        return handle(core, event)

    monkeypatch.setattr(RouterCore, "handle", fail)
    client = await fleet.add_unconnected_client(router_wait_s=WAIT_S)
    await fleet.start(clients=0)
    submission = asyncio.ensure_future(submit(client, call("unlucky")))
    await eventually(lambda: isinstance(fleet.router.failure(), KeyError), "the router knows that it failed")
    submission.cancel()
    await asyncio.gather(submission, return_exceptions=True)


async def test_an_event_that_cannot_have_happened_does_not_end_the_router(fleet: Fleet) -> None:
    """It changed nothing: a peer's mistake costs that peer its stream."""
    await fleet.start()
    with pytest.raises(InvalidEventError):
        fleet.router._runner.handle(
            Progressed(
                time.monotonic(),
                ReplicaId("worker-1"),
                ReplicaLoad(0, 0, 0),
                tokens=((DispatchId(fleet.router.epoch << 32 | 77), 1),),
            )
        )
    assert fleet.router.failure() is None


async def test_without_redis_serving_goes_on_and_the_snapshot_is_written_later(fleet: Fleet, tmp_path: Path) -> None:
    await fleet.start()
    client = fleet.clients[0]
    fleet.redis.stop()
    await submit(client, call("dark", output_tokens=10))
    await eventually(lambda: "dark" in client.ended, "served without Redis")
    await eventually(lambda: len(fleet.router.lengths) > 0, "its length is learnt")
    assert fleet.router.failure() is None
    fleet.redis = await asyncio.to_thread(start_embedded_redis, tmp_path)
    learnt = fleet.router.lengths.snapshot()
    async with asyncio.timeout(WAIT_S):
        # Redis wakes nobody, so one has to look again.
        while json.loads(await fleet.store.load_snapshot(LENGTHS_SNAPSHOT) or b"null") != learnt:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert fleet.router.failure() is None


async def test_a_draining_router_refuses_new_requests_and_finishes_old_ones(fleet: Fleet) -> None:
    await fleet.start()
    client = fleet.clients[0]
    await submit(client, call("old", output_tokens=100))
    draining = asyncio.ensure_future(fleet.router.drain(20))
    await asyncio.sleep(0)
    verdict = await submit(client, call("new"))
    assert (verdict.is_admitted, verdict.reject_reason) == (False, "draining")
    assert await draining
    await eventually(lambda: "old" in client.ended, "its last tokens arrive")
    await eventually(fleet.is_empty, "nothing is left")


async def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new(fleet: Fleet) -> None:
    await fleet.start(workers=2)
    client = fleet.clients[0]
    for number in range(8):
        await submit(client, call(f"r{number}", output_tokens=150))
    await eventually(lambda: all(worker.live_calls for worker in fleet.workers.values()), "both work")
    leaving = fleet.workers["worker-1"]
    assert await leaving.drain(20)
    assert leaving.live_calls == 0
    for number in range(4):
        await submit(client, call(f"s{number}", output_tokens=20))
    assert leaving.live_calls == 0
    await eventually(lambda: len(client.ended) == 12, "all end")
    assert not client.resumed


async def test_no_router_is_an_error_in_time_and_the_request_is_forgotten(fleet: Fleet) -> None:
    client = await fleet.add_unconnected_client(router_wait_s=0.2)
    with pytest.raises(RouterUnavailableError, match=r"within 0\.2 s"):
        await submit(client, call("nobody"))
    assert not client.link.open


async def test_an_answer_that_was_lost_whole_with_its_stream_is_given_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine has ended it and the router forgot it, and its ingress never learnt which worker had it."""
    await fleet.start()
    client, worker = fleet.clients[0], next(iter(fleet.workers.values()))
    with monkeypatch.context() as patched:
        patched.setattr(worker, "_to_ingress", lambda *_: None)
        await submit(client, call("lost", output_tokens=3))
        await eventually(lambda: fleet.router._runner.core.is_idle, "the router has it no more")
    assert "lost" in client.link.open
    break_token_streams(worker)
    await eventually(lambda: client.ended.get(RequestId("lost")) == "length", "it is answered after all")
    assert client.tokens[RequestId("lost")] == 3
    assert client.resumed == ["lost"]
    await eventually(fleet.is_empty, "nothing is left anywhere")


async def test_learnt_lengths_survive_the_router(fleet: Fleet) -> None:
    await fleet.start()
    client = fleet.clients[0]
    await submit(client, call("one", output_tokens=7))
    await eventually(lambda: "one" in client.ended, "the answer ends")
    await eventually(lambda: len(fleet.router.lengths) > 0, "its length is learnt")
    learnt = fleet.router.lengths.snapshot()
    await fleet.router._save_lengths()
    await fleet.replace_router()
    assert fleet.router.lengths.snapshot() == learnt


async def test_an_ingress_that_does_not_read_is_cut_off_and_the_others_go_on(fleet: Fleet) -> None:
    """Its frames are bounded; beyond the bound its stream is dropped, and what it still wants it submits again."""
    await fleet.start(clients=2)
    slow, quick = fleet.clients
    await submit(slow, call("slow", output_tokens=500))
    await submit(quick, call("quick", output_tokens=200))
    await eventually(lambda: slow.tokens.get(RequestId("slow"), 0) > 0, "tokens flow")
    worker = fleet.workers["worker-1"]
    session = worker._sessions["ingress-1"]
    session.outbox._limit_bytes = 0
    await eventually(lambda: worker._sessions.get("ingress-1") is not session, "the stream is dropped")
    await eventually(lambda: len(slow.ended) == len(quick.ended) == 1, "both end")
    # Twice where the router hears of the lost attempt from the worker, and of the broken stream only after it has sent
    # the next one there: that one counts as lost with the stream, too.
    assert set(slow.resumed) == {"slow"}
    assert slow.tokens[RequestId("slow")] == 500
    assert not quick.resumed
    await eventually(fleet.is_empty, "nothing is left")


async def test_a_background_task_that_died_is_a_failure_of_its_owner(fleet: Fleet) -> None:
    await fleet.start()
    client, worker = fleet.clients[0], fleet.workers["worker-1"]
    assert client.link.failure() is None
    assert worker.failure() is None
    assert fleet.router.failure() is None
    worker.on_death("out of memory")
    assert "out of memory" in str(worker.failure())
    await eventually(lambda: client.link.not_ready_because == "no worker is attached", "the ingress is not ready")


class GoneIngress:
    """The server's end of a token stream whose ingress left right after it had introduced itself."""

    async def write(self, message: wire.WorkerToIngress) -> None:
        raise grpc.aio.UsageError("RPC already finished.")


async def test_an_ingress_that_leaves_while_it_attaches_is_forgotten(fleet: Fleet) -> None:
    """Or its calls would run for nobody, and their frames wait for ever."""
    await fleet.start()
    worker = fleet.workers["worker-1"]
    attach = wire.IngressToWorker(attach=wire.IngressAttach(ingress_id="brief", engine_version="none"))

    async def messages() -> AsyncIterator[wire.IngressToWorker]:
        yield attach

    with pytest.raises(grpc.aio.UsageError):
        await worker.serve_ingress(messages(), GoneIngress())
    assert "brief" not in worker._sessions


async def test_a_mistake_in_a_token_stream_is_logged(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is opened again, so the log is the only trace."""
    await fleet.start()
    worker, client = fleet.workers["worker-1"], fleet.clients[0]

    def fail(*_: object) -> None:
        raise KeyError("a mistake in the worker")

    monkeypatch.setattr(worker, "_on_payload", fail)
    with structlog.testing.capture_logs() as logs:
        await submit(client, call("large"), padding_tokens=1000)
        await eventually(lambda: any(entry["event"] == "stream_failed" for entry in logs), "it is logged")
    client.link.cancel(RequestId("large"))
    await eventually(fleet.is_empty, "nothing is left")


async def test_an_administrative_call_ends_when_its_worker_leaves_or_fails(fleet: Fleet) -> None:
    await fleet.start()
    client, worker = fleet.clients[0], fleet.workers["worker-1"]

    async def break_down(call: bytes) -> tuple[bytes, ...]:
        raise KeyError("a mistake in the engine")

    async def take_for_ever(call: bytes) -> tuple[bytes, ...]:
        await asyncio.Event().wait()
        return ()

    worker._live_engine.call_utility = break_down  # type: ignore[method-assign]
    with pytest.raises(TempoError, match="a mistake in the engine"):
        async with asyncio.timeout(10):
            await client.link.call_utility(b"")
    worker._live_engine.call_utility = take_for_ever  # type: ignore[method-assign]
    calling = asyncio.ensure_future(client.link.call_utility(b""))
    await eventually(lambda: bool(worker._utility_tasks), "the call has arrived")
    client.link.router_said(wire.RouterToIngress(workers=wire.WorkerSet()))
    with pytest.raises(TempoError, match="lost"):
        async with asyncio.timeout(10):
            await calling
    for task in worker._utility_tasks:
        task.cancel()


async def test_nothing_follows_a_frame_that_was_dropped(fleet: Fleet) -> None:
    """The ingress would take what follows for the next tokens."""
    await fleet.start()
    await submit(fleet.clients[0], call("one", output_tokens=3000))
    worker = fleet.workers["worker-1"]
    await eventually(lambda: fleet.clients[0].tokens.get(RequestId("one"), 0) > 0, "tokens flow")
    session = worker._sessions["ingress-1"]
    waiting = len(session.outbox)
    too_large = wire.WorkerToIngress(engine_outputs=wire.Payload(buffers=[bytes(CONFIG.transport.outbox_bytes)]))
    small = wire.WorkerToIngress(deltas=[wire.TokenDelta(request_id="one", token_ids=[1])])
    worker._to_ingress("ingress-1", session, too_large)
    worker._to_ingress("ingress-1", session, small)
    assert len(session.outbox) == waiting


async def test_a_request_that_no_message_can_hold_is_refused_and_disturbs_nobody(fleet: Fleet) -> None:
    """Sent, it would break the token stream, and again each time it is tried."""
    transport = CONFIG.transport.model_copy(update={"max_message_bytes": 1024 * 1024})
    fleet.config = CONFIG.model_copy(update={"transport": transport})
    await fleet.start()
    client = fleet.clients[0]
    await submit(client, call("small", output_tokens=100))
    with pytest.raises(RequestTooLargeError, match=r"transport\.max_message_bytes"):
        await submit(client, call("huge"), padding_tokens=1024 * 1024)
    await eventually(lambda: "small" in client.ended, "the other ends")
    assert not client.resumed
    await eventually(fleet.is_empty, "nothing is left")


async def test_a_program_that_no_message_can_hold_disturbs_nobody(fleet: Fleet) -> None:
    """Told whole, it would break the ingress's stream to the router, and again each time it is asked for."""
    transport = CONFIG.transport.model_copy(update={"max_message_bytes": 256 * 1024})
    fleet.config = CONFIG.model_copy(update={"transport": transport})
    fleet.router = RouterServer(fleet.config, fleet.store, owner="router-1", host="127.0.0.1")
    with structlog.testing.capture_logs() as logs:
        await fleet.start()
        programs = ProgramClient(fleet.clients[0].link.programs)
        await programs.ask(CreateProgram("large", "", "app", deadline_s=time.time() + 600))
        names = [f"{number:0128}" for number in range(60)]
        for number, name in enumerate([*names, *(f"after {name}" for name in names)]):
            parents = tuple(names) if number >= len(names) else ()
            await programs.ask(BeginCall("large", "", NewCall(name, parents=parents, owner="ingress-1")))
        with pytest.raises(ProgramError, match=r"transport\.max_message_bytes"):
            await programs.ask(ViewProgram("large", ""))
        assert (await programs.ask(ViewConsole()))["programs"][0]["call_count"] == 120
        assert (await programs.ask(CancelProgram("large", "", "op")))["status"] == "cancelled"
    assert not [line for line in logs if line["event"] == "link_down"]


async def test_a_request_of_a_cancelled_program_is_refused_before_it_has_a_verdict(fleet: Fleet) -> None:
    await fleet.start()
    client = fleet.clients[0]
    programs = ProgramClient(client.link.programs)
    await programs.ask(CreateProgram("p", "", "app", deadline_s=time.time() + 600))
    await programs.ask(CancelProgram("p", "", "op"))
    async with asyncio.timeout(WAIT_S / 2):
        verdict = await submit(client, replace(call("late"), program_id=ProgramId("p"), call_id="k"))
    assert (verdict.is_admitted, verdict.reject_reason) == (False, "program_cancelled")
    assert client.ended == {}
    await eventually(fleet.is_empty, "nothing is left")


@pytest.mark.parametrize(
    ("news", "reason", "ended"),
    [
        (wire.RouterToIngress(cancelled=["r"]), "program_cancelled", "program cancelled"),
        (wire.RouterToIngress(expired=["r"]), "expired", "expired"),
    ],
)
async def test_what_a_router_ends_is_told_once_by_its_verdict_or_after_it(
    fleet: Fleet, news: wire.RouterToIngress, reason: str, ended: str
) -> None:
    client = await fleet.add_unconnected_client(router_wait_s=WAIT_S)
    for verdict in (None, False, True):
        client.ended.clear()
        submitting = asyncio.create_task(submit(client, call("r")))
        await eventually(lambda: RequestId("r") in client.link.open, "it is submitted")
        if verdict is not None:
            told = wire.Verdict(request_id="r", is_admitted=verdict, reject_reason="" if verdict else "queue_full")
            client.link.router_said(wire.RouterToIngress(verdicts=[told]))
        client.link.router_said(news)
        assert not client.link.open
        found = await submitting
        assert found.reject_reason == {None: reason, False: "queue_full", True: None}[verdict]
        assert client.ended == ({RequestId("r"): ended} if verdict else {})
