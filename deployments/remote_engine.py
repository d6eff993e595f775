"""vLLM's engine client, with the engines behind Tempo's router.

vLLM's `AsyncLLM` renders prompts, detokenises, counts and stops as it always does; it believes that this client is its
engine. A request leaves as vLLM's `EngineCoreRequest` in vLLM's own encoding and comes back as `EngineCoreOutputs`.
Beside this file only `vllm_frontend.py` touches vLLM on the ingress side; the start-up check there covers both.

A worker that dies takes nothing from the client: the request is sent again with the tokens that it already produced
as part of the prompt, so the stream only pauses. Where that would change the answer, the request fails, and says why.
"""

import asyncio
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason, UtilityOutput
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster import wire_pb2 as wire
from cluster.ingress_link import IngressLink
from cluster.ingress_link import Verdict as LinkVerdict
from deployments.own_metrics import RequestMetrics
from deployments.prefix_growth import SharedPrefixes
from deployments.request_context import (
    PROGRAM_CANCELLED,
    SLO_EXPIRED,
    AdmissionRejected,
    AdmissionVerdict,
    RequestContext,
    RequestFailure,
    current_request,
)
from tempo_router.errors import RouterUnavailableError, TempoError
from tempo_router.metrics import DeliveryTracker, refused_outcome
from tempo_router.request import GroupId, ProgramCall, RequestId, RequestSpec, Slo

log = structlog.get_logger()

FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "error": FinishReason.ERROR}

MAX_FRUITLESS_ATTEMPTS = 5
"""A request that ends every engine it comes to must not go round for ever. Guessed."""


@dataclass(slots=True)
class OpenCall:
    """One engine request and what of its answer the ingress has seen.

    fruitless_attempts: how many in a row were lost without a token. is_relegated: it was told so last.
    """

    request: EngineCoreRequest
    spec: RequestSpec
    tracker: DeliveryTracker
    context: RequestContext | None
    tokens: list[int] = field(default_factory=list)
    fruitless_attempts: int = 0
    is_relegated: bool = False


@dataclass(slots=True)
class _Resources:
    """What AsyncLLM reads of its client's resources. Never set: it would shut the whole ingress down."""

    engine_dead: bool = False


