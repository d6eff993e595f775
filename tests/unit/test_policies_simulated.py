"""Every policy, and Tempo's without each of its parts, run end to end on a small workload: laws that hold of all.

What a policy is good for is tested elsewhere; here everything ends, nothing is lost, and chance has no part in it.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tempo_router.config import SchedulingConfig, SwitchesConfig
from tempo_router.policies import POLICY_NAMES, build_policy
from tempo_router.request import Deadline
from tempo_router.simulation import transform
from tempo_router.simulation.generate import generate, generator_config
from tempo_router.simulation.report import Report
from tempo_router.simulation.simulator import Setup, _Run, simulate
from tempo_router.simulation.step_profiles import load_profile
from tempo_router.simulation.trace import Trace, TraceCall, Unit

PROFILE = load_profile("llama-3-8b:h100-80g:1")


@cache
def workload() -> Trace:
    """Streams, deadlines, programs with tools and best effort, two tenants; more than four slots can do in time."""
    settings = {"rate_per_s": 20.0, "duration_s": 1.5, "best_effort_weight": 0.2, "tenants": 2, "slo_factor": 0.2}
    trace = generate(generator_config({**settings, "agent.share": 0.3}), 1)
    return transform.with_length_scale(transform.with_deadline_scale(trace, 0.1), 0.05)


def finished_run(policy: str, **more: Any) -> tuple[_Run, Report]:
    run = _Run(workload(), Setup(policy, (PROFILE,), max_running=4, **more), None)
    return run, run.run()


def check(run: _Run, report: Report) -> None:
    """Every unit ended once, what it got is what it asked for or less, and nothing is left in router or engine."""
    units = workload().units
    assert [outcome.unit_id for outcome in report.units] == [unit.unit_id for unit in units]
    for unit, outcome in zip(units, report.units, strict=True):
        assert outcome.status in {"finished", "refused", "expired"}, outcome
        assert 0 <= outcome.good_tokens <= outcome.output_tokens <= unit.output_tokens
        assert outcome.status != "finished" or outcome.output_tokens == unit.output_tokens
        assert not outcome.is_met or outcome.good_tokens == unit.output_tokens
    assert report.produced_tokens == sum(outcome.output_tokens for outcome in report.units)
    (replica,) = run._replicas.values()
    # What was given up at the very last moment leaves at the end of its step.
    if not replica.is_idle:
        replica.end_step(run._now_s + 1.0)
    replica.take_cancelled()
    replica.planner.audit()
    assert (len(replica.planner), replica.kv.held) == (0, 0)


def test_the_workload_is_an_overload_of_all_classes():
    """Else the laws below would hold of policies that never choose."""
    _, report = finished_run("fcfs")
    counts = Counter((outcome.slo_class, outcome.is_met) for outcome in report.units)
    assert {name for name, _ in counts} == {"latency", "deadline", "program", "best_effort"}
    assert all(counts[name, False] for name in ("latency", "deadline", "program")), counts


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_under_every_policy_everything_ends_nothing_is_lost_and_the_same_seed_gives_the_same(policy: str):
    run, report = finished_run(policy)
    _, again = finished_run(policy)

    check(run, report)
    assert report.units == again.units
    assert np.array_equal(report.stream_gaps_s, again.stream_gaps_s)
    assert (report.duration_s, report.steps, report.preemptions) == (again.duration_s, again.steps, again.preemptions)


@pytest.mark.parametrize("switch", tuple(SwitchesConfig.model_fields))
def test_without_each_part_of_tempo_everything_ends_and_nothing_is_lost(switch: str):
    scheduling = SchedulingConfig.model_validate({"switches": {switch: False}})
    run, report = finished_run("tempo", scheduling=scheduling)

    check(run, report)


def test_chunks_have_the_size_that_is_set_where_a_policy_fills_steps_with_them():
    batches = {}
    for chunk_tokens in (None, 64):
        for policy in POLICY_NAMES:
            config = SchedulingConfig.model_validate({"policy": policy, "chunk_tokens": chunk_tokens})
            batches[policy, chunk_tokens] = build_policy(config).batch
    for policy in POLICY_NAMES:
        before, after = batches[policy, None], batches[policy, 64]
        assert after == (replace(before, step_tokens=64) if before.kind == "chunked" else before)
    assert {policy for policy in POLICY_NAMES if batches[policy, 64].step_tokens != 64} == {"tempo", "vllm_fcfs"}

    lone = Trace("lone", (Unit("u", 0.0, Deadline(20.0), (TraceCall("u", prompt_tokens=640, output_tokens=1),)),))
    steps = {
        size: simulate(lone, Setup("fcfs", (PROFILE,), SchedulingConfig.model_validate({"chunk_tokens": size}))).steps
        for size in (None, 64)
    }
    assert steps == {None: 2, 64: 10}
