"""vLLM's front end in this process: its OpenAI application and `AsyncLLM`, over an engine client that we give it.

With `remote_engine.py` the only place on the ingress side that touches vLLM. Importing it takes about 20 s. What is
used of vLLM beyond its public interface, all of it checked by `check_vllm`:

- `AsyncLLM` has no parameter for its client. It asks `EngineCoreClient.make_async_mp_client` by the global name in its
  own module; while it is constructed that name is replaced by a factory of ours. This is the one patch.
- `AsyncLLM._add_request`, `abort` and `check_admission` are overridden (see `TempoAsyncLLM`).
- `EngineCoreReadyResponse`, as a worker's engine sends it, is copied into `VllmConfig` as `MPClient` would.
- `launchers.app.build_app` and `init_app_state` build the application, which runs in Ray Serve, without uvicorn.

Routes for administration stay behind the switches that vLLM has for them (VLLM_SERVER_DEV_MODE and the like).
"""

import asyncio
import dataclasses
import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Protocol

import msgspec
import pydantic
import vllm
from fastapi import FastAPI
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app as build_vllm_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser, validate_parsed_serve_args
from vllm.exceptions import GenerationError, GracefulHTTPError
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequest,
    UtilityOutput,
    async_llm,
)
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.output_processor import OutputProcessor

from deployments.request_context import AdmissionRejected, AdmissionVerdict, current_request
from tempo_router.errors import ConfigError, EngineVersionError
from workers.vllm_check import Attributes, attribute_differences, check_version
from workers.vllm_start import inspect_models_here

VLLM_VERSION: str = vllm.__version__

# Set where they mean something: `model` and `served_model_name` of the configuration.
_ENGINE_KWARGS_SET_ELSEWHERE = {"model": "model", "served_model_name": "served_model_name"}
# Ray Serve owns the sockets. Accepting these would be a promise that is not kept.
_FRONTEND_KWARGS_OF_UVICORN = frozenset(
    {
        "data_parallel_supervisor_port",
        "disable_access_log_for_endpoints",
        "disable_uvicorn_access_log",
        "dp_supervisor_probe_failure_threshold",
        "dp_supervisor_probe_interval_s",
        "dp_supervisor_probe_timeout_s",
        "enable_ssl_refresh",
        "grpc_port",
        "h11_max_header_count",
        "h11_max_incomplete_event_size",
        "host",
        "port",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_ciphers",
        "ssl_keyfile",
        "uds",
        "uvicorn_log_level",
    }
)

# What remote_engine.py replaces, so that nothing of it reaches for an engine, and what it reads and writes.
_OF_THE_CLIENT: Mapping[str, Sequence[str]] = {
    "get_output_async": (),
    "get_supported_tasks_async": (),
    "add_request_async": ("request",),
    "abort_requests_async": ("request_ids",),
    "call_utility_async": ("method",),
    "get_kv_event_sources": (),
    "shutdown": ("timeout",),
}
# Newer methods of the same: in 0.31, which lacks this one, nobody calls it.
_OF_NEWER_CLIENTS: Mapping[str, Sequence[str]] = {"call_utility_all_async": ("method",)}
_WIRE_TYPES: Attributes = (
    (
        EngineCoreRequest,
        ("request_id", "prompt_token_ids", "prompt_embeds", "sampling_params", "lora_request", "resumable"),
    ),
    (EngineCoreOutput, ("request_id", "new_token_ids", "finish_reason", "stop_reason")),
    (EngineCoreOutputs, ("outputs", "scheduler_stats", "engine_index")),
    (UtilityOutput, ("failure_message", "result")),
)

# vLLM's Anthropic routes log every exception with its traceback; the others know NotAdmitted for what it is, and an
# error in a running stream.
_LOUD_ON_REFUSAL = ("vllm.entrypoints.anthropic.api_router", "vllm.entrypoints.anthropic.serving")


