"""What is measured, each formula once: latencies, goodput, service gain, attainment.

All times of one request are readings of one clock; `arrival_s` is when the ingress received it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from tempo_router.request import BestEffort, Latency, ProgramCall, Slo, SloClass, slo_class

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 8.0


def ttft_s(arrival_s: float, first_token_s: float) -> float:
    """Time to first token, queueing included."""
    return first_token_s - arrival_s


def ttlt_s(arrival_s: float, last_token_s: float) -> float:
    """Time to last token."""
    return last_token_s - arrival_s


def tbt_s(token_times_s: Sequence[float]) -> list[float]:
    """Times between tokens: each gap between consecutive ones."""
    return [later - earlier for earlier, later in itertools.pairwise(token_times_s)]


def tpot_s(ttft: float, ttlt: float, tokens: int) -> float | None:
    """Mean time per output token after the first; None for fewer than two tokens."""
    return (ttlt - ttft) / (tokens - 1) if tokens > 1 else None


def token_due_s(slo: Latency, arrival_s: float, token: int) -> float:
    """When token `token` (0-based) of a stream is due. Cumulative: being early banks time."""
    return arrival_s + slo.ttft_s + token * slo.tbt_s


def decayed(ratio: float, alpha: float) -> float:
    """Share of the worth that is left when target/measured is `ratio`; 1 when on time.

    alpha 1 decays linearly, alpha 100 is a step for practical purposes.
    """
    return min(1.0, max(1e-6, ratio)) ** alpha  # type: ignore[no-any-return]  # float ** float is Any to mypy


def whole_gain(prompt_tokens: int, output_tokens: int, target_s: float, latency_s: float, alpha: float) -> float:
    """Service gain of an answer (or program) that counts as a whole, at its completion.

    Source: Tempo, arXiv 2504.20068v1, as its artifact computes it.
    """
    worth = INPUT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
    return worth * decayed(_ratio(target_s, latency_s), alpha)


def stream_gain(
    slo: Latency, arrival_s: float, prompt_tokens: int, token_times_s: Sequence[float], alpha: float
) -> float:
    """Service gain of a stream: the prompt's share at the first token, then each token by how far it is behind.

    When the g-th token comes, `want` of them should exist, counted from the first token or its target,
    whichever was earlier. Source: as whole_gain.
    """
    if not token_times_s:
        return 0.0
    first = ttft_s(arrival_s, token_times_s[0])
    gain = INPUT_WEIGHT * prompt_tokens * decayed(_ratio(slo.ttft_s, first), alpha)
    for generated, at_s in enumerate(token_times_s, start=1):
        want = (at_s - arrival_s - min(first, slo.ttft_s)) / slo.tbt_s
        gain += OUTPUT_WEIGHT * decayed(_ratio(generated, want), alpha)
    return gain


def _ratio(target: float, measured: float) -> float:
    return target / measured if measured > 0 else 1.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended.

    ttft_s, ttlt_s: None when no token was delivered.
    good_tokens: tokens that count as goodput; 0 for best effort, which has no target.
    late_tokens: delivered tokens that count for nothing: late ones of a stream, or all of an answer that
        had to be whole and was not.
    max_tbt_s: longest gap between deliveries; None with fewer than two.
    is_met: None for best effort.
    """

    slo_class: SloClass
    ttft_s: float | None
    ttlt_s: float | None
    output_tokens: int
    good_tokens: int
    late_tokens: int
    max_tbt_s: float | None
    is_met: bool | None


def refused_outcome(slo: Slo) -> Outcome:
    """The outcome of a request that was rejected or expired: it counts as missed."""
    return Outcome(slo_class(slo), None, None, 0, 0, 0, None, None if isinstance(slo, BestEffort) else False)


