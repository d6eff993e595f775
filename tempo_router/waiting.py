"""A request that waits at the router: its spec, and what has been learnt about it since it came."""

from tempo_router.facts import Facts, facts_of
from tempo_router.prediction import Lengths
from tempo_router.request import RequestSpec
from tempo_router.standing import UNRANKED


class WaitingRequest:
    """State of one waiting request. Owned by RouterCore and its queue; policies only read it.

    ticket: number in the order of becoming waiting, unique; breaks every tie.
    since_s: when it began to wait here. lengths: distribution of its answer's length.
    cached_tokens: leading tokens of its context that a replica is believed to have cached.
    cost_s: predicted GPU seconds, as counted in the backlog.
    hopeless_at_s: when it is beyond help, as predicted when it came.
    is_at_front: the next plan looks at it again (plan_turns.py).
    standing: where the last plan put it. is_given_up: it can no longer meet its SLO and is ordered as best effort.
    is_deferred: the plan has no room for it, and that has been said (deferrals.py).
    is_in_line: it waits; is_queued: it waits in the queue, from where it may be popped and put back.
    key, entry: where it stands in the queue, and which of its entries there is the valid one.
    timer: number of the timer that is set for it (hopeless.py).
    blocked_since_s: when it was first found to be next and without room; None while that has not happened.
    """

    __slots__ = (
        "blocked_since_s",
        "cached_tokens",
        "cost_s",
        "entry",
        "hopeless_at_s",
        "is_at_front",
        "is_deferred",
        "is_given_up",
        "is_in_line",
        "is_queued",
        "key",
        "lengths",
        "since_s",
        "spec",
        "standing",
        "ticket",
        "timer",
    )

    def __init__(
        self,
        spec: RequestSpec,
        ticket: int,
        since_s: float,
        lengths: Lengths,
        cost_s: float,
        hopeless_at_s: float,
    ) -> None:
        self.spec = spec
        self.ticket = ticket
        self.since_s = since_s
        self.lengths = lengths
        self.cost_s = cost_s
        self.hopeless_at_s = hopeless_at_s
        self.is_given_up = False
        self.standing = UNRANKED
        self.is_at_front = False
        self.is_deferred = False
        self.is_in_line = False
        self.is_queued = False
        self.key = 0.0
        self.entry = 0
        self.cached_tokens = 0
        self.timer = 0
        self.blocked_since_s: float | None = None

    @property
    def is_relegated(self) -> bool:
        """It was given up."""
        return self.is_given_up

    @property
    def facts(self) -> Facts:
        """The spec in numbers; not kept, as who needs them often keeps them in columns."""
        return facts_of(self.spec)

    @property
    def generated_tokens(self) -> int:
        """Answer tokens that earlier attempts delivered."""
        return self.spec.generated_tokens

    @property
    def missing_tokens(self) -> int:
        """Context to be computed, less what a cache is believed to hold."""
        return max(1, self.spec.context_tokens - self.cached_tokens)
