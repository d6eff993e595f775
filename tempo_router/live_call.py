"""A call in an engine, as the planner of its steps knows it, and what a step consists of."""

from dataclasses import dataclass

from tempo_router.facts import Facts, facts_of
from tempo_router.prediction import Lengths
from tempo_router.request import DispatchId, RequestSpec
from tempo_router.standing import Standing


class StepClock:
    """Counts the steps in which calls decode."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0


class LiveCall:
    """A call in the engine, as the planner knows it. Satisfies `Job`.

    to_compute: context that its next token needs; computed: what of it is in the KV cache.
    blocks: KV blocks that it holds; while it decodes, those of the step when it began to.
    segments: [first, last) decode steps, by number, in which it ran before it was held or evicted; no more than tokens.
    row: where the planner's table keeps its numbers.
    times_taken: how often it lost its blocks to a prompt that asked for them.
    """

    __slots__ = (
        "_clock",
        "blocks",
        "call_id",
        "computed",
        "is_decoding",
        "joined",
        "lengths",
        "produced",
        "row",
        "segments",
        "since_s",
        "spec",
        "standing",
        "ticket",
        "times_taken",
        "to_compute",
    )

    def __init__(
        self,
        call_id: DispatchId,
        spec: RequestSpec,
        lengths: Lengths,
        standing: Standing,
        ticket: int,
        since_s: float,
        clock: StepClock,
    ) -> None:
        self.call_id = call_id
        self.spec = spec
        self.lengths = lengths
        self.standing = standing
        self.ticket = ticket
        self.since_s = since_s
        self.to_compute = spec.context_tokens
        self.computed = 0
        self.produced = 0
        self.blocks = 0
        self.is_decoding = False
        self.joined = 0
        self.row = 0
        self.times_taken = 0
        self.segments: list[tuple[int, int]] = []
        self._clock = clock

    @property
    def facts(self) -> Facts:
        """The spec in numbers; not kept, as who needs them often keeps them in columns."""
        return facts_of(self.spec)

    @property
    def new_tokens(self) -> int:
        """Tokens that this attempt has produced."""
        return self.produced + (self._clock.steps - self.joined if self.is_decoding else 0)

    @property
    def generated_tokens(self) -> int:
        """Tokens of the whole answer so far."""
        return self.spec.generated_tokens + self.new_tokens

    @property
    def context_tokens(self) -> int:
        """Tokens that the next one is computed from."""
        return self.spec.context_tokens + self.new_tokens

    @property
    def missing_tokens(self) -> int:
        """Context still to be computed; 0 when it can decode."""
        return self.to_compute - self.computed

    @property
    def cached_tokens(self) -> int:
        """Context that it has in the KV cache."""
        return self.context_tokens if self.is_decoding else self.computed

    @property
    def is_relegated(self) -> bool:
        """It can no longer meet its SLO."""
        return self.standing.is_relegated


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    prefills: (call, tokens of its context to compute). decodes: how many of the decoding calls run: all or none of
    them; those that shall not run are held. context_tokens: summed context of these.
    """

    prefills: tuple[tuple[LiveCall, int], ...]
    decodes: int
    context_tokens: int

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of the step."""
        return sum(tokens for _, tokens in self.prefills)

    @property
    def attention_tokens(self) -> float:
        """Sum over the prompts of tokens x (tokens before + half of them)."""
        return sum(tokens * (call.computed + tokens / 2) for call, tokens in self.prefills)
