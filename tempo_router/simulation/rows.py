"""What a simulated run came to, as one flat row: the columns of every table and picture of the goodput benchmark.

Pure arithmetic over a `Report`. Rows hold nothing but JSON's own types; what is undefined (a percentile of no values)
is None, never NaN or 0. `COLUMNS` says what each column means and writes the documentation of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from tempo_router.metrics import INPUT_WEIGHT, OUTPUT_WEIGHT, percentile
from tempo_router.request import Deadline, SloClass
from tempo_router.simulation.report import Report, UnitOutcome
from tempo_router.simulation.trace import Trace, Unit

CLASSES_WITH_TARGET: tuple[SloClass, ...] = tuple(name for name in get_args(SloClass) if name != "best_effort")

TTFT_GRID_S: tuple[float, ...] = tuple(round(0.01 * 10 ** (step / 10), 4) for step in range(41))
"""Times at which ttft_cdf is read: 10 ms to 100 s, ten per decade."""
LATENESS_GRID: tuple[float, ...] = tuple(round(0.02 * step, 2) for step in range(101))
"""Multiples of the target at which lateness_cdf is read: 0 to 2."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a row. unit: "" for a share, a name or a count."""

    name: str
    unit: str
    meaning: str


IDENTITY: tuple[Column, ...] = (
    Column("trace", "", "name of the trace, and what was made of it"),
    Column("trace_digest", "", "hash of the trace's content before its arrivals were moved"),
    Column("profile", "", "step-time profile; of several equal replicas `2 x name`, of unlike ones joined by ` + `"),
    Column("replicas", "", "number of replicas"),
    Column("load", "", "offered output tokens per second over `saturated_tokens_per_s`; null: the trace's own speed"),
    Column("policy", "", "policy of router and engines"),
    Column("objective", "", "what a success counts: token, balanced, request or gain"),
    Column("seed", "", "0: units in the order of the trace; else they are permuted over its arrival times"),
    Column("slots", "", "calls that one replica runs at once"),
    Column("sheds", "", "whether hopeless work is dropped; else it goes on as best effort"),
    Column("tuned", "", "whether slots and sheds were chosen for this policy, in runs that are not among the rows"),
    Column("knowledge", "", "what is known of lengths and programs: learned, regressor, none, graphs or true"),
    Column("time_scale", "", "factor on the profile's step times"),
    Column("kv_scale", "", "factor on the profile's KV memory"),
    Column("switches", "", "other settings of the scheduler that differ from the defaults"),
    Column("patience", "", "clients leave after so many times their target; null, or absent in older rows: they stay"),
    Column("retries", "", "how often a refused unit is sent again; 0 where absent, in older rows"),
    Column(
        "saturated_tokens_per_s",
        "tokens/s",
        "output of all replicas while the trace floods them: fcfs, 128 slots; null where no load needs it",
    ),
)

MEASURES: tuple[Column, ...] = (
    Column("units", "", "requests and programs of the trace; a program counts as one"),
    Column("calls", "", "calls of all units"),
    Column(
        "arrival_span_s",
        "s",
        "first to last arrival; rates are per second of it (of duration_s where it is 0), unless said otherwise",
    ),
    Column("duration_s", "s", "virtual time until the last unit was decided"),
    Column("offered_tokens_per_s", "tokens/s", "true output tokens of all units"),
    Column("token_goodput", "tokens/s", "good output tokens: of a stream those in time, of the rest all or nothing"),
    Column("request_goodput", "1/s", "units that met their target; a program counts as one"),
    Column("program_goodput", "1/s", "programs that met their deadline"),
    Column("attainment", "", "share of all units with a target that met it; refused ones are in the denominator"),
    Column("attainment_by_class", "", "the same by class"),
    Column("worst_class", "", "the class with the lowest attainment"),
    Column("worst_class_attainment", "", "its attainment"),
    Column("service_gain", "1/s", "service gain with weights 1:8 and alpha 1, partial credit for what is late"),
    Column("good_tokens_1_1", "tokens/s", "good prompt tokens + good output tokens"),
    Column("good_tokens_1_8", "tokens/s", "good prompt tokens + 8 x good output tokens"),
    Column("token_goodput_by_class", "tokens/s", "token_goodput by class"),
    Column(
        "throughput",
        "tokens/s",
        "all delivered output tokens, whatever they were worth, per second of duration_s; not to be compared with "
        "token_goodput",
    ),
    Column("ttft_p50_s", "s", "median time to first token of the streams that got one"),
    Column("ttft_p95_s", "s", "its 95th percentile"),
    Column("ttft_p99_s", "s", "its 99th percentile"),
    Column("tbt_p50_s", "s", "median gap between consecutive tokens over all gaps of all streams"),
    Column("tbt_p99_s", "s", "99th percentile of those gaps"),
    Column("ttlt_p95_s", "s", "95th percentile of the time to last token of finished deadline answers and programs"),
    Column("ttft_cdf", "", "share of all streams whose first token came within each of TTFT_GRID_S"),
    Column(
        "lateness_cdf", "", "by class: share of all units that had ended by each multiple (LATENESS_GRID) of the target"
    ),
    Column("jain_by_tenant", "", "Jain index over the tenants of good tokens / offered tokens with a target"),
    Column("status_by_class", "", "units by class and how they ended"),
    Column("steps", "", "engine steps of all replicas"),
    Column("preemptions", "", "running calls that lost their place"),
    Column("recomputed_tokens", "tokens", "computed again because their KV had been given up"),
    Column("prefix_hit_tokens", "tokens", "prompt tokens that the prefix cache held"),
    Column("bound_token_goodput", "tokens/s", "upper bound for any scheduler; null when it was not computed"),
    Column("wall_s", "s", "real time that the simulation took; null without a clock"),
)

