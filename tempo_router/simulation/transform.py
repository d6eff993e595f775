"""Traces from traces: another load, another order, other targets, a part. Nothing here changes its argument."""

import math
import random
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import assert_never

from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.step_profiles import Prefill, StepTime
from tempo_router.simulation.trace import Trace, TraceCall, Unit, UnitSlo


def faster(trace: Trace, factor: float) -> Trace:
    """Arrivals `factor` times as dense; gaps inside programs stay, since tools do not hurry under load."""
    _check_factor("factor", factor)
    return _with_units(trace, (replace(unit, arrival_s=unit.arrival_s / factor) for unit in trace.units))


def permuted(trace: Trace, seed: int) -> Trace:
    """The same arrival times and the same units, matched at random; seed 0 changes nothing.

    Each seed is another sample of the same workload. prefix_tokens stay as they are: exact for what a program shares
    with itself, an approximation for what units share with each other.
    """
    if seed == 0:
        return trace
    units = list(trace.units)
    random.Random(seed).shuffle(units)
    return _with_units(
        trace, (replace(unit, arrival_s=old.arrival_s) for unit, old in zip(units, trace.units, strict=True))
    )


def with_slo_scale(trace: Trace, factor: float) -> Trace:
    """Every target times `factor`; below 1 is tighter."""
    _check_factor("factor", factor)
    return _with_units(trace, (replace(unit, slo=_scaled(unit.slo, factor)) for unit in trace.units))


def with_deadline_scale(trace: Trace, factor: float) -> Trace:
    """Whole answers and programs are due after `factor` times as long; targets of streams stay."""
    _check_factor("factor", factor)
    return _with_units(
        trace,
        (
            replace(unit, slo=_scaled(unit.slo, factor)) if isinstance(unit.slo, Deadline) else unit
            for unit in trace.units
        ),
    )


def with_length_scale(trace: Trace, factor: float) -> Trace:
    """Every prompt and answer times `factor`, at least one token; gaps inside programs too. Arrivals and targets stay.

    For engines that are slower than those that the trace was made for.
    """
    _check_factor("factor", factor)

    def scaled(call: TraceCall) -> TraceCall:
        return replace(
            call,
            prompt_tokens=max(1, round(call.prompt_tokens * factor)),
            output_tokens=max(1, round(call.output_tokens * factor)),
            prefix_tokens=round(call.prefix_tokens * factor),
            gap_s=call.gap_s * factor,
        )

    return _with_units(trace, (replace(unit, calls=tuple(map(scaled, unit.calls))) for unit in trace.units))


def with_names(trace: Trace, prefix: str) -> Trace:
    """The same trace under other names, so that two replays on one server share no ids and no cached prefixes."""

    def named(call: TraceCall) -> TraceCall:
        prefix_id = f"{prefix}{call.prefix_id}" if call.prefix_id else ""
        return replace(call, request_id=f"{prefix}{call.request_id}", prefix_id=prefix_id)

    return _with_units(
        trace,
        (replace(unit, unit_id=f"{prefix}{unit.unit_id}", calls=tuple(map(named, unit.calls))) for unit in trace.units),
    )


TTFT_FLOOR_S = 0.1
"""No first token is due sooner by a factor on unloaded times (guessed: what seems immediate to a reader).

Alone, a short prompt takes a single step; a target of a few steps would only ask whether the engine was busy when the
prompt came.
"""


def with_unloaded_slos(
    trace: Trace,
    factor: float,
    step_time: StepTime,
    *,
    step_tokens: int = 2048,
    ttft_floor_s: float = TTFT_FLOOR_S,
) -> Trace:
    """Targets of `factor` times what each unit needs alone on an engine with these step times.

    TTFT: the prefill, in steps of `step_tokens`, nothing cached; at least ttft_floor_s. TBT: a decode step with the
    full context. TTLT: prefill and decode or, for programs, the longest way through them with its gaps (which the
    factor scales too).
    """
    _check_factor("factor", factor)
    if step_tokens < 1:
        raise ConfigError(f"step_tokens={step_tokens}: must be at least 1")
    if not 0 <= ttft_floor_s < math.inf:
        raise ConfigError(f"ttft_floor_s={ttft_floor_s}: must be finite and not below zero")

    def slo_of(unit: Unit) -> UnitSlo:
        slo = _scaled(_unloaded(unit, step_time, step_tokens), factor)
        return replace(slo, ttft_s=max(ttft_floor_s, slo.ttft_s)) if isinstance(slo, Latency) else slo

    return _with_units(trace, (replace(unit, slo=slo_of(unit)) for unit in trace.units))