class FrontEndClient(Protocol):
    """What `TempoAsyncLLM` asks of the engine client beyond vLLM's own interface."""

    def note_client_abort(self, request_ids: Sequence[str]) -> None:
        """The next abort of these is the client's wish; without this call it is an answer that ended here."""
        ...

    def note_group(self, parent_id: str, size: int) -> None:
        """A request with `n` > 1 is about to arrive as `size` siblings named 0_<parent_id>, 1_<parent_id>, ..."""
        ...


class ReadyFacts(Protocol):
    """What a worker says of its engine (the message EngineFacts, or workers.engine.EngineFacts)."""

    @property
    def ready_response(self) -> bytes:
        """vLLM's EngineCoreReadyResponse in msgpack; empty for an engine that is not vLLM."""
        ...

    @property
    def max_model_len(self) -> int:
        """Longest context in tokens."""
        ...

    @property
    def kv_blocks(self) -> int:
        """Blocks of the KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...


class NotAdmitted(AdmissionRejected, GenerationError, GracefulHTTPError):  # noqa: N818 - as AdmissionRejected
    """AdmissionRejected in vLLM's terms: known to all its handlers as an expected end, so none logs a traceback.

    GracefulHTTPError passes `generate` unwrapped, GenerationError is caught in the stream generators. What they make
    of it never reaches the client: the HTTP edge knows the verdict and answers itself.
    """

    def __init__(self, verdict: AdmissionVerdict) -> None:
        # Not super().__init__: the bases were not made for one another and take different arguments.
        Exception.__init__(self, f"request not admitted: {verdict.reject_reason}")
        self.verdict = verdict
        self.message = str(self)
        self.status_code = self.http_status = HTTPStatus.SERVICE_UNAVAILABLE


class TempoAsyncLLM(AsyncLLM):
    """AsyncLLM that tells its client why it aborts and which requests are siblings, and forgets refused requests."""

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Stop requests because the client wishes it; upstream calls it when a client is gone or a handler fails."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        engine_ids = self.output_processor.abort_requests(request_ids, internal)
        self.engine_core.note_client_abort(engine_ids)
        await self.engine_core.abort_requests_async(engine_ids)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Upstream's own limits, if set; and the last moment at which a request with `n` > 1 is seen whole."""
        super().check_admission(n, request_id)
        if n > 1 and request_id is not None:
            self.engine_core.note_group(request_id, n)

    async def add_request(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; a refusal by the router comes out as NotAdmitted."""
        try:
            return await super().add_request(*args, **kwargs)
        except AdmissionRejected as rejected:
            raise NotAdmitted(rejected.verdict) from rejected

    async def _add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """As upstream, which would keep a request for ever that was refused, or left by its client, on the way in."""
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            self.output_processor.abort_requests([request.request_id], internal=True)
            raise


def check_vllm(version: str = VLLM_VERSION) -> None:
    """Raise EngineVersionError unless this vLLM has every private name that we use; warn of an untested version."""
    missing = [name for name, found in _private_names().items() if not found]
    differences = [f"{name} is missing or takes other arguments" for name in missing]
    differences += attribute_differences(_WIRE_TYPES)
    check_version(version, differences, needed_for="an ingress")


def _private_names() -> dict[str, bool]:
    ready = {field.name for field in dataclasses.fields(EngineCoreReadyResponse)}
    return {
        "async_llm.EngineCoreClient": getattr(async_llm, "EngineCoreClient", None) is EngineCoreClient,
        "EngineCoreClient.make_async_mp_client": _takes(
            getattr(EngineCoreClient, "make_async_mp_client", None), "vllm_config", "executor_class", "renderer"
        ),
        "AsyncLLM._add_request": _takes(getattr(AsyncLLM, "_add_request", None), "request", "parent_req", "queue"),
        "AsyncLLM.add_request": _takes(AsyncLLM.add_request, "request_id", "prompt", "params"),
        "AsyncLLM.abort": _takes(AsyncLLM.abort, "request_id", "internal"),
        "AsyncLLM.check_admission": _takes(getattr(AsyncLLM, "check_admission", None), "n", "request_id"),
        "OutputProcessor.abort_requests": _takes(OutputProcessor.abort_requests, "request_ids", "internal"),
        **{
            f"AsyncMPClient.{name}": _takes(getattr(AsyncMPClient, name, None), *parameters)
            for name, parameters in _OF_THE_CLIENT.items()
        },
        **{
            f"AsyncMPClient.{name}": _takes(getattr(AsyncMPClient, name), *parameters)
            for name, parameters in _OF_NEWER_CLIENTS.items()
            if hasattr(AsyncMPClient, name)
        },
        "build_app": _takes(build_vllm_app, "args", "supported_tasks", "model_config"),
        "init_app_state": _takes(init_app_state, "engine_client", "state", "args", "supported_tasks"),
        "EngineCoreReadyResponse": ready
        >= {
            "vllm_version",
            "max_model_len",
            "num_gpu_blocks",
            "block_size",
            "mamba_block_size",
            "kv_cache_size_tokens",
            "kv_cache_max_concurrency",
            "effective_attention_block_size",
        },
    }


def _takes(function: Callable[..., Any] | None, *parameters: str) -> bool:
    return function is not None and set(parameters) <= set(inspect.signature(function).parameters)


def build_engine_config(model: str, engine_kwargs: Mapping[str, Any], model_name: str) -> VllmConfig:
    """vLLM's configuration from the arguments that users know from `vllm serve`.

    model: path or hub id. model_name: what clients call it. Reads the model's own configuration and tokenizer, never
    its weights. Raises ConfigError for what vLLM does not know or accept, EngineVersionError (see `check_vllm`).
    """
    check_vllm()
    for name, key in _ENGINE_KWARGS_SET_ELSEWHERE.items():
        if name in engine_kwargs:
            raise ConfigError(f"engine.engine_kwargs.{name}: set {key!r} at the top of the configuration instead")
    _refuse_unknown(
        "engine.engine_kwargs", engine_kwargs, [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    )
    try:
        engine_args = AsyncEngineArgs(model=model, served_model_name=[model_name], **engine_kwargs)
        if engine_args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(engine_args.reasoning_parser_plugin)
        inspect_models_here()
        return engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise ConfigError(f"vLLM refuses model {model!r} with these engine_kwargs: {error}") from error


def apply_facts(vllm_config: VllmConfig, facts: ReadyFacts) -> None:
    """Copy into the configuration what an engine found out when it started. Call once, before `make_async_llm`.

    As `MPClient._apply_ready_response` for one engine. Other workers of the deployment are taken to be alike.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    model.max_model_len = min(model.max_model_len, facts.max_model_len)
    cache.num_gpu_blocks = facts.kv_blocks
    if not facts.ready_response:
        cache.block_size = facts.block_size or cache.block_size
        return
    ready = msgspec.msgpack.decode(facts.ready_response, type=EngineCoreReadyResponse)
    if ready.vllm_version != VLLM_VERSION:
        raise EngineVersionError(f"a worker runs vLLM {ready.vllm_version}, this ingress {VLLM_VERSION}")
    cache.block_size = ready.block_size
    cache.mamba_block_size = ready.mamba_block_size
    cache.kv_cache_size_tokens = ready.kv_cache_size_tokens
    cache.kv_cache_max_concurrency = ready.kv_cache_max_concurrency
    cache.effective_attention_block_size = ready.effective_attention_block_size


def make_async_llm(
    vllm_config: VllmConfig, client: FrontEndClient, engine_kwargs: Mapping[str, Any] | None = None
) -> TempoAsyncLLM:
    """AsyncLLM over `client`, an EngineCoreClient. Needs a running event loop; reads from the client at once.

    engine_kwargs: those of `build_engine_config`; of them `disable_log_stats` and `enable_log_requests` count here.
    """
    asyncio.get_running_loop()
    given = engine_kwargs or {}
    with _engine_client(client):
        llm: TempoAsyncLLM = TempoAsyncLLM.from_vllm_config(
            vllm_config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            disable_log_stats=bool(given.get("disable_log_stats", False)),
            enable_log_requests=bool(given.get("enable_log_requests", False)),
        )
    return llm


@contextmanager
def _engine_client(client: FrontEndClient) -> Iterator[None]:
    """While inside, whoever constructs an AsyncLLM in this process gets this client."""

    def make_async_mp_client(*, renderer: Any, **_: Any) -> FrontEndClient:
        renderer.start_mm_warmup_in_background()  # as upstream's client does; nothing for a model of text only
        return client

    original = async_llm.EngineCoreClient
    async_llm.EngineCoreClient = SimpleNamespace(make_async_mp_client=make_async_mp_client)
    try:
        yield
    finally:
        async_llm.EngineCoreClient = original


async def build_app(
    llm: TempoAsyncLLM, *, model_name: str, model_path: str, frontend_kwargs: Mapping[str, Any]
) -> FastAPI:
    """vLLM's OpenAI application over `llm`: every route that the model's tasks have.

    frontend_kwargs: the API server's arguments of `vllm serve`, with underscores. Raises ConfigError for unknown ones,
    and for those that belong to a server of its own, which Ray Serve replaces.
    """
    args = _serve_args(llm, model_name, model_path, frontend_kwargs)
    supported_tasks = await llm.get_supported_tasks()
    app: FastAPI = build_vllm_app(args, supported_tasks, llm.model_config)
    # vLLM's error handler asks its server to exit when the engine is dead. Here health does that (ingress.py).
    app.state.server = SimpleNamespace(should_exit=False)
    await init_app_state(llm, app.state, args, supported_tasks)
    for name in _LOUD_ON_REFUSAL:
        logging.getLogger(name).addFilter(_is_not_of_a_refused_request)
    return app


def api_keys(frontend_kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of which a request must show one, as vLLM takes them from its arguments, else from its environment."""
    given: Sequence[str | None] = _frontend_args(frontend_kwargs).get("api_key") or [envs.VLLM_API_KEY]
    return tuple(key for key in given if key)


def keeps_answers() -> bool:
    """Whether vLLM stores answers of the responses API, so that `previous_response_id` can continue one."""
    return bool(envs.VLLM_ENABLE_RESPONSES_API_STORE)


def _is_not_of_a_refused_request(_: logging.LogRecord) -> bool:
    """Keeps out tracebacks about requests that were refused or ended by us: no errors, and under load many."""
    context = current_request()
    return context is None or (context.rejection is None and context.failure is None)


def _serve_args(llm: TempoAsyncLLM, model_name: str, model_path: str, frontend_kwargs: Mapping[str, Any]) -> Any:
    """The namespace that `vllm serve` would have made of a command line."""
    given = _frontend_args(frontend_kwargs)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.model = args.model_tag = model_path
    args.served_model_name = [model_name]
    args.disable_log_stats = not llm.log_stats
    args.enable_log_requests = llm.log_requests
    args.structured_outputs_config = llm.vllm_config.structured_outputs_config
    for name, value in given.items():
        setattr(args, name, value)
    try:
        validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"vLLM refuses engine.frontend_kwargs: {error}") from error
    return args


def _frontend_args(frontend_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same, checked and converted by vLLM's own types."""
    for name in frontend_kwargs:
        if name in _FRONTEND_KWARGS_OF_UVICORN:
            raise ConfigError(f"engine.frontend_kwargs.{name}: has no effect, Ray Serve owns the HTTP server")
    valid = [field.name for field in dataclasses.fields(FrontendArgs) if field.name not in _FRONTEND_KWARGS_OF_UVICORN]
    _refuse_unknown("engine.frontend_kwargs", frontend_kwargs, valid)
    try:
        typed = FrontendArgs(**frontend_kwargs)
    except pydantic.ValidationError as error:
        raise ConfigError(f"vLLM refuses engine.frontend_kwargs: {error}") from error
    return {name: getattr(typed, name) for name in frontend_kwargs}


def _refuse_unknown(section: str, given: Mapping[str, Any], valid: Sequence[str]) -> None:
    for name in given:
        if name not in valid:
            nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
            proposal = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{section}.{name}: vLLM {VLLM_VERSION} has no such argument{proposal}")
