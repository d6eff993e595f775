"""vLLM's engine core as a Tempo engine. The only file of the worker side that touches vLLM, private names included.

The core runs in a thread of this process: upstream's own busy loop, scheduler, executor and utilities. Three methods
of `EngineCoreProc` are replaced, those that would talk ZMQ: the handshake, the input thread (requests come from a
queue and are decoded there, off the busy loop) and the output thread (outputs are encoded there and handed to the
event loop, one call per engine step). Steps are observed by wrapping the scheduler's `schedule` and
`update_from_output`, so any `scheduler_cls` is observed the same way. Who runs in a step is Tempo's own decision where
a `scheduling` is given (tempo_scheduler.py), else vLLM's by priority.

Everything relied on is named in `_RELIED_ON` and checked before the start.
"""

import asyncio
import difflib
import inspect
import math
import os
import queue
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tempo_router.config import SchedulingConfig
from tempo_router.errors import ConfigError, EngineStartError, EngineVersionError, TempoError
from tempo_router.events import FinishReason, ReplicaLoad, StepReport
from workers.calibration import Calibration, CalibrationFile, measure
from workers.call_facts import News, values_from_facts
from workers.engine import ClientOutputs, EngineCall, EngineFacts, EngineFinished, EngineStep, OnDeath, OnStep

try:
    import torch
    import vllm
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import (
        EngineCoreOutput,
        EngineCoreOutputs,
        EngineCoreRequest,
        EngineCoreRequestType,
        UtilityOutput,
    )
    from vllm.v1.engine import FinishReason as VllmFinishReason
    from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
    from vllm.v1.engine.utils import EngineZmqAddresses
    from vllm.v1.executor import Executor
    from vllm.v1.request import RequestStatus
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from workers import tempo_scheduler
    from workers.vllm_start import inspect_models_here
except ImportError as e:
    raise EngineVersionError(f"vLLM cannot be used: {e}; install one of the tested versions (see README)") from e

log = structlog.get_logger()

TESTED_VERSIONS = ("0.32.0",)

# A thread that wants the interpreter waits this long before it asks the one that computes to let go; Python's default
# is 5 ms. Measured on two cores, tempo-tiny, 8 alternating runs each, medians: with 64 streams the event loop's lag
# was p99 3.6 ms, worst 6.4 ms with 5 ms and p99 2.0 ms, worst 4.2 ms with 0.5 ms; with 1 stream the same; tokens/s
# within noise (8369 and 8321; 302 and 278).
_SWITCH_INTERVAL_S = 0.0005
_STOP_TIMEOUT_S = 30.0
_HELD_SHARE = 0.5
"""Places for calls that are held, over those that run: as many as a router sends beyond an engine's slots."""
_CPU_KV_BYTES = 512 * 1024 * 1024
_NOBODY = 0  # client index of calls of our own; upstream also files statistics under 0 when a step has no outputs

_FINISH_REASONS: Mapping[Any, FinishReason] = {
    VllmFinishReason.STOP: "completed",
    VllmFinishReason.LENGTH: "completed",
    VllmFinishReason.REPETITION: "completed",
    VllmFinishReason.ABORT: "cancelled",
    VllmFinishReason.ERROR: "error",
}

_RELIED_ON: Sequence[tuple[Any, str, tuple[str, ...]]] = (
    (
        EngineCoreProc,
        "__init__",
        (
            "self", "vllm_config", "local_client", "handshake_address", "executor_class", "log_stats",
            "client_handshake_address", "tensor_queue", "engine_index",
        ),
    ),
    (
        EngineCoreProc,
        "_perform_handshakes",
        ("self", "handshake_address", "identity", "local_client", "vllm_config", "client_handshake_address"),
    ),
    (
        EngineCoreProc,
        "process_input_sockets",
        ("self", "input_addresses", "coord_input_address", "identity", "ready_event"),
    ),
    (EngineCoreProc, "process_output_sockets", ("self", "output_paths", "coord_output_path", "engine_index")),
    (EngineCoreProc, "run_busy_loop", ("self",)),
    (EngineCoreProc, "_make_ready_response", ("self",)),
    (EngineCoreProc, "_send_error_outputs_to_client", ("self", "req_ids", "client_index")),
    (EngineCore, "preprocess_add_request", ("self", "request")),
    (EngineCore, "add_request", ("self", "request", "request_wave")),
    (EngineCore, "abort_requests", ("self", "request_ids")),
    (EngineCore, "get_supported_tasks", ("self",)),
    (EngineCore, "shutdown", ("self",)),
    (Scheduler, "schedule", ("self", "throttle_prefills")),
    (Scheduler, "update_from_output", ("self", "scheduler_output", "model_runner_output")),
    (Scheduler, "finish_requests", ("self", "request_ids", "finished_status")),
    (Scheduler, "get_request_counts", ("self",)),
    (MsgpackEncoder, "encode", ("self", "obj")),
    (MsgpackDecoder, "decode", ("self", "bufs")),
)  # fmt: skip


