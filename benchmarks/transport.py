"""What the token path costs: router, worker and ingress link in a process each, without HTTP and without vLLM.

    python -m benchmarks.transport [--json out.json] [--seconds 8] [--scenario paced short-steps saturated one-token]

The engine is simulated; Redis is real. Four loads, each closed (an ended request is replaced at once):

- paced: 1,000 streams, an engine step every 50 ms. CPU time per token at a rate that the machine keeps up with, and the
  lag from the end of an engine step to its tokens in the ingress.
- short-steps: 16 streams, a step every 3 ms. What a step costs beside its tokens.
- saturated: 1,000 streams, an engine without step time. What the slowest of the three processes lets through.
- one-token: 64 at a time, one token each, no step time. Nothing but requests: CPU time per request.

CPU time is user + system time of each process, all threads. "Per token" includes the requests' own cost, and "per
request" the tokens'. Load generation is in the ingress process: a counter per token and a task per request.
"""

import argparse
import asyncio
import itertools
import logging
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import structlog

from benchmarks.figures_file import add_json_option, write_figures
from cluster import wire_pb2 as wire
from cluster.embedded_redis import start_embedded_redis
from cluster.ingress_link import IngressLink
from cluster.redis_store import RedisStore
from cluster.router_server import RouterServer
from tempo_router.config import TempoConfig
from tempo_router.metrics import percentile
from tempo_router.option_values import above_zero
from tempo_router.request import GroupId, Latency, ProgramCall, RequestId, RequestSpec
from tempo_router.simulation.step_profiles import EngineShape, LinearStepTime, StepProfile
from workers.engine import EngineStep
from workers.simulated_engine import SimulatedEngine
from workers.worker import Worker

WARM_UP_S = 3.0
READY_TIMEOUT_S = 60.0
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load. step_s: duration of every engine step, whatever it computes."""

    name: str
    streams: int
    output_tokens: int
    step_s: float


SCENARIOS = (
    Scenario("paced", streams=1000, output_tokens=200, step_s=0.05),
    Scenario("short-steps", streams=16, output_tokens=200, step_s=0.003),
    Scenario("saturated", streams=1000, output_tokens=200, step_s=0.0),
    Scenario("one-token", streams=64, output_tokens=1, step_s=0.0),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process has done so far. Its own clock is the machine's, so samples of two processes compare."""

    at_s: float
    cpu_s: float
    tokens: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario. Lags are None where the engine does not keep a pace, because they only measure the queue then."""

    scenario: str
    streams: int
    seconds: float
    tokens_per_s: float
    requests_per_s: float
    cpu_us_per_token: dict[str, float]
    cpu_ms_per_request: dict[str, float]
    cores_used: dict[str, float]
    lag_p50_ms: float | None
    lag_p99_ms: float | None


# ---- the processes


class Control:
    """A child's end of the pipe to the benchmark."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def serve(self, announced: str, count: Callable[[], tuple[int, int]], trail: "Trail | None" = None) -> None:
        """Say that we are ready, then answer until told to stop. count: tokens and requests so far."""
        self._connection.send(announced)
        while await asyncio.to_thread(self._connection.recv) == "sample":
            used = resource.getrusage(resource.RUSAGE_SELF)
            self._connection.send(Sample(time.monotonic(), used.ru_utime + used.ru_stime, *count()))
        self._connection.send(trail.points if trail is not None else [])


@dataclass(slots=True)
class Trail:
    """When how many tokens had passed a place: (time, tokens so far) at each step or frame."""

    tokens: int = 0
    points: list[tuple[float, int]] = field(default_factory=list)

    def passed(self, tokens: int) -> None:
        """So many more, now."""
        if tokens:
            self.tokens += tokens
            self.points.append((time.monotonic(), self.tokens))


async def run_router(control: Control, redis_url: str) -> None:
    """The router's process."""
    store = await RedisStore.connect(redis_url, "bench")
    router = RouterServer(TempoConfig(), store, owner="bench", host=HOST)
    await router.start()
    await control.serve(router.address, lambda: (0, 0))
    await router.stop()
    await store.close()


async def run_worker(control: Control, router_address: str, scenario: Scenario) -> None:
    """The worker's process."""
    worker = Worker("worker-1", locate_router=_always(router_address), host=HOST, transport=TempoConfig().transport)
    trail = Trail()

    def on_step(step: EngineStep) -> None:
        trail.passed(len(step.tokens))
        worker.on_step(step)

    engine = SimulatedEngine(
        StepProfile(scenario.name, "made up", LinearStepTime(scenario.step_s, 0.0, 0.0, 0.0, 0.0), _shape(scenario)),
        on_step=on_step,
        on_death=worker.on_death,
    )
    await worker.start(engine)
    await control.serve(worker.address, lambda: (trail.tokens, 0), trail)
    await worker.stop()


