"""What makes vLLM start sooner. The only names of vLLM's registry that we touch are in here."""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.models import registry
from vllm.platforms import current_platform


def inspect_models_here() -> None:
    """Look at a model's class in this process, not in a new one that imports all of vLLM first.

    vLLM starts that process so that its own does not initialise CUDA; without CUDA there is nothing to protect. It does
    so once for each model class and keeps the answer under the user's home, so the first start on a machine gains.
    A vLLM without this function inspects as it likes.
    """
    if current_platform.is_cpu() and hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = _call  # noqa: SLF001 - there is no public way


def _call(function: Callable[[], Any]) -> Any:
    return function()