def check_vllm() -> None:
    """Compare the installed vLLM with what this file was written for.

    Raises EngineVersionError naming each difference.
    """
    differences = []
    version = str(vllm.__version__).partition("+")[0]
    if version not in TESTED_VERSIONS:
        differences.append(f"its version is {vllm.__version__}, tested: {', '.join(TESTED_VERSIONS)}")
    for owner, name, expected in _RELIED_ON:
        method = getattr(owner, name, None)
        if method is None:
            differences.append(f"{owner.__name__}.{name} does not exist")
            continue
        found = tuple(inspect.signature(method).parameters)
        if found != expected:
            differences.append(f"{owner.__name__}.{name} takes ({', '.join(found)}), not ({', '.join(expected)})")
    if differences:
        raise EngineVersionError("the installed vLLM is not one that was tested: " + "; ".join(differences))


# ---- what passes between the threads ----


@dataclass(frozen=True, slots=True)
class _Add:
    call: EngineCall
    client_index: int


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class _Utility:
    call_id: int
    call: bytes


@dataclass(frozen=True, slots=True)
class _StepDone:
    """One step's results as they leave the busy loop; encoding is left to the output thread."""

    outputs: Mapping[int, Any]
    report: StepReport | None
    load: ReplicaLoad
    preempted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Aborted:
    """Requests that ended because our caller asked for it. Whoever aborts knows, so no output goes to a client."""

    request_ids: tuple[str, ...]
    load: ReplicaLoad


@dataclass(frozen=True, slots=True)
class _Scheduled:
    """A step that was scheduled and whose results have not come."""

    at_s: float
    prefill_tokens: int
    decodes: int
    context_tokens: int
    attention_tokens: float

    @property
    def is_empty(self) -> bool:
        return self.prefill_tokens == 0 and self.decodes == 0


# ---- the core, in its thread ----


