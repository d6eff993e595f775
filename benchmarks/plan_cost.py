"""What a decision costs: composing one engine step, and one plan over the whole queue.

    python -m benchmarks.plan_cost [--json out.json] [--live 256] [--waiting 1000] [--programs 1000] [--rounds 200]

Steps: a step planner with so many decoding calls and so many prompts behind them composes steps; measured when the
order is looked at anew and when it stands. Plans: a plan over so many programs, each with one waiting call. CPU time
of the thread, per decision: median and 95th percentile.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.figures_file import add_json_option, write_figures
from tempo_router.config import SchedulingConfig
from tempo_router.kv_blocks import KvBlocks
from tempo_router.ledger import Ledger
from tempo_router.metrics import percentile
from tempo_router.option_values import at_least_one
from tempo_router.policies import Context, build_policy
from tempo_router.prediction import LengthHistograms
from tempo_router.program_history import ProgramHistory
from tempo_router.request import Deadline, DispatchId, GroupId, Latency, ProgramCall, ProgramId, RequestId, RequestSpec
from tempo_router.standing import Standing
from tempo_router.step_planner import StepPlanner
from tempo_router.step_time import StepTimeModel
from tempo_router.tempo_plan import TempoPlan
from tempo_router.waiting import WaitingRequest

POLICIES = ("fcfs", "class_priority", "tempo")


def spec(number: int, rng: random.Random, *, is_program: bool) -> RequestSpec:
    """A request of the mix, or a program's first call."""
    name = RequestId(f"r{number}")
    slo = ProgramCall(ProgramId(f"p{number}"), 80.0) if is_program else rng.choice((Latency(2.0, 0.1), Deadline(20.0)))
    prompt = rng.randrange(100, 3000)
    return RequestSpec(name, number * 1e-3, slo, prompt, 1024, GroupId(name), app=f"app{number % 4}")


def step_costs(policy_name: str, live: int, waiting: int, rounds: int) -> tuple[list[float], list[float]]:
    """(microseconds of steps that order anew, of steps that keep the order)."""
    rng = random.Random(1)
    policy = build_policy(SchedulingConfig.model_validate({"policy": policy_name}))
    lengths = LengthHistograms()
    kv = KvBlocks(1_000_000, 16)
    planner = StepPlanner(policy, slots=live, max_step_tokens=8192, kv=kv, steps=StepTimeModel())
    now_s = 0.0
    for number in range(live + waiting):
        one = spec(number, rng, is_program=False)
        standing = Standing(rng.uniform(10, 1000), is_admitted=number % 2 == 0)
        planner.add(DispatchId(number), one, lengths.lookup(one), standing, now_s)
        if number == live - 1:
            while planner.waiting:
                now_s += 0.02
                plan = planner.plan(now_s)
                assert plan is not None
                planner.stepped(plan)
    anew: list[float] = []
    kept: list[float] = []
    for number in range(rounds):
        is_anew = number % 2 == 0
        now_s += policy.frame_s + 1e-3 if is_anew else 1e-6
        began = time.thread_time()
        plan = planner.plan(now_s)
        (anew if is_anew else kept).append(1e6 * (time.thread_time() - began))
        assert plan is not None
        planner.stepped(plan)
    return anew, kept


def plan_costs(programs: int, rounds: int) -> list[float]:
    """Microseconds of plans over so many programs."""
    rng = random.Random(1)
    config = SchedulingConfig.model_validate({"policy": "tempo"})
    plan, ledger, history, lengths = TempoPlan(config), Ledger(), ProgramHistory(), LengthHistograms()
    context = Context(1.0, StepTimeModel().pace(), 230.0, ledger)
    waiting = []
    for number in range(programs):
        one = spec(number, rng, is_program=True)
        waiting.append(WaitingRequest(one, number, 0.0, lengths.lookup(one), 0.1, float("inf")))
        ledger.arrived(waiting[-1])
        plan.arrived(waiting[-1], is_new=True)
    costs = []
    for _ in range(rounds):
        began = time.thread_time()
        plan.make(waiting, [], context, history, replicas=4)
        costs.append(1e6 * (time.thread_time() - began))
    return costs


def row(name: str, costs: Sequence[float]) -> dict[str, Any]:
    """Median and tail of one kind of decision."""
    return {"decision": name, "p50_us": percentile(costs, 0.5), "p95_us": percentile(costs, 0.95), "n": len(costs)}


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=at_least_one, default=256)
    parser.add_argument("--waiting", type=at_least_one, default=1000)
    parser.add_argument("--programs", type=at_least_one, default=1000)
    parser.add_argument("--rounds", type=at_least_one, default=200)
    add_json_option(parser)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: give at least 2; an order is looked at in one and kept in the next")
    rows = []
    for name in POLICIES:
        anew, kept = step_costs(name, args.live, args.waiting, args.rounds)
        rows += [row(f"step, {name}, order looked at", anew), row(f"step, {name}, order kept", kept)]
    rows.append(row(f"plan over {args.programs} programs", plan_costs(args.programs, args.rounds)))
    for one in rows:
        print(f"{one['decision']:40s} p50 {one['p50_us']:8.0f} us   p95 {one['p95_us']:8.0f} us")
    write_figures(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
