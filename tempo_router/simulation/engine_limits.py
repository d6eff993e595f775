"""What replicas can do at best, whoever schedules them: the shapes of their steps, and the least that work costs.

Step time is linear between the entries of a profile's tables, so the shapes at the corners of the linear pieces, mixed
freely, stand for all shapes. What attention costs depends only on the calls and is added.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tempo_router.errors import ConfigError
from tempo_router.simulation.linear_program import LinearProgram
from tempo_router.simulation.step_profiles import LayeredStepTime, LinearStepTime, Prefill, StepProfile, StepTime
from tempo_router.simulation.trace import TraceCall


@dataclass(frozen=True, slots=True)
class Shape:
    """A step without attention over contexts: `decodes` rows of one token and `prefill` tokens, in `seconds`."""

    decodes: float
    prefill: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Attention:
    """What work costs beyond its share in steps; never more than the profile says."""

    s_per_context_token: float
    s_per_chunk_x_past: float
    s_per_chunk_squared: float
    s_per_chunk: float
    max_chunk: int

    def prompt_s(self, cached: int, missing: int) -> float:
        """Cheapest cut of `missing` tokens after `cached` ones into chunks.

        The sum of chunk * past over m chunks that add up to p is p * cached + (p^2 - sum of squares) / 2, and that
        sum is at least p^2 / m.
        """
        fewest = math.ceil(missing / self.max_chunk)
        whole = self.s_per_chunk_x_past * missing * (cached + missing / 2)
        squared = self.s_per_chunk_squared - self.s_per_chunk_x_past / 2
        if squared <= 0:
            return whole + fewest * self.s_per_chunk + squared * missing * min(missing, self.max_chunk)
        ideal = missing * math.sqrt(squared / self.s_per_chunk) if self.s_per_chunk > 0 else float(missing)
        counts = {min(max(fewest, count), missing) for count in (math.floor(ideal), math.ceil(ideal))}
        return whole + min(count * self.s_per_chunk + squared * missing**2 / count for count in counts)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The replicas: groups of equal ones with their step shapes, and the fastest of everything among them."""

    groups: tuple[tuple[int, tuple[Shape, ...]], ...]
    attention: Attention
    step_s: float
    decode_step_s: float
    s_per_prefill_token: float

    @classmethod
    def of(cls, profiles: Sequence[StepProfile], slots: int) -> "EngineLimits":
        """Limits of these replicas, each with so many sequences in a step. Raises ConfigError for unknown profiles."""
        kinds: list[StepProfile] = []
        counts: list[int] = []
        for profile in profiles:
            if profile in kinds:
                counts[kinds.index(profile)] += 1
            else:
                kinds.append(profile)
                counts.append(1)
        parts = [_attention_of(kind.step_time, kind.shape.max_step_tokens) for kind in kinds]
        least = Attention(*(min(getattr(part, name) for part in parts) for name in Attention.__slots__))
        # A longer chunk needs fewer of them.
        attention = dataclasses.replace(least, max_chunk=max(part.max_chunk for part in parts))
        corners = [_corners(kind.step_time, slots, kind.shape.max_step_tokens) for kind in kinds]
        # Of all corners: mixtures replace the smallest steps for many calls, but not for one that is alone.
        shapes = [shape for group in corners for shape in group]
        return cls(
            groups=tuple((count, _efficient(group)) for count, group in zip(counts, corners, strict=True)),
            attention=attention,
            step_s=min(shape.seconds for shape in shapes),
            decode_step_s=min(shape.seconds for shape in shapes if shape.decodes > 0),
            s_per_prefill_token=min(shape.seconds / shape.prefill for shape in shapes if shape.prefill > 0),
        )

    @property
    def replicas(self) -> int:
        """How many there are."""
        return sum(count for count, _ in self.groups)

    def shortest_prefill_s(self, call: TraceCall) -> float:
        """From the beginning of its prompt to the first token, alone on the fastest engine."""
        missing = missing_tokens(call)
        steps = math.ceil(missing / self.attention.max_chunk) * self.step_s
        attention = self.attention.prompt_s(call.prompt_tokens - missing, missing)
        return max(steps, missing * self.s_per_prefill_token) + attention

    def shortest_decode_s(self, call: TraceCall, tokens: int) -> float:
        """From the first token to `tokens` more, alone on the engine."""
        return tokens * self.decode_step_s + self.attention.s_per_context_token * summed_context(call, tokens)


