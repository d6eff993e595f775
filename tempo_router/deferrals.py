"""What a plan changed: whom it defers from now on, and for whom it has room again."""

from collections.abc import Iterable

from tempo_router.actions import Action, Defer, Readmit
from tempo_router.policies.base import goes_last
from tempo_router.replicas import Call
from tempo_router.waiting import WaitingRequest


def note_deferrals(planned: Iterable[WaitingRequest | Call], actions: list[Action]) -> None:
    """Say of whom a plan has just looked at what it did not say before. What goes last has no place to lose."""
    for job in planned:
        standing = job.standing
        if standing.is_admitted != job.is_deferred:
            continue
        if job.is_deferred:
            job.is_deferred = False
            actions.append(Readmit(job.spec.request_id))
        elif not goes_last(job):
            job.is_deferred = True
            actions.append(Defer(job.spec.request_id, "no_room" if standing.density > 0.0 else "no_worth"))
