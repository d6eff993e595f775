"""How well the rest of a program is foretold, what that costs, and what it is worth to the scheduler.

    python -m benchmarks.program_patterns --trace deepresearch_train_1-82.csv.gz [--json out.json] [--programs 600]

Three parts. **Errors**: half of the trace's programs are learnt, the others foretold stage by stage; mean absolute
error of the remaining critical path (longest answers of later stages, summed) and of the remaining stages, for the mean
of the class, for patterns, and (zero by definition) for the true graph. **Cost**: one match against 5,000 outlines.
**Worth**: the trace's programs, drawn again with their lengths varied by about 15 %, one deadline for all, on one
simulated GPU; programs in time without look-ahead, by stage means, by patterns, and with the true graphs.
Without --trace a workload is generated.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempo_router.patterns import REST_CHAIN, Outline, PatternTable, StageOutline
from tempo_router.request import Deadline
from tempo_router.simulation.experiment import Cell, run_cell
from tempo_router.simulation.generate import generate, generator_config
from tempo_router.simulation.trace import Trace, TraceCall, Unit
from tempo_router.simulation.trace_file import read_trace

STORED = 5000
SPREAD = 0.15
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "no look-ahead": ("learned", {"look_ahead": False}),
    "stage means": ("learned", {"program_model": "stages"}),
    "patterns": ("learned", {"program_model": "patterns"}),
    "true graphs": ("graphs", {}),
}


def outlines_of(trace: Trace) -> list[tuple[StageOutline, ...]]:
    """Every program of a trace, stage by stage."""
    return [_outline(unit) for unit in trace.units if unit.is_program]


def _outline(unit: Unit) -> tuple[StageOutline, ...]:
    stages: dict[int, list[TraceCall]] = {}
    for call in unit.calls:
        stages.setdefault(call.stage, []).append(call)
    return tuple(
        StageOutline(
            len(calls),
            sum(call.prompt_tokens for call in calls),
            float(sum(call.prompt_tokens**2 for call in calls)),
            sum(call.output_tokens for call in calls),
            max(call.output_tokens for call in calls),
            max(call.prompt_tokens for call in calls),
            max(call.gap_s for call in calls),
        )
        for _, calls in sorted(stages.items())
    )


def errors(programs: Sequence[tuple[StageOutline, ...]]) -> list[dict[str, Any]]:
    """By stage that has ended: mean absolute errors on the second half, learnt from the first."""
    half = len(programs) // 2
    learnt, unseen = programs[:half], programs[half:]
    table = PatternTable(STORED)
    for one in learnt:
        table.add(Outline("app", 0.0, one))
    found: dict[int, list[tuple[float, ...]]] = {}
    for one in unseen:
        for stage in range(len(one) - 1):
            match = table.match(one[: stage + 1], 0.0, is_between=True)
            alike = [other for other in learnt if len(other) > stage]
            if match is None or not alike:
                continue
            chain, stages = _rest(one, stage)
            mean_chain, mean_stages = map(statistics.fmean, zip(*(_rest(other, stage) for other in alike), strict=True))
            found.setdefault(stage, []).append(
                (
                    abs(mean_chain - chain), abs(match.forecast.chain_tokens - chain),
                    abs(match.quantile(REST_CHAIN, 0.5) - chain), abs(mean_stages - stages),
                    abs(match.forecast.stages - stages), chain, stages,
                )
            )  # fmt: skip
    names = ("chain_class_mean", "chain_patterns", "chain_patterns_median", "stages_class_mean", "stages_patterns",
             "true_chain", "true_stages")  # fmt: skip
    rows: list[dict[str, Any]] = []
    everything = [row for stage in found.values() for row in stage]
    for label, each in [*sorted(found.items()), ("all", everything)]:
        means = (round(statistics.fmean(column), 2) for column in zip(*each, strict=True))
        rows.append({"after_stage": label, "programs": len(each), **dict(zip(names, means, strict=True))})
    return rows


def _rest(program: Sequence[StageOutline], stage: int) -> tuple[float, float]:
    return float(sum(one.chain_tokens for one in program[stage + 1 :])), float(len(program) - stage - 1)


def match_cost_ms(programs: Sequence[tuple[StageOutline, ...]], seed: int) -> dict[str, float]:
    """CPU time of one match against STORED outlines, the table built."""
    rng = random.Random(seed)
    table = PatternTable(STORED)
    for number in range(STORED):
        table.add(Outline("app", 0.0, tuple(_varied_stage(one, rng) for one in programs[number % len(programs)])))
    asked = [one[: stage + 1] for one in programs for stage in range(len(one))]
    for seen in asked:
        table.match(seen, 0.0)
    costs = []
    for seen in asked * 3:
        began = time.thread_time()
        table.match(seen, 0.0)
        costs.append((time.thread_time() - began) * 1000)
    cuts = statistics.quantiles(costs, n=100)
    return {"stored": STORED, "matches": len(costs), "p50": round(cuts[49], 3), "p95": round(cuts[94], 3)}


def _varied_stage(one: StageOutline, rng: random.Random) -> StageOutline:
    chain = _varied(one.chain_tokens, rng)
    return one._replace(chain_tokens=chain, output_tokens=max(chain, _varied(one.output_tokens, rng)))


def _varied(tokens: int, rng: random.Random) -> int:
    return max(1, round(tokens * rng.lognormvariate(0.0, SPREAD)))


def workload(trace: Trace, programs: int, deadline_s: float, seed: int) -> Trace:
    """Programs of the trace drawn again, lengths varied, Poisson arrivals; the deadline tells nothing about them."""
    rng = random.Random(seed)
    known = [unit for unit in trace.units if unit.is_program]
    at_s, units = 0.0, []
    for number in range(programs):
        at_s += rng.expovariate(1.0)
        unit = rng.choice(known)
        calls = tuple(
            replace(
                call,
                request_id=f"{number}-{position}",
                prompt_tokens=_varied(call.prompt_tokens, rng),
                output_tokens=_varied(call.output_tokens, rng),
                prefix_id="",
                prefix_tokens=0,
            )
            for position, call in enumerate(unit.calls)
        )
        units.append(replace(unit, unit_id=f"p{number}", arrival_s=at_s, calls=calls, slo=Deadline(deadline_s)))
    return Trace(f"{trace.name}-drawn", tuple(units))


def worth(trace: Trace, profile: str, load: float, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Programs in time and good tokens/s of each way to look ahead; means over orders of the trace."""
    rows = []
    for name, (knowledge, switches) in WAYS.items():
        runs = [
            run_cell(
                Cell(trace, (profile,), None, load, "tempo", objective="balanced", seed=seed, knowledge=knowledge,
                     switches=switches)
            )
            for seed in seeds
        ]  # fmt: skip
        rows.append(
            {
                "look_ahead": name,
                "attainment": round(statistics.fmean(run["attainment"] for run in runs), 4),
                "good_tokens_per_s": round(statistics.fmean(run["token_goodput"] for run in runs), 1),
            }
        )
    return rows


