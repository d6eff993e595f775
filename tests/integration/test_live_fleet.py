"""The live replay without HTTP: what a real router hears of its calls. Router, Redis, worker and streams are real."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.serial_utils import MsgpackEncoder

from benchmarks.live_client import _UnitClient, replay
from benchmarks.live_fleet import LinkSender
from cluster import wire_pb2 as wire
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, RequestSpec
from tempo_router.simulation.trace import Trace
from tests.fleet import Fleet, eventually, fleet_over_redis
from tests.live_replay import ALL, RESEARCH, is_as_in_trace

pytestmark = [pytest.mark.redis, pytest.mark.vllm]

CONFIG = TempoConfig(
    engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 8, "max_model_len": 4096}),
    scheduling=SchedulingConfig(policy="tempo", length_model="histogram", settle_s=0.1, tick_s=0.02),
)
LIMIT_S = 60.0


class Sender(LinkSender):
    """Over a simulated engine, whose frames are put into vLLM's codec. submitted: what the router was asked to run.

    failing: the trace's name of a call that ends with an error after its first output.
    """

    def __init__(self, config: TempoConfig, address: str) -> None:
        super().__init__(config, address)
        self.failing = ""
        self.submitted: dict[str, RequestSpec] = {}
        self._submit_to_router = self.link.submit
        self.link.submit = self._noting  # type: ignore[method-assign]

    async def _noting(self, spec, payload):
        self.submitted[spec.request_id.partition("-")[2]] = spec
        return await self._submit_to_router(spec, payload)

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        outputs = [
            EngineCoreOutput(
                delta.request_id,
                list(delta.token_ids),
                finish_reason=self._finish_reason(delta),
            )
            for delta in frame.deltas
        ]
        buffers = [bytes(buffer) for buffer in MsgpackEncoder().encode(EngineCoreOutputs(outputs=outputs))]
        super().frame_received(worker_id, wire.WorkerToIngress(engine_outputs=wire.Payload(buffers=buffers)))

    def _finish_reason(self, delta: wire.TokenDelta) -> FinishReason | None:
        if self.failing and self.failing in delta.request_id:
            return FinishReason.ERROR
        return FinishReason.LENGTH if delta.finish_reason else None


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with fleet_over_redis(CONFIG, tmp_path) as fleet:
        await fleet.start(clients=0)
        yield fleet


@pytest.fixture
async def sender(fleet: Fleet) -> AsyncIterator[Sender]:
    sender = Sender(CONFIG, fleet.router.address)
    await sender.connect()
    yield sender
    await sender.link.stop()


async def test_the_router_hears_of_a_call_what_an_ingress_would_say(fleet: Fleet, sender: Sender):
    report = await replay(ALL, sender, limit_s=LIMIT_S)

    assert [unit.status for unit in report.units] == ["finished"] * 4
    assert [unit.output_tokens for unit in report.units] == [14, 6, 2, 2]
    (graph,) = fleet.router.programs.book.ended
    is_as_in_trace(graph, RESEARCH)
    assert graph.deadline_s == pytest.approx(graph.created_s + 60.0, abs=30.0)
    sent = sender.submitted
    assert {name: sent[name].stage for name in ("plan", "search-a", "search-b", "report")} == {
        "plan": 0, "search-a": 1, "search-b": 1, "report": 2,
    }  # fmt: skip
    for call in RESEARCH.calls:
        spec = sent[call.request_id]
        assert isinstance(spec.slo, ProgramCall)
        assert (spec.slo.program_id, spec.program_id, spec.app, spec.tenant) == (
            graph.program_id, graph.program_id, "research", "ann",
        )  # fmt: skip
        assert spec.call_id in graph.calls
        assert (spec.prompt_tokens, spec.max_output_tokens) == (call.prompt_tokens, call.output_tokens)
    assert sent["report"].prefix_id == sent["search-a"].prefix_id != ""
    assert (sent["search-a"].prefix_tokens, sent["report"].prefix_tokens) == (0, 64)
    assert (sent["hello"].slo, sent["night"].slo) == (Latency(30.0, 10.0), BestEffort())
    assert isinstance(sent["sort"].slo, Deadline)
    assert {sent[name].program_id for name in ("hello", "sort", "night")} == {""}
    await eventually(fleet.is_empty, "nothing is left anywhere")


async def test_a_program_without_a_deadline_is_best_effort(fleet: Fleet, sender: Sender):
    await replay(Trace("free", (replace(RESEARCH, slo=BestEffort()),)), sender, limit_s=LIMIT_S)
    (graph,) = fleet.router.programs.book.ended
    is_as_in_trace(graph, RESEARCH)
    assert {spec.slo for spec in sender.submitted.values()} == {BestEffort()}
    assert {spec.program_id for spec in sender.submitted.values()} == {graph.program_id}


async def test_a_call_that_ends_with_an_error_is_not_finished(fleet: Fleet, sender: Sender):
    """Nothing of it is good, and what would follow it in its program is not sent."""
    sender.failing = "plan"
    report = await replay(Trace("failing", (RESEARCH,)), sender, limit_s=LIMIT_S)

    (unit,) = report.units
    assert (unit.status, unit.is_met, unit.good_tokens) == ("expired", False, 0)
    assert 0 < unit.output_tokens < RESEARCH.calls[0].output_tokens
    assert list(sender.submitted) == ["plan"]
    (graph,) = fleet.router.programs.book.ended
    assert (graph.status, [call.status for call in graph.calls.values()]) == ("cancelled", ["failed"])


async def test_a_program_that_is_cut_leaves_nothing_in_the_router(fleet: Fleet, sender: Sender):
    long = replace(RESEARCH, calls=(replace(RESEARCH.calls[0], output_tokens=3000), *RESEARCH.calls[1:]))
    client = _UnitClient(long, sender, time.perf_counter())
    running = asyncio.create_task(client.run())
    await eventually(lambda: "plan" in sender.submitted, "the first call is sent")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert client.outcome().status == "cut"
    (graph,) = fleet.router.programs.book.ended
    assert graph.status == "cancelled"
    await eventually(fleet.is_empty, "nothing is left anywhere")
