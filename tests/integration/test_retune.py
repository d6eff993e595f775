"""What the router plans reaches the engine of a worker: standings, the cap of a step, targets that moved."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import wire_pb2 as wire
from cluster.codec import retarget_message
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.request import Deadline, DispatchId, Latency, ProgramCall, ProgramId, Slo
from tempo_router.standing import Standing
from tests.fleet import Fleet, call, eventually, fleet_over_redis, submit
from workers.call_facts import News
from workers.engine import EngineCall, EngineFacts
from workers.simulated_engine import SimulatedEngine
from workers.worker import Worker

CONFIG = TempoConfig(
    engine=EngineConfig(
        kind="simulated", engine_kwargs={"max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 4096}
    ),
    scheduling=SchedulingConfig(policy="tempo", settle_s=0.1, tick_s=0.02, plan_s=0.05),
)


class Listening(SimulatedEngine):
    """Says that it plans its steps, and keeps what it is told for it."""

    @property
    def facts(self) -> EngineFacts:
        return replace(super().facts, has_step_planner=True)

    def submit(self, call: EngineCall) -> None:
        self.calls = [*getattr(self, "calls", []), call]
        super().submit(call)

    def tell(self, news: News) -> None:
        self.news = [*getattr(self, "news", []), news]


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr("workers.simulated_engine.SimulatedEngine", Listening)
    async with fleet_over_redis(CONFIG, tmp_path) as fleet:
        await fleet.start()
        yield fleet


def engine_of(worker: Worker) -> Listening:
    engine = worker._engine
    assert isinstance(engine, Listening)
    return engine


def standing_of(engine: Listening, request_id: str) -> Standing:
    """As the engine knows it: how it came, or what was told last."""
    known = {one.request_id: one.facts.standing for one in engine.calls if one.facts is not None}
    for news in getattr(engine, "news", []):
        known |= {one.request_id: one.standing for one in news.updates if one.standing is not None}
    return known[request_id]


async def test_a_call_comes_with_its_target_and_its_lengths_and_is_ranked(fleet: Fleet):
    await submit(fleet.clients[0], call("one", output_tokens=3000, slo=Deadline(30.0)))
    engine = engine_of(next(iter(fleet.workers.values())))
    await eventually(lambda: bool(getattr(engine, "calls", [])), "the call is in the engine")
    facts = engine.calls[0].facts
    assert facts is not None
    assert facts.spec.slo == Deadline(30.0)
    assert facts.lengths is not None
    assert len(facts.lengths.atoms) == 20
    # What came between two plans stands nowhere until the next one, a tenth of a second later.
    await eventually(lambda: standing_of(engine, "one").density > 0, "it is ranked")


async def test_an_ingress_knows_which_of_its_workers_plan_their_steps(fleet: Fleet):
    """Its /metrics count the others."""
    link = fleet.clients[0].link
    assert [one.has_step_planner for one in link.attached_workers] == [True]

    await fleet.kill_worker(next(iter(fleet.workers)))
    await eventually(lambda: link.attached_workers == [], "it is gone")


async def test_plans_go_on_telling_how_running_calls_stand(fleet: Fleet):
    await submit(fleet.clients[0], call("one", output_tokens=3000, slo=Latency(5.0, 0.5)))
    engine = engine_of(next(iter(fleet.workers.values())))
    await eventually(lambda: len(getattr(engine, "news", [])) >= 3, "several plans were told")
    named = {update.request_id for news in engine.news for update in news.updates}
    assert named == {"one"}
    assert all(update.standing is not None for news in engine.news for update in news.updates)


async def test_a_moved_target_reaches_the_engine_and_stays_with_the_call(fleet: Fleet):
    await submit(fleet.clients[0], call("one", output_tokens=3000, slo=Deadline(30.0)))
    worker = next(iter(fleet.workers.values()))
    engine = engine_of(worker)
    await eventually(lambda: bool(getattr(engine, "calls", [])), "the call is in the engine")
    facts = engine.calls[0].facts
    assert facts is not None
    worker.received(wire.RouterToWorker(retargets=[retarget_message(facts.key, Deadline(9.0))]))
    worker.received(wire.RouterToWorker(retargets=[retarget_message(DispatchId(10**6), Deadline(9.0))]))

    (update,) = [update for news in engine.news for update in news.updates if update.slo is not None]
    assert (update.request_id, update.slo) == ("one", Deadline(9.0))
    (running,) = worker.hello().hello.running
    assert running.header.deadline.ttlt_s == 9.0


async def test_a_program_whose_newest_call_is_in_a_hurry_hurries_the_calls_that_run(fleet: Fleet):
    """The deadline is the program's; every call states it anew, and the last word counts for all."""
    program = ProgramId("p")
    client, engine = fleet.clients[0], engine_of(next(iter(fleet.workers.values())))
    await submit(client, call("one", output_tokens=3000, slo=ProgramCall(program, 60.0)))
    await eventually(lambda: bool(getattr(engine, "calls", [])), "the first call is in the engine")
    await submit(client, call("two", output_tokens=3000, slo=ProgramCall(program, 20.0)))

    def moved() -> list[Slo]:
        news = [update for news in getattr(engine, "news", []) for update in news.updates]
        return [update.slo for update in news if update.request_id == "one" and update.slo is not None]

    await eventually(lambda: bool(moved()), "the first call hears of it")
    (slo,) = moved()
    assert isinstance(slo, ProgramCall)
    assert 20.0 < slo.ttlt_s < 40.0, "20 s from now, counted from its own arrival"
