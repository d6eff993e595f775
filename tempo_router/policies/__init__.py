"""Ordering policies, one per file. A new one needs its file and its line in `build_policy`."""

from typing import assert_never, get_args

from tempo_router.config import PolicyName, SchedulingConfig
from tempo_router.policies.base import Context, Policy
from tempo_router.policies.class_priority import ClassPriority
from tempo_router.policies.density import ValueDensity
from tempo_router.policies.edf import EarliestDeadline
from tempo_router.policies.fcfs import FirstCome


POLICY_NAMES: tuple[str, ...] = get_args(PolicyName)


def build_policy(config: SchedulingConfig) -> Policy:
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
        case _:
            assert_never(config.policy)


__all__ = ["POLICY_NAMES", "Context", "Policy", "build_policy"]