async def run_ingress(control: Control, router_address: str, scenario: Scenario) -> None:
    """The ingress's process: a link and the clients."""
    clients = Clients(scenario)
    link = clients.link = IngressLink(
        "ingress-1",
        locate_router=_always(router_address),
        listener=clients,
        transport=TempoConfig().transport,
        router_wait_s=30.0,
        engine_version="none",
    )
    link.start()
    await link.first_worker()
    work = [asyncio.create_task(clients.one_client(place)) for place in range(scenario.streams)]
    await control.serve("", lambda: (clients.trail.tokens, clients.ended), clients.trail)
    failure = link.failure() or next((task.exception() for task in work if task.done()), None)
    if failure is not None:
        raise failure
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    await link.stop()


class Clients:
    """Listens to the link in place of vLLM's front end, and keeps `streams` requests open."""

    link: IngressLink

    def __init__(self, scenario: Scenario) -> None:
        self.trail = Trail()
        self.ended = 0
        self._scenario = scenario
        self._numbers = itertools.count()
        self._open: dict[RequestId, asyncio.Future[None]] = {}

    async def one_client(self, place: int) -> None:
        """Send a request, wait for its last token, and again.

        The first answers have all lengths, by the client's place, so that answers end evenly and not in waves.
        """
        output_tokens = 1 + place * self._scenario.output_tokens // self._scenario.streams
        while True:
            spec = _spec(next(self._numbers), output_tokens)
            output_tokens = self._scenario.output_tokens
            last_token = self._open[spec.request_id] = asyncio.get_running_loop().create_future()
            verdict = await self.link.submit(spec, [_payload(spec)])
            if not verdict.is_admitted:
                raise RuntimeError(f"the router refused {spec.request_id}: {verdict.reject_reason}")
            await last_token

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        """Count, and let the client of each ended request go on."""
        tokens = 0
        for delta in frame.deltas:
            request_id = self.link.claim(worker_id, delta.request_id)
            if request_id is None:
                continue
            tokens += len(delta.token_ids)
            if delta.finish_reason:
                if delta.finish_reason != "length":
                    raise RuntimeError(f"{request_id} ended with {delta.finish_reason}")
                self.ended += 1
                self.link.finish(request_id)
                self._open.pop(request_id).set_result(None)
        self.trail.passed(tokens)

    def attempt_lost(self, request_id: RequestId) -> None:
        """Must not happen here."""
        raise RuntimeError(f"{request_id} lost its worker")

    def relegated(self, request_id: RequestId) -> None:
        """Overload lets SLOs be missed; that is not what is measured."""

    def redated(self, request_id: RequestId, slo: ProgramCall) -> None:
        """Must not happen here."""
        raise RuntimeError(f"{request_id} has another deadline: {slo}")

    def program_cancelled(self, request_id: RequestId) -> None:
        """Must not happen here."""
        raise RuntimeError(f"{request_id} was cancelled with a program")

    def expired(self, request_id: RequestId) -> None:
        """Must not happen here."""
        raise RuntimeError(f"{request_id} expired")


def _spec(number: int, output_tokens: int) -> RequestSpec:
    # As long as the ids that vLLM's front end makes.
    request_id = f"cmpl-{number:032x}-0"
    return RequestSpec(
        request_id=RequestId(request_id),
        arrival_s=time.monotonic(),
        slo=Latency(2.0, 0.1),
        prompt_tokens=16,
        max_output_tokens=output_tokens,
        group_id=GroupId(request_id),
        model="bench",
        tier="chat",
    )


def _payload(spec: RequestSpec) -> bytes:
    """The beginning of vLLM's request, as far as the simulated engine reads it; about 1 kB, as a short chat has."""
    return msgspec.msgpack.encode([spec.attempt_id, [1000] * 300, None, {"ignore_eos": True}])


def _shape(scenario: Scenario) -> EngineShape:
    return EngineShape(
        kv_tokens=scenario.streams * 2048, block_size=16, max_running=scenario.streams, max_step_tokens=65536,
        max_model_len=2048,
    )  # fmt: skip


def _always(address: str) -> Callable[[], Awaitable[str]]:
    async def locate() -> str:
        return address

    return locate


PARTS: dict[str, Callable[..., Any]] = {"router": run_router, "worker": run_worker, "ingress": run_ingress}


