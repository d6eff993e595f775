"""What the router knows of each replica: the calls it gave it, the room they take, the speed it works at."""

from collections.abc import Sequence

from tempo_router.events import ReplicaCapacity, ReplicaLoad
from tempo_router.facts import Facts, facts_of
from tempo_router.prediction import Lengths
from tempo_router.request import DispatchId, ReplicaId, RequestSpec
from tempo_router.standing import UNRANKED, Standing
from tempo_router.step_time import StepTimeModel


class Call:
    """One dispatched attempt on one replica. Owned by RouterCore.

    new_tokens: tokens that this attempt has produced.
    expected_tokens: how many it is expected to produce in all; raised when it produces more.
    ticket, since_s: order and time of its dispatch. standing: where the last plan put it.
    cached_tokens: leading tokens of its context that its replica is believed to have cached.
    timer: number of the timer that is set for it (hopeless.py).
    is_deferred: the plan has no room for it, and that has been said (deferrals.py).
    is_aborted: its tokens are no longer wanted; it only holds its room until the replica says that it ended.
    """

    __slots__ = (
        "cached_tokens",
        "dispatch_id",
        "expected_tokens",
        "is_aborted",
        "is_deferred",
        "is_given_up",
        "lengths",
        "new_tokens",
        "replica",
        "since_s",
        "spec",
        "standing",
        "ticket",
        "timer",
    )

    def __init__(
        self,
        dispatch_id: DispatchId,
        spec: RequestSpec,
        replica: "Replica",
        lengths: Lengths,
        new_tokens: int,
        *,
        ticket: int = 0,
        since_s: float = 0.0,
        standing: Standing = UNRANKED,
    ) -> None:
        self.dispatch_id = dispatch_id
        self.spec = spec
        self.replica = replica
        self.lengths = lengths
        self.new_tokens = new_tokens
        self.expected_tokens = new_tokens + self._left()
        self.is_aborted = False
        self.is_deferred = False
        self.is_given_up = False
        self.ticket = ticket
        self.since_s = since_s
        self.standing = standing
        self.cached_tokens = 0
        self.timer = 0

    @property
    def facts(self) -> Facts:
        """The spec in numbers; not kept, as who needs them often keeps them in columns."""
        return facts_of(self.spec)

    @property
    def generated_tokens(self) -> int:
        """Tokens of the whole answer so far, those of earlier attempts included."""
        return self.spec.generated_tokens + self.new_tokens

    @property
    def missing_tokens(self) -> int:
        """Context that is not computed yet, as far as it can be seen from here: all of it before the first token."""
        return 0 if self.new_tokens else max(1, self.spec.context_tokens - self.cached_tokens)

    @property
    def is_relegated(self) -> bool:
        """It can no longer meet its SLO: it was given up, or the last plan says so of its program."""
        return self.is_given_up or self.standing.is_relegated

    @property
    def kv_tokens(self) -> int:
        """Room set aside for it: its context and all that it is expected to produce."""
        return self.spec.context_tokens + self.expected_tokens

    def expect_more(self) -> int:
        """It outgrew what was expected: look again. Returns by how many tokens the expectation rose."""
        before = self.expected_tokens
        self.expected_tokens = self.new_tokens + self._left()
        return self.expected_tokens - before

    def _left(self) -> int:
        return round(self.lengths.mean_left(self.generated_tokens, self.spec.max_output_tokens))