COLUMNS: tuple[Column, ...] = IDENTITY + MEASURES


def columns_markdown() -> str:
    """The documentation of a row, as a Markdown table."""
    lines = ["| column | unit | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{column.name}` | {column.unit} | {column.meaning} |" for column in COLUMNS]
    return "\n".join(lines)


def measures(report: Report, trace: Trace) -> dict[str, Any]:
    """The columns of MEASURES but the last two, which the report cannot know. trace: the one that was simulated."""
    outcomes = report.units
    if len(outcomes) != len(trace.units):
        raise ValueError(f"a report on {len(outcomes)} units does not belong to a trace of {len(trace.units)}")
    window_s = report.arrival_span_s if report.arrival_span_s > 0 else report.duration_s
    judged = [outcome for outcome in outcomes if outcome.is_met is not None]
    by_class = attainment_by_class(judged)
    worst = min(by_class, key=lambda name: by_class[name]) if by_class else None
    good = sum(outcome.good_tokens for outcome in judged)
    good_prompt = sum(outcome.good_prompt_tokens for outcome in judged)
    streams = [outcome for outcome in outcomes if outcome.slo_class == "latency"]
    first_tokens_s = [outcome.ttft_s for outcome in streams if outcome.ttft_s is not None]
    whole_s = [o.ttlt_s for o in judged if o.slo_class != "latency" and o.status == "finished" and o.ttlt_s is not None]
    return {
        "units": len(outcomes),
        "calls": trace.calls,
        "arrival_span_s": report.arrival_span_s,
        "duration_s": report.duration_s,
        "offered_tokens_per_s": _rate(sum(unit.output_tokens for unit in trace.units), window_s),
        "token_goodput": _rate(good, window_s),
        "request_goodput": _rate(_met(judged), window_s),
        "program_goodput": _rate(_met(o for o in judged if o.slo_class == "program"), window_s),
        "attainment": _met(judged) / len(judged) if judged else None,
        "attainment_by_class": by_class,
        "worst_class": worst,
        "worst_class_attainment": None if worst is None else by_class[worst],
        "service_gain": _rate(sum(outcome.service_gain for outcome in judged), window_s),
        "good_tokens_1_1": _rate(good_prompt + good, window_s),
        "good_tokens_1_8": _rate(INPUT_WEIGHT * good_prompt + OUTPUT_WEIGHT * good, window_s),
        "token_goodput_by_class": {
            name: _rate(sum(o.good_tokens for o in judged if o.slo_class == name), window_s) for name in by_class
        },
        "throughput": _rate(sum(outcome.output_tokens for outcome in outcomes), report.duration_s),
        "ttft_p50_s": percentile(first_tokens_s, 0.50),
        "ttft_p95_s": percentile(first_tokens_s, 0.95),
        "ttft_p99_s": percentile(first_tokens_s, 0.99),
        "tbt_p50_s": gap_percentile(report.stream_gaps_s, 0.50),
        "tbt_p99_s": gap_percentile(report.stream_gaps_s, 0.99),
        "ttlt_p95_s": percentile(whole_s, 0.95),
        "ttft_cdf": share_within(first_tokens_s, len(streams), TTFT_GRID_S),
        "lateness_cdf": lateness_by_class(trace.units, outcomes),
        "jain_by_tenant": jain(tenant_shares(trace.units, outcomes)),
        "status_by_class": status_by_class(outcomes),
        "steps": int(report.steps),
        "preemptions": int(report.preemptions),
        "recomputed_tokens": int(report.recomputed_tokens),
        "prefix_hit_tokens": int(report.prefix_hit_tokens),
    }


