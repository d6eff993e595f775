"""vLLM's engine core without its sockets: the busy loop, in a thread of the worker's process.

Three methods of `EngineCoreProc` are replaced, those that would talk ZMQ: the handshake, the input thread (requests
come from a queue and are decoded there, off the busy loop) and the output thread (what leaves the engine is handed to
who publishes it). Steps are observed by wrapping the scheduler's `schedule` and `update_from_output`, so any
`scheduler_cls` is observed the same way.

What serving relies on is named in `_RELIED_ON` and `_ATTRIBUTES` and checked before the start; of the scheduler that is
little, as any `scheduler_cls` may run. What Tempo's own scheduler relies on beyond it: tempo_scheduler.py.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tempo_router.errors import EngineVersionError
from tempo_router.events import ReplicaLoad, StepReport
from workers.call_facts import KEY, values_from_facts
from workers.engine import EngineCall, EngineFacts
from workers.vllm_check import Attributes, Signatures, attribute_differences, check_version, signature_differences

if TYPE_CHECKING:
    from workers.tempo_scheduler import TempoScheduler

try:
    import vllm
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import (
        EngineCoreOutput,
        EngineCoreOutputs,
        EngineCoreRequest,
        EngineCoreRequestType,
        UtilityOutput,
    )
    from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
    from vllm.v1.engine.utils import EngineZmqAddresses
    from vllm.v1.executor import Executor
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
except ImportError as e:
    raise EngineVersionError(f"vLLM cannot be used: {e}; install one of the tested versions (see README)") from e

log = structlog.get_logger()

STOP_TIMEOUT_S = 30.0
NOBODY = 0
"""Client index of calls of our own; upstream also files statistics under 0 when a step has no outputs."""

_RELIED_ON: Signatures = (
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
    (Scheduler, "finish_requests", ("self", "request_ids", "finished_status")),
    (Scheduler, "get_request_counts", ("self",)),
    (BlockPool, "get_num_free_blocks", ("self",)),
    (Executor, "get_class", ("vllm_config",)),
    (MsgpackEncoder, "encode", ("self", "obj")),
    (MsgpackDecoder, "decode", ("self", "bufs")),
)  # fmt: skip
_ATTRIBUTES: Attributes = (
    (
        EngineCoreProc,
        (
            "ENGINE_CORE_DEAD", "aborts_queue", "input_queue", "model_executor", "output_queue", "output_thread",
            "request_block_hasher", "scheduler", "shutdown_state", "step_fn", "vllm_config",
        ),
    ),
    (Scheduler, ("schedule", "update_from_output", "requests", "kv_cache_manager")),
    (KVCacheManager, ("block_pool",)),
    (
        SchedulerOutput,
        ("num_scheduled_tokens", "preempted_req_ids", "scheduled_new_reqs", "scheduled_spec_decode_tokens"),
    ),
    (NewRequestData, ("req_id", "num_computed_tokens")),
    (Request, ("request_id", "num_computed_tokens", "num_prompt_tokens", "num_tokens", "num_preemptions")),
    (
        EngineCoreRequest,
        (
            "request_id", "client_index", "priority", "prompt_token_ids", "mm_features", "sampling_params",
            "pooling_params", "arrival_time", "lora_request", "cache_salt", "data_parallel_rank",
        ),
    ),
    (EngineCoreOutputs, ("outputs", "utility_output")),
    (EngineCoreOutput, ("request_id", "new_token_ids", "finish_reason")),
    (UtilityOutput, ("call_id", "failure_message")),
    (EngineZmqAddresses, ("inputs", "outputs")),
    (RequestStatus, ("FINISHED_ABORTED",)),
    (EngineShutdownState, ("REQUESTED",)),
    (EngineCoreRequestType, ("ABORT", "ADD", "UTILITY", "WAKEUP")),
    # Of the configuration, what vllm_start.py reads too.
    (VllmConfig, ("additional_config", "cache_config", "lora_config", "model_config", "scheduler_config")),
    (CacheConfig, ("block_size", "kv_cache_size_tokens", "num_gpu_blocks")),
    (ModelConfig, ("max_model_len",)),
    (SchedulerConfig, ("max_num_batched_tokens", "max_num_seqs", "policy", "scheduler_cls")),
)  # fmt: skip


def check_vllm() -> None:
    """Compare the installed vLLM with what serving needs of it.

    Raises EngineVersionError naming each difference. A version that was not tested and has none is warned of.
    """
    differences = [*signature_differences(_RELIED_ON), *attribute_differences(_ATTRIBUTES)]
    check_version(str(vllm.__version__), differences, needed_for="a worker")


# ---- what passes between the threads ----


@dataclass(frozen=True, slots=True)
class Add:
    """A call to compute. client_index: where its outputs go."""

    call: EngineCall
    client_index: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Calls whose outputs nobody wants any more."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Utility:
    """A public method of the core, called by name: (method, arguments) in msgpack."""

    call_id: int
    call: bytes


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step's results as they leave the busy loop; encoding is left to the output thread."""

    outputs: Mapping[int, Any]
    report: StepReport | None
    load: ReplicaLoad
    preempted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Aborted:
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


