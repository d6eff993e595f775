"""Service gain as Tempo's and JITServe's published code computes it; two rivals order by it.

Source: the artifact of JITServe (github.com/UIUC-MLSys/JITServe), jitserve/scheduler/policy.py.
"""

from tempo_router.policies.base import Context, Job
from tempo_router.request import Latency

OUTPUT_WEIGHT = 8.0
"""A token of the answer is worth eight of the prompt, as in the artifact."""

LEAST_S = 1e-6
_LEAST_RATIO = 1e-6


def discount(wanted_s: float, taken_s: float, alpha: float) -> float:
    """What lateness leaves of a gain: (wanted / taken) to the power of alpha, between 1e-6 to that power and 1."""
    if taken_s <= wanted_s:
        return 1.0
    return float(max(_LEAST_RATIO, wanted_s / taken_s) ** alpha) if taken_s > 0 else float(_LEAST_RATIO**alpha)


def stream_target_s(slo: Latency, length: float) -> float:
    """When the last of `length` tokens of a stream is due, in seconds after its arrival."""
    return slo.ttft_s + slo.tbt_s * length


def gain(job: Job, length: float, wanted_s: float, needed_s: float, context: Context, alpha: float) -> float:
    """Weighted tokens that the request can still earn if it is served now.

    length: bound on its whole answer, in tokens; below what it has already produced the gain of a stream is negative,
        as in the artifact. wanted_s: its target, needed_s: time that it still takes; both in seconds, the first from
        its arrival.
    """
    spec, generated = job.spec, job.generated_tokens
    age_s = max(context.now_s - spec.arrival_s, 0.0)
    on_time = discount(wanted_s, age_s + needed_s, alpha)
    slo = spec.slo
    if not isinstance(slo, Latency):
        return (spec.prompt_tokens + OUTPUT_WEIGHT * length) * on_time
    if generated == 0:
        first = spec.prompt_tokens * discount(slo.ttft_s, age_s + context.pace.tau_s, alpha)
        return first + OUTPUT_WEIGHT * length * on_time
    tokens_due = (age_s - slo.ttft_s) / slo.tbt_s
    last = OUTPUT_WEIGHT * discount(float(generated), tokens_due, alpha)
    return last + OUTPUT_WEIGHT * (length - generated) * on_time
