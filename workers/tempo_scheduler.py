"""Tempo's step planner inside vLLM: a scheduler class for the engine argument `scheduler_cls`.

The only module that changes the state of vLLM's scheduler; vllm_core.py, which any scheduler may run in, reads some
(vllm_check.py says who uses what). It never copies the parent's `schedule()`: it asks the planner of tempo_router for
the step, the same that the simulator runs, arranges the parent's state so that the parent comes to that step, and tells
the planner what came of it.

    order        `waiting` is a queue that shows only the planned prompts; partly computed ones stand last in `running`
    budget       `max_num_scheduled_tokens` for one call
    hold         `next_decode_eligible_step` beyond any step
    victim       `_preempt_request`, before the call; what vLLM itself preempts is the tail of `running`
    end          `_free_blocks`

`differences` compares the installed vLLM with what is relied on, `not_planned` names what the planner cannot plan for.
Whoever starts an engine asks them first, in this order; where either finds something, or this module cannot even be
imported, the order is left to vLLM (vllm_start.py). A plain server does not ask: then the class refuses to be made.
"""

import inspect
import itertools
import time
import typing
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import structlog
from vllm import SamplingParams
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

from tempo_router.config import SchedulingConfig
from tempo_router.errors import ConfigError, EngineVersionError
from tempo_router.events import StepReport
from tempo_router.live_call import LiveCall, StepPlan
from tempo_router.policies import build_policy
from tempo_router.prediction import LengthHistograms
from tempo_router.request import DispatchId
from tempo_router.step_planner import StepPlanner
from tempo_router.step_time import Coefficients, StepTimeModel
from workers.call_facts import KEY, CallFacts, CallUpdate, News, facts_from_values
from workers.engine_blocks import EngineBlocks
from workers.lora_places import LoraPlaces
from workers.planned_queue import Funnel, PlannedQueue
from workers.vllm_check import (
    TESTED_VERSIONS,
    Attributes,
    Signatures,
    attribute_differences,
    contract_differences,
    has_attribute,
    signature_differences,
    source_of,
)

log = structlog.get_logger()

_NEVER = 1 << 60
_MOST_EARLY = 1024
_WORST_STANDS_S = 0.1
"""How long the last of the order is taken for the last, so that a full cache does not mean sorting at every step."""
_MOST_LOOKED_UP = 8
"""Prompts that do not fit of which a step asks what others hold of them: an answer costs as much as it has blocks."""
_FACTS_OF_A_STRANGER = {"class": "best_effort"}

_RELIED_ON: Signatures = (
    (Scheduler, "schedule", ("self", "throttle_prefills")),
    (Scheduler, "add_request", ("self", "request")),
    (Scheduler, "_preempt_request", ("self", "request", "timestamp", "drop_stale_output")),
    (Scheduler, "_free_blocks", ("self", "request")),
    (KVCacheManager, "get_computed_blocks", ("self", "request")),
    (KVCacheManager, "get_blocks", ("self", "request_id")),
)
_ATTRIBUTES: Attributes = (
    (
        AsyncScheduler,
        (
            "requests", "waiting", "running", "max_num_scheduled_tokens", "max_num_running_reqs", "current_step",
            "num_waiting_for_streaming_input",
            "kv_cache_manager", "kv_cache_config", "block_size", "max_model_len", "lora_config", "vllm_config",
            "cache_config", "_pause_state",
        ),
    ),
    (KVCacheBlocks, ("blocks",)),
    (KVCacheBlock, ("is_null", "ref_cnt")),
    (KVCacheConfig, ("kv_cache_groups",)),
    (KVCacheGroupSpec, ("kv_cache_spec",)),
    (KVCacheSpec, ("block_size", "page_size_bytes", "max_memory_usage_bytes")),
    (
        Request,
        (
            "request_id", "status", "sampling_params", "max_tokens", "lora_request", "structured_output_request",
            "num_prompt_tokens", "num_tokens", "num_output_tokens", "num_computed_tokens", "num_output_placeholders",
            "num_in_flight_tokens", "next_decode_eligible_step", "resumable",
        ),
    ),
    (
        RequestStatus,
        ("RUNNING", "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR", "FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"),
    ),
    (SchedulerOutput, ("num_scheduled_tokens",)),
    (StructuredOutputRequest, ("grammar",)),
    (PauseState, ("UNPAUSED",)),
    (
        VllmConfig,
        (
            "additional_config", "cache_config", "ec_transfer_config", "kv_transfer_config", "model_config",
            "parallel_config", "scheduler_config", "speculative_config",
        ),
    ),
    (CacheConfig, ("mamba_cache_mode",)),
    (ParallelConfig, ("data_parallel_size", "pipeline_parallel_size")),
    (ModelConfig, ("is_encoder_decoder", "is_multimodal_model", "runner_type")),
    (SchedulerConfig, ("disable_chunked_mm_input", "enable_chunked_prefill")),
    (LoRAConfig, ("max_loras",)),
    (LoRARequest, ("lora_int_id",)),
    (SamplingParams, ("extra_args",)),
)  # fmt: skip
_QUEUES = ("kv_holding_waiting", "skipped_waiting")
"""Where the parent keeps those that it passed over: the first since 0.31, the second before."""


