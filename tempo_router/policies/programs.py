"""Keys of live calls where those of one program share a key."""

from collections.abc import Sequence

from tempo_router.policies.base import Context, Job, Policy
from tempo_router.request import ProgramCall, ProgramId


def keys_by_program(
    policy: Policy, jobs: Sequence[Job], context: Context, *, are_relegated_apart: bool = True
) -> list[float]:
    """The key of each job in this order; that of a program, which is costly, is computed once, for its first job.

    are_relegated_apart: relegated calls do not share it, and have keys of their own.
    """
    of_program: dict[ProgramId, float] = {}
    keys: list[float] = []
    for job in jobs:
        slo = job.spec.slo
        if not isinstance(slo, ProgramCall) or (are_relegated_apart and job.is_relegated):
            keys.append(policy.key(job, context))
            continue
        if slo.program_id not in of_program:
            of_program[slo.program_id] = policy.key(job, context)
        keys.append(of_program[slo.program_id])
    return keys