class _Core(EngineCoreProc):
    """Upstream's engine core with queues in place of sockets.

    slots: sequences of one step; the scheduler may have more places, for those that it holds.
    publish: called in the output thread with (_StepDone | _Aborted | (client index, EngineCoreOutputs)), in order.
    """

    step_fn: Callable[[], tuple[Any, bool]]

    def __init__(self, vllm_config: Any, *, slots: int, log_stats: bool, publish: Callable[[Any], None]) -> None:
        self._slots = slots
        self.inbox: queue.SimpleQueue[_Add | _Abort | _Utility | None] = queue.SimpleQueue()
        self._publish = publish
        self._in_flight: deque[_Scheduled] = deque()
        self._report: StepReport | None = None
        self._last_outputs_at_s = 0.0
        self._preemptions = 0
        self._preempted: list[str] = []
        self._prefix_hit_tokens = 0
        self._prefix_query_tokens = 0
        super().__init__(
            vllm_config,
            local_client=True,
            handshake_address="",
            executor_class=Executor.get_class(vllm_config),
            log_stats=log_stats,
        )
        self._tokens_per_block = self._block_tokens()
        self._observe_steps()
        self._last_load = self._load()

    # -- in place of sockets --

    @contextmanager
    def _perform_handshakes(self, *_: Any) -> Generator[Any, None, None]:
        """There is nobody to shake hands with: one process, no coordinator."""
        yield EngineZmqAddresses(inputs=[], outputs=[])

    def process_input_sockets(self, *args: Any) -> None:
        """Input thread: decodes and preprocesses requests while the busy loop computes."""
        *_, ready_event = args
        request_decoder = MsgpackDecoder(EngineCoreRequest)
        utility_decoder = MsgpackDecoder()
        ready_event.set()
        while (item := self.inbox.get()) is not None:
            match item:
                case _Add(call, client_index):
                    self._take_request(call, client_index, request_decoder)
                case _Abort(request_ids):
                    # On both queues, as upstream: the first acts within the step that runs, the second comes after
                    # the request itself, which may still be on its way.
                    self.aborts_queue.put_nowait(request_ids)
                    self.input_queue.put_nowait((EngineCoreRequestType.ABORT, request_ids))
                case _Utility(call_id, call):
                    self._take_utility(call_id, call, utility_decoder)

    def _take_request(self, call: EngineCall, client_index: int, decoder: Any) -> None:
        try:
            request = decoder.decode(list(call.payload))
            if request.request_id != call.request_id:
                raise ValueError(f"the payload belongs to {request.request_id!r}")  # noqa: TRY301 - one way to fail
            request.client_index = client_index
            request.priority = call.priority
            self._add_facts(request, call)
            item = self.preprocess_add_request(request)
        except Exception:
            # A request that cannot be read is its own problem, never the engine's.
            log.exception("engine_request_unreadable", request_id=call.request_id)
            self._send_error_outputs_to_client([call.request_id], client_index)
            return
        self.input_queue.put_nowait((EngineCoreRequestType.ADD, item))

    def _add_facts(self, request: Any, call: EngineCall) -> None:
        """Hand the SLO to the scheduler. Whatever a client may have sent under our name is overwritten."""
        params = request.sampling_params
        if self.step_planner is None or params is None or call.facts is None:
            return
        values = values_from_facts(call.facts, time.monotonic())
        params.extra_args = {**(params.extra_args or {}), tempo_scheduler.KEY: values}

    @property
    def step_planner(self) -> "tempo_scheduler.TempoScheduler | None":
        """The scheduler, where it is ours."""
        scheduler = self.scheduler
        return scheduler if isinstance(scheduler, tempo_scheduler.TempoScheduler) else None

    def _take_utility(self, call_id: int, call: bytes, decoder: Any) -> None:
        try:
            method, args = decoder.decode(call)
            if not isinstance(method, str) or method.startswith("_") or not isinstance(args, (list, tuple)):
                raise ValueError(f"expected (public method name, arguments), got {method!r}")  # noqa: TRY301
        except Exception as e:  # noqa: BLE001 - whatever the sender wrote, only this call fails
            failed = UtilityOutput(call_id, failure_message=f"the call cannot be read: {e}")
            self.output_queue.put_nowait((_NOBODY, EngineCoreOutputs(utility_output=failed)))
            return
        self.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (_NOBODY, call_id, method, tuple(args))))

    def process_output_sockets(self, *_: Any) -> None:
        """Output thread: everything that leaves the engine, in order."""
        while (item := self.output_queue.get()) != EngineCoreProc.ENGINE_CORE_DEAD:
            self._publish(item)

    # -- requests --

    def add_request(self, request: Any, request_wave: int = 0) -> None:
        """Upstream lets a request that the scheduler refuses end the whole engine; here it ends alone."""
        try:
            super().add_request(request, request_wave)
        except Exception:
            log.exception("engine_request_refused", request_id=request.request_id)
            self._send_error_outputs_to_client([request.request_id], request.client_index)

    def abort_requests(self, request_ids: list[str]) -> None:
        """As upstream, and tells whom it stopped."""
        stopped = self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)
        if stopped:
            aborted = _Aborted(tuple(request.request_id for request in stopped), self._load())
            self.output_queue.put_nowait(aborted)

    def request_stop(self) -> None:
        """End the busy loop; running requests are aborted. From any thread."""
        self.shutdown_state = EngineShutdownState.REQUESTED
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def close_threads(self) -> None:
        """End the input and output threads; the output thread first sends what is queued."""
        self.inbox.put(None)
        self.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)
        self.output_thread.join(timeout=_STOP_TIMEOUT_S)

    # -- steps --

    def _observe_steps(self) -> None:
        step_fn, step_planner = self.step_fn, self.step_planner
        schedule, update = self.scheduler.schedule, self.scheduler.update_from_output

        def observed_schedule(throttle_prefills: bool = False) -> Any:
            at_s = time.monotonic()
            scheduled = schedule(throttle_prefills)
            self._in_flight.append(self._features(scheduled, at_s))
            return scheduled

        def observed_update(scheduler_output: Any, model_runner_output: Any) -> Any:
            outputs = update(scheduler_output, model_runner_output)
            self._report = self._finish_step(self._in_flight.popleft())
            if step_planner is not None and self._report is not None:
                step_planner.observe(self._report)
            return outputs

        def observed_step() -> tuple[dict[int, Any], bool]:
            outputs, executed = step_fn()
            load = self._load()
            report, self._report = self._report, None
            if outputs or report is not None or load != self._last_load:
                self._last_load = load
                preempted, self._preempted = tuple(self._preempted), []
                self.output_queue.put_nowait(_StepDone(outputs or {}, report, load, preempted))
            # The caller would queue the outputs of each client apart.
            return {}, executed

        self.scheduler.schedule = observed_schedule
        self.scheduler.update_from_output = observed_update
        self.step_fn = observed_step

    def _features(self, scheduled: Any, at_s: float) -> _Scheduled:
        """What a step consists of. `schedule` has already advanced `num_computed_tokens` by this step's tokens."""
        prefill_tokens = decodes = context_tokens = 0
        attention_tokens = 0.0
        requests = self.scheduler.requests
        drafts = scheduled.scheduled_spec_decode_tokens
        for request_id, tokens in scheduled.num_scheduled_tokens.items():
            request = requests[request_id]
            before = request.num_computed_tokens - tokens
            # More than one token beyond the prompt is what a preempted request computes again.
            if before < request.num_prompt_tokens or tokens - len(drafts.get(request_id, ())) > 1:
                prefill_tokens += tokens
                attention_tokens += tokens * (before + tokens / 2)
            else:
                decodes += 1
                context_tokens += request.num_computed_tokens
        self._preemptions += len(scheduled.preempted_req_ids or ())
        self._preempted += sorted(scheduled.preempted_req_ids or ())
        if self.request_block_hasher is not None:
            self._count_prefix_hits(scheduled.scheduled_new_reqs)
        return _Scheduled(at_s, prefill_tokens, decodes, context_tokens, attention_tokens)

    def _count_prefix_hits(self, new_requests: Iterable[Any]) -> None:
        for new in new_requests:
            request = self.scheduler.requests[new.req_id]
            if request.num_preemptions == 0:
                self._prefix_hit_tokens += new.num_computed_tokens
                self._prefix_query_tokens += request.num_tokens

    def _finish_step(self, scheduled: _Scheduled) -> StepReport | None:
        """With steps in flight one behind another, a step begins when the results of the one before it are out."""
        now_s = time.monotonic()
        began_s = max(scheduled.at_s, self._last_outputs_at_s)
        self._last_outputs_at_s = now_s
        if scheduled.is_empty:
            return None
        return StepReport(
            duration_s=now_s - began_s,
            prefill_tokens=scheduled.prefill_tokens,
            decodes=scheduled.decodes,
            context_tokens=scheduled.context_tokens,
            attention_tokens=scheduled.attention_tokens,
        )

    def _load(self) -> ReplicaLoad:
        running, waiting = self.scheduler.get_request_counts()
        return ReplicaLoad(
            running=running,
            waiting=waiting,
            free_kv_tokens=self.free_kv_tokens(),
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            preemptions=self._preemptions,
        )

    def free_kv_tokens(self) -> int:
        """Cached blocks that nobody uses count as free: they are taken when needed."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.get_num_free_blocks() * self._tokens_per_block)

    def _block_tokens(self) -> float:
        """The block size; less where a token needs blocks of several kinds (hybrid models)."""
        cache = self.vllm_config.cache_config
        if cache.kv_cache_size_tokens and cache.num_gpu_blocks:
            return float(cache.kv_cache_size_tokens / cache.num_gpu_blocks)
        return float(cache.block_size)

    def facts(self, model: str) -> EngineFacts:
        """What the engine says of itself. In the busy loop's thread only."""
        cache, scheduler = self.vllm_config.cache_config, self.vllm_config.scheduler_config
        return EngineFacts(
            engine="vllm",
            engine_version=str(vllm.__version__),
            model=model,
            max_model_len=self.vllm_config.model_config.max_model_len,
            kv_blocks=cache.num_gpu_blocks or 0,
            block_size=cache.block_size,
            kv_tokens=self.free_kv_tokens(),
            max_running=self._slots,
            max_step_tokens=scheduler.max_num_batched_tokens,
            supported_tasks=tuple(self.get_supported_tasks()),
            ready_response=msgspec.msgpack.encode(self._make_ready_response()),
            has_step_planner=self.step_planner is not None,
        )


