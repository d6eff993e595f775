"""How long an engine step takes: the clock of the simulated engine.

A few presets come with the project (`step_profiles.json`, which names their sources). A file with measured per-layer
tables can be given instead; every "model:gpu:tp" in it is then a profile.
"""

import bisect
import difflib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tempo_router.errors import ConfigError

_PRESETS = Path(__file__).with_name("step_profiles.json")
# A profile file knows the memory of the GPU, not how the engine was started; these are vLLM's usual settings.
_FILE_BLOCK_SIZE = 16
_FILE_MAX_RUNNING = 256
_FILE_MAX_STEP_TOKENS = 2048
_FILE_MAX_MODEL_LEN = 8192
_MOST_NAMES = 8
"""Profiles that a message lists; of more it names the nearest."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A piece of one prompt computed in a step: `chunk` tokens after `past` that are already in the cache."""

    chunk: int
    past: int


class StepTime(Protocol):
    """Duration of a step from what it computes."""

    def duration_s(self, prefills: Sequence[Prefill], decodes: int, context_tokens: int) -> float:
        """Seconds. context_tokens: summed context of the `decodes` sequences."""
        ...


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What the engine of a profile can hold."""

    kv_tokens: int
    block_size: int
    max_running: int
    max_step_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A named engine: its step time and its shape.

    drift: factor on the time of a step that begins at this moment of the trace, in seconds; above 0. For engines on a
    machine that others use too, whose speed was recorded (benchmarks/live_truth.py). None: always 1.
    """

    name: str
    source: str
    step_time: StepTime
    shape: EngineShape
    drift: Callable[[float], float] | None = None


@dataclass(frozen=True, slots=True)
class LinearStepTime:
    """Five terms; attention over a chunk grows with the tokens before its middle."""

    base_s: float
    s_per_prefill_token: float
    s_per_decode: float
    s_per_context_token: float
    s_per_prefill_token_x_context: float

    def duration_s(self, prefills: Sequence[Prefill], decodes: int, context_tokens: int) -> float:
        """The sum of the five terms, in seconds."""
        tokens = sum(prefill.chunk for prefill in prefills)
        attention = sum(prefill.chunk * (prefill.past + prefill.chunk / 2) for prefill in prefills)
        return (
            self.base_s
            + self.s_per_prefill_token * tokens
            + self.s_per_decode * decodes
            + self.s_per_context_token * context_tokens
            + self.s_per_prefill_token_x_context * attention
        )


