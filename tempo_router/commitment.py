"""Commitment: an answer that counts as a whole or not at all is begun only when the plan has room for all of it."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tempo_router.columns import Columns, Floats
from tempo_router.facts import STREAM
from tempo_router.ledger import Ledger
from tempo_router.policies.base import BatchRule, Context, Job, Policy
from tempo_router.request import BestEffort, Latency

HELD_BACK_KEY = 1e9
"""Added to the keys of gambles: behind all that the plan knows a use for, and before best effort, whose keys are around
two billion (policies/base.py): what could still be in time comes before what cannot."""


def is_gamble(job: Job, ledger: Ledger) -> bool:
    """It counts as a whole or not at all, nothing of it is done, and the plan has no room for it."""
    standing, spec = job.standing, job.spec
    if standing.is_admitted or standing.density <= 0.0 or job.is_relegated:
        return False
    if isinstance(spec.slo, Latency | BestEffort) or spec.generated_tokens:
        return False
    program = ledger.program(spec)
    return program is None or (program.done_calls == 0 and program.attained_tokens == 0)


class HoldingBack(Policy):
    """The queue's order under commitment: that of a policy, with the gambles behind all but best effort.

    They are not begun before the next plan admits them or their program has begun. Back there they are in nobody's way;
    at their own places every look for work would take them out and put them back.
    """

    is_static: ClassVar[bool] = False

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.batch: BatchRule = policy.batch

    def key(self, request: Job, context: Context) -> float:
        """That of the policy, of gambles above HELD_BACK_KEY."""
        key = self._policy.key(request, context)
        return key + HELD_BACK_KEY if is_gamble(request, context.ledger) else key


def held_back(keys: Floats, columns: Columns, jobs: Sequence[Job], ledger: Ledger) -> Floats:
    """Keys of many jobs as `HoldingBack.key` gives them, from those of its policy."""
    is_doubtful = ~columns.is_admitted & (columns.density > 0.0) & (columns.kind != STREAM) & ~columns.is_last
    gambles = [number for number in np.nonzero(is_doubtful)[0].tolist() if is_gamble(jobs[number], ledger)]
    keys[gambles] += HELD_BACK_KEY
    return keys