class Replica:
    """State of one attached replica.

    unstarted: calls of which no token has been seen. committed_kv: room set aside for its calls.
    left_tokens: output still expected from its calls. unstarted_context: context still to be prefilled.
    changed: where it puts itself when its calls, or what is known of them, change.
    """

    __slots__ = (
        "_changed",
        "calls",
        "capacity",
        "committed_kv",
        "is_draining",
        "left_tokens",
        "load",
        "number",
        "replica_id",
        "steps",
        "unstarted",
        "unstarted_context",
    )

    def __init__(
        self,
        replica_id: ReplicaId,
        number: int,
        capacity: ReplicaCapacity,
        steps: StepTimeModel,
        changed: set["Replica"],
    ) -> None:
        self._changed = changed
        self.replica_id = replica_id
        self.number = number
        self.capacity = capacity
        self.steps = steps
        self.load = ReplicaLoad(running=0, waiting=0, free_kv_tokens=capacity.kv_tokens)
        self.is_draining = False
        self.calls: dict[DispatchId, Call] = {}
        self.unstarted = 0
        self.committed_kv = 0
        self.left_tokens = 0
        self.unstarted_context = 0

    @property
    def free_kv(self) -> int:
        """Tokens of KV cache that no call has been promised; below zero when answers outgrew the expectation."""
        return self.capacity.kv_tokens - self.committed_kv

    def is_open(self, queue_depth: int, *, is_deep: bool = False) -> bool:
        """It takes another call: its slots and the short queue that hides the round trip are not full.

        Where calls wait in the engine although it has slots, its steps are full of prompts. It then gets what fills
        the step that runs and the one after, unless its KV cache is what lacks. is_deep: the policy orders what waits
        in the engine, too, so prompts need not be held back from one with a step planner.
        """
        if self.is_draining:
            return False
        if not self.calls:
            return True
        if len(self.calls) >= self.capacity.max_running + queue_depth:
            return False
        if is_deep and self.capacity.has_step_planner:
            return True
        if self.load.waiting == 0 or self.unstarted < queue_depth:
            return True
        return self.unstarted_context < min(2 * self.capacity.max_step_tokens, self.load.free_kv_tokens)

    def next_slot_s(self) -> float:
        """Predicted time until one of its calls ends: the mean rest, divided by their number. It must have calls."""
        calls = len(self.calls)
        return self.left_tokens / calls * self.steps.tau_s / calls

    def outstanding_s(self) -> float:
        """Predicted GPU seconds of the work that it has been given."""
        pace = self.steps.pace()
        return self.left_tokens * (pace.share_s + pace.decode_s) + self.unstarted_context * pace.prefill_token_s

    def add(self, call: Call) -> None:
        """Give it a call, or find it running one."""
        self._changed.add(self)
        self.calls[call.dispatch_id] = call
        self.committed_kv += call.kv_tokens
        self.left_tokens += call.expected_tokens - call.new_tokens
        if call.new_tokens == 0:
            self.unstarted += 1
            self.unstarted_context += call.spec.context_tokens

    def remove(self, call: Call) -> None:
        """The call left the replica."""
        self._changed.add(self)
        del self.calls[call.dispatch_id]
        self.committed_kv -= call.kv_tokens
        self.left_tokens -= call.expected_tokens - call.new_tokens
        if call.new_tokens == 0:
            self.unstarted -= 1
            self.unstarted_context -= call.spec.context_tokens

    def progress(self, calls: Sequence[Call | None], news: Sequence[tuple[DispatchId, int]]) -> list[Call]:
        """The calls produced tokens, as `news` says in the same order; None stands for a call that is over.

        Returns those that got their first ones. The innermost loop of the router: one turn for every token.
        """
        self._changed.add(self)
        begun: list[Call] = []
        produced = 0
        for call, (_, tokens) in zip(calls, news, strict=True):
            if call is None:
                continue
            if not call.new_tokens and tokens:
                self.unstarted -= 1
                self.unstarted_context -= call.spec.context_tokens
                begun.append(call)
            call.new_tokens += tokens
            produced += tokens
            if call.new_tokens >= call.expected_tokens:
                more = call.expect_more()
                self.committed_kv += more
                self.left_tokens += more
        self.left_tokens -= produced
        return begun

    def audit(self) -> None:
        """Check the sums against the calls. Raises AssertionError."""
        calls = self.calls.values()
        sums = {
            "committed_kv": sum(call.kv_tokens for call in calls),
            "left_tokens": sum(call.expected_tokens - call.new_tokens for call in calls),
            "unstarted": sum(call.new_tokens == 0 for call in calls),
            "unstarted_context": sum(call.spec.context_tokens for call in calls if call.new_tokens == 0),
        }
        for name, expected in sums.items():
            counted = getattr(self, name)
            assert counted == expected, f"{self.replica_id}: {name} is {counted}, its calls add up to {expected}"
        assert all(call.replica is self for call in calls), f"{self.replica_id} holds a call of another replica"