def attainment_by_class(outcomes: Iterable[UnitOutcome]) -> dict[str, float]:
    """Share of the units of each class that met their target; classes without units are absent."""
    counts: dict[str, list[int]] = {}
    for outcome in outcomes:
        if outcome.is_met is not None:
            pair = counts.setdefault(outcome.slo_class, [0, 0])
            pair[0] += outcome.is_met
            pair[1] += 1
    return {name: counts[name][0] / counts[name][1] for name in CLASSES_WITH_TARGET if name in counts}


def tenant_shares(units: Sequence[Unit], outcomes: Sequence[UnitOutcome]) -> dict[str, float]:
    """By tenant, good output tokens over the output tokens that it offered with a target."""
    offered: dict[str, int] = {}
    good: dict[str, int] = {}
    for unit, outcome in zip(units, outcomes, strict=True):
        if outcome.is_met is not None:
            offered[unit.tenant] = offered.get(unit.tenant, 0) + unit.output_tokens
            good[unit.tenant] = good.get(unit.tenant, 0) + outcome.good_tokens
    return {tenant: good[tenant] / tokens for tenant, tokens in offered.items() if tokens}


def jain(shares: dict[str, float]) -> float | None:
    """Jain's fairness index, 1/n (one has it all) to 1 (all have the same); None when nobody has anything."""
    squares = sum(share * share for share in shares.values())
    return sum(shares.values()) ** 2 / (len(shares) * squares) if squares > 0 else None


def gap_percentile(gaps_s: npt.NDArray[np.float64], share: float) -> float | None:
    """As metrics.percentile, for millions of values."""
    if len(gaps_s) == 0:
        return None
    return float(np.quantile(gaps_s, share, method="inverted_cdf"))


def share_within(values: Sequence[float], total: int, grid: Sequence[float]) -> list[float] | None:
    """Share of `total` things whose value exists and is at most each point of the grid; None for no things."""
    if total == 0:
        return None
    ranks = np.searchsorted(np.sort(np.asarray(values, dtype=np.float64)), np.asarray(grid), side="right")
    return [round(float(rank) / total, 5) for rank in ranks]


def lateness_by_class(units: Sequence[Unit], outcomes: Sequence[UnitOutcome]) -> dict[str, list[float]]:
    """For deadline answers and programs: the share that had ended by each multiple of the target, on LATENESS_GRID."""
    ratios: dict[str, list[float]] = {}
    totals: dict[str, int] = {}
    for unit, outcome in zip(units, outcomes, strict=True):
        if not isinstance(unit.slo, Deadline):
            continue
        totals[outcome.slo_class] = totals.get(outcome.slo_class, 0) + 1
        if outcome.status == "finished" and outcome.ttlt_s is not None:
            ratios.setdefault(outcome.slo_class, []).append(outcome.ttlt_s / unit.slo.ttlt_s)
    curves = {name: share_within(ratios.get(name, ()), total, LATENESS_GRID) for name, total in totals.items()}
    return {name: curves[name] or [] for name in CLASSES_WITH_TARGET if name in curves}


def status_by_class(outcomes: Iterable[UnitOutcome]) -> dict[str, dict[str, int]]:
    """How many units of each class ended in which way; ways that did not occur are absent."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        of_class = counts.setdefault(outcome.slo_class, {})
        of_class[outcome.status] = of_class.get(outcome.status, 0) + 1
    return {name: counts[name] for name in get_args(SloClass) if name in counts}


def _met(outcomes: Iterable[UnitOutcome]) -> int:
    return sum(outcome.is_met is True for outcome in outcomes)


def _rate(amount: float, window_s: float) -> float:
    return amount / window_s if window_s > 0 else 0.0
