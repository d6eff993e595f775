"""What `/v1/requests/{id}/explain` tells of decisions that are an engine's: real gRPC, a simulated engine."""

import asyncio
from pathlib import Path

import pytest

from cluster.embedded_redis import start_embedded_redis
from cluster.program_desk import ExplainRequest
from cluster.redis_store import RedisStore
from deployments.program_client import ProgramClient
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tests.fleet import Fleet, call, eventually, submit

pytestmark = pytest.mark.redis

SMALL = {"max_num_seqs": 4, "max_model_len": 1024, "block_size": 16, "num_gpu_blocks_override": 64}


async def test_a_preemption_by_the_engine_is_told_to_who_asks(tmp_path: Path) -> None:
    """Four answers that grow beyond the cache: the engine takes the place of some of them."""
    redis = start_embedded_redis(tmp_path)
    store = await RedisStore.connect(redis.url, "explained")
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs=SMALL, time_scale=0.02),
        scheduling=SchedulingConfig(length_model="histogram", settle_s=0.1, tick_s=0.02),
    )
    fleet = Fleet(config, store)
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
    await fleet.close()
    await store.close()
    redis.stop()