def differences() -> list[str]:
    """What of the installed vLLM is not as this module needs it; empty if all is."""
    found = [
        *signature_differences(_RELIED_ON),
        *attribute_differences(_ATTRIBUTES),
        *contract_differences(RequestQueue, PlannedQueue),
    ]
    if not any(has_attribute(Scheduler, name) for name in _QUEUES):
        found.append(f"Scheduler has none of {', '.join(_QUEUES)}")
    found += _shape_differences()
    if "next_decode_eligible_step" not in source_of(Scheduler.schedule):
        found.append("Scheduler.schedule does not read next_decode_eligible_step")
    return found


def _shape_differences() -> list[str]:
    """What get_computed_blocks returns: (blocks, cached tokens, and from 0.32 on more)."""
    method = getattr(KVCacheManager, "get_computed_blocks", None)
    returned = inspect.signature(method).return_annotation if method is not None else None
    if method is None or typing.get_args(returned)[1:2] == (int,):
        return []
    return [f"KVCacheManager.get_computed_blocks returns {returned}, of which the second is no number of tokens"]


def not_planned(config: Any) -> list[str]:
    """What of an engine's configuration the planner knows nothing of; empty for what it can plan.

    To be asked only where `differences` finds none: it reads fields that another vLLM need not have.
    """
    parallel, model, scheduler = config.parallel_config, config.model_config, config.scheduler_config
    is_uncut = scheduler.disable_chunked_mm_input and model.is_multimodal_model
    reasons = {
        "speculative decoding": config.speculative_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        "transfer of encoder outputs": config.ec_transfer_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "encoder-decoder models": model.is_encoder_decoder,
        "models that do not generate": model.runner_type != "generate",
        # Older versions have none of these.
        "diffusion models": getattr(model, "is_diffusion", False),
        "prompts that are not cut (enable_chunked_prefill is off)": not scheduler.enable_chunked_prefill,
        # A budget that ends within an image would keep it out for ever.
        "images that are not cut (disable_chunked_mm_input is on)": is_uncut,
        # vLLM cuts prompts at whole blocks of its own size there, so a budget below one lets none of them go on.
        "Mamba states cached at block ends (mamba_cache_mode is align)": config.cache_config.mamba_cache_mode
        == "align",
    }
    return [name for name, is_there in reasons.items() if is_there]


def _check(config: Any) -> None:
    """A plain server names the class and asks nothing: it ends here, before it serves."""
    found = differences()
    if found:
        raise EngineVersionError(
            f"the installed vLLM is not as TempoScheduler needs it: {'; '.join(found)}; "
            f"install a tested version ({', '.join(TESTED_VERSIONS)}), or start without scheduler_cls"
        )
    found = not_planned(config)
    if found:
        raise ConfigError(
            f"TempoScheduler cannot plan for {'; '.join(found)}; start vLLM without that, or without scheduler_cls"
        )


def _is_stranger(request: Any) -> bool:
    """The planner knows nothing of it: it does not sample, or its input is streamed."""
    return request.sampling_params is None or request.resumable


def _known_steps(settings: Mapping[str, Any]) -> StepTimeModel:
    """What was measured before, as far as it is given."""
    if "coefficients" not in settings:
        return StepTimeModel()
    coefficients = Coefficients(*settings["coefficients"])
    if "upper_ratio" not in settings:
        return StepTimeModel(coefficients)
    return StepTimeModel(coefficients, settings["upper_ratio"])


