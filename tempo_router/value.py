"""What a request is worth, what it still costs, and when it is beyond help (docs/scheduling.md).

A program's call is valued here by itself, like a deadline request; `tempo_plan` values whole programs.
"""

from typing import assert_never

from tempo_router.prediction import Lengths
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, RequestSpec
from tempo_router.step_time import Pace

PREFILL_WALL_RATIO = 1.3
"""Wall time of a prefill over its GPU time: other sequences share its steps."""

_FIRST_TOKEN_GRACE = 0.25
_FOREVER = float("inf")


def cost_s(spec: RequestSpec, lengths: Lengths, pace: Pace) -> float:
    """GPU seconds still needed: prefill of the whole context, then the expected rest of the answer. Above zero."""
    context = spec.prompt_tokens + spec.generated_tokens
    left = lengths.mean_left(spec.generated_tokens, spec.max_output_tokens)
    per_token_s = pace.share_s + pace.decode_s + pace.context_token_s * (context + left / 2)
    return pace.prefill_token_s * context + left * per_token_s


def expected_good(spec: RequestSpec, lengths: Lengths, pace: Pace, now_s: float) -> tuple[float, float]:
    """(expected good tokens, probability that the SLO is met as a whole) if it were dispatched now.

    (0, 0) for best effort, which has no target.
    """
    match spec.slo:
        case Latency() as slo:
            return _stream(spec, slo, lengths, pace, now_s)
        case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
            left_s = spec.arrival_s + ttlt_s - now_s
            return _whole(spec, left_s, lengths, pace)
        case BestEffort():
            return 0.0, 0.0
        case _:
            assert_never(spec.slo)


def _stream(spec: RequestSpec, slo: Latency, lengths: Lengths, pace: Pace, now_s: float) -> tuple[float, float]:
    generated, limit = spec.generated_tokens, spec.max_output_tokens
    late_s = now_s - _latest_start_s(spec, slo, pace)
    if late_s <= 0:
        return lengths.mean_left(generated, limit), 1.0
    lost = late_s / _catch_up_s(slo, pace) + (0.0 if generated else 1.0)
    return lengths.mean_beyond(lost, generated, limit), 0.0


def _whole(spec: RequestSpec, left_s: float, lengths: Lengths, pace: Pace) -> tuple[float, float]:
    generated, limit = spec.generated_tokens, spec.max_output_tokens
    prefill_s = PREFILL_WALL_RATIO * pace.prefill_s(spec.context_tokens)
    possible = (left_s - prefill_s) / pace.tau_s
    return (
        lengths.tokens_within(possible, generated, limit),
        lengths.probability_within(possible, generated, limit),
    )


def _latest_start_s(spec: RequestSpec, slo: Latency, pace: Pace) -> float:
    """When a stream must start for its next token to come in time."""
    due_s = spec.arrival_s + slo.ttft_s + spec.generated_tokens * slo.tbt_s
    return due_s - PREFILL_WALL_RATIO * pace.prefill_s(spec.context_tokens) - pace.tau_s


def _catch_up_s(slo: Latency, pace: Pace) -> float:
    """Lateness that a stream makes good with each token; a pace as slow as the target makes good almost nothing."""
    return max(slo.tbt_s - pace.tau_s, 1e-3 * slo.tbt_s)


def hopeless_at_s(spec: RequestSpec, lengths: Lengths, pace: Pace) -> float:
    """From when on a dispatch comes too late for any worth; infinity for best effort.

    A stream that has not begun: its first token would be late by a quarter of its target, when its reader has seen the
    target missed. Any: even the longest likely answer would be late to its last token. A whole answer: even the
    shortest likely one would miss the deadline with the replica to itself.
    """
    generated, limit = spec.generated_tokens, spec.max_output_tokens
    match spec.slo:
        case Latency() as slo:
            savable = lengths.longest_left(generated, limit) - (0.0 if generated else 1.0)
            grace_s = max(savable, 0.0) * _catch_up_s(slo, pace)
            if not generated:
                grace_s = min(grace_s, _FIRST_TOKEN_GRACE * slo.ttft_s)
            return _latest_start_s(spec, slo, pace) + grace_s
        case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
            shortest_s = lengths.shortest_left(generated, limit) * pace.alone_s
            return spec.arrival_s + ttlt_s - pace.prefill_s(spec.context_tokens) - shortest_s
        case BestEffort():
            return _FOREVER
        case _:
            assert_never(spec.slo)