def missing_tokens(call: TraceCall) -> int:
    """Prompt tokens that no cache can hold."""
    return max(1, call.prompt_tokens - call.prefix_tokens)


def summed_context(call: TraceCall, tokens: int) -> float:
    """Summed context of the rows that make `tokens` tokens after the first one; the newest token not counted."""
    return tokens * call.prompt_tokens + tokens * (tokens - 1) / 2


def _attention_of(step_time: StepTime, max_chunk: int) -> Attention:
    match step_time:
        case LinearStepTime():
            rate = step_time.s_per_prefill_token_x_context
            return Attention(step_time.s_per_context_token, rate, rate / 2, 0.0, max_chunk)
        case LayeredStepTime():
            layers = step_time.layers
            return Attention(
                s_per_context_token=layers * step_time.decode_s_per_context_token,
                s_per_chunk_x_past=layers * step_time.prefill_s_per_chunk_x_past,
                s_per_chunk_squared=layers * step_time.prefill_s_per_chunk_squared,
                s_per_chunk=layers * step_time.prefill_fixed_s,
                max_chunk=max_chunk,
            )
        case _:
            raise ConfigError(
                f"step times of type {type(step_time).__name__} have no known linear pieces; "
                "the bound needs LinearStepTime or LayeredStepTime"
            )


def _without_attention(step_time: StepTime) -> StepTime:
    match step_time:
        case LinearStepTime():
            return dataclasses.replace(step_time, s_per_context_token=0.0, s_per_prefill_token_x_context=0.0)
        case LayeredStepTime():
            return dataclasses.replace(
                step_time,
                decode_s_per_context_token=0.0,
                prefill_fixed_s=0.0,
                prefill_s_per_chunk_x_past=0.0,
                prefill_s_per_chunk_squared=0.0,
            )
        case _:
            return step_time


def _corners(step_time: StepTime, slots: int, max_step_tokens: int) -> list[Shape]:
    """Shapes whose mixtures contain every step.

    Between two table entries step time is linear in decode rows (one or more) and prefill tokens, so the corners of
    that piece suffice. A step with prefill has a row less for decoding.
    """
    plain = _without_attention(step_time)
    beside = min(slots - 1, max_step_tokens)
    alone = min(slots, max_step_tokens)
    table = step_time.linear_tokens if isinstance(step_time, LayeredStepTime) else ()
    entries = {1, max_step_tokens, alone, max(1, beside), *(n for n in table if 1 <= n <= max_step_tokens)}
    shapes = set()
    for tokens in sorted(entries):
        shapes.add((0, tokens))
        for decodes in (1, min(beside, tokens)):
            if 1 <= decodes <= beside:
                shapes.add((decodes, tokens - decodes))
    shapes.add((alone, 0))
    shapes.add((1, 0))
    return [
        Shape(decodes, prefill, plain.duration_s([Prefill(prefill, 0)] if prefill else [], decodes, 0))
        for decodes, prefill in sorted(shapes)
    ]


def _efficient(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Those that no mixture of the others replaces: as many steps, rows and tokens in no more time."""
    kept = list(shapes)
    for shape in shapes:
        others = [other for other in kept if other is not shape]
        if not others:
            break
        program = LinearProgram()
        for other in others:
            program.column(-other.seconds, shape.seconds / other.seconds * 2)
        columns = range(len(others))
        program.row(columns, [1.0] * len(others), 1.0, math.inf)
        program.row(columns, [other.decodes for other in others], shape.decodes, math.inf)
        program.row(columns, [other.prefill for other in others], shape.prefill, math.inf)
        found, point, _, _ = program.solve(60.0)
        covers = program.violation(point) <= 1e-9
        if covers and -found <= shape.seconds:
            kept = others
    return tuple(kept)