class TempoScheduler(AsyncScheduler):
    """Plans every step with `StepPlanner`. One thread calls it; `tell` may be called from any.

    Settings are in `additional_config["tempo"]`, all optional: `scheduling` (as in the configuration of the router),
    `slots` (sequences of one step; beyond it calls are held), `coefficients` and `upper_ratio` (of StepTimeModel, as
    measured before).
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self.vllm_config)
        chosen = (self.vllm_config.additional_config or {}).get(KEY, {})
        scheduling = SchedulingConfig.model_validate(chosen.get("scheduling", {"policy": "tempo"}))
        self.running: list[Any] = []
        self.waiting: PlannedQueue[Any] = PlannedQueue()
        if hasattr(self, "skipped_waiting"):
            self.skipped_waiting: PlannedQueue[Any] = Funnel(self.waiting)
        self._most_tokens: int = self.max_num_scheduled_tokens
        self.steps = _known_steps(chosen)
        least_each, self._most_each = self._blocks_each()
        self._kv = EngineBlocks(
            self.cache_config.num_gpu_blocks - 1,
            self.block_size,
            self._cached_tokens,
            self._shared_blocks,
            least_each=least_each,
            most_each=self._most_each,
        )
        self.planner = StepPlanner(
            build_policy(scheduling),
            slots=min(chosen.get("slots", self.max_num_running_reqs), self.max_num_running_reqs),
            max_step_tokens=self._most_tokens,
            kv=self._kv,
            steps=self.steps,
        )
        self._lengths = LengthHistograms()
        self._news: deque[News] = deque()
        self._spare_keys = itertools.count(-1, -1)
        self._calls: dict[str, LiveCall] = {}
        self._requests: dict[DispatchId, Any] = {}
        self._strangers: dict[str, Any] = {}
        self._not_ready: dict[str, tuple[Any, CallFacts]] = {}
        places = self.lora_config.max_loras if self.lora_config else 0
        self._loras: LoraPlaces[tuple[Any, CallFacts | None]] = LoraPlaces(
            places, most_passed=self.max_num_running_reqs
        )
        self._begun: dict[DispatchId, LiveCall] = {}
        self._skipped: list[Any] = []
        self._worst: Any = None
        self._worst_until_s = -1.0
        self._early: dict[str, CallUpdate] = {}
        self._is_stuck = False
        self._looked_up = 0

    def _blocks_each(self) -> tuple[float, float]:
        """Blocks of the pool that `block_size` tokens take: of the longest request, and of a short one.

        Every group of layers takes its own; one with a sliding window no more than its window needs, and a Mamba layer
        as much for any length.
        """
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        longest = sum(-(-spec.max_memory_usage_bytes(self.vllm_config) // spec.page_size_bytes) for spec in specs)
        most = sum(max(1.0, self.block_size / spec.block_size) for spec in specs) if len(specs) > 1 else 1.0
        return min(most, longest * self.block_size / self.max_model_len), most

    # ---- what comes in ----

    def tell(self, news: News) -> None:
        """The next step knows. From any thread."""
        self._news.append(news)

    def observe(self, report: StepReport) -> None:
        """How long a step took, for the costs and the budget of later ones."""
        self.planner.measured(report)

    def add_request(self, request: Any) -> None:
        """As upstream; the planner learns of it too, once it can run."""
        is_known = request.request_id in self.requests
        # Before the parent keeps it, and by the time when it came: grammars and adapters may keep it waiting.
        facts = None if is_known or _is_stranger(request) else self._facts(request, self.clock())
        super().add_request(request)
        if is_known:
            return
        if facts is not None and request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            self._not_ready[request.request_id] = (request, facts)
        else:
            self._find_place(request, facts)

    def _find_place(self, request: Any, facts: CallFacts | None) -> None:
        """It takes part at once unless its adapter would be one too many for a step. facts: None for a stranger."""
        lora = request.lora_request if self.lora_config else None
        if lora is None or self._loras.enter(request.request_id, lora.lora_int_id, (request, facts)):
            self._enter(request, facts)

    def _enter(self, request: Any, facts: CallFacts | None) -> None:
        if facts is None:
            self._strangers[request.request_id] = request
            return
        key = facts.key
        if key in self._requests:
            key = DispatchId(next(self._spare_keys))
            log.warning("call_key_twice", request_id=request.request_id, key=facts.key)
        lengths = facts.lengths if facts.lengths is not None else self._lengths.lookup(facts.spec)
        self._requests[key] = request
        self._calls[request.request_id] = self.planner.add(key, facts.spec, lengths, facts.standing, self.clock())
        early = self._early.pop(request.request_id, None) if self._early else None
        if early is not None:
            self._update(early)

    def _facts(self, request: Any, came_s: float) -> CallFacts:
        values = (request.sampling_params.extra_args or {}).get(KEY)
        spare_key = next(self._spare_keys)

        def read(values: Any) -> CallFacts:
            return facts_from_values(
                values,
                request_id=request.request_id,
                prompt_tokens=request.num_prompt_tokens,
                max_tokens=request.max_tokens,
                now_s=came_s,
                spare_key=spare_key,
            )

        try:
            return read(values if values is not None else _FACTS_OF_A_STRANGER)
        except ValueError as problem:
            log.warning(
                "slo_unreadable", request_id=request.request_id, problem=str(problem)[:200], effect="best effort"
            )
            return read(_FACTS_OF_A_STRANGER)

    def _take_news(self) -> None:
        while self._news:
            news = self._news.popleft()
            self.planner.step_cap_s = news.step_cap_s
            for update in news.updates:
                self._update(update)

    def _update(self, update: CallUpdate) -> None:
        call = self._calls.get(update.request_id)
        if call is None:
            # It has ended, and the news crossed with its last token; or they overtook the request itself, or it waits
            # for its grammar or a place for its adapter.
            known = self._early.pop(update.request_id, update)
            standing, slo = update.standing or known.standing, update.slo or known.slo
            self._early[update.request_id] = CallUpdate(update.request_id, standing, slo)
            if len(self._early) > _MOST_EARLY:
                del self._early[next(iter(self._early))]
            return
        if update.standing is not None:
            self.planner.retune(call.call_id, update.standing)
        if update.slo is not None:
            self.planner.retarget(call.call_id, update.slo)

    def _admit_ready(self) -> None:
        """Those whose grammar is compiled, or cannot be: the parent tells these two apart when it meets them."""
        waiting = self._not_ready.values()
        ready = [(one, facts) for one, facts in waiting if one.structured_output_request.grammar is not None]
        for request, facts in ready:
            del self._not_ready[request.request_id]
            self._find_place(request, facts)

    def _cached_tokens(self, request_id: str) -> int:
        request = self.requests.get(request_id)
        return int(self.kv_cache_manager.get_computed_blocks(request)[1]) if request is not None else 0

    def _shared_blocks(self, request_id: str) -> int:
        """Blocks that others hold: of those that it has, or of those that it would find in the cache."""
        request = self.requests.get(request_id)
        if request is None:
            return 0
        if request.status == RequestStatus.RUNNING:
            held = self.kv_cache_manager.get_blocks(request_id).blocks
            return sum(block.ref_cnt > 1 and not block.is_null for group in held for block in group)
        self._looked_up += 1
        if self._looked_up > _MOST_LOOKED_UP:
            return 0
        found = self.kv_cache_manager.get_computed_blocks(request)[0].blocks
        return sum(block.ref_cnt > 0 and not block.is_null for group in found for block in group)

    # ---- a step ----

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """The parent's step, as the planner wants it."""
        if self._news:
            self._take_news()
        if self._not_ready:
            self._admit_ready()
        for request, facts in self._loras.admit():
            self._enter(request, facts)
        plan = self._plan() if self._pause_state == PauseState.UNPAUSED else None
        offered = self._arrange(plan)
        self.waiting.offer(offered)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.waiting.withdraw()
            self.max_num_scheduled_tokens = self._most_tokens
        self._follow(plan, output)
        return output

    def _plan(self) -> StepPlan | None:
        planner = self.planner
        self._measure_blocks()
        plan = planner.plan(self.clock())
        if planner.evicted:
            self._preempt(planner.evicted)
        if self._is_stuck:
            self._make_way(plan)
        return plan

    def _measure_blocks(self) -> None:
        self._looked_up = 0
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        # Kept from prompts while anything runs; older versions have no watermark.
        spare = getattr(self.kv_cache_manager, "watermark_blocks", 0) if self.running else 0
        self._kv.measure(free, promised=self._promised(), spare=spare, for_decodes=self.planner.crossings)

    def _promised(self) -> int:
        """Blocks that begun prompts will still take."""
        promised = 0
        for call_id, call in self._begun.items():
            request = self._requests[call_id]
            is_running = request.status == RequestStatus.RUNNING
            taken = -(-request.num_computed_tokens // self.block_size) if is_running else 0
            promised += max(0, call.blocks - taken)
        return promised

    def _preempt(self, calls: Iterable[LiveCall]) -> None:
        victims = []
        for call in calls:
            self._begun.pop(call.call_id, None)
            request = self._requests.get(call.call_id)
            if request is not None and request.status == RequestStatus.RUNNING:
                victims.append(request)
        if not victims:
            return
        gone = {request.request_id for request in victims}
        self.running = [request for request in self.running if request.request_id not in gone]
        for request in victims:
            super()._preempt_request(request, self.clock())
            request.next_decode_eligible_step = 0

    def _make_way(self, plan: StepPlan | None) -> None:
        """Nothing ran in the last step: who is held gives up its place, the last of them first.

        If nobody is held, blocks are short of what was reckoned, and a begun prompt gives up its own for the first of
        the plan.
        """
        planner = self.planner
        ordered = planner.ordered()
        planned = {call.call_id for call in planner.held_calls}
        last = next((call for call in reversed(ordered) if call.call_id in planned), None)
        if last is None and plan is not None and plan.prefills:
            first = plan.prefills[0][0]
            last = next((call for call in reversed(ordered) if call is not first and self._has_begun(call)), None)
        if last is not None:
            planner.lost(last)
            self._preempt([last])

    def _make_places(self, offered: Iterable[Any]) -> None:
        """Who is to come in and finds every place of the batch taken gets that of one who is held, the last first."""
        places = getattr(self, "max_num_active_reqs", self.max_num_running_reqs)
        taken = len(self.running) + self.num_waiting_for_streaming_input
        lacking = sum(request in self.waiting for request in offered) - max(0, places - taken)
        if lacking <= 0:
            return
        held = {call.call_id for call in self.planner.held_calls}
        last = [call for call in reversed(self.planner.ordered()) if call.call_id in held][:lacking]
        for call in last:
            self.planner.lost(call)
        self._preempt(last)

    def _has_begun(self, call: LiveCall) -> bool:
        """Some of its prompt is computed."""
        return call.call_id in self._begun and self._requests[call.call_id].status == RequestStatus.RUNNING

    def _arrange(self, plan: StepPlan | None) -> list[Any]:
        """Set holds, order and budget. Returns the waiting requests that may come in, in order."""
        strangers = self._strangers
        if plan is None:
            self._hold_nobody()
            return list(strangers.values()) if strangers else []
        offered, chunks = self._prompts(plan)
        if self.planner.held:
            self._make_places([*strangers.values(), *offered])
        self._hold(plan, chunks)
        if chunks or self._skipped:
            self._put_prompts_last(chunks)
        elif self.kv_cache_manager.block_pool.get_num_free_blocks() < self._most_each * len(self.running):
            self._put_worst_last()
        budget = plan.decodes + plan.prefill_tokens
        if strangers:
            budget += sum(max(1, one.num_tokens - one.num_computed_tokens) for one in strangers.values())
            offered = [*strangers.values(), *offered]
        self.max_num_scheduled_tokens = max(1, min(budget, self._most_tokens))
        return offered

    def _prompts(self, plan: StepPlan) -> tuple[list[Any], list[Any]]:
        """(planned requests that wait, planned requests that are partly computed), each in order.

        The parent serves the second before the first. Who would thereby take what is meant for one ahead of it sits
        the step out.
        """
        offered, chunks = [], []
        evicted = {call.call_id for call in self.planner.evicted} if self.planner.evicted else ()
        for call, tokens in plan.prefills:
            if not call.blocks:
                # It made way after the plan.
                continue
            self._begun[call.call_id] = call
            request = self._requests[call.call_id]
            if request.status != RequestStatus.RUNNING:
                if call.call_id not in evicted:
                    offered.append(request)
            elif not offered or tokens >= call.missing_tokens:
                chunks.append(request)
        return offered, chunks

    def _hold(self, plan: StepPlan, chunks: Sequence[Any]) -> None:
        """Who has a place in `running` and no part in this step is not eligible; everyone else is."""
        planner = self.planner
        if not (planner.held or self._begun or self._skipped or not plan.decodes):
            return
        skipped = [self._requests[call.call_id] for call in planner.held_calls]
        if self._begun:
            taking_part = {request.request_id for request in chunks}
            skipped += [
                request
                for request in (self._requests[call_id] for call_id in self._begun)
                if request.status == RequestStatus.RUNNING and request.request_id not in taking_part
            ]
        if not plan.decodes:
            skipped += [self._requests[call.call_id] for call in planner.decoding]
        self._skip(skipped)

    def _hold_nobody(self) -> None:
        """Without a plan vLLM's own order counts; whoever pauses it waits for all that run, those held included."""
        for call in list(self.planner.held_calls):
            self.planner.went_on(call)
        if self._skipped:
            self._skip([])

    def _skip(self, skipped: list[Any]) -> None:
        """These take no part in the step, nor those before that cannot yet; all others do."""
        kept = {request.request_id for request in skipped}
        for request in self._skipped:
            if request.request_id in kept or request.next_decode_eligible_step != _NEVER:
                continue
            if request.num_output_placeholders > 0:
                # Its token of an earlier step is still on its way: the model runner could not continue from it.
                skipped.append(request)
            else:
                request.next_decode_eligible_step = 0
        for request in skipped:
            request.next_decode_eligible_step = _NEVER
        self._skipped = skipped

    def _put_prompts_last(self, chunks: Sequence[Any]) -> None:
        """Decodes get their token first, then prompts in order; who sits the step out loses its place first."""
        last = {id(request) for request in chunks}
        skipped = {id(request) for request in self._skipped}
        front = [one for one in self.running if id(one) not in last and id(one) not in skipped]
        self.running = [*front, *chunks, *(one for one in self.running if id(one) in skipped)]

    def _put_worst_last(self) -> None:
        """Blocks may run out within the step: the parent then preempts the tail."""
        now_s = self.clock()
        if now_s < self._worst_until_s and self.running[-1] is self._worst:
            return
        self._worst_until_s = now_s + _WORST_STANDS_S
        for call in reversed(self.planner.ordered()):
            request = self._requests[call.call_id]
            if request.status == RequestStatus.RUNNING:
                self.running.remove(request)
                self.running.append(request)
                self._worst = request
                return

    def _follow(self, plan: StepPlan | None, output: Any) -> None:
        """Tell the planner what was computed, which need not be what it planned."""
        scheduled: dict[str, int] = output.num_scheduled_tokens
        planner = self.planner
        if not scheduled:
            self._is_stuck = plan is not None and not any(one.num_in_flight_tokens for one in self.running)
            return
        self._is_stuck = False
        prefills = []
        for call_id, call in self._begun.items() if self._begun else ():
            request = self._requests[call_id]
            tokens = scheduled.get(request.request_id)
            if tokens is not None:
                planner.found(call, request.num_computed_tokens - tokens, request.num_tokens)
                prefills.append((call, tokens))
        decodes = len(scheduled) - len(prefills)
        if self._strangers:
            decodes -= sum(request_id in scheduled for request_id in self._strangers)
        missed: list[LiveCall] = []
        if decodes and decodes != planner.decodes:
            missed = [call for call in planner.decoding if self._requests[call.call_id].request_id not in scheduled]
        for call in planner.stepped(StepPlan(tuple(prefills), decodes, 0), missed):
            del self._begun[call.call_id]

    # ---- what goes out ----

    def _preempt_request(self, request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        """vLLM takes a place by itself: blocks ran out, or its cache is reset."""
        super()._preempt_request(request, timestamp, drop_stale_output)
        request.next_decode_eligible_step = 0
        call = self._calls.get(request.request_id)
        if call is not None:
            self._begun.pop(call.call_id, None)
            self.planner.lost(call)

    def _free_blocks(self, request: Any) -> None:
        """A request ended, in whatever way: nothing of it is kept."""
        super()._free_blocks(request)
        self._strangers.pop(request.request_id, None)
        self._not_ready.pop(request.request_id, None)
        self._loras.leave(request.request_id)
        call = self._calls.pop(request.request_id, None)
        if call is None:
            return
        del self._requests[call.call_id]
        self._begun.pop(call.call_id, None)
        self.planner.remove(call)
        if self._skipped:
            self._skipped = [one for one in self._skipped if one is not request]
        if call.call_id < 0:
            # A router learns lengths itself, and sends what it expects.
            is_complete = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
            self._lengths.observe(call.spec, request.num_output_tokens, is_complete=is_complete)

    def audit(self) -> None:
        """Check that planner and engine speak of the same requests. Raises AssertionError. O(everything)."""
        known = {*self._calls, *self._strangers, *self._not_ready, *self._loras.waiting}
        assert known == set(self.requests), f"{known ^ set(self.requests)} are known on one side only"
        assert len(self.planner) == len(self._calls) == len(self._requests), "calls do not add up"
        assert set(self._begun) <= set(self._requests), "a prompt of nobody is begun"
        self.planner.audit()
        self._loras.audit()
        held = {self._requests[call.call_id].request_id for call in self.planner.held_calls}
        decoding = {self._requests[call.call_id].request_id for call in self.planner.decoding}
        running = {request.request_id for request in self.running}
        assert held | decoding <= running, f"{(held | decoding) - running} decode, and have no place"
