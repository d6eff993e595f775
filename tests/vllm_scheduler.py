"""vLLM's real scheduler without a model: tokens are made up and time is the test's. Imports vLLM: tests marked `vllm`.

Token i of a request is a fixed function of its number and i, so an answer tells whether a token was lost, came twice or
out of order, whatever the scheduler did in between.
"""

import copy
import functools
import inspect
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config.lora import LoRAConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tempo_router.events import StepReport
from workers import tempo_scheduler
from workers.call_facts import CallFacts, values_from_facts
from workers.tempo_scheduler import TempoScheduler

BLOCK_SIZE = 16
EOS = 257


@functools.cache
def base_config(model: Path) -> Any:
    """A configuration of the default model, made once: it takes seconds."""
    return EngineArgs(
        model=str(model),
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=4096,
        block_size=BLOCK_SIZE,
        enforce_eager=True,
    ).create_engine_config()


@dataclass(frozen=True, slots=True)
class Shape:
    """slots: sequences of one step. places: in the batch, held ones included. max_loras: 0 for an engine without.

    window: of a second kind of layers, with a sliding window; 0 for a model without. watermark: share of the blocks
    that prompts leave free while anything runs.
    """

    slots: int = 8
    places: int = 12
    max_step_tokens: int = 256
    blocks: int = 200
    prefix_cache: bool = True
    is_async: bool = False
    max_loras: int = 0
    window: int = 0
    watermark: float = 0.0


def make_scheduler(model: Path, shape: Shape, kind: str = "tempo", scheduling: dict[str, Any] | None = None) -> Any:
    """kind: tempo, or stock (vLLM's own, first come first served)."""
    config = copy.copy(base_config(model))
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = shape.places if kind == "tempo" else shape.slots
    config.scheduler_config.max_num_batched_tokens = shape.max_step_tokens
    config.scheduler_config.async_scheduling = shape.is_async
    config.scheduler_config.watermark = shape.watermark
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.num_gpu_blocks = shape.blocks
    config.cache_config.enable_prefix_caching = shape.prefix_cache
    config.lora_config = LoRAConfig(max_loras=shape.max_loras) if shape.max_loras else None
    config.additional_config = {
        tempo_scheduler.KEY: {"slots": shape.slots, "scheduling": {"policy": "tempo", **(scheduling or {})}}
    }
    kv_cache = KVCacheConfig(num_blocks=shape.blocks, kv_cache_tensors=[], kv_cache_groups=_layers(shape))
    owner = TempoScheduler if kind == "tempo" else AsyncScheduler if shape.is_async else Scheduler
    return owner(
        vllm_config=config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=False,
    )


