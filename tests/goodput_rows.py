"""Made-up rows of the goodput benchmark, shaped like real ones, for tests of its tables and pictures."""

import math
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.goodput_comparison import grouped
from tempo_router.simulation.rows import LATENESS_GRID, TTFT_GRID_S


def goodput_row(
    policy: str = "tempo", load: float = 1.5, seed: int = 0, goodput: float = 2000.0, **values: Any
) -> dict[str, Any]:
    """One row; what is not given is plausible and depends on nothing but the arguments."""
    rng = random.Random(f"{policy} {load} {seed} {values.get('objective')}")
    attainment = values.get("attainment", 0.9)
    by_class = {
        "latency": min(1.0, attainment + 0.05),
        "deadline": attainment,
        "program": max(0.0, attainment - 0.3),
    }
    row: dict[str, Any] = {
        "trace": "mixed",
        "trace_digest": "0123456789abcdef",
        "profile": "llama-3-8b:h100-80g:1",
        "replicas": 1,
        "load": load,
        "policy": policy,
        "objective": "token",
        "seed": seed,
        "slots": 128,
        "sheds": True,
        "tuned": False,
        "knowledge": "learned",
        "time_scale": 1.0,
        "kv_scale": 1.0,
        "switches": {},
        "saturated_tokens_per_s": 2300.0,
        "units": 1800,
        "calls": 4500,
        "arrival_span_s": 1800.0 / load,
        "duration_s": 1900.0 / load,
        "offered_tokens_per_s": 2300.0 * load,
        "token_goodput": goodput,
        "request_goodput": attainment * load,
        "program_goodput": by_class["program"] * load / 3,
        "attainment": attainment,
        "attainment_by_class": by_class,
        "worst_class": "program",
        "worst_class_attainment": by_class["program"],
        "service_gain": 10 * goodput,
        "good_tokens_1_1": 4 * goodput,
        "good_tokens_1_8": 11 * goodput,
        "token_goodput_by_class": {"latency": 0.2 * goodput, "deadline": 0.2 * goodput, "program": 0.6 * goodput},
        "throughput": 2200.0,
        "ttft_p50_s": 0.1,
        "ttft_p95_s": 0.25,
        "ttft_p99_s": 0.4,
        "tbt_p50_s": 0.02,
        "tbt_p99_s": 0.04,
        "ttlt_p95_s": 60.0,
        "ttft_cdf": [by_class["latency"] * _logistic(3 * math.log10(at / 0.2)) for at in TTFT_GRID_S],
        "lateness_cdf": {
            name: [by_class[name] * _logistic(8 * (at - 0.6 - 0.1 * rng.random())) for at in LATENESS_GRID]
            for name in ("deadline", "program")
        },
        "jain_by_tenant": 0.97,
        "status_by_class": {"latency": {"finished": 500, "expired": 100}, "program": {"finished": 300, "expired": 300}},
        "steps": 50_000,
        "preemptions": 3,
        "recomputed_tokens": 100,
        "prefix_hit_tokens": 1000,
        "bound_token_goodput": None,
        "wall_s": 12.0,
    }
    return row | values


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def full_rows(loads: Sequence[float] = (0.9, 1.0, 1.5), seeds: int = 2) -> list[dict[str, Any]]:
    """Rivals, ours under both objectives, without a part, and clairvoyant, at one place."""
    rivals = {"jitserve": 0.6, "jitserve_tuned": 0.7, "qoserve": 0.75, "class_priority": 0.72, "edf": 0.4, "fcfs": 0.1}
    quality = {"tempo": 0.9, "srpt": 0.8, **rivals}
    rows = []
    for seed in range(seeds):
        for load in loads:
            for policy, share in quality.items():
                goodput = 2000 * (share if load > 1 else 0.95) + 10 * seed
                known = "true" if policy == "srpt" else "learned"
                rows.append(goodput_row(policy, load, seed, goodput, attainment=share, bound_token_goodput=2100.0,
                                        knowledge=known))  # fmt: skip
            rows.append(goodput_row("tempo", load, seed, 1700.0, objective="balanced", attainment=0.95))
            rows.append(goodput_row("tempo", load, seed, 1200.0 if load > 1 else 1900.0, switches={"reserve": False}))
            rows.append(goodput_row("tempo", load, seed, 1900.0, knowledge="true"))
    return rows


def only_place(rows: Sequence[dict[str, Any]]) -> Any:
    """The lines of the one place that these rows are of."""
    (lines,) = grouped(rows).values()
    return lines
