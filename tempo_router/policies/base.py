"""What an ordering policy is. Policies are frozen, remember nothing and are given everything."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, assert_never, runtime_checkable

from tempo_router.columns import Columns, Floats, columns_of
from tempo_router.facts import Facts
from tempo_router.ledger import Ledger
from tempo_router.prediction import Lengths
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, RequestSpec
from tempo_router.standing import Standing
from tempo_router.step_time import Pace

BEST_EFFORT_KEY = 1e9
"""Keys of best-effort and relegated work begin here in policies that put it last; all others stay below."""

MICROSECONDS = 1e6

_ENGINE_LIMIT = 2**62


class Job(Protocol):
    """A request as policies see it, whether it waits at the router or is live in an engine.

    ticket: order of arrival at its holder; breaks ties. since_s: when it came to the holder of this view.
    generated_tokens: answer tokens so far, those of earlier attempts included.
    missing_tokens: context that must be computed before the next token: prompt (less what a cache is believed to
        hold) while it has not started, what is left of it during prefill, 0 while it decodes.
    """

    @property
    def spec(self) -> RequestSpec:
        """What the client asked for."""
        ...

    @property
    def ticket(self) -> int:
        """Breaks ties."""
        ...

    @property
    def since_s(self) -> float:
        """When it came here."""
        ...

    @property
    def lengths(self) -> Lengths:
        """What is known of its answer's length."""
        ...

    @property
    def generated_tokens(self) -> int:
        """Answer tokens so far."""
        ...

    @property
    def missing_tokens(self) -> int:
        """Context still to be computed."""
        ...

    @property
    def facts(self) -> Facts:
        """The spec in numbers."""
        ...

    @property
    def is_relegated(self) -> bool:
        """It can no longer meet its SLO."""
        ...

    @property
    def standing(self) -> Standing:
        """Where the last plan put it."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy may know besides the request.

    mean_length: running mean of answer lengths, in tokens. ledger: programs and tenants, and what they were served.
    slots: sequences that one replica decodes together. produced_per_s: output tokens per second of one replica.
    """

    now_s: float
    pace: Pace
    mean_length: float
    ledger: Ledger = field(default_factory=Ledger)
    slots: int = 128
    produced_per_s: float = 2000.0


@dataclass(frozen=True, slots=True)
class BatchRule:
    """How a step is filled once the order is known.

    chunked: decodes first, prompts up to `step_tokens` tokens in all (Sarathi-Serve).
    prefill_first: whole prompts up to `step_tokens`, decodes only in steps without prompts (vLLM's first scheduler).
    capped: as many prompt tokens as keep the step within `cap_s` and within the slack of the streams in it; with
        cap_s None the share `cap_share` of the tightest TBT served, or more where nobody has a target that can be met.
    """

    kind: Literal["chunked", "prefill_first", "capped"] = "chunked"
    step_tokens: int = 512
    cap_s: float | None = None
    cap_share: float = 0.2


CHUNKED = BatchRule()


class Policy(Protocol):
    """An order of requests: of those that wait at the router, and of those that are live in an engine.

    Lower keys go first; equal keys go by ticket. A key is finite for every valid request. Where `is_static` is False
    a request's key may change with time and progress; the queue looks at it again when its turn comes, and rotates
    through the others.
    """

    is_static: ClassVar[bool]
    """The key depends on the request's spec and tokens alone, not on the clock or on other requests."""

    preempts: ClassVar[bool] = False
    """A running call may be held, or evicted, for a better one that waits."""

    spares: ClassVar[bool] = False
    """By choice, no KV cache is taken from streams that are read, nor too often, nor for too little (eviction.py)."""

    is_class_blind: ClassVar[bool] = False
    """It knows no targets, so best effort waits no longer than others."""

    binds_early: ClassVar[bool] = False
    """Everything goes to a replica on arrival, and `arrange` sees all of it."""

    frame_s: ClassVar[float] = 0.05
    """How long an order of live calls stands before it is looked at again."""

    batch: BatchRule

    def key(self, request: Job, context: Context) -> float:
        """Where the request stands; lower goes first."""
        ...

    def arrange(self, jobs: Sequence[Job], context: Context) -> list[float]:
        """Keys of all live calls of one engine together; for policies that choose a set."""
        return [self.key(job, context) for job in jobs]

    def engine_priority(self, request: Job, context: Context) -> int:
        """The request's order inside vLLM's own priority policy; lower is sooner; fits int64."""
        return as_engine_priority(self.key(request, context), MICROSECONDS)


