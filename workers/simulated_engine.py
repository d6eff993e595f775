"""An engine without a model: the scheduling of a real one in real time, with step durations from a profile.

For laptops, tests and load tests of everything around an engine. It batches continuously, prefills in chunks, fills
slots in order of priority, accounts KV blocks and preempts by recomputation when they run out, as vLLM's priority
policy does. It runs on the event loop with one timer for the step in progress; a request costs no task.
Not simulated: prefix caching, speculative decoding, more than one model.
"""

import asyncio
import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tempo_router.config import EngineConfig
from tempo_router.errors import EngineStartError, TempoError
from tempo_router.events import ReplicaLoad, StepReport
from tempo_router.simulation.step_profiles import EngineShape, Prefill, StepProfile, load_profile
from workers.call_facts import News
from workers.default_model import EOS_ID
from workers.engine import (
    ClientOutputs,
    EngineCall,
    EngineFacts,
    EngineFinished,
    EngineStep,
    OnDeath,
    OnStep,
    TokenDelta,
)

log = structlog.get_logger()

_VERSION = "1"
_MEAN_OUTPUT_TOKENS = 150  # as tempo-tiny answers
_LATE_S = 0.02  # timers fire up to a few ms late; up to this much is made good in the next steps
_TEXT_SEED = 7
# What administrative calls answer; there is no cache to reset and nothing to put to sleep.
_UTILITIES: Mapping[str, Any] = {
    "reset_prefix_cache": True,
    "reset_mm_cache": None,
    "reset_encoder_cache": None,
    "is_sleeping": False,
    "list_loras": [],
}


class _Sampling(msgspec.Struct):
    """What counts of vLLM's sampling parameters in the length of an answer."""

    ignore_eos: bool = False
    min_tokens: int = 0


class _Request(msgspec.Struct, array_like=True):
    """The beginning of vLLM's EngineCoreRequest; what follows is not looked at."""

    request_id: str
    prompt_token_ids: msgspec.Raw
    mm_features: msgspec.Raw
    sampling_params: _Sampling | None


@dataclass(slots=True)
class _Sequence:
    """A request in the engine. Order of running and of preemption: (priority, ticket)."""

    request_id: str
    client: str
    priority: int
    ticket: int
    prompt_tokens: int
    answer_tokens: int
    stops: bool  # ends by itself at answer_tokens; otherwise it is cut there
    text_at: int
    to_compute: int  # prompt tokens, and after a preemption the answer's too, that must be in the cache to go on
    computed: int = 0
    produced: int = 0
    blocks: int = 0
    is_live: bool = True

    @property
    def is_prefilling(self) -> bool:
        return self.computed < self.to_compute

    @property
    def rank(self) -> tuple[int, int]:
        return (self.priority, self.ticket)


@dataclass(frozen=True, slots=True)
class _Step:
    """What the step in progress computes."""

    began_s: float
    prefills: tuple[tuple[_Sequence, int], ...]
    decodes: tuple[_Sequence, ...]
    context_tokens: int
    attention_tokens: float


