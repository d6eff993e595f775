"""The ingress: vLLM's OpenAI application over remote engines, behind Tempo's HTTP edge, plus the Python handle."""

import asyncio
import dataclasses
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog
from prometheus_client import REGISTRY
from ray import serve

from cluster.ingress_link import IngressLink
from deployments import own_metrics
from deployments.declared_graph import json_value
from deployments.handle_api import GenerateRequest, Generation, GenerationPart, NewProgram, ProgramPlace
from deployments.http_edge import HttpEdge
from deployments.logs import configure_logging
from deployments.program_calls import join, leave
from deployments.program_client import ProgramClient
from deployments.program_identity import Identity, ProgramFields, identify
from deployments.request_context import RequestContext, bound_request
from deployments.router_actor import RouterFinder
from deployments.slo_wire import as_float
from tempo_router.config import TempoConfig
from tempo_router.errors import InvalidSloError, RequestFailedError, TempoError
from tempo_router.request import Slo
from workers.default_model import resolve_model

log = structlog.get_logger()


class IngressReplica:
    """Serves HTTP and handle calls. Its constructor waits for the first worker, whose limits vLLM must know."""

    # Serve awaits constructors. _worker ties the two deployments together; requests do not go through it.
    async def __init__(self, config_json: str, _worker: Any = None) -> None:  # type: ignore[misc]
        # Imports take 20 s: Serve starts workers meanwhile, in their own processes.
        from deployments import vllm_frontend
        from deployments.remote_engine import RemoteEngine

        config = self._config = TempoConfig.model_validate_json(config_json)
        configure_logging()
        self._router = RouterFinder(config)
        await self._router.first_contact()
        model = await asyncio.to_thread(resolve_model, config.model, Path(config.data_dir))
        vllm_config = await asyncio.to_thread(
            vllm_frontend.build_engine_config, model, config.engine.engine_kwargs, config.model_name
        )
        engine = RemoteEngine(
            model_name=config.model_name,
            max_model_len=vllm_config.model_config.max_model_len,
            default_slo=config.tiers[config.default_tier].slo(),
            metrics=own_metrics.RequestMetrics(REGISTRY),
        )
        self._link = IngressLink(
            serve.get_replica_context().replica_id.unique_id,
            locate_router=self._router.locate,
            listener=engine,
            transport=config.transport,
            router_wait_s=config.ingress.router_wait_s,
            engine_version=vllm_frontend.VLLM_VERSION,
        )
        self._link.start()
        facts = await self._link.first_worker()
        vllm_frontend.apply_facts(vllm_config, facts)
        engine.attach(self._link, facts)
        own_metrics.export(lambda: self._link.attached_workers, are_planned=config.planned_scheduling is not None)
        self._engine = engine
        self._llm = vllm_frontend.make_async_llm(vllm_config, engine, config.engine.engine_kwargs)
        app = await vllm_frontend.build_app(
            self._llm, model_name=config.model_name, model_path=model, frontend_kwargs=config.engine.frontend_kwargs
        )
        self._programs = ProgramClient(self._link.programs)
        self._edge = HttpEdge(
            app,
            config,
            not_ready_because=lambda: self._link.not_ready_because,
            programs=self._programs,
            before_scrape=own_metrics.RouterMetrics(self._programs).ask,
            api_keys=vllm_frontend.api_keys(config.engine.frontend_kwargs),
            keeps_answers=vllm_frontend.keeps_answers(),
        )

    def __serve_build_asgi_app__(self) -> HttpEdge:
        return self._edge

    def check_health(self) -> None:
        """Called by Serve; raising gets the replica replaced. Having no worker is not ill health, only unreadiness."""
        failure = self._link.failure()
        if failure is not None:
            raise RuntimeError(f"the ingress's {failure}")
        if self._llm.output_handler is not None and self._llm.output_handler.done():
            raise RuntimeError("vLLM's output handler ended; no stream of this ingress can go on")

    async def open_http_requests(self) -> int:
        """HTTP requests whose responses have not been sent to their ends."""
        return self._edge.open_requests

    async def snapshot(self) -> dict[str, Any]:
        """Counts for status pages and tests; the ingress's own are zero when nothing is open."""
        return {
            "router": await self._router.snapshot(),
            "open_http_requests": self._edge.open_requests,
            "open_calls": self._engine.open_calls,
            "open_link_requests": len(self._link.open),
            "unfinished_in_front_end": self._llm.get_num_unfinished_requests(),
        }

    # ---- Python handle ----

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerationPart]:
        """Generate, part by part. Raises AdmissionRejected, InvalidSloError, or ValueError for bad input.

        Raises RequestFailedError when an admitted request cannot be finished.
        """
        async with self._context(request, is_streaming=True) as context:
            async for output in await self._outputs(request, context):
                _raise_failure(context)
                answer = output.outputs[0]
                yield GenerationPart(
                    request_id=output.request_id,
                    text=answer.text,
                    token_ids=tuple(answer.token_ids),
                    finish_reason=answer.finish_reason,
                    outcome=context.outcomes[0] if answer.finish_reason is not None and context.outcomes else None,
                    **_of_program(context),
                )

    async def generate(self, request: GenerateRequest) -> Generation:
        """Generate the whole answer. Raises as `stream` does."""
        async with self._context(request, is_streaming=False) as context:
            last = None
            async for output in await self._outputs(request, context):
                last = output
            _raise_failure(context)
        if last is None or not context.outcomes:
            raise TempoError(f"request {request.request_id!r} was cancelled before its first token")
        answer = last.outputs[0]
        return Generation(
            request_id=last.request_id,
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            prompt_tokens=len(last.prompt_token_ids or ()),
            finish_reason=answer.finish_reason or "abort",
            outcome=context.outcomes[0],
            **_of_program(context),
        )

    async def cancel(self, request_id: str) -> None:
        """Stop a request that `stream` or `generate` began; unknown ids are ignored."""
        await self._llm.abort(request_id)

    # ---- programs, as /v1/programs has them; all raise ProgramError, RouterUnavailableError ----

    async def create_program(self, new: NewProgram) -> dict[str, Any]:
        """Make a program; its calls name it in `GenerateRequest.program`."""
        return dict(await self._edge.own.programs.create(new))

    async def run_program(self, new: NewProgram) -> AsyncIterator[dict[str, Any]]:
        """Run a declared graph: events as its nodes finish (stream=True), the last one with the whole program.

        Who stops reading cancels the program.
        """
        graph = json_value(new.graph, "graph")
        async with aclosing(await self._edge.own.graphs.run(dataclasses.replace(new, graph=graph))) as events:
            async for event in events:
                yield event

    async def deliver_output(self, program: str, node: str, output: Any, tenant: str = "") -> None:
        """The output of a tool that a declared graph waits for: what JSON can hold; bytes and dates become text."""
        body = msgspec.json.encode({"output": json_value(output, "output")})
        await self._edge.own.graphs.deliver(program, node, body, tenant)

    async def program(self, program: str, tenant: str = "") -> dict[str, Any]:
        """All of a program. program: its id, or the name that it was given."""
        return dict(await self._edge.own.programs.view(program, tenant))

    async def programs(self, tenant: str = "", **filters: str) -> dict[str, Any]:
        """Programs of a tenant. filters: those of `GET /v1/programs`, as text."""
        return dict(await self._edge.own.programs.listed(tenant, filters))

    async def extend_program(
        self, program: str, deadline_s: float | None = None, tenant: str = "", *, deadline: float | None = None
    ) -> dict[str, Any]:
        """Another deadline: in seconds from now, or as a date (seconds since the epoch)."""
        fields = {"deadline_s": deadline_s, "deadline": deadline}
        return dict(await self._edge.own.programs.extend(program, fields, tenant))

    async def finish_program(self, program: str, tenant: str = "") -> dict[str, Any]:
        """No further call will come."""
        return dict(await self._edge.own.programs.finish(program, tenant))

    async def cancel_program(self, program: str, reason: str = "", tenant: str = "") -> dict[str, Any]:
        """Give it up, with all that runs."""
        return dict(await self._edge.own.programs.cancel(program, reason, tenant))

    async def explain(self, request: str, tenant: str = "") -> dict[str, Any]:
        """Why one of the last requests was served as it was. request: its id, or that of its call in a program."""
        return dict(await self._edge.own.programs.explain(request, tenant))

    @asynccontextmanager
    async def _context(self, request: GenerateRequest, *, is_streaming: bool) -> AsyncIterator[RequestContext]:
        """What a request carries, from its place in its program to its end there."""
        if (request.prompt is None) == (request.messages is None):
            raise ValueError("give either prompt or messages")
        slo, tier = chosen_targets(request, self._config)
        context = RequestContext(
            slo=slo,
            tier=tier,
            app=request.app,
            tenant=request.tenant,
            arrival_s=time.monotonic(),
            is_streaming=is_streaming,
        )
        if request.program is None:
            yield context
            return
        identity = placed(request.program, request.tenant)
        has_own_slo = request.slo is not None or request.tier is not None
        await join(self._programs, identity, context, has_own_slo=has_own_slo, now_epoch_s=time.time())
        try:
            yield context
        finally:
            leave(self._programs, context, is_last=identity.is_last)

    async def _outputs(self, request: GenerateRequest, context: RequestContext) -> AsyncIterator[Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        outputs = self._llm.generate(
            await self._prompt(request),
            SamplingParams(
                **request.sampling,
                output_kind=RequestOutputKind.DELTA if context.is_streaming else RequestOutputKind.FINAL_ONLY,
            ),
            request.request_id or f"handle-{uuid.uuid4().hex}",
        )
        # The engine client reads the context when the request is added, which is before the first output.
        with bound_request(context):
            first = await anext(outputs, None)
        return _chain(first, outputs)

    async def _prompt(self, request: GenerateRequest) -> Any:
        if isinstance(request.prompt, list):
            return {"prompt_token_ids": request.prompt}
        if request.prompt is not None:
            return {"prompt": request.prompt}
        tokenizer = self._llm.get_tokenizer()
        return {"prompt": tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)}

    async def __del__(self) -> None:
        link: IngressLink | None = getattr(self, "_link", None)
        if link is not None:
            await link.stop()


