"""How much waits: counts, tokens and predicted GPU seconds by class, and what follows for who comes next."""

from typing import get_args

from tempo_router.request import SloClass, slo_class
from tempo_router.step_time import Pace
from tempo_router.value import PREFILL_WALL_RATIO
from tempo_router.waiting import WaitingRequest

NO_REPLICA_WAIT_S = 300.0
"""Wait told to clients while no replica is attached: a model may be loading. A guess, finite for the wire."""

MAX_WAIT_S = 86_400.0
MIN_RETRY_S = 1.0


class Backlog:
    """Running sums over the waiting requests."""

    __slots__ = ("cost_s", "prompt_tokens", "requests")

    def __init__(self) -> None:
        self.requests: dict[SloClass, int] = dict.fromkeys(get_args(SloClass), 0)
        self.cost_s: dict[SloClass, float] = dict.fromkeys(get_args(SloClass), 0.0)
        self.prompt_tokens = 0

    def add(self, request: WaitingRequest) -> None:
        """A request began to wait."""
        name = slo_class(request.spec.slo)
        self.requests[name] += 1
        self.cost_s[name] += request.cost_s
        self.prompt_tokens += request.spec.prompt_tokens

    def remove(self, request: WaitingRequest) -> None:
        """A request waits no longer."""
        name = slo_class(request.spec.slo)
        self.requests[name] -= 1
        # Sums of floats drift; an empty class is exactly zero again.
        self.cost_s[name] = self.cost_s[name] - request.cost_s if self.requests[name] else 0.0
        self.prompt_tokens -= request.spec.prompt_tokens

    def ahead_s(self, name: SloClass, is_class_blind: bool) -> float:
        """Predicted GPU seconds of the waiting work that may go before a newcomer of this class.

        is_class_blind: the policy does not put best effort last. An estimate from above: a dense newcomer overtakes
        part of it.
        """
        everything = sum(self.cost_s.values())
        if is_class_blind or name == "best_effort":
            return max(everything, 0.0)
        return max(everything - self.cost_s["best_effort"], 0.0)

    def retry_after_s(self, replicas: int) -> float:
        """When a refused client may try again: the time in which the replicas work off what waits."""
        return min(max(MIN_RETRY_S, sum(self.cost_s.values()) / max(replicas, 1)), MAX_WAIT_S)


def expected_wait_s(request: WaitingRequest, ahead_s: float, slot_s: float, replicas: int, pace: Pace) -> float:
    """Predicted time until the first token of a request that has just come. Finite.

    slot_s: until the first replica has a slot (Fleet.next_slot_s). replicas: how many take work.
    """
    own_s = PREFILL_WALL_RATIO * pace.prefill_s(request.spec.context_tokens) + pace.tau_s
    if not replicas:
        return min(NO_REPLICA_WAIT_S + ahead_s + own_s, MAX_WAIT_S)
    return min(slot_s + ahead_s / replicas + own_s, MAX_WAIT_S)
