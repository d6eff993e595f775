"""What an ordering policy is. Policies are frozen, remember nothing and are given everything."""

from dataclasses import dataclass
from typing import Protocol

from tempo_router.request import Deadline, Latency, ProgramCall, RequestSpec
from tempo_router.step_time import Pace
from tempo_router.waiting import WaitingRequest

BEST_EFFORT_KEY = 1e9
"""Keys of best-effort and relegated work begin here in policies that put it last; all others stay below."""

_ENGINE_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy may know besides the request. mean_length: running mean of answer lengths, in tokens."""

    now_s: float
    pace: Pace
    mean_length: float


class Policy(Protocol):
    """An order of waiting requests.

    Lower keys go first; equal keys go by ticket, that is by arrival at the router. A key is finite for every valid
    request. Where `is_static` is False a request's key may only rise with time (its density falls): the queue then
    looks again before it believes one. It may fall when the pace changes; the queue notices that in rotation.
    """

    @property
    def is_static(self) -> bool:
        """The key depends on the request alone, not on the context."""
        ...

    def key(self, request: WaitingRequest, context: Context) -> float:
        """Where the request stands; lower goes first."""
        ...

    def engine_priority(self, request: WaitingRequest, context: Context) -> int:
        """The request's order inside the engine, for vLLM's priority policy; lower is sooner; fits int64."""
        ...


def due_s(spec: RequestSpec) -> float:
    """When the request's next obligation falls due: a stream's next token, a deadline; infinity for best effort."""
    match spec.slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            return spec.arrival_s + ttft_s + spec.generated_tokens * tbt_s
        case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
            return spec.arrival_s + ttlt_s
        case _:
            return float("inf")


def bounded_s(at_s: float) -> float:
    """A time as part of a key: within a billion seconds either side of the clock's zero."""
    return min(max(at_s, -BEST_EFFORT_KEY / 2), BEST_EFFORT_KEY / 2)


def best_effort_key(spec: RequestSpec) -> float:
    """Behind everything that has a target; among themselves by arrival."""
    return 2 * BEST_EFFORT_KEY + bounded_s(spec.arrival_s)


def as_engine_priority(key: float, steps_per_unit: float) -> int:
    """A key as an integer that fits int64, in order of the key."""
    return int(min(max(key * steps_per_unit, -_ENGINE_LIMIT), _ENGINE_LIMIT))