class RemoteEngine(AsyncMPClient):
    """The engine client of one ingress; also the listener of its IngressLink.

    The base class lends its administrative methods, which all end in `call_utility_async` or
    `call_utility_all_async`; its constructor, which starts an engine, is not run.
    default_slo: for requests that come in without an HTTP request around them.
    """

    def __init__(
        self, *, model_name: str, max_model_len: int, default_slo: Slo, metrics: RequestMetrics | None = None
    ) -> None:
        self.resources = _Resources()
        self.engine_ranks_managed = [0]
        self.link: IngressLink | None = None
        self._model_name = model_name
        self._max_model_len = max_model_len
        self._default_slo = default_slo
        self._metrics = metrics if metrics is not None else RequestMetrics()
        self._supported_tasks: tuple[str, ...] = ()
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._calls: dict[RequestId, OpenCall] = {}
        self._group_sizes: dict[str, int] = {}
        self._left: set[str] = set()
        self._prefixes = SharedPrefixes()
        self._caches_prefixes = False
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._utility_decoder = MsgpackDecoder(UtilityOutput)

    def attach(self, link: IngressLink, facts: wire.EngineFacts) -> None:
        """Give the client its streams and the limits of the first worker; must come before the first request."""
        self.link = link
        self._max_model_len = min(self._max_model_len, facts.max_model_len)
        self._supported_tasks = tuple(facts.supported_tasks)
        # The simulated engine has no such cache, and estimates that count on one would be wrong.
        self._caches_prefixes = facts.engine == "vllm"

    @property
    def open_calls(self) -> int:
        """Engine requests that have not ended."""
        return len(self._calls)

    @property
    def _live_link(self) -> IngressLink:
        if self.link is None:
            raise TempoError("the engine client has no streams yet; call attach(link) first")
        return self.link

    # ---- called by AsyncLLM ----

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """What the first worker's engine said of itself."""
        return self._supported_tasks

    async def get_output_async(self) -> EngineCoreOutputs:
        """Wait for the outputs of the next engine step of any worker."""
        return await self._outputs.get()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to the router. Raises AdmissionRejected, also when no router answers."""
        context = current_request()
        spec = self._spec(request, context)
        if context is not None:
            context.report_prompt(spec.prompt_tokens)
        call = OpenCall(request, spec, DeliveryTracker(spec.slo, spec.arrival_s), context)
        self._calls[spec.request_id] = call
        try:
            verdict = await self._live_link.submit(spec, self._encode(request))
        except RouterUnavailableError:
            verdict = LinkVerdict(is_admitted=False, reject_reason="router_unavailable")
        except BaseException:
            self._forget_refused(spec)
            raise
        answer = AdmissionVerdict(
            verdict.is_admitted,
            verdict.expected_wait_s,
            verdict.success_probability,
            verdict.reject_reason,
            verdict.retry_after_s,
        )
        if context is not None:
            context.report_verdict(answer)
        if not answer.is_admitted:
            outcome = refused_outcome(spec.slo)
            self._live_link.report_outcome(spec.request_id, outcome)
            self._metrics.refused(spec.slo, str(answer.reject_reason))
            self._metrics.ended(outcome, completed=False)
            self._forget_refused(spec)
            raise AdmissionRejected(answer)

    def _forget_refused(self, spec: RequestSpec) -> None:
        """Its siblings that have not come yet will not come."""
        self._calls.pop(spec.request_id, None)
        self._group_sizes.pop(spec.group_id, None)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """vLLM aborts for two reasons: the client left, or the answer ended here (a stop string)."""
        for request_id in request_ids:
            has_left = request_id in self._left
            self._left.discard(request_id)
            call = self._calls.pop(RequestId(request_id), None)
            if call is not None:
                self._live_link.cancel(call.spec.request_id, is_complete=not has_left)
                self._report_outcome(call, completed=not has_left)

    def note_client_abort(self, request_ids: Sequence[str]) -> None:
        """The next abort of these is a client that left, not an answer that ended."""
        self._left.update(request_id for request_id in request_ids if request_id in self._calls)

    def note_group(self, parent_id: str, size: int) -> None:
        """A request with `n` > 1 is about to arrive as `size` siblings."""
        self._group_sizes[parent_id] = size

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to stop here: the link belongs to the ingress."""

    def get_kv_event_sources(self) -> dict[int, Any]:
        """None: which worker caches what is the router's business."""
        return {}

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        """Run an administrative method on every worker. Raises TempoError naming the worker that failed."""
        buffers = self._encoder.encode((method, args))
        if len(buffers) != 1:
            raise TempoError(f"{method}: arguments with tensors cannot be sent to workers")
        answers = await self._live_link.call_utility(bytes(buffers[0]))
        return [self._utility_result(method, answer) for answer in answers]

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Run it on every worker, all the same; the first answer stands for all."""
        return (await self.call_utility_all_async(method, *args))[0]

    def _utility_result(self, method: str, answer: Sequence[bytes]) -> Any:
        output: UtilityOutput = self._utility_decoder.decode(list(answer))
        if output.failure_message is not None:
            raise TempoError(f"{method}: {output.failure_message}")
        return output.result.result if output.result is not None else None

    # ---- requests ----

    def _spec(self, request: EngineCoreRequest, context: RequestContext | None) -> RequestSpec:
        group_id, group_size = self._group(request.request_id)
        prompt_tokens = _prompt_length(request)
        ticket = context.program if context else None
        tenant = context.tenant if context else ""
        prefix_id, prefix_tokens = "", 0
        if self._caches_prefixes:
            prefix_id, prefix_tokens = self._prefixes.note(
                _cache_owner(request, tenant), request.prompt_token_ids or ()
            )
        return RequestSpec(
            request_id=RequestId(request.request_id),
            arrival_s=context.arrival_s if context else time.monotonic(),
            slo=context.slo if context else self._default_slo,
            prompt_tokens=prompt_tokens,
            max_output_tokens=_output_bound(request, self._max_model_len - prompt_tokens),
            group_id=group_id,
            group_size=group_size,
            model=self._model_name,
            app=context.app if context else "",
            tenant=tenant,
            tier=context.tier if context else "",
            stage=ticket.stage if ticket else 0,
            prefix_id=prefix_id,
            prefix_tokens=prefix_tokens,
            program_id=ticket.program_id if ticket else "",
            call_id=ticket.call_id if ticket else "",
        )

    def _group(self, request_id: str) -> tuple[GroupId, int]:
        """vLLM names the siblings of request X 0_X, 1_X, ..., and asks for admission of X before."""
        index, _, parent_id = request_id.partition("_")
        size = self._group_sizes.get(parent_id, 0) if index.isdigit() else 0
        if not size:
            return GroupId(request_id), 1
        if int(index) == size - 1:
            del self._group_sizes[parent_id]
        return GroupId(parent_id), size

    def _encode(self, request: EngineCoreRequest) -> list[bytes]:
        return [bytes(buffer) for buffer in self._encoder.encode(request)]

    # ---- called by the link ----

    def frame_received(self, worker_id: str, frame: wire.WorkerToIngress) -> None:
        """Pass on what counts of one engine step's outputs."""
        if frame.deltas:
            outputs = EngineCoreOutputs(outputs=[_output_of_delta(delta) for delta in frame.deltas])
        else:
            outputs = self._decoder.decode(list(frame.engine_outputs.buffers))
        now_s = time.monotonic()
        kept = [output for output in outputs.outputs if self._take(worker_id, output, now_s)]
        if kept or outputs.scheduler_stats:
            outputs.outputs = kept
            outputs.engine_index = 0
            self._outputs.put_nowait(outputs)

    def _take(self, worker_id: str, output: EngineCoreOutput, now_s: float) -> bool:
        """Count one output towards its request. False: it belongs to no open attempt, or ended in a way we mend."""
        request_id = self._live_link.claim(worker_id, output.request_id)
        call = self._calls.get(request_id) if request_id is not None else None
        if request_id is None or call is None:
            return False
        if output.finish_reason == FinishReason.ABORT:
            # Nobody here asked for it: the worker is stopping. The request goes on elsewhere.
            self.attempt_lost(request_id)
            return False
        output.request_id = request_id
        call.tokens.extend(output.new_token_ids)
        call.tracker.delivered(now_s, len(output.new_token_ids))
        if output.finish_reason is not None:
            self._end(call, completed=output.finish_reason != FinishReason.ERROR)
        return True

    def attempt_lost(self, request_id: RequestId) -> None:
        """Continue the request on another worker, or fail it with the reason."""
        call = self._calls.get(request_id)
        if call is None:
            return
        is_fruitless = len(call.tokens) == call.spec.generated_tokens
        call.fruitless_attempts = call.fruitless_attempts + 1 if is_fruitless else 0
        obstacle = why_not_resumable(call.request, len(call.tokens))
        if call.fruitless_attempts >= MAX_FRUITLESS_ATTEMPTS:
            obstacle = f"{call.fruitless_attempts} attempts in a row were lost without a token"
        if obstacle is not None:
            message = f"the worker was lost and the answer cannot be continued elsewhere: {obstacle}; please try again"
            self._fail(call, RequestFailure("worker_lost", message, 503))
            return
        attempt = call.spec.attempt + 1
        call.spec = replace(call.spec, attempt=attempt, generated_tokens=len(call.tokens))
        log.info("request_resumed", request_id=request_id, attempt=attempt, generated_tokens=len(call.tokens))
        self._live_link.resubmit(call.spec, self._encode(continuation(call.request, call.spec.attempt_id, call.tokens)))

    def relegated(self, request_id: RequestId) -> None:
        """The SLO is out of reach; the request goes on as best effort."""
        call = self._calls.get(request_id)
        if call is None:
            return
        if not call.is_relegated:
            call.is_relegated = True
            self._metrics.relegated(call.spec.slo)
        if call.context is not None:
            call.context.report_relegated()

    def redated(self, request_id: RequestId, slo: ProgramCall) -> None:
        """The deadline of its program moved: it is judged by this target, and has a chance again if it had none."""
        call = self._calls.get(request_id)
        if call is not None:
            call.spec = replace(call.spec, slo=slo)
            call.is_relegated = False
            call.tracker.redated(slo)
            if call.context is not None:
                call.context.report_redated(slo)

    def expired(self, request_id: RequestId) -> None:
        """The router dropped a request that could no longer meet its SLO."""
        call = self._calls.get(request_id)
        if call is not None:
            self._metrics.refused(call.spec.slo, "expired")
            self._fail(call, SLO_EXPIRED)

    def program_cancelled(self, request_id: RequestId) -> None:
        """Its program was cancelled, with all that ran."""
        call = self._calls.get(request_id)
        if call is not None:
            self._fail(call, PROGRAM_CANCELLED)

    def _fail(self, call: OpenCall, failure: RequestFailure) -> None:
        log.warning("request_failed", request_id=call.spec.request_id, code=failure.code)
        if call.context is not None:
            call.context.report_failure(failure)
        self._live_link.cancel(call.spec.request_id)
        self._end(call, completed=False)
        output = EngineCoreOutput(call.spec.request_id, [], finish_reason=FinishReason.ERROR)
        self._outputs.put_nowait(EngineCoreOutputs(outputs=[output]))

    def _end(self, call: OpenCall, *, completed: bool) -> None:
        self._calls.pop(call.spec.request_id, None)
        self._left.discard(call.spec.request_id)
        self._live_link.finish(call.spec.request_id)
        self._report_outcome(call, completed=completed)

    def _report_outcome(self, call: OpenCall, *, completed: bool) -> None:
        outcome = call.tracker.finish(time.monotonic(), completed)
        self._live_link.report_outcome(call.spec.request_id, outcome)
        self._metrics.ended(outcome, completed=completed)
        if call.context is not None:
            call.context.report_outcome(outcome, completed=completed)


