"""What a simulated run came to: one outcome for each unit of the trace, and totals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tempo_router.metrics import DeliveryTracker, stream_gain, token_due_s, whole_gain
from tempo_router.request import Latency, SloClass
from tempo_router.simulation.trace import Unit, UnitSlo

Status = Literal["finished", "refused", "expired", "abandoned", "cut"]
"""refused, expired: the router would not take it, or gave it up. abandoned: its client left.
cut: the run ended first."""

_GAIN_ALPHA = 1.0


@dataclass(frozen=True, slots=True)
class UnitOutcome:
    """How one unit ended.

    is_met: every token on time, or the last one by the deadline; None for best effort.
    prompt_tokens: of the calls that got a token. output_tokens: delivered. good_tokens: those that count as goodput.
    good_prompt_tokens: prompts that count: a stream's if its first token was in time, all of a unit that was met.
    service_gain: with alpha = 1 and weights 1:8. ttft_s: of a unit's first call. ttlt_s: None unless it finished.
    """

    unit_id: str
    app: str
    tenant: str
    slo_class: SloClass
    arrival_s: float
    status: Status
    is_met: bool | None
    calls: int
    prompt_tokens: int
    output_tokens: int
    good_tokens: int
    good_prompt_tokens: int
    service_gain: float
    ttft_s: float | None
    ttlt_s: float | None
    max_tbt_s: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """One run. units: in the trace's order. stream_gaps_s: every gap between consecutive tokens of streams.

    duration_s: virtual time of the end. wall_s belongs to whoever ran it: a report is a pure function of its input.
    """

    units: list[UnitOutcome]
    stream_gaps_s: npt.NDArray[np.float64]
    duration_s: float
    arrival_span_s: float
    steps: int
    preemptions: int
    recomputed_tokens: int
    produced_tokens: int
    prefix_hit_tokens: int


@dataclass(frozen=True, slots=True)
class CallDelivery:
    """One call as its client saw it. times_s: delivery of each token for streams; first and last for others."""

    prompt_tokens: int
    output_tokens: int
    times_s: Sequence[float]
    is_finished: bool


def unit_outcome(unit: Unit, slo_class: SloClass, status: Status, calls: Sequence[CallDelivery]) -> UnitOutcome:
    """Judge a unit by its deliveries alone; formulas as in tempo_router.metrics."""
    started = [call for call in calls if call.output_tokens]
    is_whole = status == "finished" and len(calls) == len(unit.calls) and all(call.is_finished for call in calls)
    prompt = sum(call.prompt_tokens for call in started)
    output = sum(call.output_tokens for call in started)
    first_s = min((call.times_s[0] for call in started), default=None)
    last_s = max((call.times_s[-1] for call in started), default=None)
    good, good_prompt, gain, is_met, max_tbt_s = _worth(unit.slo, unit.arrival_s, started, is_whole, prompt, output)
    return UnitOutcome(
        unit_id=unit.unit_id,
        app=unit.app,
        tenant=unit.tenant,
        slo_class=slo_class,
        arrival_s=unit.arrival_s,
        status=status,
        is_met=is_met,
        calls=len(unit.calls),
        prompt_tokens=prompt,
        output_tokens=output,
        good_tokens=good,
        good_prompt_tokens=good_prompt,
        service_gain=gain,
        ttft_s=None if first_s is None else first_s - unit.arrival_s,
        ttlt_s=last_s - unit.arrival_s if is_whole and last_s is not None else None,
        max_tbt_s=max_tbt_s,
    )


def _worth(
    slo: UnitSlo, arrival_s: float, calls: Sequence[CallDelivery], is_whole: bool, prompt: int, output: int
) -> tuple[int, int, float, bool | None, float | None]:
    """(good tokens, good prompt tokens, service gain, is_met, longest gap)."""
    if isinstance(slo, Latency):
        tracker = DeliveryTracker(slo, arrival_s)
        times = calls[0].times_s if calls else ()
        for at_s in times:
            tracker.delivered(at_s, 1)
        outcome = tracker.finish(times[-1] if times else arrival_s, completed=is_whole)
        is_prompt_good = bool(times) and times[0] <= token_due_s(slo, arrival_s, 0)
        gain = stream_gain(slo, arrival_s, prompt, times, _GAIN_ALPHA)
        return outcome.good_tokens, prompt if is_prompt_good else 0, gain, outcome.is_met, outcome.max_tbt_s
    ttlt_s = getattr(slo, "ttlt_s", None)
    if ttlt_s is None:
        return 0, 0, 0.0, None, None
    if not is_whole:
        return 0, 0, 0.0, False, None
    latency_s = max(call.times_s[-1] for call in calls) - arrival_s
    is_met = latency_s <= ttlt_s
    gain = whole_gain(prompt, output, ttlt_s, latency_s, _GAIN_ALPHA)
    return (output, prompt, gain, True, None) if is_met else (0, 0, gain, False, None)
