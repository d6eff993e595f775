"""Whatever is killed, cancelled or replaced, in whatever order: every request ends once, with all of its tokens."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from cluster.embedded_redis import EmbeddedRedis, start_embedded_redis
from cluster.ingress_link import IngressLink
from cluster.redis_store import RedisStore
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig, TransportConfig
from tempo_router.request import Deadline, Latency, RequestId
from tests.fleet import Fleet, break_control_stream, break_token_streams, call, eventually, submit
from workers.worker import Worker

CONFIG = TempoConfig(
    engine=EngineConfig(
        kind="simulated",
        engine_kwargs={"max_num_seqs": 4, "max_num_batched_tokens": 512, "max_model_len": 4096},
    ),
    scheduling=SchedulingConfig(settle_s=0.05, tick_s=0.02),
    transport=TransportConfig(inline_payload_bytes=64, attach_timeout_s=2, snapshot_s=0.05),
)
SLOS = (None, Latency(0.2, 0.02), Deadline(1.0))

submissions = st.tuples(st.just("submit"), st.integers(1, 12), st.integers(1, 200))
cancels = st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0))
moments = st.tuples(st.just("let it run"), st.integers(1, 30), st.just(0))
troubles = st.tuples(
    st.sampled_from(["kill worker", "add worker", "drain worker", "kill router", "break control", "break tokens"]),
    st.integers(0, 5),
    st.just(0),
)
histories = st.lists(st.one_of(submissions, submissions, cancels, moments, troubles), min_size=3, max_size=14)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = start_embedded_redis(Path(tmp_path_factory.mktemp("redis")))
    yield server
    server.stop()


# A history takes seconds, so a failing one is reported as it was found: shrinking would take many minutes.
@settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(history=[("submit", 9, 145), ("submit", 6, 129), ("break control", 3, 0), ("let it run", 1, 0)])
@given(history=histories)
def test_every_request_ends_once_and_whole(redis: EmbeddedRedis, history: list[tuple[str, int, int]]) -> None:
    asyncio.run(live_through(redis.url, history))


async def live_through(redis_url: str, history: list[tuple[str, int, int]]) -> None:
    """Play one history on a fresh fleet, then let everything come to its end and check."""
    store = await RedisStore.connect(redis_url, "chaos")
    fleet = Fleet(CONFIG, store)
    await fleet.start(workers=2, clients=2)
    wanted: dict[RequestId, int] = {}
    cancelled: set[RequestId] = set()
    try:
        for what, number, tokens in history:
            await play(fleet, wanted, cancelled, what, number, tokens)
        if not any(not worker.is_draining for worker in fleet.workers.values()):
            await fleet.add_worker()
        ended = [client.ended for client in fleet.clients]
        await eventually(
            lambda: all(any(name in each for each in ended) for name in wanted if name not in cancelled), "all end"
        )
        await eventually(fleet.is_empty, "nothing is left anywhere")
        for name, length in wanted.items():
            received = sum(client.tokens.get(name, 0) for client in fleet.clients)
            assert received <= length, f"{name} received tokens twice"
            assert name in cancelled or received == length, f"{name} lost tokens"
    finally:
        await fleet.close()
        await store.close()


async def play(
    fleet: Fleet, wanted: dict[RequestId, int], cancelled: set[RequestId], what: str, number: int, tokens: int
) -> None:
    """One step of a history. A step that has no object (no worker left to kill) does nothing."""
    match what:
        case "submit":
            for _ in range(number):
                spec = call(f"r{len(wanted)}", output_tokens=tokens, slo=SLOS[len(wanted) % len(SLOS)])
                wanted[spec.request_id] = tokens
                assert (await submit(fleet.clients[len(wanted) % 2], spec)).is_admitted
        case "cancel" if wanted:
            name = list(wanted)[number % len(wanted)]
            cancelled.add(name)
            for client in fleet.clients:
                client.link.cancel(name)
        case "let it run":
            for _ in range(number):
                await asyncio.sleep(0.002)
        case _:
            await make_trouble(fleet, what, number)


async def make_trouble(fleet: Fleet, what: str, number: int) -> None:
    """Kill, add, drain or cut something."""
    workers = list(fleet.workers.values())
    match what:
        case "kill worker" if len(workers) > 1:
            await fleet.kill_worker(workers[number % len(workers)].worker_id)
        case "add worker" if len(workers) < 4:
            await fleet.add_worker()
        case "drain worker" if workers:
            await workers[number % len(workers)].drain(0)
        case "kill router":
            await fleet.replace_router()
        case "break control":
            peers: list[Worker | IngressLink] = [*(client.link for client in fleet.clients), *workers]
            await break_control_stream(peers[number % len(peers)])
        case "break tokens" if workers:
            break_token_streams(workers[number % len(workers)])