class SimulatedEngine:
    """The `Engine` protocol over a `StepProfile`. Must be built on the event loop that it will run on.

    time_scale: step times are multiplied by it. seed: answers and their lengths follow from it and the request's id.
    """

    def __init__(
        self,
        profile: StepProfile,
        *,
        shape: EngineShape | None = None,
        time_scale: float = 1.0,
        seed: int = 0,
        on_step: OnStep,
        on_death: OnDeath,
    ) -> None:
        self._profile = profile
        self._shape = shape or profile.shape
        _check_shape(self._shape)
        self._time_scale = time_scale
        self._seed = seed
        self._on_step = on_step
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._text = _made_up_text(random.Random(_TEXT_SEED))
        self._tickets = itertools.count()
        self._live: dict[str, _Sequence] = {}
        self._waiting: list[tuple[int, int, _Sequence]] = []
        self._running: list[_Sequence] = []
        self._blocks = self._shape.kv_tokens // self._shape.block_size
        self._free_blocks = self._blocks
        self._preemptions = 0
        self._preempted: list[str] = []
        self._step: _Step | None = None
        self._timer: asyncio.Handle | None = None
        self._ready_s = 0.0
        self._last_end_s = 0.0
        self._news: list[tuple[EngineFinished, tuple[str, TokenDelta] | None]] = []
        self._news_handle: asyncio.Handle | None = None
        self._is_stopped = False
        self._facts = EngineFacts(
            engine="simulated",
            engine_version=_VERSION,
            model=profile.name,
            max_model_len=self._shape.max_model_len,
            kv_blocks=self._blocks,
            block_size=self._shape.block_size,
            kv_tokens=self._blocks * self._shape.block_size,
            max_running=self._shape.max_running,
            max_step_tokens=self._shape.max_step_tokens,
            supported_tasks=("generate",),
        )

    # ---- the protocol ----

    @property
    def facts(self) -> EngineFacts:
        """Fixed from the start."""
        return self._facts

    def submit(self, call: EngineCall) -> None:
        """Queue a request. Its answer's length is drawn now; `ignore_eos` and `min_tokens` of the payload count."""
        if self._is_stopped:
            raise TempoError("the engine has stopped")
        live = self._live.get(call.request_id)
        if live is not None:
            self._refuse(call, "it is already live", tell_client=live.client != call.client)
            return
        try:
            sequence = self._admit(call)
        except (msgspec.DecodeError, ValueError) as e:
            self._refuse(call, str(e), tell_client=True)
            return
        self._live[call.request_id] = sequence
        heapq.heappush(self._waiting, (*sequence.rank, sequence))
        self._wake()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these. Their clients get no output: whoever aborts knows."""
        for request_id in request_ids:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self._retire(sequence)
                self._tell(EngineFinished(request_id, "cancelled"))

    def tell(self, news: News) -> None:
        """Orders by priority alone, so nobody tells it anything."""

    async def call_utility(self, call: bytes) -> tuple[bytes, ...]:
        """Answer an administrative call in vLLM's codec (its UtilityOutput), for the few that mean something here."""
        if self._is_stopped:
            raise TempoError("the engine has stopped")
        try:
            method, _ = msgspec.msgpack.decode(call, type=tuple[str, list[Any]])
        except msgspec.DecodeError as e:
            raise TempoError(f"the call cannot be read: {e}") from e
        if method not in _UTILITIES:
            raise TempoError(f"the simulated engine has no {method!r}; it has: {', '.join(_UTILITIES)}")
        return (msgspec.msgpack.encode([0, None, [None, _UTILITIES[method]]]),)

    def live_requests(self) -> tuple[str, ...]:
        """Submitted and not finished."""
        return tuple(self._live)

    async def shutdown(self) -> None:
        """Stop; running requests are reported as cancelled."""
        if self._is_stopped:
            return
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._step = None
        self.abort(list(self._live))
        self._flush_news()

    # ---- admission ----

    def _admit(self, call: EngineCall) -> _Sequence:
        sampling = _Sampling()
        if call.payload:
            request = msgspec.msgpack.decode(call.payload[0], type=_Request)
            if request.request_id != call.request_id:
                raise ValueError(f"the payload belongs to {request.request_id!r}")
            sampling = request.sampling_params or sampling
        room = self._shape.max_model_len - call.prompt_tokens
        if call.prompt_tokens < 1 or room < 1:
            raise ValueError(
                f"{call.prompt_tokens} prompt tokens; this engine takes 1 to {self._shape.max_model_len - 1}"
            )
        limit = max(1, min(call.max_output_tokens, room))
        rng = random.Random(f"{self._seed}:{call.request_id}")
        own = limit + 1 if sampling.ignore_eos else max(sampling.min_tokens, _answer_length(rng))
        return _Sequence(
            request_id=call.request_id,
            client=call.client,
            priority=call.priority,
            ticket=next(self._tickets),
            prompt_tokens=call.prompt_tokens,
            answer_tokens=min(own, limit),
            stops=own < limit,
            text_at=rng.randrange(len(self._text)),
            to_compute=call.prompt_tokens,
        )

    def _refuse(self, call: EngineCall, problem: str, *, tell_client: bool) -> None:
        log.warning("engine_request_refused", request_id=call.request_id, problem=problem)
        delta = (call.client, TokenDelta(call.request_id, (), finish_reason="error")) if tell_client else None
        self._tell(EngineFinished(call.request_id, "error"), delta)

    def _tell(self, finished: EngineFinished, delta: tuple[str, TokenDelta] | None = None) -> None:
        """Report outside of a step, once for all that happens before the loop comes round."""
        self._news.append((finished, delta))
        if self._news_handle is None:
            self._news_handle = self._loop.call_soon(self._flush_news)

    def _flush_news(self) -> None:
        self._news_handle = None
        news, self._news = self._news, []
        if not news:
            return
        deltas: defaultdict[str, list[TokenDelta]] = defaultdict(list)
        for _, told in news:
            if told is not None:
                deltas[told[0]].append(told[1])
        finished = tuple(ended for ended, _ in news)
        self._on_step(EngineStep(load=self._load(), finished=finished, outputs=_grouped(deltas)))

    # ---- steps ----

    def _wake(self) -> None:
        """Begin a step when the loop comes round, so that what is submitted together runs together."""
        if self._step is None and self._timer is None and not self._is_stopped:
            self._ready_s = self._loop.time()
            self._timer = self._loop.call_soon(self._guarded, self._begin_step)

    def _guarded(self, action: Callable[[], None]) -> None:
        """A mistake in here ends the engine aloud, as in any other engine."""
        try:
            action()
        except Exception as e:
            log.exception("engine_failed")
            self._is_stopped = True
            self._on_death(f"{type(e).__name__}: {e}")

    def _begin_step(self) -> None:
        self._timer = None
        prefills, decodes = self._plan()
        if not prefills and not decodes:
            self._step = None
            return
        context_tokens = sum(sequence.computed + 1 for sequence in decodes)
        shapes = [Prefill(chunk, sequence.computed) for sequence, chunk in prefills]
        duration_s = self._time_scale * self._profile.step_time.duration_s(shapes, len(decodes), context_tokens)
        # Timers are late by a millisecond or so; counting from when the step could have begun keeps the rate right.
        began_s = max(self._ready_s, self._loop.time() - _LATE_S)
        self._ready_s = began_s + duration_s
        attention_tokens = sum(shape.chunk * (shape.past + shape.chunk / 2) for shape in shapes)
        self._step = _Step(began_s, tuple(prefills), tuple(decodes), context_tokens, attention_tokens)
        self._timer = self._loop.call_at(self._ready_s, self._guarded, self._end_step)

    def _plan(self) -> tuple[list[tuple[_Sequence, int]], list[_Sequence]]:
        """Choose what the next step computes: first what runs, then who waits, in order of rank.

        Nobody is let in by a step that had to preempt: the victim would come straight back.
        """
        preemptions = self._preemptions
        budget = self._shape.max_step_tokens
        prefills: list[tuple[_Sequence, int]] = []
        decodes: list[_Sequence] = []
        for sequence in list(self._running):
            if budget == 0:
                break
            if sequence.blocks == 0:
                continue  # preempted by one before it
            chunk = min(budget, max(1, sequence.to_compute - sequence.computed))
            if not self._hold(sequence, chunk):
                continue
            budget -= chunk
            if sequence.is_prefilling:
                prefills.append((sequence, chunk))
            else:
                decodes.append(sequence)
        may_admit = self._preemptions == preemptions
        while may_admit and budget and self._waiting and len(self._running) < self._shape.max_running:
            sequence = self._waiting[0][2]
            chunk = min(budget, sequence.to_compute)
            if sequence.is_live:
                if self._blocks_for(chunk) > self._free_blocks:
                    break
                self._reserve(sequence, chunk)
                self._running.append(sequence)
                prefills.append((sequence, chunk))
                budget -= chunk
            heapq.heappop(self._waiting)
        # Who was preempted after its turn is not computed.
        return [item for item in prefills if item[0].blocks], [item for item in decodes if item.blocks]

    def _hold(self, sequence: _Sequence, tokens: int) -> bool:
        """Get room in the cache for more tokens, at the cost of the last in rank. False: it was itself the last."""
        while self._blocks_for(sequence.computed + tokens) - sequence.blocks > self._free_blocks:
            victim = max(self._running, key=lambda running: running.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        self._reserve(sequence, sequence.computed + tokens)
        return True

    def _blocks_for(self, tokens: int) -> int:
        return math.ceil(tokens / self._shape.block_size)

    def _reserve(self, sequence: _Sequence, tokens: int) -> None:
        more = self._blocks_for(tokens) - sequence.blocks
        sequence.blocks += more
        self._free_blocks -= more

    def _release(self, sequence: _Sequence) -> None:
        self._free_blocks += sequence.blocks
        sequence.blocks = 0

    def _preempt(self, victim: _Sequence) -> None:
        """Back to the queue; all that it had is computed again."""
        self._preemptions += 1
        self._preempted.append(victim.request_id)
        self._running.remove(victim)
        self._release(victim)
        victim.to_compute = victim.prompt_tokens + victim.produced
        victim.computed = 0
        heapq.heappush(self._waiting, (*victim.rank, victim))

    def _retire(self, sequence: _Sequence) -> None:
        """Forget a request wherever it is. Its entry in the waiting heap is skipped later."""
        sequence.is_live = False
        del self._live[sequence.request_id]
        if sequence.blocks:
            self._running.remove(sequence)
            self._release(sequence)

    def _end_step(self) -> None:
        step, self._step = self._step, None
        assert step is not None, "a step ends once"
        self._timer = None
        for sequence, chunk in step.prefills:
            sequence.computed += chunk
        for sequence in step.decodes:
            sequence.computed += 1
        answering = [sequence for sequence, _ in step.prefills if not sequence.is_prefilling]
        tokens, finished, outputs = self._produce(itertools.chain(step.decodes, answering))
        # Measured as one would measure a real engine: from the end of the step before, if that came late.
        now_s = self._loop.time()
        began_s, self._last_end_s = max(step.began_s, self._last_end_s), now_s
        report = StepReport(
            duration_s=now_s - began_s,
            prefill_tokens=sum(chunk for _, chunk in step.prefills),
            decodes=len(step.decodes),
            context_tokens=step.context_tokens,
            attention_tokens=step.attention_tokens,
        )
        # Planned before anyone hears of this step, as in an engine that does not wait for its listeners.
        self._begin_step()
        preempted, self._preempted = tuple(self._preempted), []
        self._on_step(EngineStep(self._load(), report, tokens, finished, outputs, preempted))

    def _produce(
        self, answering: Iterable[_Sequence]
    ) -> tuple[tuple[tuple[str, int], ...], tuple[EngineFinished, ...], dict[str, ClientOutputs]]:
        """One token for each of these."""
        tokens = []
        finished = []
        deltas: defaultdict[str, list[TokenDelta]] = defaultdict(list)
        for sequence in answering:
            if not sequence.is_live:
                continue
            token_id = self._text[(sequence.text_at + sequence.produced) % len(self._text)]
            sequence.produced += 1
            reason = None
            if sequence.produced == sequence.answer_tokens:
                reason = "stop" if sequence.stops else "length"
                if sequence.stops:
                    token_id = EOS_ID
                self._retire(sequence)
                finished.append(EngineFinished(sequence.request_id, "completed"))
            tokens.append((sequence.request_id, 1))
            deltas[sequence.client].append(TokenDelta(sequence.request_id, (token_id,), reason))
        return tuple(tokens), tuple(finished), _grouped(deltas)

    def _load(self) -> ReplicaLoad:
        return ReplicaLoad(
            running=len(self._running),
            waiting=len(self._live) - len(self._running),
            free_kv_tokens=self._free_blocks * self._shape.block_size,
            preemptions=self._preemptions,
        )


async def start_simulated_engine(config: EngineConfig, *, on_step: OnStep, on_death: OnDeath) -> SimulatedEngine:
    """Start the engine that a configuration describes.

    Of `engine_kwargs` it reads what shapes an engine, by vLLM's names: max_num_seqs, max_num_batched_tokens,
    max_model_len, block_size, num_gpu_blocks_override. Raises ConfigError (unknown profile) or EngineStartError.
    """
    profile = load_profile(config.profile, Path(config.profile_path) if config.profile_path else None)
    return SimulatedEngine(
        profile,
        shape=_shape(profile.shape, config.engine_kwargs),
        time_scale=config.time_scale,
        seed=config.seed,
        on_step=on_step,
        on_death=on_death,
    )


def _shape(shape: EngineShape, engine_kwargs: Mapping[str, Any]) -> EngineShape:
    block_size = int(engine_kwargs.get("block_size") or shape.block_size)
    blocks = int(engine_kwargs.get("num_gpu_blocks_override") or shape.kv_tokens // block_size)
    return EngineShape(
        kv_tokens=blocks * block_size,
        block_size=block_size,
        max_running=int(engine_kwargs.get("max_num_seqs") or shape.max_running),
        max_step_tokens=int(engine_kwargs.get("max_num_batched_tokens") or shape.max_step_tokens),
        max_model_len=int(engine_kwargs.get("max_model_len") or shape.max_model_len),
    )


def _check_shape(shape: EngineShape) -> None:
    if min(shape.kv_tokens, shape.block_size, shape.max_running, shape.max_step_tokens, shape.max_model_len) < 1:
        raise EngineStartError(f"the simulated engine cannot start: every part of its shape must be positive: {shape}")
    if shape.max_model_len > shape.kv_tokens // shape.block_size * shape.block_size:
        raise EngineStartError(
            f"the simulated engine cannot start: a sequence of max_model_len={shape.max_model_len} does not fit into "
            f"{shape.kv_tokens} tokens of KV cache; reduce max_model_len"
        )


def _grouped(deltas: Mapping[str, list[TokenDelta]]) -> dict[str, ClientOutputs]:
    return {client: ClientOutputs(deltas=tuple(group)) for client, group in deltas.items()}


def _answer_length(rng: random.Random) -> int:
    """Tokens until the answer ends by itself: geometric, as when each token may be the last."""
    return 1 + int(math.log(1.0 - rng.random()) / math.log(1.0 - 1.0 / _MEAN_OUTPUT_TOKENS))


def _made_up_text(rng: random.Random) -> tuple[int, ...]:
    """Tokens of a text of made-up words; every token of tempo-tiny below 256 is that byte."""
    words = [
        "".join(rng.choice("bdfklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(700)
    ]
    return tuple(" ".join(words).encode() + b" ")