def _layers(shape: Shape) -> list[KVCacheGroupSpec]:
    sizes = {"block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    layers = [KVCacheGroupSpec(["full"], FullAttentionSpec(**sizes))]
    if shape.window:
        layers.append(KVCacheGroupSpec(["sliding"], SlidingWindowSpec(**sizes, sliding_window=shape.window)))
    return layers


class AnyToken:
    """A grammar that is compiled, and has nothing against any token."""

    def accept_tokens(self, _request_id: str, _tokens: list[int]) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False


def compile_grammar(request: Any) -> None:
    """As if the thread that compiles it were done."""
    request.structured_output_request.grammar = AnyToken()


def token_of(number: int, index: int) -> int:
    """Token `index` of the answer of request `number`: any byte, never the end."""
    return (number * 31 + index * 7) % 256


@dataclass
class Drive:
    """Steps a scheduler. now_s advances with each step by what `step_s` says of its tokens."""

    scheduler: Any
    is_async: bool = False
    now_s: float = 100.0
    fixed_s: float = 0.004
    token_s: float = 2e-5
    answers: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    scheduled: list[dict[str, int]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    first_token_s: dict[str, float] = field(default_factory=dict)
    token_times_s: dict[str, list[float]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)
    _in_flight: deque[Any] = field(default_factory=deque)
    _hasher: Any = None

    def __post_init__(self) -> None:
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        if self.scheduler.cache_config.enable_prefix_caching:
            self._hasher = get_request_block_hasher(BLOCK_SIZE, hash_fn)
        if isinstance(self.scheduler, TempoScheduler):
            self.scheduler.clock = lambda: self.now_s

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        facts: CallFacts | None = None,
        *,
        says: Any = None,
        adapter: int = 0,
        **sampling: Any,
    ) -> Any:
        """says: in place of facts, as a client wrote it. adapter: number of a LoRA adapter that nobody loads, or 0."""
        if facts is not None:
            says = values_from_facts(facts, self.now_s)
        extra = {tempo_scheduler.KEY: says} if says is not None else None
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra, **sampling)
        params.update_from_generation_config({}, EOS)
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            lora_request=LoRARequest(f"adapter-{adapter}", adapter, "/nowhere") if adapter else None,
            block_hasher=self._hasher,
        )
        self._numbers[request_id] = len(self._numbers)
        self.answers[request_id] = []
        self.token_times_s[request_id] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, *request_ids: str) -> None:
        for request in self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED):
            self.ended[request.request_id] = "abort"

    def step(self) -> dict[str, int]:
        """One call of `schedule`, and the results of this step, or asynchronously of the one before."""
        output = self.scheduler.schedule()
        produced = {}
        for request_id in output.num_scheduled_tokens:
            request = self.scheduler.requests[request_id]
            if not request.is_prefill_chunk:
                index = request.num_output_tokens + max(request.num_output_placeholders, 1) - 1
                produced[request_id] = token_of(self._numbers[request_id], index)
        self._in_flight.append((output, produced))
        self.scheduled.append(dict(output.num_scheduled_tokens))
        self.preempted += sorted(output.preempted_req_ids or ())
        tokens = output.total_num_scheduled_tokens
        self.now_s += self.fixed_s + self.token_s * tokens if tokens else 1e-4
        while len(self._in_flight) > (1 if self.is_async and tokens else 0):
            self._finish(*self._in_flight.popleft())
        return output.num_scheduled_tokens

    def _finish(self, output: Any, produced: dict[str, int]) -> None:
        names = list(output.num_scheduled_tokens)
        fields = {
            "req_ids": names,
            "req_id_to_index": {name: index for index, name in enumerate(names)},
            "sampled_token_ids": [[produced[name]] if name in produced else [] for name in names],
            "logprobs": None,
            "prompt_logprobs_dict": {},
            "pooler_output": [],
        }
        known = inspect.signature(ModelRunnerOutput).parameters
        result = ModelRunnerOutput(**{name: value for name, value in fields.items() if name in known})
        for group in self.scheduler.update_from_output(output, result).values():
            for one in group.outputs:
                self.answers[one.request_id].extend(one.new_token_ids)
                self.token_times_s[one.request_id].extend([self.now_s] * len(one.new_token_ids))
                self.first_token_s.setdefault(one.request_id, self.now_s)
                if one.finish_reason is not None:
                    self.ended[one.request_id] = str(one.finish_reason)

    def observe(self, duration_s: float, decodes: int) -> None:
        """Tell the planner of a step that took so long."""
        self.scheduler.observe(StepReport(duration_s, 0, decodes, 100 * decodes))

    def go_on(self, rng: random.Random, submitted: Iterable[str]) -> list[str]:
        """Some audited steps; then, now and then, some clients leave. Returns those of `submitted` that lived."""
        for _ in range(rng.choice((0, 1, 4, 9))):
            self.step()
            self.scheduler.audit()
        live = [name for name in submitted if name not in self.ended]
        if live and rng.random() < 0.15:
            self.abort(*rng.sample(live, min(len(live), rng.choice((1, 3)))))
        return live

    def drain(self, limit: int = 20_000) -> int:
        """Step until nothing is left. Returns the number of steps; fails when that takes more than `limit`."""
        for count in range(limit):
            if not (self.scheduler.has_requests() or self._in_flight):
                return count
            self.step()
            if isinstance(self.scheduler, TempoScheduler):
                self.scheduler.audit()
        raise AssertionError(f"{self.scheduler.get_request_counts()} (running, waiting) after {limit} steps")

    def expected(self, request_id: str, tokens: int) -> list[int]:
        return [token_of(self._numbers[request_id], index) for index in range(tokens)]

    def check_nothing_is_left(self) -> None:
        """No request, no record, no block but the null block."""
        scheduler = self.scheduler
        assert not scheduler.requests
        assert scheduler.get_request_counts() == (0, 0)
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        if isinstance(scheduler, TempoScheduler):
            assert len(scheduler.planner) == 0
            scheduler.audit()
            kept = ("_calls", "_requests", "_begun", "_skipped", "_strangers", "_not_ready")
            left = {name: getattr(scheduler, name) for name in kept if getattr(scheduler, name)}
            assert left == {}
            assert scheduler._kv.held == 0
            assert scheduler._loras.waiting == []
            assert not scheduler._loras._calls
