"""Ordering policies, one per file. A new one needs its file and its case in `_named`."""

from dataclasses import replace
from typing import Any, assert_never, cast, get_args

from tempo_router.config import PolicyName, SchedulingConfig
from tempo_router.policies.alise import SpeculativeQueues
from tempo_router.policies.atlas import LeastAttainedPath
from tempo_router.policies.base import BatchRule, Context, Policy
from tempo_router.policies.bros import LeastSlack
from tempo_router.policies.class_fcfs import ClassArrival
from tempo_router.policies.class_priority import ClassPriority
from tempo_router.policies.density import ValueDensity
from tempo_router.policies.edf import EarliestDeadline
from tempo_router.policies.edf_preemptive import PreemptiveEarliestDeadline
from tempo_router.policies.fcfs import FirstCome
from tempo_router.policies.hygen import OnlineFirst
from tempo_router.policies.jitserve import JitServe
from tempo_router.policies.jitserve_tuned import JitServeTuned
from tempo_router.policies.llmd import SloDeadline
from tempo_router.policies.lsdf import LargestServiceDensity
from tempo_router.policies.ltr import ShortestPredicted
from tempo_router.policies.plas import LeastAttainedProgram
from tempo_router.policies.qlm import RequestGroups
from tempo_router.policies.qoserve import DeadlinePlusWork
from tempo_router.policies.slos_serve import PlannedAdmission
from tempo_router.policies.srpt import ShortestRemaining
from tempo_router.policies.tempo import Tempo
from tempo_router.policies.vllm_fcfs import WholePromptsFirst
from tempo_router.policies.vtc import VirtualTokenCounter

POLICY_NAMES: tuple[str, ...] = get_args(PolicyName)


def build_policy(config: SchedulingConfig) -> Policy:
    """The policy that the configuration names, with its size of chunks."""
    policy = _named(config)
    if config.chunk_tokens is None or policy.batch.kind != "chunked":
        return policy
    # Every policy is a dataclass, which its protocol cannot say.
    resized: Policy = replace(cast(Any, policy), batch=replace(policy.batch, step_tokens=config.chunk_tokens))
    return resized


def _named(config: SchedulingConfig) -> Policy:  # noqa: C901  # one case per policy
    match config.policy:
        case "fcfs":
            return FirstCome()
        case "edf":
            return EarliestDeadline()
        case "class_priority":
            return ClassPriority()
        case "density":
            return ValueDensity(config.request_weight)
        case "tempo":
            switches = config.switches
            by_density = not (switches.urgency and switches.timeline)
            batch = (
                BatchRule("capped", cap_share=config.step_cap_share)
                if switches.step_cap
                else BatchRule(step_tokens=512)
            )
            return Tempo(by_density, switches.gap_bound, batch)
        case "vllm_fcfs":
            return WholePromptsFirst()
        case "class_fcfs":
            return ClassArrival()
        case "edf_preemptive":
            return PreemptiveEarliestDeadline()
        case "ltr":
            return ShortestPredicted()
        case "srpt":
            return ShortestRemaining()
        case "llmd":
            return SloDeadline()
        case "qoserve":
            return DeadlinePlusWork()
        case "hygen":
            return OnlineFirst()
        case "bros":
            return LeastSlack()
        case "lsdf":
            return LargestServiceDensity()
        case "jitserve":
            return JitServe()
        case "jitserve_tuned":
            return JitServeTuned()
        case "plas":
            return LeastAttainedProgram()
        case "atlas":
            return LeastAttainedPath()
        case "vtc":
            return VirtualTokenCounter()
        case "alise":
            return SpeculativeQueues()
        case "qlm":
            return RequestGroups()
        case "slos_serve":
            return PlannedAdmission()
        case _:
            assert_never(config.policy)


__all__ = ["POLICY_NAMES", "Context", "Policy", "build_policy"]