class DeliveryTracker:
    """Follows the delivery of one answer; every call costs O(1), whatever the number of tokens.

    Deliveries must come in the order of time. `finish` may be called once.
    """

    __slots__ = ("_arrival_s", "_first_s", "_last_s", "_late", "_max_gap_s", "_slo", "_tokens")

    def __init__(self, slo: Slo, arrival_s: float) -> None:
        self._slo = slo
        self._arrival_s = arrival_s
        self._first_s: float | None = None
        self._last_s = arrival_s
        self._max_gap_s: float | None = None
        self._tokens = 0
        self._late = 0

    def redated(self, slo: ProgramCall) -> None:
        """Another deadline counts from now on, of an answer that counts as a whole."""
        self._slo = slo

    @property
    def tokens(self) -> int:
        """Tokens delivered so far."""
        return self._tokens

    def delivered(self, at_s: float, tokens: int) -> None:
        """`tokens` more tokens reached the client at at_s, all at once."""
        if tokens <= 0:
            return
        if self._first_s is None:
            self._first_s = at_s
        else:
            gap_s = at_s - self._last_s
            if self._max_gap_s is None or gap_s > self._max_gap_s:
                self._max_gap_s = gap_s
        slo = self._slo
        if isinstance(slo, Latency) and at_s > token_due_s(slo, self._arrival_s, self._tokens):
            self._late += _late_in_batch(slo, self._arrival_s, at_s, self._tokens, tokens)
        self._last_s = at_s
        self._tokens += tokens

    def finish(self, at_s: float, completed: bool) -> Outcome:
        """The answer ended. completed: it came to its own end; False when cancelled, failed or refused."""
        slo = self._slo
        first_s = self._first_s
        is_met: bool | None
        if isinstance(slo, BestEffort):
            is_met, late = None, 0
        elif isinstance(slo, Latency):
            is_met, late = completed and self._late == 0, self._late
        else:
            end_s = self._last_s if first_s is not None else at_s
            is_met = completed and end_s <= self._arrival_s + slo.ttlt_s
            late = 0 if is_met else self._tokens
        return Outcome(
            slo_class=slo_class(slo),
            ttft_s=None if first_s is None else ttft_s(self._arrival_s, first_s),
            ttlt_s=None if first_s is None else ttlt_s(self._arrival_s, self._last_s),
            output_tokens=self._tokens,
            good_tokens=0 if is_met is None else self._tokens - late,
            late_tokens=late,
            max_tbt_s=self._max_gap_s,
            is_met=is_met,
        )


def _late_in_batch(slo: Latency, arrival_s: float, at_s: float, first: int, tokens: int) -> int:
    """How many of the tokens first..first+tokens-1, delivered at at_s, were due before it."""
    guess = math.ceil(min((at_s - arrival_s - slo.ttft_s) / slo.tbt_s, float(first + tokens)))
    boundary = min(max(guess, first), first + tokens)
    # The division rounds differently from the product that defines the due time; the product decides.
    while boundary > first and token_due_s(slo, arrival_s, boundary - 1) >= at_s:
        boundary -= 1
    while boundary < first + tokens and token_due_s(slo, arrival_s, boundary) < at_s:
        boundary += 1
    return boundary - first


@dataclass(frozen=True, slots=True)
class Goodput:
    """What a set of requests came to.

    attainment: per class, share of its requests that met their SLO; classes without requests are absent.
    worst_class: the class with the lowest attainment; None when no request had a target.
    requests_per_s, tokens_per_s: goodput, that is requests that met their SLO and tokens that counted.
    throughput_tokens_per_s: all delivered tokens, whatever they were worth.
    """

    requests: int
    attainment: dict[SloClass, float]
    worst_class: SloClass | None
    overall_attainment: float | None
    requests_per_s: float
    tokens_per_s: float
    throughput_tokens_per_s: float


def summarise(outcomes: Iterable[Outcome], window_s: float) -> Goodput:
    """Attainment and goodput of the requests of a window. Refused ones belong in it: see refused_outcome."""
    totals: dict[SloClass, list[int]] = {}
    requests = good = delivered = 0
    for outcome in outcomes:
        requests += 1
        good += outcome.good_tokens
        delivered += outcome.output_tokens
        if outcome.is_met is not None:
            met_and_all = totals.setdefault(outcome.slo_class, [0, 0])
            met_and_all[0] += outcome.is_met
            met_and_all[1] += 1
    attainment = {name: totals[name][0] / totals[name][1] for name in get_args(SloClass) if name in totals}
    met = sum(pair[0] for pair in totals.values())
    with_target = sum(pair[1] for pair in totals.values())
    return Goodput(
        requests=requests,
        attainment=attainment,
        worst_class=min(attainment, key=lambda name: attainment[name]) if attainment else None,
        overall_attainment=met / with_target if with_target else None,
        requests_per_s=met / window_s,
        tokens_per_s=good / window_s,
        throughput_tokens_per_s=delivered / window_s,
    )