def why_not_resumable(request: EngineCoreRequest, generated_tokens: int) -> str | None:
    """What another worker could not know when it continues this answer; None if nothing.

    Before the first token everything can start again. After it, tokens that move into the prompt lose whatever the
    engine had derived from them as output.
    """
    params = request.sampling_params
    if generated_tokens == 0 or params is None:
        return None
    obstacles = {
        "structured output (the grammar's state is lost)": params.structured_outputs is not None,
        "a seed (the random state is lost)": params.seed is not None,
        "penalties (they count the tokens of the answer)": bool(params.presence_penalty or params.frequency_penalty),
        "input that is streamed": request.resumable,
        "embeddings as prompt": request.prompt_embeds is not None,
    }
    return next((name for name, is_there in obstacles.items() if is_there), None)


def continuation(request: EngineCoreRequest, attempt_id: str, tokens: Sequence[int]) -> EngineCoreRequest:
    """The same request for another worker: what was generated becomes prompt, and the budget shrinks by it."""
    again = copy(request)
    again.request_id = attempt_id
    if tokens and request.sampling_params is not None:
        params = copy(request.sampling_params)
        params.prompt_logprobs = None
        params.min_tokens = max(0, params.min_tokens - len(tokens))
        if params.max_tokens is not None:
            params.max_tokens = max(1, params.max_tokens - len(tokens))
        again.sampling_params = params
        again.prompt_token_ids = [*(request.prompt_token_ids or []), *tokens]
    return again


def _cache_owner(request: EngineCoreRequest, tenant: str) -> str:
    """Whose cached prefixes a request can use: an engine keeps those of each LoRA adapter apart."""
    lora = request.lora_request
    return f"{tenant}\0{lora.lora_name}" if lora is not None else tenant


def _prompt_length(request: EngineCoreRequest) -> int:
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return len(request.prompt_embeds) if request.prompt_embeds is not None else 0


def _output_bound(request: EngineCoreRequest, room: int) -> int:
    params: SamplingParams | None = request.sampling_params
    if params is None:
        return 1
    return max(1, min(params.max_tokens, room) if params.max_tokens is not None else room)


def _output_of_delta(delta: wire.TokenDelta) -> EngineCoreOutput:
    return EngineCoreOutput(
        delta.request_id,
        list(delta.token_ids),
        finish_reason=FINISH_REASONS[delta.finish_reason] if delta.finish_reason else None,
        stop_reason=delta.stop_reason or None,
    )
