"""A trace in numbers: enough to see whether two workloads are alike."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tempo_router.request import BestEffort, Deadline, Latency, SloClass
from tempo_router.simulation.trace import Trace, Unit

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """Of all calls, or of the arrivals of units where so named; None where too few units arrive.

    arrivals_per_s: over the time from the first to the last arrival. gap_cv: coefficient of variation of the gaps
    between arrivals. peak_over_mean: arrivals in the busiest minute over the mean of all minutes.
    prefix_share: prefix tokens over prompt tokens.
    """

    name: str
    units: int
    calls: int
    units_by_class: dict[SloClass, int]
    calls_by_app: dict[str, int]
    tenants: int
    programs: int
    stages_p50: float | None
    longest_program: int
    span_s: float
    arrivals_per_s: float | None
    gap_cv: float | None
    peak_over_mean: float | None
    prompt_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    max_call_tokens: int
    prefix_share: float


def trace_statistics(trace: Trace) -> TraceStatistics:
    """The numbers of a trace with at least one unit."""
    calls = [call for unit in trace.units for call in unit.calls]
    prompts = np.array([call.prompt_tokens for call in calls])
    outputs = np.array([call.output_tokens for call in calls])
    arrivals_s = np.array([unit.arrival_s for unit in trace.units])
    span_s = float(arrivals_s[-1] - arrivals_s[0])
    programs = [unit for unit in trace.units if unit.is_program]
    return TraceStatistics(
        name=trace.name,
        units=len(trace.units),
        calls=len(calls),
        units_by_class=dict(Counter(unit_class(unit) for unit in trace.units).most_common()),
        calls_by_app=_calls_by_app(trace.units),
        tenants=len({unit.tenant for unit in trace.units}),
        programs=len(programs),
        stages_p50=float(np.median([len({c.stage for c in p.calls}) for p in programs])) if programs else None,
        longest_program=max((len(program.calls) for program in programs), default=0),
        span_s=span_s,
        arrivals_per_s=(len(trace.units) - 1) / span_s if span_s > 0 else None,
        gap_cv=_gap_cv(arrivals_s),
        peak_over_mean=_peak_over_mean(arrivals_s),
        prompt_tokens=_quantiles(prompts),
        output_tokens=_quantiles(outputs),
        max_call_tokens=int((prompts + outputs).max()),
        prefix_share=sum(call.prefix_tokens for call in calls) / int(prompts.sum()),
    )


def unit_class(unit: Unit) -> SloClass:
    """The class that a unit is counted under."""
    match unit.slo:
        case Latency():
            return "latency"
        case Deadline():
            return "program" if unit.is_program else "deadline"
        case BestEffort():
            return "best_effort"


def _calls_by_app(units: Sequence[Unit]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for unit in units:
        counts[unit.app] += len(unit.calls)
    return dict(counts.most_common())


def _quantiles(values: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, QUANTILES))


def _gap_cv(arrivals_s: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float | None:
    gaps = np.diff(arrivals_s)
    if len(gaps) < 2 or gaps.mean() == 0:
        return None
    return float(gaps.std() / gaps.mean())


def _peak_over_mean(arrivals_s: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float | None:
    minutes = np.bincount(((arrivals_s - arrivals_s[0]) // 60).astype(int))
    return float(minutes.max() / minutes.mean()) if len(minutes) > 1 else None
