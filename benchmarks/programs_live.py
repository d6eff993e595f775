"""Programs that meet their deadline when served live, by how much the router knows of them.

    python -m benchmarks.programs_live --trace deepresearch_train_1-82.csv.gz [--seconds 60] [--load 1.5]

Router, worker, ingress link and the streams between them are real, and so is Redis; the engine is simulated in real
time; Ray and HTTP are left out. Clients end an answer themselves when it is long enough, as a stop string does, so
nobody is told its length. The trace's programs are drawn again with lengths times --scale, varied by about 15 %, and
one deadline for all. Load 1.0 is what the engine delivers of these programs from a backlog, measured first; the ways
then take turns over the same arrivals.

    per call        each call has a deadline of its own: that of the program over its mean number of stages
    no look-ahead   the program's deadline, nothing foretold
    stages          the rest foretold by means of each stage
    patterns        the rest foretold by programs that looked alike
    true graphs     the rest known
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.program_patterns import workload
from cluster import wire_pb2 as wire
from cluster.embedded_redis import start_embedded_redis
from cluster.ingress_link import IngressLink
from cluster.redis_store import RedisStore
from cluster.router_server import RouterServer
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from tempo_router.config import EngineConfig, SchedulingConfig, TempoConfig
from tempo_router.errors import ProgramError
from tempo_router.program_graph import CallStatus
from tempo_router.program_history import Call as GraphCall
from tempo_router.program_history import KnownGraphs, ProgramHistory
from tempo_router.program_ops import CancelProgram, CreateProgram, EndCall, FinishProgram
from tempo_router.request import BestEffort, Deadline, GroupId, ProgramCall, ProgramId, RequestId, RequestSpec, Slo
from tempo_router.simulation.generate import generate, generator_config
from tempo_router.simulation.trace import Trace, TraceCall, Unit
from tempo_router.simulation.trace_file import read_trace
from workers.simulated_engine import start_simulated_engine
from workers.worker import Worker

BOUND = 2048
WAYS: dict[str, dict[str, Any]] = {
    "per call": {},
    "no look-ahead": {"switches": {"look_ahead": False}},
    "stages": {"program_model": "stages"},
    "patterns": {"program_model": "patterns"},
    "true graphs": {},
}


class KnowingRouter(RouterServer):
    """A router that is told the history of programs to go by."""

    known: ProgramHistory | None = None

    def make_history(self) -> ProgramHistory:
        """The one it was told, else its own."""
        return self.known if self.known is not None else super().make_history()


@dataclass
class Answers:
    """The clients of one link: each waits for its call to be long enough."""

    link: IngressLink = field(init=False)
    wanted: dict[RequestId, tuple[int, asyncio.Future[bool]]] = field(default_factory=dict)
    tokens: dict[RequestId, int] = field(default_factory=dict)
    delivered: int = 0

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        """Count; end what is long enough."""
        for delta in frame.deltas:
            request_id = self.link.claim(worker_id, delta.request_id)
            if request_id is None or request_id not in self.wanted:
                continue
            self.delivered += len(delta.token_ids)
            self.tokens[request_id] = self.tokens.get(request_id, 0) + len(delta.token_ids)
            length, ended = self.wanted[request_id]
            if self.tokens[request_id] >= length or delta.finish_reason:
                self._over(request_id, ended, is_answered=True)
                self.link.cancel(request_id, is_complete=True)

    def attempt_lost(self, request_id: RequestId) -> None:
        """Must not happen here."""
        raise RuntimeError(f"{request_id} was lost")

    def relegated(self, request_id: RequestId) -> None:
        """It goes on as best effort."""

    def redated(self, request_id: RequestId, slo: ProgramCall) -> None:
        """Deadlines stay where they are."""

    def expired(self, request_id: RequestId) -> None:
        """Dropped from the queue."""
        self._over(request_id, self.wanted[request_id][1], is_answered=False)

    def program_cancelled(self, request_id: RequestId) -> None:
        """Its program was given up."""
        if request_id in self.wanted:
            self._over(request_id, self.wanted[request_id][1], is_answered=False)

    async def answer(self, spec: RequestSpec, length: int) -> bool:
        """Send a call and wait for its end. Returns whether it was answered."""
        ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.wanted[spec.request_id] = (length, ended)
        payload = [msgspec.msgpack.encode([spec.attempt_id, [], None, {"ignore_eos": True}])]
        verdict = await self.link.submit(spec, payload)
        if not verdict.is_admitted:
            self.wanted.pop(spec.request_id, None)
            return False
        return await ended

    def _over(self, request_id: RequestId, ended: "asyncio.Future[bool]", *, is_answered: bool) -> None:
        del self.wanted[request_id]
        self.tokens.pop(request_id, None)
        if not ended.done():
            ended.set_result(is_answered)


@dataclass
class Service:
    """Router, one worker and one ingress link."""

    router: KnowingRouter
    worker: Worker
    answers: Answers

    async def close(self) -> None:
        """End all."""
        await self.answers.link.stop()
        await self.worker.stop()
        await self.router.stop()


async def serve(config: TempoConfig, store: RedisStore, known: ProgramHistory | None) -> Service:
    """Start and wait until requests can be served."""
    router = KnowingRouter(config, store, owner="benchmark", host="127.0.0.1")
    router.known = known
    await router.start()

    async def locate() -> str:
        return router.address

    worker = Worker("worker", locate_router=locate, host="127.0.0.1", transport=config.transport)
    await worker.start(await start_simulated_engine(config.engine, on_step=worker.on_step, on_death=worker.on_death))
    answers = Answers()
    answers.link = IngressLink(
        "ingress", locate_router=locate, listener=answers, transport=config.transport, router_wait_s=30.0,
        engine_version="none",
    )  # fmt: skip
    answers.link.start()
    while answers.link.not_ready_because is not None:  # noqa: ASYNC110  # the link has no event for it
        await asyncio.sleep(0.02)
    return Service(router, worker, answers)


def config_of(options: argparse.Namespace, **scheduling: Any) -> TempoConfig:
    """One small simulated GPU."""
    return TempoConfig(
        name="programs-live",
        engine=EngineConfig(
            kind="simulated", profile=options.profile, time_scale=options.time_scale,
            engine_kwargs={"max_num_seqs": options.slots, "max_model_len": 8192},
        ),
        scheduling=SchedulingConfig.model_validate(
            {"policy": "tempo", "settle_s": 0.1, "length_model": "histogram", **scheduling}
        ),
    )  # fmt: skip


def spec_of(name: str, call: TraceCall, slo: Slo, *, app: str, stage: int = 0, program_id: str = "") -> RequestSpec:
    """A call that arrives now; what is told of its answer is a bound that says nothing."""
    return RequestSpec(
        request_id=RequestId(name), arrival_s=time.monotonic(), slo=slo, prompt_tokens=call.prompt_tokens,
        max_output_tokens=BOUND, group_id=GroupId(name), app=app, stage=stage, program_id=program_id,
    )  # fmt: skip


async def saturated_tokens_per_s(options: argparse.Namespace, store: RedisStore, trace: Trace) -> float:
    """Tokens per second from a backlog of the trace's calls."""
    service = await serve(config_of(options, policy="fcfs"), store, None)
    calls = [call for unit in trace.units for call in unit.calls]
    work = [
        asyncio.create_task(
            service.answers.answer(spec_of(f"b{number}", call, BestEffort(), app="backlog"), call.output_tokens)
        )
        for number, call in enumerate(calls)
    ]
    await asyncio.sleep(2.0)
    before, began_s = service.answers.delivered, time.monotonic()
    await asyncio.sleep(options.measure_s)
    rate = (service.answers.delivered - before) / (time.monotonic() - began_s)
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    await service.close()
    return rate