def chosen_targets(request: GenerateRequest, config: TempoConfig) -> tuple[Slo, str]:
    """The targets that a handle call asks for, and its tier ("" with its own). Raises InvalidSloError."""
    if request.slo is not None and request.tier is not None:
        raise InvalidSloError("tier", request.tier, "give either slo or tier, not both")
    if request.slo is not None:
        for field in dataclasses.fields(request.slo):
            value = getattr(request.slo, field.name)
            if isinstance(value, int | float) and not (math.isfinite(as_float(value)) and value > 0):
                raise InvalidSloError(f"slo.{field.name}", value, "must be a number of seconds greater than zero")
        return request.slo, ""
    tier = request.tier or config.default_tier
    if tier not in config.tiers:
        valid = ", ".join(sorted(config.tiers))
        raise InvalidSloError("tier", tier, f"is not a tier of this application; tiers are {valid}")
    return config.tiers[tier].slo(), tier


def placed(place: ProgramPlace, tenant: str) -> Identity:
    """A call's place as the identity of an HTTP request says it. Raises ProgramError."""
    fields = {
        "id": place.program,
        "stage": place.stage,
        "parents": list(place.parents),
        "call": place.call or None,
        "attempt": place.attempt,
        "agent": place.agent or None,
        "deadline_s": place.deadline_s,
        "deadline": place.deadline,
        "final": place.is_last,
    }
    identity = identify((), ProgramFields(program=fields), tenant, ())
    assert identity is not None
    return identity