class Core(EngineCoreProc):
    """Upstream's engine core with queues in place of sockets.

    slots: sequences of one step; the scheduler may have more places, for those that it holds.
    step_planner: the class of ours that the configuration names as its scheduler; None where vLLM's own composes steps.
    publish: called in the output thread with (StepDone | Aborted | (client index, EngineCoreOutputs)), in order.
    """

    step_fn: Callable[[], tuple[Any, bool]]

    def __init__(
        self,
        vllm_config: Any,
        *,
        slots: int,
        step_planner: "type[TempoScheduler] | None",
        log_stats: bool,
        publish: Callable[[Any], None],
    ) -> None:
        self._slots = slots
        self._step_planner = step_planner
        self.inbox: queue.SimpleQueue[Add | Abort | Utility | None] = queue.SimpleQueue()
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
                case Add(call, client_index):
                    self._take_request(call, client_index, request_decoder)
                case Abort(request_ids):
                    # On both queues, as upstream: the first acts within the step that runs, the second comes after
                    # the request itself, which may still be on its way.
                    self.aborts_queue.put_nowait(request_ids)
                    self.input_queue.put_nowait((EngineCoreRequestType.ABORT, request_ids))
                case Utility(call_id, call):
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
        params.extra_args = {**(params.extra_args or {}), KEY: values}

    @property
    def step_planner(self) -> "TempoScheduler | None":
        """The scheduler, where it is ours."""
        scheduler, ours = self.scheduler, self._step_planner
        return scheduler if ours is not None and isinstance(scheduler, ours) else None

    def _take_utility(self, call_id: int, call: bytes, decoder: Any) -> None:
        try:
            method, args = decoder.decode(call)
            if not isinstance(method, str) or method.startswith("_") or not isinstance(args, (list, tuple)):
                raise ValueError(f"expected (public method name, arguments), got {method!r}")  # noqa: TRY301
        except Exception as e:  # noqa: BLE001 - whatever the sender wrote, only this call fails
            failed = UtilityOutput(call_id, failure_message=f"the call cannot be read: {e}")
            self.output_queue.put_nowait((NOBODY, EngineCoreOutputs(utility_output=failed)))
            return
        self.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (NOBODY, call_id, method, tuple(args))))

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
            aborted = Aborted(tuple(request.request_id for request in stopped), self._load())
            self.output_queue.put_nowait(aborted)

    def request_stop(self) -> None:
        """End the busy loop; running requests are aborted. From any thread."""
        self.shutdown_state = EngineShutdownState.REQUESTED
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def close_threads(self) -> None:
        """End the input and output threads; the output thread first sends what is queued."""
        self.inbox.put(None)
        self.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)
        self.output_thread.join(timeout=STOP_TIMEOUT_S)

    # -- steps --

    def _observe_steps(self) -> None:
        step_fn, step_planner = self.step_fn, self.step_planner
        schedule, update = self.scheduler.schedule, self.scheduler.update_from_output

        def observed_schedule(*args: Any, **kwargs: Any) -> Any:
            at_s = time.monotonic()
            scheduled = schedule(*args, **kwargs)
            self._in_flight.append(self._features(scheduled, at_s))
            return scheduled

        def observed_update(*args: Any, **kwargs: Any) -> Any:
            outputs = update(*args, **kwargs)
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
                self.output_queue.put_nowait(StepDone(outputs or {}, report, load, preempted))
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