# ---- the engine, on the event loop ----


class VllmEngine:
    """vLLM behind the `Engine` protocol. Made by `start_vllm_engine`."""

    def __init__(
        self,
        model: str,
        arguments: Mapping[str, Any],
        on_step: OnStep,
        on_death: OnDeath,
        scheduling: SchedulingConfig | None = None,
        known: Calibration | None = None,
    ) -> None:
        self._known = known
        self._model = model
        self._arguments = arguments
        self._scheduling = scheduling
        self._on_step = on_step
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._core: _Core | None = None
        self._facts: EngineFacts | None = None
        self._is_stopping = False
        self._stopping: asyncio.Task[None] | None = None
        self._live: dict[str, str] = {}
        self._client_indexes: dict[str, int] = {}
        self._clients: list[str] = [""]  # by index; index 0 is nobody
        self._utilities: dict[int, asyncio.Future[tuple[bytes, ...]]] = {}
        self._next_call_id = 1
        self._load: ReplicaLoad | None = None
        self._encoder = MsgpackEncoder()  # output thread only

    @property
    def calibration(self) -> Calibration:
        """What the steps cost, as far as is known. Only where steps are planned."""
        step_planner = self._live_core.step_planner
        if step_planner is None:
            raise TempoError("only planned steps are calibrated")
        steps = step_planner.steps
        return Calibration(steps.coefficients, steps.relative_error, steps.observed)

    async def start(self) -> None:
        """Load the model in the engine's thread. Raises ConfigError or EngineStartError."""
        self._thread.start()
        try:
            await asyncio.shield(self._started)
        except asyncio.CancelledError:
            self._is_stopping = True  # the thread ends by itself once it is up
            raise

    # -- the protocol --

    @property
    def facts(self) -> EngineFacts:
        """Fixed from the start."""
        if self._facts is None:
            raise TempoError("the engine has not started")
        return self._facts

    def submit(self, call: EngineCall) -> None:
        """Queue a request; decoding happens in the input thread."""
        if call.request_id in self._live:
            self._loop.call_soon(self._refuse_duplicate, call)
            return
        self._live[call.request_id] = call.client
        self._live_core.inbox.put(_Add(call, self._client_index(call.client)))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these. Their clients get no output: whoever aborts knows."""
        live = [request_id for request_id in request_ids if request_id in self._live]
        if live:
            self._live_core.inbox.put(_Abort(live))

    def tell(self, news: News) -> None:
        """The scheduler reads it before its next step."""
        step_planner = self._live_core.step_planner
        if step_planner is not None:
            step_planner.tell(news)

    async def call_utility(self, call: bytes) -> tuple[bytes, ...]:
        """Run a method of the engine core. `call`: msgpack (name, arguments); the answer: vLLM's UtilityOutput."""
        if self._is_stopping or not self._thread.is_alive():
            raise TempoError("the engine has stopped")
        call_id = self._next_call_id
        self._next_call_id += 1
        answer: asyncio.Future[tuple[bytes, ...]] = self._loop.create_future()
        self._utilities[call_id] = answer
        self._live_core.inbox.put(_Utility(call_id, call))
        try:
            return await answer
        finally:
            del self._utilities[call_id]

    def live_requests(self) -> tuple[str, ...]:
        """Submitted and not finished."""
        return tuple(self._live)

    async def shutdown(self) -> None:
        """Stop the engine; running requests are reported as cancelled."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._is_stopping = True
        if self._core is not None:
            self._core.request_stop()
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
        if self._thread.is_alive() and self._core is not None:
            log.error("engine_does_not_stop", waited_s=_STOP_TIMEOUT_S)
            await asyncio.to_thread(self._core.model_executor.shutdown)
        self._fail_utilities("the engine has stopped")

    @property
    def _live_core(self) -> _Core:
        if self._core is None:
            raise TempoError("the engine has not started")
        return self._core

    def _client_index(self, client: str) -> int:
        index = self._client_indexes.get(client)
        if index is None:
            index = self._client_indexes[client] = len(self._clients)
            self._clients.append(client)
        return index

    # -- the engine's thread --

    def _run(self) -> None:
        try:
            self._core = core = _build_core(self._arguments, self._scheduling, self._known, self._publish)
            self._facts = core.facts(self._model)
            self._load = ReplicaLoad(running=0, waiting=0, free_kv_tokens=self._facts.kv_tokens)
        except ConfigError as e:
            self._call_on_loop(_settle, self._started, e)
            return
        except (Exception, SystemExit) as e:  # noqa: BLE001 - the reason travels on in the EngineStartError
            problem = EngineStartError(f"vLLM could not start with model {self._model!r}: {_reason(e)}")
            problem.__cause__ = e
            self._call_on_loop(_settle, self._started, problem)
            return
        self._call_on_loop(_settle, self._started, None)
        self._run_core(core)

    def _run_core(self, core: _Core) -> None:
        death = None
        try:
            if self._is_stopping:
                core.request_stop()
            core.run_busy_loop()
        except SystemExit:
            pass  # how the busy loop says that it was asked to end
        except Exception as e:
            log.exception("engine_failed")
            death = _reason(e)
        try:
            core.shutdown()
        except Exception:
            log.exception("engine_teardown_failed")
        core.close_threads()
        if death is not None:
            self._call_on_loop(self._die, death)

    def _call_on_loop(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("event_loop_closed_before_engine")  # the process is ending

    # -- the output thread --

    def _publish(self, item: Any) -> None:
        match item:
            case _StepDone(outputs, report, load, preempted):
                self._load = load
                step = replace(self._step_of(outputs, load, report), preempted=preempted)
                self._call_on_loop(self._deliver, step)
            case _Aborted(request_ids, load):
                self._load = load
                finished = tuple(EngineFinished(request_id, "cancelled") for request_id in request_ids)
                self._call_on_loop(self._deliver, EngineStep(load=load, finished=finished))
            case (client_index, outputs):
                if outputs.utility_output is not None:
                    self._publish_utility(outputs.utility_output)
                else:
                    self._call_on_loop(self._deliver, self._step_of({client_index: outputs}, self._known_load, None))

    @property
    def _known_load(self) -> ReplicaLoad:
        assert self._load is not None, "outputs come only from an engine that has started"
        return self._load

    def _step_of(self, by_client: Mapping[int, Any], load: ReplicaLoad, report: StepReport | None) -> EngineStep:
        tokens = []
        finished = []
        outputs = {}
        for client_index, group in by_client.items():
            for output in group.outputs:
                if output.new_token_ids:
                    tokens.append((output.request_id, len(output.new_token_ids)))
                if output.finish_reason is not None:
                    finished.append(EngineFinished(output.request_id, _FINISH_REASONS[output.finish_reason]))
            # Statistics of a step without outputs go to whoever came last: somebody should count them.
            client = self._clients[client_index] if client_index != _NOBODY else self._clients[-1]
            if client:
                outputs[client] = ClientOutputs(buffers=_buffers(self._encoder, group))
        return EngineStep(load=load, step=report, tokens=tuple(tokens), finished=tuple(finished), outputs=outputs)

    def _publish_utility(self, output: Any) -> None:
        try:
            encoded, failure = _buffers(self._encoder, output), output.failure_message
        except Exception as e:  # noqa: BLE001 - a result of any type may come back; the caller hears of it
            encoded, failure = (), f"the result cannot be sent: {e}"
        self._call_on_loop(self._settle_utility, output.call_id, encoded, failure)

    # -- the event loop --

    def _deliver(self, step: EngineStep) -> None:
        if step.finished:
            # Once each: an abort and the natural end may both be reported.
            once = tuple(end for end in step.finished if self._live.pop(end.request_id, None) is not None)
            if len(once) != len(step.finished):
                step = replace(step, finished=once)
        self._on_step(step)

    def _refuse_duplicate(self, call: EngineCall) -> None:
        """The live one goes on; only a client that does not own it hears of the error."""
        log.warning("engine_request_duplicate", request_id=call.request_id)
        outputs = {}
        if self._live.get(call.request_id) != call.client:
            refusal = EngineCoreOutput(call.request_id, [], finish_reason=VllmFinishReason.ERROR)
            outputs[call.client] = ClientOutputs(_buffers(MsgpackEncoder(), EngineCoreOutputs(outputs=[refusal])))
        finished = (EngineFinished(call.request_id, "error"),)
        self._on_step(EngineStep(load=self._known_load, finished=finished, outputs=outputs))

    def _settle_utility(self, call_id: int, encoded: tuple[bytes, ...], failure: str | None) -> None:
        answer = self._utilities.get(call_id)
        if answer is None or answer.done():
            return
        if failure is None:
            answer.set_result(encoded)
        else:
            answer.set_exception(TempoError(failure))

    def _fail_utilities(self, reason: str) -> None:
        for answer in self._utilities.values():
            if not answer.done():
                answer.set_exception(TempoError(reason))

    def _die(self, reason: str) -> None:
        self._fail_utilities(f"the engine died: {reason}")
        self._on_death(reason)


async def start_vllm_engine(
    model: str,
    engine_kwargs: Mapping[str, Any],
    *,
    on_step: OnStep,
    on_death: OnDeath,
    scheduling: SchedulingConfig | None = None,
    calibrations: Path | None = None,
) -> VllmEngine:
    """Start vLLM in a thread of this process and return when it can take requests.

    scheduling: plan every step by this policy; None leaves the steps to vLLM.
    calibrations: folder of what was measured of planned steps; what is not there is measured now. None: neither.

    engine_kwargs: vLLM's engine arguments, as in `vllm serve`, with underscores. What is not given comes from vLLM,
    except `scheduling_policy` ("priority") and, on a CPU, what `_cpu_defaults` says.
    Raises EngineVersionError, ConfigError (an argument that does not exist), EngineStartError with the reason.
    """
    check_vllm()
    if sys.getswitchinterval() > _SWITCH_INTERVAL_S:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
    arguments = _arguments(model, engine_kwargs)
    file = None
    if calibrations is not None and scheduling is not None:
        file = CalibrationFile(
            calibrations, model=model, device=current_platform.get_device_name(), arguments=dict(arguments)
        )
    known = file.load() if file is not None else None
    engine = VllmEngine(model, arguments, on_step, on_death, scheduling, known)
    await engine.start()
    if file is not None and known is None and engine.facts.has_step_planner:
        await _calibrate(engine, file)
    return engine


async def _calibrate(engine: VllmEngine, file: CalibrationFile) -> None:
    """Measure and keep. An engine that cannot be measured still serves: it learns from its requests."""
    began_s = time.monotonic()
    try:
        await measure(engine, _made_up_request)
        file.save(engine.calibration)
    except (TimeoutError, OSError) as error:
        log.warning("calibration_failed", problem=repr(error), effect="step times are learnt from requests alone")
        return
    found = engine.calibration
    log.info(
        "calibrated",
        seconds=round(time.monotonic() - began_s, 1),
        steps=found.steps,
        relative_error=round(found.relative_error, 3),
        path=str(file.path),
    )


def _made_up_request(request_id: str, prompt_tokens: int, answer_tokens: int) -> tuple[bytes, ...]:
    """Greedy, as long as it may be; its prompt is its own, so that no cache has it."""
    rng = random.Random(request_id)
    params = SamplingParams(max_tokens=answer_tokens, ignore_eos=True, temperature=0.0)
    request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[rng.randrange(1, 200) for _ in range(prompt_tokens)],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return _buffers(MsgpackEncoder(), request)


def _arguments(model: str, engine_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = tuple(inspect.signature(AsyncEngineArgs).parameters)
    for name in engine_kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"engine_kwargs.{name}: vLLM has no such engine argument{_did_you_mean(near)}")
    for name in ("model", "data_parallel_size"):
        if name in engine_kwargs and engine_kwargs[name] not in (model, 1):
            raise ConfigError(
                f"engine_kwargs.{name}={engine_kwargs[name]!r}: set `model` and `workers.replicas` in the "
                "configuration instead"
            )
    arguments = {"scheduling_policy": "priority", **engine_kwargs, "model": model}
    if current_platform.is_cpu():
        arguments = _cpu_defaults(arguments)
    return arguments


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _cpu_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What suits several engines on one machine; vLLM's own defaults take the whole machine for one.

    - KV cache of 512 MiB, not nine tenths of the memory.
    - Eager: compiling took 50 s at the first start and 14 s from its cache, and made no difference to tempo-tiny's
      steps that noise would show.
    - Threads not bound to cores: automatic binding puts two engines on the same cores.
    - OMP_NUM_THREADS: half of the cores unless set; the others serve streams.
    - Executor "uni", the model in this process. Measured on two busy cores against "mp", its own process: step period
      3.5 and 5.7 ms with 1 stream, 3.9 and 6.2 with 16, 7.4 and 6.4 to 13 with 64; start after imports 5 and 27 s.
    """
    chosen = dict(arguments)
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "gpu_memory_utilization" not in chosen:
        chosen.setdefault("kv_cache_memory_bytes", _CPU_KV_BYTES)
    chosen.setdefault("enforce_eager", True)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    world_size = int(chosen.get("tensor_parallel_size", 1)) * int(chosen.get("pipeline_parallel_size", 1))
    backend = chosen.get("distributed_executor_backend")
    if backend == "uni" or (backend is None and world_size == 1):
        chosen["distributed_executor_backend"] = "uni"
        # Otherwise the CPU platform silently turns "uni" into "mp".
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return chosen


