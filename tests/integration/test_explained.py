"""What `/v1/requests/{id}/explain` and the log tell of a request: real gRPC, a simulated engine."""

import asyncio
from pathlib import Path

import pytest
import structlog

from cluster.program_desk import ExplainRequest, ViewConsole
from deployments.program_client import ProgramClient
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.metrics import Outcome, refused_outcome
from tempo_router.request import Deadline, Latency, RequestId
from tests.fleet import call, eventually, fleet_over_redis, submit

pytestmark = pytest.mark.redis

SMALL = {"max_num_seqs": 4, "max_model_len": 1024, "block_size": 16, "num_gpu_blocks_override": 64}


async def test_a_preemption_by_the_engine_is_told_to_who_asks(tmp_path: Path) -> None:
    """Four answers that grow beyond the cache: the engine takes the place of some of them."""
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs=SMALL, time_scale=0.02),
        scheduling=SchedulingConfig(length_model="histogram", settle_s=0.1, tick_s=0.02),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start()
        client = fleet.clients[0]
        specs = [call(f"r{number}", output_tokens=500) for number in range(4)]
        await asyncio.gather(*(submit(client, spec) for spec in specs))
        await eventually(lambda: all(spec.request_id in client.ended for spec in specs), "all are answered")

        programs = ProgramClient(client.link.programs)
        told = {spec.request_id: (await programs.ask(ExplainRequest(spec.request_id, "")))[0] for spec in specs}
        preemptions = [one for record in told.values() for one in record["decisions"] if one["what"] == "preempted"]
        assert preemptions
        assert all(one["replica"] == "worker-1" and one["reason"] and one["at_s"] > 0 for one in preemptions)
        for record in told.values():
            whats = [one["what"] for one in record["decisions"]]
            if "preempted" in whats:
                assert whats.index("dispatched") < whats.index("preempted")


async def test_a_miss_is_logged_with_the_record_that_explain_gives(tmp_path: Path) -> None:
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs=SMALL, time_scale=0.02),
        scheduling=SchedulingConfig(length_model="histogram", settle_s=0.1, tick_s=0.02),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start()
        client = fleet.clients[0]
        slo = Latency(ttft_s=60.0, tbt_s=10.0)
        met = Outcome("latency", 0.4, 1.0, 20, 20, 0, 0.05, is_met=True)
        late = Outcome("latency", 60.25, 61.0, 20, 19, 1, 0.2, is_met=False)
        with structlog.testing.capture_logs() as logs:
            for name, outcome in (("in time", met), ("late", late)):
                await submit(client, call(name, slo=slo))
                await eventually(lambda name=name: RequestId(name) in client.ended, "it is answered")
                client.link.report_outcome(RequestId(name), outcome)
            await eventually(lambda: any(line["event"] == "slo_missed" for line in logs), "the miss is logged")
            [explained] = await ProgramClient(client.link.programs).ask(ExplainRequest("late", ""))

        [logged] = [line for line in logs if line["event"] == "slo_missed"]
        assert logged.pop("log_level") == "info"
        assert logged.pop("event") == "slo_missed"
        assert logged == {name: value for name, value in explained.items() if value is not None}
        assert (logged["id"], logged["class"], logged["missed_by_s"]) == ("late", "latency", 0.25)
        assert [one["what"] for one in logged["decisions"]] == ["arrived", "queued", "dispatched", "ended"]


async def test_a_refusal_is_logged_as_a_miss_and_counts_for_the_console(tmp_path: Path) -> None:
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs=SMALL, time_scale=0.02),
        scheduling=SchedulingConfig(length_model="histogram", settle_s=0.1, tick_s=0.02, hopeless="refuse"),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start()
        client, slo = fleet.clients[0], Deadline(1e-6)
        with structlog.testing.capture_logs() as logs:
            assert (await submit(client, call("hopeless", slo=slo))).reject_reason == "deadline_impossible"
            client.link.report_outcome(RequestId("hopeless"), refused_outcome(slo))
            await eventually(lambda: any(line["event"] == "slo_missed" for line in logs), "the miss is logged")
        [logged] = [line for line in logs if line["event"] == "slo_missed"]
        assert [one["what"] for one in logged["decisions"]] == ["arrived", "rejected", "ended"]
        shown = (await ProgramClient(client.link.programs).ask(ViewConsole()))["service"]["classes"]["deadline"]
        assert (shown["requests"], shown["attainment"]) == (1, 0.0)