@dataclass(frozen=True, slots=True)
class LayeredStepTime:
    """Host time + layers * (linear parts + attention + all-reduce) + output head, from measured tables.

    linear_tokens, linear_s: time of one layer's linear parts at some token counts; between them it is interpolated,
    beyond the last it grows in proportion.
    """

    host_s: float
    layers: int
    linear_tokens: tuple[int, ...]
    linear_s: tuple[float, ...]
    decode_fixed_s: float
    decode_s_per_context_token: float
    prefill_fixed_s: float
    prefill_s_per_chunk_x_past: float
    prefill_s_per_chunk_squared: float
    all_reduces: float
    all_reduce_fixed_s: float
    all_reduce_s_per_token: float
    head_fixed_s: float
    head_s_per_row: float
    _token_parts_s: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What follows from the number of tokens alone, kept for each number seen: a simulation asks again and again."""

    def duration_s(self, prefills: Sequence[Prefill], decodes: int, context_tokens: int) -> float:
        """The sum over host, layers and head, in seconds."""
        tokens = decodes
        attention_s = 0.0
        for prefill in prefills:
            chunk = prefill.chunk
            tokens += chunk
            attention_s += self.prefill_fixed_s + chunk * (
                self.prefill_s_per_chunk_x_past * prefill.past + self.prefill_s_per_chunk_squared * chunk
            )
        if decodes:
            attention_s += self.decode_fixed_s + self.decode_s_per_context_token * context_tokens
        token_parts_s = self._token_parts_s.get(tokens)
        if token_parts_s is None:
            token_parts_s = self._token_parts_s[tokens] = self._of_tokens(tokens)
        return token_parts_s + self.layers * attention_s + self.head_s_per_row * (decodes + len(prefills))

    def _of_tokens(self, tokens: int) -> float:
        reduce_s = self.all_reduces * (self.all_reduce_fixed_s + self.all_reduce_s_per_token * tokens)
        return self.host_s + self.layers * (self._linear(tokens) + reduce_s) + self.head_fixed_s

    def _linear(self, tokens: int) -> float:
        xs, ys = self.linear_tokens, self.linear_s
        if tokens >= xs[-1]:
            return ys[-1] * tokens / xs[-1]
        right = bisect.bisect_right(xs, tokens)
        if right == 0:
            return ys[0]
        left = right - 1
        share = (tokens - xs[left]) / (xs[right] - xs[left])
        return ys[left] + share * (ys[right] - ys[left])


def scaled(profile: StepProfile, time: float = 1.0, kv: float = 1.0) -> StepProfile:
    """The same engine with every step `time` times as long and `kv` times the cache: what if the profile is wrong?

    The cache keeps whole blocks, and room for one request of the greatest length. Raises ConfigError unless both are
    finite and above zero, and for step times of a kind that is not of this file.
    """
    if not (0 < time < math.inf and 0 < kv < math.inf):
        raise ConfigError(f"profile {profile.name!r}: cannot be scaled by time={time}, kv={kv}; both must be above 0")
    shape = profile.shape
    least = math.ceil(shape.max_model_len / shape.block_size)
    blocks = max(least, int(shape.kv_tokens * kv / shape.block_size))
    return replace(
        profile,
        name=f"{profile.name} (time x{time:g}, kv x{kv:g})",
        step_time=_scaled_times(profile.step_time, time),
        shape=replace(shape, kv_tokens=blocks * shape.block_size),
    )


def _scaled_times(times: StepTime, factor: float) -> StepTime:
    """Step times of the same kind, so that who knows its pieces, such as the upper bound, knows those of this one."""
    match times:
        case LinearStepTime():
            return LinearStepTime(*(factor * getattr(times, name) for name in LinearStepTime.__dataclass_fields__))
        case LayeredStepTime():
            return replace(
                times,
                host_s=factor * times.host_s,
                linear_s=tuple(factor * seconds for seconds in times.linear_s),
                decode_fixed_s=factor * times.decode_fixed_s,
                decode_s_per_context_token=factor * times.decode_s_per_context_token,
                prefill_fixed_s=factor * times.prefill_fixed_s,
                prefill_s_per_chunk_x_past=factor * times.prefill_s_per_chunk_x_past,
                prefill_s_per_chunk_squared=factor * times.prefill_s_per_chunk_squared,
                all_reduce_fixed_s=factor * times.all_reduce_fixed_s,
                all_reduce_s_per_token=factor * times.all_reduce_s_per_token,
                head_fixed_s=factor * times.head_fixed_s,
                head_s_per_row=factor * times.head_s_per_row,
            )
        case _:
            raise ConfigError(
                f"step times of type {type(times).__name__} cannot be scaled; LinearStepTime and LayeredStepTime can"
            )


def load_profile(name: str, path: Path | None = None) -> StepProfile:
    """The profile of that name: one of the presets or, with a path, one of that file.

    Raises ConfigError naming the profiles that exist, or what is wrong with the file.
    """
    profiles = preset_profiles() | (file_profiles(path) if path is not None else {})
    if name not in profiles:
        where = "among the presets" if path is None else f"among the presets and in {path}"
        raise ConfigError(f"profile {name!r}: no such step-time profile {where}; {_proposal(name, sorted(profiles))}")
    return profiles[name]


def _proposal(name: str, names: Sequence[str]) -> str:
    """Which profiles there are and which is the nearest; of many the nearest few."""
    near = difflib.get_close_matches(name, names, n=_MOST_NAMES, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else ""
    if len(names) > _MOST_NAMES:
        return " ".join(
            filter(None, (hint, f"there are {len(names)}, such as {', '.join(near or names[:_MOST_NAMES])}"))
        )
    return "; ".join(filter(None, (f"there are: {', '.join(names)}", hint)))


def preset_profiles() -> dict[str, StepProfile]:
    """The profiles that come with the project, by name."""
    entries = json.loads(_PRESETS.read_text(encoding="utf-8"))["profiles"]
    return {name: _preset(name, entry) for name, entry in entries.items()}


def file_profiles(path: Path) -> dict[str, StepProfile]:
    """Every "model:gpu:tp" of a step-time file (milliseconds, version 1).

    Raises ConfigError if it cannot be read, naming the profile, the field and the value that is wrong.
    """
    try:
        content = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not a step-time file: {type(e).__name__}: {e}") from e
    fields = _Fields(content, str(path))
    version, unit = fields.value("version"), fields.value("unit")
    if version != 1 or unit != "ms":
        raise ConfigError(f"{path}: expected a step-time file of version 1 in ms; it is of version {version} in {unit}")
    host_s = fields.seconds("cpu_overhead_ms_default")
    profiles: dict[str, StepProfile] = {}
    for number, entry in enumerate(fields.values("profiles")):
        profile = _layered_profile(entry, host_s, str(path), number)
        if profiles.setdefault(profile.name, profile) != profile:
            raise ConfigError(f"{path}: two different profiles are called {profile.name}; rename or remove one")
    return profiles


def _preset(name: str, entry: dict[str, Any]) -> StepProfile:
    shape = EngineShape(**{name: int(entry[name]) for name in EngineShape.__dataclass_fields__})
    times = _layered_preset(entry) if "linear_tokens" in entry else _linear_preset(entry)
    return StepProfile(name, entry["source"], times, shape)


def _linear_preset(entry: dict[str, Any]) -> LinearStepTime:
    return LinearStepTime(**{name: float(entry[name]) for name in LinearStepTime.__dataclass_fields__})


def _layered_preset(entry: dict[str, Any]) -> LayeredStepTime:
    tables: dict[str, Any] = {"linear_tokens": tuple(entry["linear_tokens"]), "linear_s": tuple(entry["linear_s"])}
    names = [name for name, field in LayeredStepTime.__dataclass_fields__.items() if field.init and name not in tables]
    return LayeredStepTime(**tables, **{name: entry[name] for name in names})


def _layered_profile(entry: object, host_s: float, path: str, number: int) -> StepProfile:
    unnamed = _Fields(entry, f"{path}: profile {number + 1}")
    name = ":".join(str(unnamed.value(part)) for part in ("model", "gpu", "tp"))
    fields = _Fields(entry, f"{path}: profile {name}")
    times = LayeredStepTime(
        host_s=host_s,
        layers=fields.count("layers"),
        linear_tokens=fields.counts("lin_layer.tokens"),
        linear_s=fields.all_seconds("lin_layer.ms"),
        decode_fixed_s=fields.seconds("attn_decode_layer.fixed_ms"),
        decode_s_per_context_token=fields.seconds("attn_decode_layer.ms_per_gb", "attn_decode_layer.gb_per_ctx_token"),
        prefill_fixed_s=fields.seconds("attn_prefill_layer.fixed_ms"),
        prefill_s_per_chunk_x_past=fields.seconds("attn_prefill_layer.ms_per_chunk_x_past"),
        prefill_s_per_chunk_squared=fields.seconds("attn_prefill_layer.ms_per_chunk_sq"),
        all_reduces=fields.number("all_reduce.per_layer"),
        all_reduce_fixed_s=fields.seconds("all_reduce.fixed_ms"),
        all_reduce_s_per_token=fields.seconds("all_reduce.ms_per_mb", "all_reduce.mb_per_token"),
        head_fixed_s=fields.seconds("lm_head.fixed_ms"),
        head_s_per_row=fields.seconds("lm_head.ms_per_row"),
    )
    _check_times(times, fields)
    kv_tokens = fields.count("kv_capacity_tokens", at_least=_FILE_BLOCK_SIZE) // _FILE_BLOCK_SIZE * _FILE_BLOCK_SIZE
    shape = EngineShape(
        kv_tokens=kv_tokens,
        block_size=_FILE_BLOCK_SIZE,
        max_running=_FILE_MAX_RUNNING,
        max_step_tokens=_FILE_MAX_STEP_TOKENS,
        max_model_len=min(_FILE_MAX_MODEL_LEN, kv_tokens),
    )
    return StepProfile(name, str(fields.value("lin_layer.source")), times, shape)


def _check_times(times: LayeredStepTime, fields: "_Fields") -> None:
    """Raises ConfigError for a table that cannot be interpolated, and for steps that take no time."""
    tokens, seconds = times.linear_tokens, times.linear_s
    if not tokens or len(tokens) != len(seconds):
        problem = f"{len(tokens)} tokens and {len(seconds)} ms; each number of tokens needs its time"
        raise fields.error("lin_layer", problem)
    for before, after in itertools.pairwise(tokens):
        if after <= before:
            raise fields.error("lin_layer.tokens", f"{after} comes after {before}; they must go up, each once")
    if not (times.duration_s((), 1, 0) > 0 and times.duration_s((Prefill(1, 0),), 0, 0) > 0):
        raise fields.error(
            "lin_layer.ms", "with these and the other times a step of one token takes 0 s; give it a time"
        )


class _Fields:
    """Fields of an object in a step-time file, by names such as lin_layer.ms; each is checked when it is read.

    where: the file and the profile, for messages.
    """

    def __init__(self, content: object, where: str) -> None:
        self._content = content
        self._where = where

    def error(self, key: str, problem: str) -> ConfigError:
        """What is wrong with a field."""
        return ConfigError(f"{self._where}: {key}: {problem}")

    def value(self, key: str) -> Any:
        """The field as it is."""
        found = self._content
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                raise self.error(key, "is missing; docs/workloads.md lists the fields of a step-time file")
            found = found[part]
        return found

    def values(self, key: str) -> list[Any]:
        """A list."""
        found = self.value(key)
        if not isinstance(found, list):
            raise self.error(key, f"expected a list, got {found!r}")
        return found

    def number(self, key: str) -> float:
        """A finite number, not below zero."""
        return self._number(key, self.value(key))

    def seconds(self, *keys: str) -> float:
        """A time in milliseconds, or the product of what makes one, in seconds."""
        return math.prod(self.number(key) for key in keys) / 1000

    def all_seconds(self, key: str) -> tuple[float, ...]:
        """A list of times in milliseconds."""
        return tuple(self._number(key, value) / 1000 for value in self.values(key))

    def count(self, key: str, at_least: int = 1) -> int:
        """A whole number."""
        return self._count(key, self.value(key), at_least)

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers above zero."""
        return tuple(self._count(key, value, 1) for value in self.values(key))

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.error(key, f"{value!r} is not a finite number that is not below zero")
        return float(value)

    def _count(self, key: str, value: object, at_least: int) -> int:
        number = self._number(key, value)
        if number != int(number) or number < at_least:
            raise self.error(key, f"{value!r} is not a whole number of at least {at_least}")
        return int(number)
