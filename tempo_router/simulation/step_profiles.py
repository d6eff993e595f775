"""How long an engine step takes: the clock of the simulated engine.

A few presets come with the project (`step_profiles.json`, which names their sources). A file with measured per-layer
tables can be given instead; every "model:gpu:tp" in it is then a profile.
"""

import bisect
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
        raise ConfigError(
            f"profile {name!r}: no such step-time profile {where}; there are: {', '.join(sorted(profiles))}"
        )
    return profiles[name]


def preset_profiles() -> dict[str, StepProfile]:
    """The profiles that come with the project, by name."""
    entries = json.loads(_PRESETS.read_text(encoding="utf-8"))["profiles"]
    return {name: _preset(name, entry) for name, entry in entries.items()}


def file_profiles(path: Path) -> dict[str, StepProfile]:
    """Every "model:gpu:tp" of a step-time file (milliseconds, version 1). Raises ConfigError if it cannot be read."""
    try:
        content = json.loads(path.expanduser().read_text(encoding="utf-8"))
        if content["version"] != 1 or content["unit"] != "ms":
            raise ConfigError(f"{path}: expected a step-time file of version 1 in ms")
        host_ms = float(content["cpu_overhead_ms_default"])
        profiles = [_layered_profile(entry, host_ms) for entry in content["profiles"]]
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise ConfigError(f"{path}: not a step-time file: {type(e).__name__}: {e}") from e
    return {profile.name: profile for profile in profiles}


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


def _layered_profile(entry: dict[str, Any], host_ms: float) -> StepProfile:
    name = f"{entry['model']}:{entry['gpu']}:{entry['tp']}"
    decode, prefill = entry["attn_decode_layer"], entry["attn_prefill_layer"]
    reduce, head, linear = entry["all_reduce"], entry["lm_head"], entry["lin_layer"]
    times = LayeredStepTime(
        host_s=_seconds(host_ms),
        layers=int(entry["layers"]),
        linear_tokens=tuple(int(tokens) for tokens in linear["tokens"]),
        linear_s=tuple(_seconds(ms) for ms in linear["ms"]),
        decode_fixed_s=_seconds(decode["fixed_ms"]),
        decode_s_per_context_token=_seconds(decode["ms_per_gb"] * decode["gb_per_ctx_token"]),
        prefill_fixed_s=_seconds(prefill["fixed_ms"]),
        prefill_s_per_chunk_x_past=_seconds(prefill["ms_per_chunk_x_past"]),
        prefill_s_per_chunk_squared=_seconds(prefill["ms_per_chunk_sq"]),
        all_reduces=float(reduce["per_layer"]),
        all_reduce_fixed_s=_seconds(reduce["fixed_ms"]),
        all_reduce_s_per_token=_seconds(reduce["ms_per_mb"] * reduce["mb_per_token"]),
        head_fixed_s=_seconds(head["fixed_ms"]),
        head_s_per_row=_seconds(head["ms_per_row"]),
    )
    kv_tokens = int(entry["kv_capacity_tokens"]) // _FILE_BLOCK_SIZE * _FILE_BLOCK_SIZE
    shape = EngineShape(
        kv_tokens=kv_tokens,
        block_size=_FILE_BLOCK_SIZE,
        max_running=_FILE_MAX_RUNNING,
        max_step_tokens=_FILE_MAX_STEP_TOKENS,
        max_model_len=min(_FILE_MAX_MODEL_LEN, kv_tokens),
    )
    return StepProfile(name, str(linear["source"]), times, shape)


def _seconds(milliseconds: float) -> float:
    seconds = float(milliseconds) / 1000
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{milliseconds!r} is not a duration")
    return seconds
