"""What a live router recorded is decided again in the same way, without gRPC, Redis, workers or time."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from cluster.embedded_redis import start_embedded_redis
from cluster.redis_store import RedisStore
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.errors import InvalidSnapshotError
from tempo_router.event_log import read_beginning, read_event, replay
from tempo_router.request import BestEffort, Deadline, Latency
from tests.fleet import Fleet, call, eventually, submit


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
    redis = start_embedded_redis(tmp_path)
    store = await RedisStore.connect(redis.url, "test")
    fleet = Fleet(config, store)
    await fleet.start(workers=2)
    client = fleet.clients[0]
    rng = random.Random(4)
    slos = (Latency(2.0, 0.1), Latency(0.05, 0.01), Deadline(5.0), Deadline(0.01), BestEffort())
    specs = [
        call(f"r{number}", output_tokens=rng.randint(1, 60), prompt_tokens=rng.randint(1, 300), slo=rng.choice(slos))
        for number in range(60)
    ]
    await asyncio.gather(*(submit(client, spec) for spec in specs[:50]))
    for spec in specs[40:45]:
        client.link.cancel(spec.request_id)
    await fleet.kill_worker("worker-1")
    await asyncio.gather(*(submit(client, spec) for spec in specs[50:]))
    gone = {spec.request_id for spec in specs[40:45]}
    await eventually(
        lambda: all(spec.request_id in client.ended for spec in specs if spec.request_id not in gone), "all answers end"
    )
    await fleet.close()
    await store.close()
    redis.stop()

    lines = recorded(tmp_path)
    assert list(replay(lines)) == []
    decided = Counter(type(action).__name__ for line in lines[1:] for action in read_event(line)[1])
    assert {"Admit", "Dispatch", "Relegate", "Evict"} <= set(decided), decided
    assert read_beginning(lines[0]).scheduling.policy == policy


def recorded(folder: Path) -> list[str]:
    (path,) = folder.glob("events-*.jsonl")
    return path.read_text().splitlines()


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
        read_event(line)
