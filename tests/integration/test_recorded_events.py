"""What a live router recorded is decided again in the same way, without gRPC, Redis, workers or time."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.program_desk import ViewProgram
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.actions import Action
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.errors import InvalidSnapshotError
from tempo_router.event_log import Asked, beginning_line, read_beginning, read_line, replay
from tempo_router.pattern_history import KnownPrograms
from tempo_router.program_ops import CreateProgram, EndCall, FinishProgram
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, ProgramId
from tests.fleet import Client, call, eventually, fleet_over_redis, submit


@pytest.mark.parametrize("policy", ["tempo", "density"])
async def test_a_recorded_life_of_a_router_replays_with_the_same_actions(tmp_path: Path, policy: str):
    """Overload, targets that cannot be met, cancels, a worker that is killed: everything that made it decide."""
    config = TempoConfig(
        engine=EngineConfig(
            kind="simulated", engine_kwargs={"max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 4096}
        ),
        scheduling=SchedulingConfig.model_validate(
            {"policy": policy, "settle_s": 0.1, "tick_s": 0.02, "length_model": "histogram"}
        ),
        record_events=str(tmp_path / "events.jsonl"),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start(workers=2)
        client = fleet.clients[0]
        rng = random.Random(4)
        slos = (Latency(2.0, 0.1), Latency(0.05, 0.01), Deadline(5.0), Deadline(0.01), BestEffort())
        specs = [
            call(f"r{n}", output_tokens=rng.randint(1, 60), prompt_tokens=rng.randint(1, 300), slo=rng.choice(slos))
            for n in range(60)
        ]
        await asyncio.gather(*(submit(client, spec) for spec in specs[:50]))
        for spec in specs[40:45]:
            client.link.cancel(spec.request_id)
        await fleet.kill_worker("worker-1")
        await asyncio.gather(*(submit(client, spec) for spec in specs[50:]))
        awaited = {spec.request_id for spec in (*specs[:40], *specs[45:])}
        await eventually(lambda: awaited <= client.ended.keys(), "all answers end")

    lines = recorded(tmp_path)
    assert list(replay(lines)) == []
    decided = Counter(type(action).__name__ for line in lines[1:] for action in actions_of(line))
    assert {"Admit", "Dispatch", "Relegate", "Evict"} <= set(decided), decided
    assert read_beginning(lines[0]).scheduling.policy == policy


async def test_programs_that_were_learnt_in_an_earlier_life_replay_too(tmp_path: Path):
    """A router is killed in the midst of programs: the next one's record tells what it was left."""
    config = TempoConfig(
        engine=EngineConfig(kind="simulated", engine_kwargs={"max_num_seqs": 8, "max_model_len": 4096}, time_scale=0.1),
        scheduling=SchedulingConfig(
            policy="tempo", program_model="patterns", settle_s=0.1, tick_s=0.02, length_model="histogram"
        ),
        record_events=str(tmp_path / "events.jsonl"),
    )
    async with fleet_over_redis(config, tmp_path) as fleet:
        await fleet.start()
        client = fleet.clients[0]
        await asyncio.gather(*(run_stages(client, f"early-{number}", range(3)) for number in range(20)))
        await asyncio.gather(*(run_stages(client, f"long-{number}", range(1)) for number in range(6)))
        await eventually(lambda: not client.link.programs.unstored, "all is stored")
        first = fleet.router
        await fleet.replace_router()
        assert first._runner.recorder is not None
        first._runner.recorder.close()
        await eventually(lambda: client.link.not_ready_because is None, "another router is there")
        late = (run_stages(client, f"late-{number}", range(3)) for number in range(20))
        await asyncio.gather(*late, *(run_stages(client, f"long-{number}", range(1, 3)) for number in range(6)))

    for epoch in (1, 2):
        assert list(replay(recorded(tmp_path, epoch))) == []
    lines = recorded(tmp_path, 2)
    beginning = read_beginning(lines[0])
    assert len(beginning.programs.outlines) == 20
    assert all(0 <= time.monotonic() - one.at_s < 600 for one in beginning.programs.outlines), "not dates: moments here"
    assert len(beginning.programs.unfolding) == 6
    assert any(isinstance(read_line(line), Asked) for line in lines[1:])
    lines[0] = beginning_line(replace(beginning, programs=KnownPrograms()))
    assert next(replay(lines), None) is not None, "what was learnt earlier has made a difference"


async def run_stages(client: Client, program_id: str, stages: range) -> None:
    """Some of a program's three stages, one call after another, and what is foretold of it after each."""
    programs, rng = ProgramClient(client.link.programs), random.Random(program_id)
    if not stages.start:
        await programs.ask(CreateProgram(program_id, "", "app", time.time() + 30))
    for stage in stages:
        call_id, tokens = f"call-{stage}", rng.randint(5, 60)
        identity = Identity("explicit", program_id, call_id=call_id)
        ticket = await programs.begin(identity, tenant="", app="", now_epoch_s=time.time())
        assert ticket.left_s is not None
        slo = ProgramCall(ProgramId(program_id), ticket.left_s)
        spec = call(f"{program_id}-{call_id}", output_tokens=tokens, prompt_tokens=rng.randint(1, 200), slo=slo)
        spec = replace(spec, app="app", program_id=program_id, call_id=call_id, stage=ticket.stage)
        assert (await submit(client, spec)).is_admitted
        await eventually(lambda spec=spec: spec.request_id in client.ended, f"{spec.request_id} is answered")
        programs.end(EndCall(program_id, call_id, ticket.attempt, "completed", spec.prompt_tokens, tokens))
        assert (await programs.ask(ViewProgram(program_id, "")))["id"] == program_id
    if stages.stop == 3:
        await programs.ask(FinishProgram(program_id, "", f"finish-{program_id}"))


def recorded(folder: Path, epoch: int = 1) -> list[str]:
    return (folder / f"events-{epoch}.jsonl").read_text().splitlines()


def actions_of(line: str) -> tuple[Action, ...]:
    read = read_line(line)
    return () if isinstance(read, Asked) else read[1]


async def test_a_replay_says_where_it_went_another_way(tmp_path: Path):
    from tempo_router.actions import Abort
    from tempo_router.event_log import Beginning, beginning_line, event_line
    from tempo_router.events import Ticked
    from tempo_router.request import DispatchId, ReplicaId

    tick = Ticked(1.0)
    lines = [
        beginning_line(Beginning(SchedulingConfig(), 1)),
        event_line(tick, []),
        event_line(tick, [Abort(DispatchId(7), ReplicaId("gpu0"))]),
    ]
    (difference,) = replay(lines)
    assert (difference.line, difference.event) == (3, tick)
    assert (difference.recorded, difference.replayed) == ((Abort(DispatchId(7), ReplicaId("gpu0")),), ())


@pytest.mark.parametrize("line", ["", "{}", '{"version": 0}', '{"event": {"_": "Nothing"}, "actions": []}'])
def test_what_is_no_log_is_refused(line: str):
    with pytest.raises(InvalidSnapshotError):
        read_beginning(line)
    with pytest.raises(InvalidSnapshotError):
        read_line(line)