def run_part(connection: Connection, name: str, arguments: Sequence[Any]) -> None:
    """Entry point of a child process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(PARTS[name](Control(connection), *arguments))


# ---- the benchmark


class Part:
    """A child process seen from the benchmark."""

    def __init__(self, name: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=run_part, args=(theirs, name, arguments), daemon=True)
        self.process.start()
        self.name = name
        self.announced = self._answer()

    def sample(self) -> Sample:
        """What it has done so far."""
        self._connection.send("sample")
        sample: Sample = self._answer()
        return sample

    def stop(self) -> list[tuple[float, int]]:
        """End it; returns its trail."""
        self._connection.send("stop")
        points: list[tuple[float, int]] = self._answer()
        self.process.join(READY_TIMEOUT_S)
        return points

    def _answer(self) -> Any:
        if not self._connection.poll(READY_TIMEOUT_S):
            raise TimeoutError(f"the {self.name} process does not answer")
        return self._connection.recv()


def measure(scenario: Scenario, seconds: float) -> Result:
    """Start everything, let it run in, and count for so many seconds."""
    with _redis() as redis_url:
        router = Part("router", redis_url)
        worker = Part("worker", router.announced, scenario)
        ingress = Part("ingress", router.announced, scenario)
        parts = (router, worker, ingress)
        time.sleep(WARM_UP_S)
        before = [part.sample() for part in parts]
        time.sleep(seconds)
        after = [part.sample() for part in parts]
        arrived = ingress.stop()
        produced = worker.stop()
        router.stop()
    window_s = after[2].at_s - before[2].at_s
    tokens, requests = after[2].tokens - before[2].tokens, after[2].requests - before[2].requests
    if not tokens or not requests:
        raise RuntimeError(f"{scenario.name}: {tokens} tokens and {requests} requests in {window_s:.1f} s")
    cpu_s = {part.name: late.cpu_s - early.cpu_s for part, early, late in zip(parts, before, after, strict=True)}
    cpu_s["all"] = sum(cpu_s.values())
    lags = lags_s(produced, arrived, since_s=before[2].at_s) if scenario.step_s else []
    return Result(
        scenario=scenario.name,
        streams=scenario.streams,
        seconds=round(window_s, 2),
        tokens_per_s=round(tokens / window_s, 1),
        requests_per_s=round(requests / window_s, 1),
        cpu_us_per_token={name: round(used * 1e6 / tokens, 2) for name, used in cpu_s.items()},
        cpu_ms_per_request={name: round(used * 1e3 / requests, 3) for name, used in cpu_s.items()},
        cores_used={name: round(used / window_s, 2) for name, used in cpu_s.items()},
        lag_p50_ms=_milliseconds(percentile(lags, 0.5)),
        lag_p99_ms=_milliseconds(percentile(lags, 0.99)),
    )


def lags_s(
    produced: Sequence[tuple[float, int]], arrived: Sequence[tuple[float, int]], *, since_s: float
) -> list[float]:
    """For each engine step after since_s: seconds until its last token was in the ingress. Order is kept on the way."""
    lags: list[float] = []
    arrivals = iter(arrived)
    at_s, count = 0.0, 0
    for produced_s, tokens in produced:
        while count < tokens:
            following = next(arrivals, None)
            if following is None:
                return lags
            at_s, count = following
        if produced_s >= since_s:
            lags.append(at_s - produced_s)
    return lags


@contextmanager
def _redis() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tempo-bench-") as folder:
        redis = start_embedded_redis(folder)
        try:
            yield redis.url
        finally:
            redis.stop()


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


def table(results: Sequence[Result]) -> str:
    """For people."""
    lines = [
        f"{'':<11}{'tokens/s':>10}{'requests/s':>12}   CPU us per token (ms per request): router, worker, ingress, all"
    ]
    for one in results:
        costs = "  ".join(
            f"{one.cpu_us_per_token[name]:.1f} ({one.cpu_ms_per_request[name]:.2f})" for name in one.cpu_us_per_token
        )
        lag = "" if one.lag_p50_ms is None else f"   lag p50 {one.lag_p50_ms} ms, p99 {one.lag_p99_ms} ms"
        lines.append(f"{one.scenario:<11}{one.tokens_per_s:>10.0f}{one.requests_per_s:>12.0f}   {costs}{lag}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--seconds", type=above_zero, default=8.0, help="length of each measurement")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", nargs="+", default=names, choices=names)
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    chosen = [scenario for scenario in SCENARIOS if scenario.name in options.scenario]
    results = [measure(scenario, options.seconds) for scenario in chosen]
    print(table(results))
    write_figures(options.json, [asdict(one) for one in results])


if __name__ == "__main__":
    main()