def _of_program(context: RequestContext) -> dict[str, Any]:
    """What a generation says of its place and its chance."""
    call_id = context.program.call_id if context.program is not None else ""
    return {"call_id": call_id, "is_relegated": context.is_relegated or context.is_of_late_program}


def _raise_failure(context: RequestContext) -> None:
    if context.failure is not None:
        raise RequestFailedError(f"{context.failure.code}: {context.failure.message}")


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    if first is not None:
        yield first
    async for each in rest:
        yield each


def _ongoing_requests(max_open_requests: int) -> int:
    """What Serve lets into one ingress at once, each open stream being one.

    What is beyond it waits in Serve, seen by nobody, and counts as arrived only when it gets through. So this is well
    above what the edge admits: the edge refuses the rest itself, and probes and scrapes are not behind it.
    """
    return 2 * max_open_requests + 100


def ingress_deployment(config: TempoConfig) -> Any:
    """The Serve deployment of the ingress."""
    deployment: Any = serve.deployment(serve.ingress()(IngressReplica))
    return deployment.options(
        name="ingress",
        num_replicas=config.ingress.replicas,
        ray_actor_options={"num_cpus": config.ingress.num_cpus, "num_gpus": 0},
        max_ongoing_requests=_ongoing_requests(config.ingress.max_open_requests),
        graceful_shutdown_timeout_s=config.ingress.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        health_check_timeout_s=30,
        max_constructor_retry_count=2,
    )
