"""Ordering policies, one per file. A new one needs its file and its line in `build_policy`."""

from typing import assert_never, get_args

from tempo_router.config import PolicyName, SchedulingConfig
from tempo_router.policies.base import Context, Policy
from tempo_router.policies.bros import LeastSlack
from tempo_router.policies.class_fcfs import ClassArrival
from tempo_router.policies.class_priority import ClassPriority
from tempo_router.policies.density import ValueDensity
from tempo_router.policies.edf import EarliestDeadline
from tempo_router.policies.edf_preemptive import PreemptiveEarliestDeadline
from tempo_router.policies.fcfs import FirstCome
from tempo_router.policies.hygen import OnlineFirst
from tempo_router.policies.llmd import SloDeadline
from tempo_router.policies.ltr import ShortestPredicted
from tempo_router.policies.qoserve import DeadlinePlusWork
from tempo_router.policies.srpt import ShortestRemaining
from tempo_router.policies.vllm_fcfs import WholePromptsFirst

POLICY_NAMES: tuple[str, ...] = get_args(PolicyName)


def build_policy(config: SchedulingConfig) -> Policy:  # noqa: C901  # one case per policy
    """The policy that the configuration names."""
    match config.policy:
        case "fcfs":
            return FirstCome()
        case "edf":
            return EarliestDeadline()
        case "class_priority":
            return ClassPriority()
        case "density":
            return ValueDensity(config.request_weight)
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
        case _:
            assert_never(config.policy)


__all__ = ["POLICY_NAMES", "Context", "Policy", "build_policy"]