async def run_program(service: Service, unit: Unit, *, way: str, deadline_s: float, stages: float) -> dict[str, Any]:
    """One program as its client lives it: stage by stage, until it is done or its deadline has passed."""
    began_s = time.monotonic()
    programs = ProgramClient(service.answers.link.programs)
    is_known = way != "per call"
    if is_known:
        await programs.ask(CreateProgram(unit.unit_id, "", unit.app, time.time() + deadline_s))
    ended: set[int] = set()
    good = 0
    for stage in range(1 + max(call.stage for call in unit.calls)):
        calls = [(number, call) for number, call in enumerate(unit.calls) if call.stage == stage]
        results = await asyncio.gather(
            *(
                one_call(service, programs, unit, number, call, is_known=is_known, own_s=deadline_s / stages)
                for number, call in calls
            )
        )
        if not all(results) or time.monotonic() - began_s > deadline_s:
            break
        ended.update(number for number, _ in calls)
        good += sum(call.output_tokens for _, call in calls)
    took_s = time.monotonic() - began_s
    is_met = len(ended) == len(unit.calls) and took_s <= deadline_s
    if is_known:
        op = FinishProgram if len(ended) == len(unit.calls) else CancelProgram
        await programs.ask(op(unit.unit_id, "", "end"))
    return {"is_met": is_met, "good_tokens": good if is_met else 0, "took_s": took_s}