def without_apps(trace: Trace, apps: Collection[str]) -> Trace:
    """Without the units of these applications."""
    return _with_units(trace, (unit for unit in trace.units if unit.app not in apps))


def at_most_tokens(trace: Trace, tokens: int) -> Trace:
    """Without the units that have a call of more than `tokens` prompt and output tokens: for models that end there."""
    return _with_units(
        trace,
        (unit for unit in trace.units if all(call.prompt_tokens + call.output_tokens <= tokens for call in unit.calls)),
    )


def without_prefix_cache(trace: Trace) -> Trace:
    """The trace as engines see it that cache no prefixes: no prompt begins with what another one had; so it is named.

    A change of the trace and not of the engine, so that the reference for loads, the bound and every policy follow.
    """
    units = (
        replace(unit, calls=tuple(replace(call, prefix_id="", prefix_tokens=0) for call in unit.calls))
        for unit in trace.units
    )
    return replace(_with_units(trace, units), name=f"{trace.name} no prefix cache")


def first_s(trace: Trace, seconds: float) -> Trace:
    """The units that arrive in the first `seconds`."""
    return _with_units(trace, (unit for unit in trace.units if unit.arrival_s < seconds))


def first_output_tokens(trace: Trace, tokens: int) -> Trace:
    """The first units, until their answers have at least `tokens` tokens together; all if they never have."""
    total, units = 0, []
    for unit in trace.units:
        if total >= tokens:
            break
        units.append(unit)
        total += unit.output_tokens
    return _with_units(trace, units)


def as_best_effort(trace: Trace, share: float, seed: int) -> Trace:
    """A random `share` (0 to 1) of the single calls without targets, rounded to whole calls. Programs keep theirs."""
    if not 0 <= share <= 1:
        raise ConfigError(f"share={share}: must be from 0 to 1")
    single = [number for number, unit in enumerate(trace.units) if not unit.is_program]
    chosen = set(random.Random(seed).sample(single, round(share * len(single))))
    return _with_units(
        trace, (replace(unit, slo=BestEffort()) if i in chosen else unit for i, unit in enumerate(trace.units))
    )


def unloaded_call_s(call: TraceCall, step_time: StepTime, *, step_tokens: int = 2048) -> float:
    """Seconds from the release of the call to its last token on an engine that does nothing else."""
    prefill_s = _prefill_s(call.prompt_tokens, step_time, step_tokens)
    decodes = call.output_tokens - 1
    if not decodes:
        return prefill_s
    # Step times grow linearly with the context, so the step with the mean context is the mean step.
    return prefill_s + decodes * step_time.duration_s((), 1, call.prompt_tokens + (decodes + 1) // 2)


def critical_path_s(unit: Unit, step_time: StepTime, *, step_tokens: int = 2048) -> float:
    """Seconds from arrival to the end of the unit with every call alone on its engine, gaps included."""
    ends_s: list[float] = []
    for call in unit.calls:
        released_s = max((ends_s[parent] for parent in call.parents), default=0.0) + call.gap_s
        ends_s.append(released_s + unloaded_call_s(call, step_time, step_tokens=step_tokens))
    return max(ends_s)


def _unloaded(unit: Unit, step_time: StepTime, step_tokens: int) -> UnitSlo:
    match unit.slo:
        case Latency():
            call = unit.calls[0]
            last_step_s = step_time.duration_s((), 1, call.prompt_tokens + call.output_tokens)
            return Latency(_prefill_s(call.prompt_tokens, step_time, step_tokens), last_step_s)
        case Deadline():
            return Deadline(critical_path_s(unit, step_time, step_tokens=step_tokens))
        case BestEffort():
            return unit.slo
        case _:
            assert_never(unit.slo)


def _prefill_s(tokens: int, step_time: StepTime, step_tokens: int) -> float:
    return sum(
        step_time.duration_s((Prefill(min(step_tokens, tokens - past), past),), 0, 0)
        for past in range(0, tokens, step_tokens)
    )


def _scaled(slo: UnitSlo, factor: float) -> UnitSlo:
    match slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            return Latency(ttft_s * factor, tbt_s * factor)
        case Deadline(ttlt_s=ttlt_s):
            return Deadline(ttlt_s * factor)
        case BestEffort():
            return slo
        case _:
            assert_never(slo)


def _check_factor(name: str, factor: float) -> None:
    if not (math.isfinite(factor) and factor > 0):
        raise ConfigError(f"{name}={factor}: must be above zero")


def _with_units(trace: Trace, units: Iterable[Unit]) -> Trace:
    return Trace(trace.name, tuple(units))