@runtime_checkable
class ColumnPolicy(Policy, Protocol):
    """A policy that computes all keys at once, from columns: an engine keeps those up to date between two looks."""

    def arrange_columns(self, columns: Columns, context: Context) -> Floats:
        """Keys of all jobs, those of `arrange`; each depends on its own job alone."""
        ...

    def arrange(self, jobs: Sequence[Job], context: Context) -> list[float]:
        """The same keys as `key`, all at once."""
        keys: list[float] = self.arrange_columns(columns_of(jobs), context).tolist()
        return keys


def due_s(job: Job) -> float:
    """When the next obligation falls due: a stream's next token, a deadline; infinity for best effort."""
    spec = job.spec
    match spec.slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            return spec.arrival_s + ttft_s + job.generated_tokens * tbt_s
        case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
            return spec.arrival_s + ttlt_s
        case _:
            return float("inf")


def quantile_left(lengths: Lengths, share: float, generated: int, limit: int) -> float:
    """Tokens still to come that are not exceeded with probability `share` (0 to 1, exclusive), at least 1.

    The quantile is that of the answers longer than `generated`. When no answer so long was seen, that of the
    exponential tail that `Lengths` assumes.
    """
    atoms = lengths.atoms
    first = bisect_right(atoms, generated)
    left = len(atoms) - first
    if left == 0:
        upper = -math.log(1.0 - share) * lengths.mean_left(generated, _ENGINE_LIMIT)
    else:
        upper = atoms[first + max(math.ceil(share * left - 1e-9), 1) - 1] - generated
    return max(1.0, min(upper, float(limit - generated)))


def bounded_s(at_s: float) -> float:
    """A time as part of a key: within a billion seconds either side of the clock's zero."""
    return min(max(at_s, -BEST_EFFORT_KEY / 2), BEST_EFFORT_KEY / 2)


def best_effort_key(spec: RequestSpec) -> float:
    """Behind everything that has a target; among themselves by arrival."""
    return 2 * BEST_EFFORT_KEY + bounded_s(spec.arrival_s)


def goes_last(job: Job) -> bool:
    """Best effort, and what can no longer meet its SLO."""
    return job.is_relegated or isinstance(job.spec.slo, BestEffort)


def class_rank(spec: RequestSpec) -> int:
    """0 for streams, 1 for deadlines, 2 for calls of programs, 3 for best effort."""
    match spec.slo:
        case Latency():
            return 0
        case Deadline():
            return 1
        case ProgramCall():
            return 2
        case BestEffort():
            return 3
        case _:
            assert_never(spec.slo)


def prefill_left_s(job: Job, pace: Pace) -> float:
    """GPU seconds to compute what is missing of its context."""
    missing = job.missing_tokens
    return pace.prefill_s(missing, max(0, job.spec.prompt_tokens + job.generated_tokens - missing))


def remaining_s(job: Job, pace: Pace) -> float:
    """GPU seconds still needed: prefill of what is missing, then the expected rest of the answer. Above zero."""
    generated = job.generated_tokens
    held = job.spec.prompt_tokens + generated
    left = job.lengths.mean_left(generated, job.spec.max_output_tokens)
    per_token_s = pace.share_s + pace.decode_s + pace.context_token_s * (held + left / 2)
    return prefill_left_s(job, pace) + left * per_token_s


def as_engine_priority(key: float, steps_per_unit: float) -> int:
    """A key as an integer that fits int64, in order of the key."""
    return int(min(max(key * steps_per_unit, -_ENGINE_LIMIT), _ENGINE_LIMIT))
