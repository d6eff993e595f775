"""What vLLM is started with: its arguments, Tempo's scheduler in it, and what makes it start sooner on a CPU."""

import difflib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import structlog
import torch
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from tempo_router.config import SchedulingConfig
from tempo_router.errors import ConfigError
from workers.calibration import Calibration
from workers.call_facts import KEY
from workers.vllm_core import Core

if TYPE_CHECKING:
    from workers.tempo_scheduler import TempoScheduler

log = structlog.get_logger()

_HELD_SHARE = 0.5
"""Places for calls that are held, over those that run: as many as a router sends beyond an engine's slots."""
_CPU_KV_BYTES = 512 * 1024 * 1024


def engine_arguments(model: str, engine_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `AsyncEngineArgs`. Raises ConfigError for one that vLLM does not have."""
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


def build_core(
    arguments: Mapping[str, Any],
    scheduling: SchedulingConfig | None,
    known: Calibration | None,
    publish: Callable[[Any], None],
) -> Core:
    """vLLM's core, with its model loaded. Takes seconds to minutes; raises whatever vLLM does."""
    if current_platform.is_cpu():
        # Acts on the in-process executor, the default here; vLLM looks the name up when a seeded request comes.
        torch.Generator = _RewindingGenerator
        # torch read OMP_NUM_THREADS when it was imported; kernels take the count of the thread that calls them: this.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    inspect_models_here()
    vllm_arguments = AsyncEngineArgs(**arguments)
    config = vllm_arguments.create_engine_config()
    if config.lora_config is not None and current_platform.is_cpu():
        _mask_missing_adapters()
    slots = config.scheduler_config.max_num_seqs
    step_planner = _put_planner_in(config, scheduling, known) if scheduling is not None else None
    return Core(
        config,
        slots=slots,
        step_planner=step_planner,
        log_stats=not vllm_arguments.disable_log_stats,
        publish=publish,
    )


def _mask_missing_adapters() -> None:
    try:
        # Not above: vLLM serves without the kernels that only this module needs.
        from workers.cpu_lora import mask_missing_adapters

        unmasked = mask_missing_adapters()
    except ImportError as problem:
        unmasked = [str(problem)]
    if unmasked:
        log.warning(
            "cpu_lora_unmasked",
            vllm=str(vllm.__version__),
            kernels=unmasked,
            effect="requests without an adapter may be answered by one that runs beside them",
        )


def _put_planner_in(
    config: Any, scheduling: SchedulingConfig, known: Calibration | None
) -> "type[TempoScheduler] | None":
    """Let Tempo's scheduler compose the steps, and return its class; or say why vLLM's own does, and return None."""
    planner, obstacles = _find_planner(config)
    if planner is None or obstacles:
        _fall_back(config, obstacles)
        return None
    _put_in(config, planner, scheduling, known)
    return planner


def _find_planner(config: Any) -> tuple["type[TempoScheduler] | None", list[str]]:
    """Tempo's scheduler class, if this vLLM has what its import needs, and all that speaks against it."""
    obstacles = []
    if config.scheduler_config.scheduler_cls is not None:
        obstacles.append(f"scheduler_cls is {config.scheduler_config.scheduler_cls!r}")
    try:
        # Not above: vLLM serves without the names that only this module needs.
        from workers.tempo_scheduler import TempoScheduler, differences, not_planned
    except ImportError as problem:
        return None, [str(problem), *obstacles]
    return TempoScheduler, [*(differences() or not_planned(config)), *obstacles]


def _fall_back(config: Any, obstacles: Sequence[str]) -> None:
    """vLLM composes the steps: by the router's priorities, unless another scheduler is to do as it likes."""
    chosen = config.scheduler_config
    effect = "vLLM's own priority policy composes the steps; SLOs count in the router's order alone"
    if chosen.scheduler_cls is not None:
        effect = "that scheduler composes the steps; SLOs count in the router's order alone"
    elif chosen.policy != "priority":
        effect += f"; scheduling_policy={chosen.policy!r} does not count"
        chosen.policy = "priority"
    log.warning("step_planner_off", vllm=str(vllm.__version__), reasons=list(obstacles), effect=effect)


def _put_in(
    config: Any, planner: "type[TempoScheduler]", scheduling: SchedulingConfig, known: Calibration | None
) -> None:
    """Who is held keeps a place in vLLM's batch, so there are more of these than run at once."""
    chosen = config.scheduler_config
    slots = chosen.max_num_seqs
    chosen.scheduler_cls = f"{planner.__module__}.{planner.__name__}"
    # The victim is then the tail of the list of running requests, which the planner arranges.
    chosen.policy = "fcfs"
    chosen.max_num_seqs = min(math.ceil((1 + _HELD_SHARE) * slots), max(slots, chosen.max_num_batched_tokens))
    settings: dict[str, Any] = {"slots": slots, "scheduling": scheduling.model_dump(mode="json")}
    if known is not None:
        settings["coefficients"] = list(known.coefficients)
        settings["upper_ratio"] = known.upper_ratio
    config.additional_config = {**(config.additional_config or {}), KEY: settings}
    log.info("step_planner_on", policy=scheduling.policy, slots=slots, places=chosen.max_num_seqs)


def inspect_models_here() -> None:
    """Look at a model's class in this process, not in a new one that imports all of vLLM first.

    vLLM starts that process so that its own does not initialise CUDA; without CUDA there is nothing to protect. It does
    so once for each model class and keeps the answer under the user's home, so the first start on a machine gains.
    A vLLM without this function inspects as it likes.
    """
    if not current_platform.is_cpu():
        return
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = _call  # noqa: SLF001 - there is no public way
    else:
        log.info("vllm_start_slow", vllm=str(vllm.__version__), reason="registry._run_in_subprocess does not exist")


def _call(function: Callable[[], Any]) -> Any:
    return function()