async def one_call(
    service: Service, programs: ProgramClient, unit: Unit, number: int, call: TraceCall, *, is_known: bool, own_s: float
) -> bool:
    """A call of a program, or one that only its client knows to belong to it."""
    name = f"{unit.unit_id}-{number}"
    if not is_known:
        return await service.answers.answer(spec_of(name, call, Deadline(own_s), app=unit.app), call.output_tokens)
    identity = Identity("explicit", unit.unit_id, call_id=name, stage=call.stage)
    try:
        ticket = await programs.begin(identity, tenant="", app="", now_epoch_s=time.time())
    except ProgramError:
        return False
    slo: Slo = BestEffort() if ticket.left_s is None else ProgramCall(ProgramId(unit.unit_id), ticket.left_s)
    spec = spec_of(name, call, slo, app=unit.app, stage=ticket.stage, program_id=unit.unit_id)
    is_answered = await service.answers.answer(spec, call.output_tokens)
    status: CallStatus = "completed" if is_answered else "failed"
    programs.end(EndCall(unit.unit_id, name, 0, status, call.prompt_tokens, call.output_tokens))
    return is_answered


def known_graphs(units: Sequence[Unit]) -> KnownGraphs:
    """A clairvoyant's history."""
    graphs: dict[ProgramId, list[list[GraphCall]]] = {}
    for unit in units:
        stages: list[list[GraphCall]] = [[] for _ in range(1 + max(call.stage for call in unit.calls))]
        for call in unit.calls:
            stages[call.stage].append((call.prompt_tokens, call.output_tokens, call.gap_s))
        graphs[ProgramId(unit.unit_id)] = stages
    return KnownGraphs(graphs)


async def measure(
    options: argparse.Namespace, store: RedisStore, trace: Trace, way: str, rate: float
) -> dict[str, Any]:
    """One way under load."""
    scheduling = WAYS[way]
    known = known_graphs(trace.units) if way == "true graphs" else None
    service = await serve(config_of(options, **scheduling), store, known)
    stages = statistics.fmean(1 + max(call.stage for call in unit.calls) for unit in trace.units)
    tokens = statistics.fmean(unit.output_tokens for unit in trace.units)
    per_s = options.load * rate / tokens
    rng = random.Random(options.seed)
    began_s = time.monotonic()
    at_s = 0.0
    work: list[asyncio.Task[dict[str, Any]]] = []
    for unit in trace.units:
        at_s += rng.expovariate(per_s)
        if at_s > options.seconds:
            break
        await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
        one = run_program(service, unit, way=way, deadline_s=options.deadline_s, stages=stages)
        work.append(asyncio.create_task(one))
    results = await asyncio.gather(*work)
    writer = service.router.programs.writer
    calls = sum(len(unit.calls) for unit in trace.units[: len(results)])
    row = {
        "way": way,
        "programs": len(results),
        "met": sum(result["is_met"] for result in results),
        "attainment": round(statistics.fmean(result["is_met"] for result in results), 4),
        "good_tokens": sum(result["good_tokens"] for result in results),
        "redis_round_trips_per_call": round(writer.round_trips / calls, 3),
    }
    await service.close()
    return row


async def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways, in turns over seeds."""
    source = read_trace(options.trace) if options.trace else generate(generator_config({"duration_s": 1200}), seed=0)
    redis = start_embedded_redis(folder)
    rows: list[dict[str, Any]] = []
    rate = 0.0
    try:
        for seed in range(options.seeds):
            drawn = workload(source, 2000, options.deadline_s, seed=seed + 11)
            units = tuple(
                replace(unit, calls=tuple(_scaled(call, options.scale) for call in unit.calls)) for unit in drawn.units
            )
            trace = Trace(drawn.name, tuple(replace(unit, unit_id=f"s{seed}-{unit.unit_id}") for unit in units))
            options.seed = seed
            for way in options.ways:
                store = await RedisStore.connect(redis.url, f"live-{seed}-{way.replace(' ', '-')}")
                try:
                    rate = rate or await saturated_tokens_per_s(options, store, Trace("b", trace.units[:400]))
                    row = {"seed": seed, **await measure(options, store, trace, way, rate)}
                finally:
                    await store.close()
                rows.append(row)
                print(json.dumps(row), flush=True)
    finally:
        redis.stop()
    met = {way: sum(row["met"] for row in rows if row["way"] == way) for way in options.ways}
    offered = {way: sum(row["programs"] for row in rows if row["way"] == way) for way in options.ways}
    return {"saturated_tokens_per_s": rate, "load": options.load, "rows": rows, "met": met, "programs": offered}


def _scaled(call: TraceCall, scale: float) -> TraceCall:
    return replace(
        call,
        prompt_tokens=max(1, round(call.prompt_tokens * scale)),
        output_tokens=max(1, round(call.output_tokens * scale)),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a CSV as in docs/workloads.md that holds programs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for each way")
    parser.add_argument("--measure-s", type=float, default=5.0, help="of the backlog")
    parser.add_argument("--load", type=float, default=1.5)
    parser.add_argument("--deadline-s", type=float, default=10.0)
    parser.add_argument("--scale", type=float, default=0.1, help="of all lengths of the trace")
    parser.add_argument("--profile", default="llama-3-8b:a100-80g:1")
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(run(options, Path(folder)))
    print(json.dumps({name: result[name] for name in ("saturated_tokens_per_s", "met", "programs")}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
