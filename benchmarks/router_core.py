"""How many events per second RouterCore handles, and what a waiting request costs in memory.

    python -m benchmarks.router_core [--json out.json] [--waiting 10000 100000] [--events 20000] [--replicas 4 100]

The queue is filled, then kept at its length: each round has one replica's progress report (64 calls produce a token,
one of them ends) and one arrival. Progress reports, arrivals and a tick each 50 ms of virtual time are all events.
Times are CPU times of the thread, so that neighbours on the machine count little. Encoding and the network are not
in them.

Plans come by the clock, not by events, so their part depends on how fast virtual time passes. "events/s": a step of
each replica every 20 ms, 400 events per virtual second with four replicas. "full": virtual time passes as the router
takes it, so that it is just busy all the time; then it makes as many plans per second as it would in service.
"""

import argparse
import itertools
import platform
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import get_args

from benchmarks.figures_file import add_json_option, write_figures
from tempo_router.actions import Action, Dispatch
from tempo_router.config import SchedulingConfig
from tempo_router.events import (
    Arrived,
    CallFinished,
    Event,
    Progressed,
    ReplicaAttached,
    ReplicaCapacity,
    ReplicaLoad,
    Settled,
    StepReport,
    Ticked,
)
from tempo_router.option_values import at_least_one
from tempo_router.request import (
    BestEffort,
    Deadline,
    DispatchId,
    GroupId,
    Latency,
    ReplicaId,
    RequestId,
    RequestSpec,
    Slo,
)
from tempo_router.router import RouterCore

BATCH = 64
STEP_S = 0.02
POLICIES = ("fcfs", "edf", "class_priority", "density", "tempo")
SLOS: tuple[Slo, ...] = (Latency(2.0, 0.1), Deadline(20.0), BestEffort())


@dataclass(frozen=True, slots=True)
class Measurement:
    """One policy at one length of the queue. p99_us, max_us: time of single events.

    full_events_per_s: with virtual time passing as the events take it; all other figures are of a step in 20 ms.
    """

    policy: str
    waiting: int
    replicas: int
    events: int
    events_per_s: float
    full_events_per_s: float
    p50_us: float
    p99_us: float
    max_us: float
    arrival_us: float
    progress_us: float
    bytes_per_waiting: float


class World:
    """Replicas that run what they are sent: 64 calls each, one token per call and step, one end per step."""

    def __init__(self, seed: int, replicas: int) -> None:
        self._random = random.Random(seed)
        self._calls: dict[ReplicaId, dict[DispatchId, int]] = {
            ReplicaId(f"gpu{number}"): {} for number in range(replicas)
        }
        self.round_s = STEP_S / replicas
        self._names = 0
        self.now_s = 0.0

    def attachments(self) -> Iterator[Event]:
        """The replicas connect."""
        for replica_id in self._calls:
            yield ReplicaAttached(self.now_s, replica_id, ReplicaCapacity(BATCH, 8192, 1_000_000))

    def arrival(self) -> Arrived:
        """A request of a random class and length."""
        self._names += 1
        name = f"chatcmpl-{self._names:032x}"
        slo = self._random.choice(SLOS)
        spec = RequestSpec(
            request_id=RequestId(name),
            arrival_s=self.now_s - 0.001,
            slo=slo,
            prompt_tokens=int(self._random.lognormvariate(6, 1)) + 1,
            max_output_tokens=1024,
            group_id=GroupId(name),
            model="model",
            app=f"app{self._names % 8}",
        )
        return Arrived(self.now_s, spec)

    def progress(self, replica_id: ReplicaId) -> Progressed:
        """One step of a replica: every call produces a token and the oldest one ends."""
        calls = self._calls[replica_id]
        for dispatch_id in calls:
            calls[dispatch_id] += 1
        finished: tuple[CallFinished, ...] = ()
        tokens = tuple((dispatch_id, 1) for dispatch_id in calls)
        if calls:
            oldest = next(iter(calls))
            finished = (CallFinished(oldest, "completed", calls.pop(oldest)),)
        load = ReplicaLoad(len(calls), 0, 500_000)
        step = StepReport(STEP_S * self._random.uniform(0.8, 1.2), 400, len(tokens), 500 * len(tokens))
        return Progressed(self.now_s, replica_id, load, step, tokens, finished)

    def obey(self, actions: list[Action]) -> None:
        """Start what was dispatched."""
        for action in actions:
            if isinstance(action, Dispatch):
                self._calls[action.replica_id][action.dispatch_id] = 0

    def rounds(self) -> Iterator[Event]:
        """For ever: a step of each replica in turn, an arrival after each; a tick each 50 ms."""
        last_tick_s = self.now_s
        while True:
            for replica_id in self._calls:
                self.now_s += self.round_s
                yield self.progress(replica_id)
                yield self.arrival()
                if self.now_s - last_tick_s >= 0.05:
                    last_tick_s = self.now_s
                    yield Ticked(self.now_s)


