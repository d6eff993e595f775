"""Requests without a LoRA adapter on a CPU, in one batch with some that have one.

vLLM marks their tokens with adapter -1. Its kernels for GPUs skip those; its PyTorch kernels, which CPUs use, index
with it, and so apply the adapter in the last slot (0.32.0; vllm-project/vllm#48421). An answer is then not the base
model's, and depends on who else is in the batch.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

_KERNELS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
_ADAPTERS = "lora_indices_tensor"
"""Name of the fourth parameter: the adapter of each token."""


def mask_missing_adapters() -> list[str]:
    """Make vLLM's PyTorch kernels skip tokens without an adapter; others are computed as before, bit for bit.

    Acts on engines of this process. May be called again. Returns the kernels that this vLLM does not have, or whose
    parameters are others: they are left as they are.
    """
    unmasked = []
    for module in (lora_ops, punica_cpu):
        for name in _KERNELS:
            kernel = getattr(module, name, None)
            if kernel is None or _ADAPTERS not in tuple(inspect.signature(kernel).parameters)[3:4]:
                unmasked.append(f"{module.__name__}.{name}")
            elif not hasattr(kernel, "__wrapped__"):
                setattr(module, name, _masked(kernel))
    return unmasked


def _masked(kernel: Callable[..., None]) -> Callable[..., None]:
    """All of them are linear in their input: what is zero adds nothing."""

    @functools.wraps(kernel)
    def masked(inputs: Any, weights: Any, output: Any, adapters: Any, *rest: Any, **named: Any) -> None:
        kernel(inputs * (adapters >= 0).unsqueeze(-1), weights, output, adapters, *rest, **named)

    return masked
