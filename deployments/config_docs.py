"""Writes docs/configuration.md from the models that check the configuration, so that the two cannot differ.

python -m deployments.config_docs
"""

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from tempo_router.config import DEFAULT_TIERS, OPENAI_TIERS, StrictModel, TempoConfig, TierConfig

PATH = Path(__file__).parent.parent / "docs" / "configuration.md"

# The end of a key's name is its unit.
UNITS = {
    "_ms": "milliseconds",
    "_s": "seconds",
    "_bytes": "bytes",
    "_tokens": "tokens",
    "_requests": "requests",
    "_cpus": "CPU cores",
    "_gpus": "GPUs",
    "_depth": "requests",
    "replicas": "processes",
    "_scale": "factor",
    "request_weight": "share",
    "dag_weight": "requests",
    "_share": "share",
    "_programs": "programs",
    "_patterns": "programs",
    "_window": "answers",
}

_INTRODUCTION = """\
# Configuration

Written by `make docs` from `tempo_router/config.py`; do not edit.

`serve_config.yaml` is a Ray Serve configuration file. What belongs to Tempo stands under `applications[].args` and is
listed here; the rest (`http_options`, `proxy_location`, `deployments`, ...) is
[Ray Serve's](https://docs.ray.io/en/releases-2.60.0/serve/production-guide/config.html). A key that neither knows is
refused at the start, with the nearest one that exists; `tempo check` does that alone. `tempo serve --set key.key=value`
replaces single values.

Defaults marked *guessed* have not been measured yet.
"""

_ENVIRONMENT = """\
## Environment

| variable | meaning |
| --- | --- |
| `TEMPO_REDIS_URL` | Redis to use when `redis_url` is null |
| `TEMPO_DEVICE` | `make setup`: `cpu` or `cuda`; else CUDA where an NVIDIA GPU is |
| `RAY_ADDRESS` | `tempo serve` deploys to this Ray cluster instead of starting Ray |
| `RAY_SERVE_HAPROXY_MAXCONN` | connections that HAProxy takes, 4096 unless set; more wait there, unseen |
| `RAY_SERVE_ENABLE_HA_PROXY` | `tempo serve` sets it to 1; it has to be set before Ray starts |
| `RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD` | likewise, to 0: less CPU time per token |
| `RAY_worker_niceness` | likewise, to 0; Ray's own choice of 15 lets every other program go before the streams |
| `RAY_memory_monitor_refresh_ms` | likewise, to 0: Ray would kill an engine for another program's use of memory |
| `RAY_AUTH_MODE` | likewise, to `disabled`: another Ray's token file would switch authentication on |
| `RAY_USAGE_STATS_ENABLED`, `VLLM_NO_USAGE_STATS`, `DO_NOT_TRACK` | likewise, so that nobody is told what you run |

What you have set yourself stays as it is.
"""


def render() -> str:
    """The whole page."""
    parts = [_INTRODUCTION, _section("args", TempoConfig)]
    parts += [_section(name, model) for name, model in _sections(TempoConfig)]
    parts += [_tiers(), _ENVIRONMENT]
    return "\n".join(parts)


def _sections(model: type[StrictModel], path: str = "") -> Iterator[tuple[str, type[StrictModel]]]:
    """All sections below a model, each with its dotted path, a section before those inside it."""
    for name, field in model.model_fields.items():
        if _is_section(field):
            section = typing.cast(type[StrictModel], field.annotation)
            yield f"{path}{name}", section
            yield from _sections(section, f"{path}{name}.")


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel)


def _section(title: str, model: type[StrictModel]) -> str:
    rows = [_row(field.alias or name, field) for name, field in model.model_fields.items() if not _is_section(field)]
    head = f"## `{title}`\n\n{(model.__doc__ or '').strip()}\n\n"
    return (
        head + "| key | type | default | unit | meaning |\n| --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


def _row(name: str, field: FieldInfo) -> str:
    cells = [
        f"`{name}`",
        _type_name(field.annotation) + _bounds(field),
        _default(name, field),
        _unit(name),
        field.description or "",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(each) for each in inner)
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {_type_name(inner[0])}"
    return "null" if annotation is type(None) else f"{annotation.__name__}"


def _bounds(field: FieldInfo) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    bounds = [
        f"{word} {getattr(each, key)}" for each in field.metadata for key, word in words.items() if hasattr(each, key)
    ]
    return f", {', '.join(bounds)}" if bounds else ""


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if name == "tiers":
        return "see [tiers](#tiers)"
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def _unit(name: str) -> str:
    return next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), "")


def _tiers() -> str:
    """The default tiers, and what a tier is made of."""
    lines = ["| tier | class | ttft_ms | tbt_ms | ttlt_ms |", "| --- | --- | --- | --- | --- |"]
    for name, tier in DEFAULT_TIERS.items():
        targets = [tier.ttft_ms, tier.tbt_ms, tier.ttlt_ms]
        cells = [f"`{name}`", tier.slo_class, *("" if each is None else f"{each:g}" for each in targets)]
        lines.append("| " + " | ".join(cells) + " |")
    openai = ", ".join(f"`{theirs}` is `{ours}`" for theirs, ours in OPENAI_TIERS.items())
    return (
        _section("tiers", TierConfig).replace("## `tiers`", "## tiers")
        + "\nThe default tiers:\n\n"
        + "\n".join(lines)
        + f"\n\nOpenAI's and Anthropic's own values of `service_tier`: {openai}.\n"
    )


def main() -> None:
    """Write the page."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render(), encoding="utf-8")
    print(f"wrote {PATH.name}")


if __name__ == "__main__":
    main()