class _RewindingGenerator(torch.Generator):
    """A random state that vLLM can take back on a CPU.

    A prompt that is computed over several steps draws a token in each, and all but the last are discarded; vLLM then
    sets a seeded request's generator back by its offset. CPU generators have none and raise, which ends the whole
    engine (0.32.0). Discarded draws come before the first token, so starting again from the seed takes them back.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, _offset: int) -> None:
        self.manual_seed(self.initial_seed())


def _build_core(
    arguments: Mapping[str, Any],
    scheduling: SchedulingConfig | None,
    known: Calibration | None,
    publish: Callable[[Any], None],
) -> _Core:
    if current_platform.is_cpu():
        # Acts on the in-process executor, the default here; vLLM looks the name up when a seeded request comes.
        torch.Generator = _RewindingGenerator
        # torch read OMP_NUM_THREADS when it was imported; kernels take the count of the thread that calls them: this.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    inspect_models_here()
    vllm_arguments = AsyncEngineArgs(**arguments)
    config = vllm_arguments.create_engine_config()
    slots = config.scheduler_config.max_num_seqs
    if scheduling is not None:
        _put_planner_in(config, scheduling, known)
    return _Core(config, slots=slots, log_stats=not vllm_arguments.disable_log_stats, publish=publish)


def _put_planner_in(config: Any, scheduling: SchedulingConfig, known: Calibration | None) -> None:
    """Let Tempo's scheduler compose the steps, or say why vLLM's own does.

    Who is held keeps a place in vLLM's batch, so there are more of these than run at once.
    """
    obstacles = [*tempo_scheduler.differences(), *tempo_scheduler.not_planned(config)]
    if config.scheduler_config.scheduler_cls is not None:
        obstacles.append(f"scheduler_cls is {config.scheduler_config.scheduler_cls!r}")
    if obstacles:
        log.warning(
            "step_planner_off",
            vllm=str(vllm.__version__),
            reasons=obstacles,
            effect="vLLM's own priority policy composes the steps; SLOs count in the router's order alone",
        )
        return
    chosen = config.scheduler_config
    slots = chosen.max_num_seqs
    chosen.scheduler_cls = tempo_scheduler.SCHEDULER
    # The victim is then the tail of the list of running requests, which the planner arranges.
    chosen.policy = "fcfs"
    chosen.max_num_seqs = min(math.ceil((1 + _HELD_SHARE) * slots), max(slots, chosen.max_num_batched_tokens))
    settings: dict[str, Any] = {"slots": slots, "scheduling": scheduling.model_dump(mode="json")}
    if known is not None:
        settings["coefficients"] = list(known.coefficients)
    config.additional_config = {**(config.additional_config or {}), tempo_scheduler.KEY: settings}
    log.info("step_planner_on", policy=scheduling.policy, slots=slots, places=chosen.max_num_seqs)


def _buffers(encoder: Any, outputs: Any) -> tuple[bytes, ...]:
    return tuple(bytes(buffer) for buffer in encoder.encode(outputs))


def _settle(started: "asyncio.Future[None]", problem: BaseException | None) -> None:
    if started.done():
        return
    if problem is None:
        started.set_result(None)
    else:
        started.set_exception(problem)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