def recovered(rows: Sequence[dict[str, Any]], way: str, measure: str) -> float | None:
    """Share of the gap between no look-ahead and the true graphs that a way closes; None without a gap."""
    value = {row["look_ahead"]: row[measure] for row in rows}
    gap = value["true graphs"] - value["no look-ahead"]
    return round((value[way] - value["no look-ahead"]) / gap, 3) if gap > 0 else None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a CSV as in docs/workloads.md that holds programs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--programs", type=int, default=600)
    parser.add_argument("--deadline-s", type=float, default=100.0)
    parser.add_argument("--profile", default="llama-3-8b:a100-80g:1")
    parser.add_argument("--load", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    trace = read_trace(options.trace) if options.trace else generate(generator_config({"duration_s": 1200}), seed=0)
    programs = outlines_of(trace)
    result: dict[str, Any] = {"trace": trace.name, "programs": len(programs), "errors": errors(programs)}
    result["match_ms"] = match_cost_ms(programs, seed=1)
    for row in (*result["errors"], result["match_ms"]):
        print(json.dumps(row))
    drawn = workload(trace, options.programs, options.deadline_s, seed=3)
    result["worth"] = worth(drawn, options.profile, options.load, range(options.seeds))
    for row in result["worth"]:
        print(json.dumps(row))
    for way in ("stage means", "patterns"):
        for measure in ("attainment", "good_tokens_per_s"):
            share = result[f"recovered {way} {measure}"] = recovered(result["worth"], way, measure)
            print(f"gap in {measure} that {way} close: {share}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
