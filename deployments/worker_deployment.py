"""A worker as a Serve replica. No request ever comes to it through Serve: Serve places it, watches it and stops it."""

import asyncio
from pathlib import Path
from typing import Any

import structlog
from ray import serve

from deployments.logs import configure_logging
from deployments.router_actor import RouterFinder, own_address
from tempo_router.config import TempoConfig
from tempo_router.errors import EngineStartError, TempoError
from workers.default_model import resolve_model
from workers.engine import Engine
from workers.worker import Worker

log = structlog.get_logger()


class WorkerReplica:
    """Starts the engine, then the streams. A failure to start is raised, so that `serve status` shows the reason."""

    # Serve awaits constructors.
    async def __init__(self, config_json: str) -> None:  # type: ignore[misc]
        configure_logging()
        self._config = TempoConfig.model_validate_json(config_json)
        router = RouterFinder(self._config)
        await router.first_contact()
        self._worker = Worker(
            serve.get_replica_context().replica_id.unique_id,
            locate_router=router.locate,
            host=own_address(self._config),
            transport=self._config.transport,
        )
        engine = await self._start_engine()
        await self._worker.start(engine)

    async def _start_engine(self) -> Engine:
        config = self._config.engine
        if config.kind == "simulated":
            from workers.simulated_engine import start_simulated_engine

            return await start_simulated_engine(config, on_step=self._worker.on_step, on_death=self._worker.on_death)
        from workers.vllm_engine import start_vllm_engine

        model = await asyncio.to_thread(resolve_model, self._config.model, Path(self._config.data_dir))
        try:
            return await start_vllm_engine(
                model,
                config.engine_kwargs,
                on_step=self._worker.on_step,
                on_death=self._worker.on_death,
                scheduling=self._config.planned_scheduling,
                calibrations=Path(self._config.data_dir) / "calibrations" if config.calibrate else None,
            )
        except TempoError:
            raise
        except Exception as error:
            raise EngineStartError(f"vLLM could not start with model {model!r}: {error}") from error

    def check_health(self) -> None:
        """Called by Serve; raising gets the replica replaced."""
        failure = self._worker.failure()
        if failure is not None:
            raise RuntimeError(failure)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What an autoscaling policy can see of this worker: Serve itself counts no request here."""
        return {"live_calls": float(self._worker.live_calls)}

    async def __del__(self) -> None:
        worker: Worker | None = getattr(self, "_worker", None)
        if worker is not None:
            await worker.drain(self._config.workers.drain_timeout_s)
            await worker.stop()


def worker_deployment(config: TempoConfig, num_gpus: float) -> Any:
    """The Serve deployment of the workers."""
    deployment: Any = serve.deployment(WorkerReplica)
    return deployment.options(
        name="worker",
        num_replicas=config.workers.replicas,
        ray_actor_options={
            "num_cpus": config.workers.num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": config.workers.env},
        },
        # Serve waits for the drain in __del__ inside this time, then kills.
        graceful_shutdown_timeout_s=config.workers.drain_timeout_s + 15,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        health_check_timeout_s=30,
        max_constructor_retry_count=2,
    )
