"""Whether the installed vLLM is as our code needs it. Imports no vLLM: whoever does hands over what it relies on.

No interface of vLLM's engine is promised, so each file below says which names it uses, private ones included, and
asks here at the start whether they are there.

    vllm_core.py (vllm_engine.py, vllm_payload.py)      engine core, its threads and wire types, the fields that this
                                                        file and vllm_start.py read of the configuration: without them
                                                        no serving
    tempo_scheduler.py (planned_queue.py)               scheduler, its queues, requests, the fields that it reads of the
                                                        configuration: without them no step planner
    vllm_start.py, cpu_lora.py                          one function for a faster start; kernels of LoRA on a CPU
    deployments/vllm_frontend.py (remote_engine.py)     front end: without it no ingress

What serving needs ends the start with an EngineVersionError. What the step planner needs alone leaves the steps to
vLLM's priority policy. An untested version in which every name fits is used, and said to be untested.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import structlog

from tempo_router.errors import EngineVersionError

log = structlog.get_logger()

TESTED_VERSIONS = ("0.32.0", "0.31.0")

Signatures = Sequence[tuple[Any, str, tuple[str, ...]]]
"""(class, method, names of its parameters)."""
Attributes = Sequence[tuple[Any, tuple[str, ...]]]
"""(class, names that its instances or it itself have)."""


def check_version(version: str, differences: Sequence[str], *, needed_for: str) -> None:
    """Raise EngineVersionError if there are differences; warn of a version that was not tested."""
    if differences:
        raise EngineVersionError(
            f"vLLM {version} is not as {needed_for} needs it: {'; '.join(differences)}; "
            f"install a tested version: {', '.join(TESTED_VERSIONS)}"
        )
    if version.partition("+")[0] not in TESTED_VERSIONS:
        log.warning(
            "vllm_untested",
            vllm=version,
            tested=list(TESTED_VERSIONS),
            used_by=needed_for,
            effect="all names fit, so it is used; what they do may differ",
        )


def signature_differences(relied_on: Signatures) -> list[str]:
    """Methods that do not exist, or take other parameters."""
    found = []
    for owner, name, expected in relied_on:
        method = getattr(owner, name, None)
        if method is None:
            found.append(f"{owner.__name__}.{name} does not exist")
            continue
        parameters = _parameters(method)
        if parameters != expected:
            found.append(f"{owner.__name__}.{name} takes ({', '.join(parameters)}), not ({', '.join(expected)})")
    return found


def attribute_differences(relied_on: Attributes) -> list[str]:
    """Names that neither the class has nor its methods set."""
    return [
        f"{owner.__name__} has no {name}"
        for owner, names in relied_on
        for name in names
        if not has_attribute(owner, name)
    ]


def has_attribute(owner: Any, name: str) -> bool:
    """Whether instances of a class can have it: in the class, declared there, or set by a method of it."""
    return hasattr(owner, name) or any(name in _names_set_by(one) for one in inspect.getmro(owner)[:-1])


@functools.cache
def _names_set_by(owner: type) -> set[str]:
    """What it declares, and what its methods set on `self`."""
    names = set(vars(owner).get("__annotations__", ()))
    tree = ast.parse(textwrap.dedent(source_of(owner)))
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return names | {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}


def source_of(owner: Any) -> str:
    """Of a class or function; empty where there is none to read."""
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):
        return ""


def contract_differences(abstract: type, ours: type) -> list[str]:
    """Abstract methods that a class of ours lacks, or that take other parameters there."""
    found = []
    for name in sorted(_abstract_methods(abstract)):
        own = getattr(ours, name, None)
        if own is None:
            found.append(f"{abstract.__name__} asks for {name}, which {ours.__name__} does not have")
            continue
        asked, taken = _parameters(getattr(abstract, name)), _parameters(own)
        if asked != taken:
            found.append(
                f"{abstract.__name__}.{name} takes ({', '.join(asked)}), {ours.__name__}'s ({', '.join(taken)})"
            )
    return found


def _abstract_methods(owner: type) -> Iterable[str]:
    names: Iterable[str] = getattr(owner, "__abstractmethods__", ())
    return names


def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