def filled(policy: str, waiting: int, replicas: int) -> tuple[RouterCore, World, float]:
    """A router with so many requests waiting, its world, and the bytes that each of them takes."""
    core = RouterCore(
        SchedulingConfig.model_validate(
            {"policy": policy, "max_waiting_requests": 10 * waiting, "max_waiting_tokens": 10**12}
        )
    )
    world = World(1, replicas)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(waiting):
        core.handle(world.arrival())
        # Arrivals over the last ten seconds: most are not late yet, many streams are.
        world.now_s += 10.0 / waiting
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for event in (*world.attachments(), Settled(world.now_s)):
        world.obey(core.handle(event))
    return core, world, (after - before) / waiting


def measure(policy: str, waiting: int, events: int, replicas: int) -> Measurement:
    """Time every event of so many; making the events is not timed."""
    by_kind, bytes_per_waiting = timed(policy, waiting, events, replicas, is_full=False)
    at_full_load, _ = timed(policy, waiting, events, replicas, is_full=True)
    every = sorted(ns for times in by_kind.values() for ns in times)
    return Measurement(
        policy=policy,
        waiting=waiting,
        replicas=replicas,
        events=events,
        events_per_s=events / (sum(every) / 1e9),
        full_events_per_s=events / (sum(map(sum, at_full_load.values())) / 1e9),
        p50_us=every[len(every) // 2] / 1e3,
        p99_us=every[len(every) * 99 // 100] / 1e3,
        max_us=every[-1] / 1e3,
        arrival_us=sum(by_kind[Arrived]) / len(by_kind[Arrived]) / 1e3,
        progress_us=sum(by_kind[Progressed]) / len(by_kind[Progressed]) / 1e3,
        bytes_per_waiting=bytes_per_waiting,
    )


def timed(
    policy: str, waiting: int, events: int, replicas: int, *, is_full: bool
) -> tuple[dict[type[Event], list[int]], float]:
    """(CPU times of each event in ns, bytes per waiting request). is_full: virtual time is that of the CPU."""
    core, world, bytes_per_waiting = filled(policy, waiting, replicas)
    if is_full:
        world.round_s = 0.0
    by_kind: dict[type[Event], list[int]] = {kind: [] for kind in get_args(Event)}
    rounds = world.rounds()
    for _ in range(events):
        event = next(rounds)
        begin = time.thread_time_ns()
        actions = core.handle(event)
        took_ns = time.thread_time_ns() - begin
        by_kind[type(event)].append(took_ns)
        if is_full:
            world.now_s += took_ns / 1e9
        world.obey(actions)
    core.audit()
    return by_kind, bytes_per_waiting


def main() -> None:
    """Measure every policy at every length and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--waiting", type=at_least_one, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--events", type=at_least_one, default=20_000)
    parser.add_argument("--replicas", type=at_least_one, nargs="+", default=[4])
    parser.add_argument("--policy", nargs="+", default=list(POLICIES), choices=POLICIES)
    options = parser.parse_args()
    if options.events < 2:
        parser.error(f"--events {options.events}: give at least 2, progress and an arrival")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"{'policy':<15}{'waiting':>9}{'replicas':>9}{'events/s':>10}{'full':>8}{'p50 us':>8}{'p99 us':>8}", end="")
    print(f"{'max us':>9}{'arrival us':>12}{'progress us':>13}{'B/waiting':>11}")
    results = []
    for waiting, replicas, policy in itertools.product(options.waiting, options.replicas, options.policy):
        one = measure(policy, waiting, options.events, replicas)
        results.append(one)
        print(f"{one.policy:<15}{one.waiting:>9}{one.replicas:>9}{one.events_per_s:>10.0f}", end="")
        print(f"{one.full_events_per_s:>8.0f}{one.p50_us:>8.1f}{one.p99_us:>8.1f}{one.max_us:>9.0f}", end="")
        print(f"{one.arrival_us:>12.1f}{one.progress_us:>13.1f}{one.bytes_per_waiting:>11.0f}")
        sys.stdout.flush()
    write_figures(options.json, [asdict(one) for one in results])


if __name__ == "__main__":
    main()
