"""`POST /v1/programs/{id}/extend` as the router carries it out: real gRPC and Redis, a simulated engine."""

import time
from pathlib import Path

import pytest

from cluster.embedded_redis import start_embedded_redis
from cluster.redis_store import RedisStore
from deployments.program_client import ProgramClient
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.program_ops import CreateProgram, ExtendProgram, FinishProgram
from tempo_router.request import ProgramCall, ProgramId
from tests.fleet import Fleet, call, eventually, submit

pytestmark = pytest.mark.redis
PROGRAM = "moved"


async def test_only_another_deadline_moves_what_runs(tmp_path: Path) -> None:
    redis = start_embedded_redis(tmp_path)
    store = await RedisStore.connect(redis.url, "moved")
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 1, "max_model_len": 4096}),
        scheduling=SchedulingConfig(policy="tempo", length_model="histogram", settle_s=0.1, tick_s=0.02),
    )
    fleet = Fleet(config, store)
    await fleet.start()
    client, programs = fleet.clients[0], ProgramClient(fleet.clients[0].link)
    core = fleet.router._core
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
    await fleet.close()
    await store.close()
    redis.stop()
