"""The router's life: its lease, what it knows from earlier ones, its clockwork, its end, and what is shown of it."""

import asyncio
import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import grpc.aio
import structlog

from cluster import wire_pb2_grpc
from cluster.control_streams import ControlStreams
from cluster.core_runner import CoreRunner
from cluster.event_recorder import EventRecorder
from cluster.learnt_lengths import LearntLengths
from cluster.length_estimates import LengthEstimates
from cluster.link import channel_options
from cluster.open_requests import OpenRequests
from cluster.peers import INGRESS_GRACE_S, Peers
from cluster.program_desk import ExplainRequest, ProgramDesk, ViewConsole
from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from tempo_router.attainment import Attainment
from tempo_router.config import TempoConfig
from tempo_router.errors import InvalidEventError, LeaseLostError, StoreRefusedError, StoreUnavailableError, TempoError
from tempo_router.event_log import Beginning
from tempo_router.events import DrainStarted, Ticked
from tempo_router.explain import DecisionLog
from tempo_router.pattern_history import PatternHistory
from tempo_router.prediction import LengthHistograms
from tempo_router.program_history import ProgramHistory
from tempo_router.router import RouterCore

log = structlog.get_logger()

REDIS_RETRY_S = 0.2


class RouterServer:
    """One life of an application's router, from lease to stop. host: the address that peers can reach."""

    def __init__(self, config: TempoConfig, store: RedisStore, *, owner: str, host: str) -> None:
        self.epoch = 0
        self.address = ""
        self._config = config
        self._store = store
        self._owner = owner
        self._host = host
        self._learnt: LearntLengths | None = None
        self._estimates: LengthEstimates | None = None
        self._open = OpenRequests()
        self._peers = Peers(self._open)
        self._decisions = DecisionLog(config.ingress.explained_requests)
        self._attainment = Attainment()
        self._runner = CoreRunner(RouterCore(config.scheduling), self._peers, self._open, self._decisions)
        self._redis_restarted = asyncio.Event()
        self._programs: ProgramDesk | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._server = grpc.aio.server(options=channel_options(config.transport))

    # ---- life ----

    async def start(self) -> str:
        """Take the lease, restore what was learnt, serve. Returns host:port.

        Raises StoreUnavailableError, StoreRefusedError.
        """
        self._store.on_restart = self._redis_restarted.set
        self.epoch = await self._store.acquire_lease(self._owner, self._config.transport.lease_s)
        history = self.make_history()
        learnt = self._learnt = LearntLengths(self._store, self.epoch)
        lengths, beginning = await learnt.histograms()
        core = RouterCore(self._config.scheduling, epoch=self.epoch, lengths=lengths, history=history)
        self._runner = CoreRunner(core, self._peers, self._open, self._decisions)
        if self._config.scheduling.length_model == "auto":
            self._estimates = LengthEstimates(
                self._config.scheduling, drain=core.drain_samples, on_predicted=self._runner.handle
            )
            await learnt.restore_answers(self._estimates)
        self._programs = self._open_desk(history)
        known = await self._programs.restore()
        if self._config.record_events is not None:
            kept = self._config.programs
            recorder = EventRecorder(
                Path(self._config.record_events),
                Beginning(
                    self._config.scheduling, self.epoch, beginning,
                    most_patterns=kept.max_patterns, pattern_age_s=kept.pattern_age_s, programs=known,
                ),
            )  # fmt: skip
            self._runner.record(recorder)
        control = ControlStreams(
            self._runner, self._peers, self._open, self._programs, self._estimates, self._attainment, epoch=self.epoch
        )
        wire_pb2_grpc.add_RouterControlServicer_to_server(control, self._server)
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        self.address = f"{self._host}:{port}"
        self._tasks.append(asyncio.create_task(self._settle(control), name=self._settle.__qualname__))
        loops = (self._tick, self._keep_lease, self._forget_lost_owners)
        for loop in (*loops, self._programs.writer.run, self._programs.sweep):
            self._tasks.append(asyncio.create_task(loop(), name=loop.__qualname__))
        keeping = learnt.keep(lengths, self._estimates, self._config.transport.snapshot_s)
        self._tasks.append(asyncio.create_task(keeping, name="memory of lengths"))
        if self._estimates is not None:
            self._tasks.append(asyncio.create_task(self._estimates.run(), name="estimates of lengths"))
        log.info("router_started", address=self.address, epoch=self.epoch)
        return self.address

    def _open_desk(self, history: ProgramHistory) -> ProgramDesk:
        config, runner = self._config.programs, self._runner
        store = ProgramStore(self._store, keep_s=config.keep_s, most_patterns=config.max_patterns)
        return ProgramDesk(
            config, store, fence=self.epoch, handle=runner.handle, send=self._peers.tell_ingress,
            cancel_calls=runner.cancel_program, outlook=runner.outlook, least_left_s=runner.least_left_s,
            patterns=history if isinstance(history, PatternHistory) else None,
            questions={ExplainRequest: self._explain, ViewConsole: self._console},
            most_answer_bytes=self._config.transport.max_message_bytes // 2,
        )  # fmt: skip

    def make_history(self) -> ProgramHistory:
        """What programs are foretold by, empty; a router whose programs are known beforehand has another."""
        if self._config.scheduling.program_model == "patterns":
            return PatternHistory(self._config.programs.max_patterns, self._config.programs.pattern_age_s)
        return ProgramHistory()

    async def stop(self) -> None:
        """Close the streams, write what was learnt, give the lease back."""
        self._peers.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._estimates is not None:
            self._estimates.close()
        await self._server.stop(grace=0.2)
        if self._runner.recorder is not None:
            self._runner.recorder.close()
        try:
            await self._save_lengths()
            if self._programs is not None:
                await self._programs.stop()
            await self._store.release(self._owner, self.epoch)
        except (StoreUnavailableError, StoreRefusedError, LeaseLostError) as error:
            log.warning("router_end_not_stored", problem=str(error))

    async def _save_lengths(self) -> None:
        if self._learnt is not None:
            await self._learnt.save(self._runner.core.lengths, self._estimates)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until all open ones have ended. Returns whether they have, in time."""
        self._runner.handle(DrainStarted(time.monotonic()))
        try:
            async with asyncio.timeout(timeout_s):
                await self._open.until_empty()
        except TimeoutError:
            log.warning("drain_timed_out", open_requests=len(self._open), timeout_s=timeout_s)
            return False
        return True

    def failure(self) -> BaseException | None:
        """Why it can no longer be relied on: a task ended, an event failed halfway, or it is outdated; or None."""
        if self._runner.failure is not None:
            return self._runner.failure
        for task in self._tasks:
            is_once = task.get_name().endswith(("_settle", "_forget_lost_owners"))
            if task.done() and not task.cancelled() and (not is_once or task.exception() is not None):
                return task.exception() or RuntimeError(f"the router's {task.get_name()} ended")
        return None

    # ---- what is shown ----

    @property
    def has_peers(self) -> bool:
        """Whether any ingress or worker is connected."""
        return bool(self._peers.worker_ids or self._peers.connected_ingresses)

    @property
    def lengths(self) -> LengthHistograms:
        """What was learnt about the lengths of answers."""
        return self._runner.core.lengths

    @property
    def estimates(self) -> LengthEstimates | None:
        """The second opinion on lengths; None where the histograms are all."""
        return self._estimates

    def snapshot(self) -> dict[str, Any]:
        """Counts for logs, status pages and tests."""
        return {
            "epoch": self.epoch,
            **self._open.counts(),
            "ingresses": [session.ingress_id for session in self._peers.connected_ingresses],
            "workers": self._peers.worker_ids,
            "programs": self._programs_snapshot(),
            "core": self._runner.core.snapshot(),
            "length_estimates": None if self._estimates is None else self._estimates.snapshot(),
        }

    @property
    def programs(self) -> ProgramDesk:
        """Programs in progress; there once `start` has returned."""
        if self._programs is None:
            raise InvalidEventError("the router has not started: it knows no programs yet")
        return self._programs

    def _programs_snapshot(self) -> dict[str, Any]:
        shown = {"live": 0, "unwritten": 0, "refused": 0, "is_store_away": False, "written": 0, "round_trips": 0}
        if self._programs is not None:
            writer = self._programs.writer
            shown |= {
                "live": len(self._programs.book),
                "unwritten": writer.waiting,
                "refused": writer.refused,
                "is_store_away": writer.is_away,
                "written": writer.written,
                "round_trips": writer.round_trips,
            }
        return shown

    def _explain(self, asked: ExplainRequest) -> list[dict[str, Any]]:
        return [one.shown() for one in self._decisions.find(asked.name, asked.tenant)]

    def _console(self, asked: ViewConsole) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "ingresses": len(self._peers.connected_ingresses),
            "service": self._attainment.shown(time.monotonic()),
            "queue": dataclasses.asdict(self._runner.core.snapshot()),
            "store": self._programs_snapshot(),
            "programs": self.programs.newest(asked.most, asked.tenant),
        }

    # ---- background ----

    async def _settle(self, control: ControlStreams) -> None:
        """Only listen at first: or the first worker to attach would get everything that waits."""
        await asyncio.sleep(self._config.scheduling.settle_s)
        control.settled()

    async def _forget_lost_owners(self) -> None:
        """Ingresses that went while there was no router never come back: what they served is over."""
        await asyncio.sleep(self._config.scheduling.settle_s + INGRESS_GRACE_S)
        self.programs.owners_gone(session.ingress_id for session in self._peers.ingresses)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.scheduling.tick_s)
            self._runner.handle(Ticked(time.monotonic()))

    async def _keep_lease(self) -> None:
        """Renew the lease. Redis being away, or refusing, stops nothing: only a newer router does."""
        trouble: type[TempoError] | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.transport.lease_s / 3):
                    await self._redis_restarted.wait()
            try:
                if self._redis_restarted.is_set():
                    await self._store.reconnect()
                await self._store.renew(self._owner, self.epoch, self._config.transport.lease_s)
                # Only now: the fence may be among what was lost, and an older router may think that it still counts.
                if self._redis_restarted.is_set():
                    self._redis_restarted.clear()
                    self.programs.store_again()
                if trouble is not None:
                    was_away = trouble is StoreUnavailableError
                    log.warning("redis_back" if was_away else "lease_renewed_again", epoch=self.epoch)
                trouble = None
            except (StoreUnavailableError, StoreRefusedError) as error:
                if type(error) is not trouble:
                    _say_not_renewed(error)
                trouble = type(error)
                await asyncio.sleep(REDIS_RETRY_S)


def _say_not_renewed(error: StoreUnavailableError | StoreRefusedError) -> None:
    if isinstance(error, StoreRefusedError):
        effect = "serving goes on; what a Redis that is restarted has lost is not written again"
        log.error("lease_not_renewed", problem=str(error), effect=effect)
    else:
        log.warning("redis_away", problem=str(error), effect="serving goes on; nothing learnt is stored")
