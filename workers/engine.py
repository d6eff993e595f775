"""What a worker needs of an engine. Two engines implement it: vLLM, and a simulated one for tests and laptops.

One contract suite (tests/contract) runs on both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tempo_router.events import FinishReason, ReplicaLoad, StepReport
from workers.call_facts import CallFacts, News


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself once it has started; mirrors the message of the same name.

    max_running: sequences that one step computes. has_step_planner: Tempo's planner composes the steps.
    """

    engine: str
    engine_version: str
    model: str
    max_model_len: int
    kv_blocks: int
    block_size: int
    kv_tokens: int
    max_running: int
    max_step_tokens: int
    supported_tasks: tuple[str, ...]
    ready_response: bytes = b""
    has_step_planner: bool = False


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A request for the engine.

    client: which ingress owns it; outputs come back grouped by it.
    priority: lower runs sooner among the engine's waiting requests.
    payload: the request in the engine's own codec, as buffers (vLLM: EngineCoreRequest, msgpack).
    prompt_tokens, max_output_tokens: of this attempt, for engines that do not read the payload.
    facts: its SLO and how it stands, for engines whose steps are planned.
    """

    request_id: str
    client: str
    priority: int
    payload: Sequence[bytes]
    prompt_tokens: int
    max_output_tokens: int
    facts: CallFacts | None = None


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one request, for engines without a codec of their own."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | None = None


@dataclass(frozen=True, slots=True)
class ClientOutputs:
    """What one step produced for one ingress: buffers in the engine's codec, or plain deltas. Never both."""

    buffers: tuple[bytes, ...] = ()
    deltas: tuple[TokenDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineFinished:
    """A request left the engine; no output for it follows."""

    request_id: str
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineStep:
    """All news of one engine step.

    tokens: (request_id, new tokens) of every request that produced any.
    preempted: requests whose KV cache the engine has taken since the last report; they compute it again, in their turn.
    outputs: what to send to whom; already contains the finishing output of each request in `finished`.
    """

    load: ReplicaLoad
    step: StepReport | None = None
    tokens: tuple[tuple[str, int], ...] = ()
    finished: tuple[EngineFinished, ...] = ()
    outputs: dict[str, ClientOutputs] = field(default_factory=dict)
    preempted: tuple[str, ...] = ()


OnStep = Callable[[EngineStep], None]
OnDeath = Callable[[str], None]


class Engine(Protocol):
    """A running engine. Methods are called from one event loop and do not block it.

    `on_step` is called on the event loop, in the order of the steps. `on_death(reason)` is called once if
    the engine fails; after it no other call is made.
    """

    @property
    def facts(self) -> EngineFacts:
        """Fixed from the start."""
        ...

    def submit(self, call: EngineCall) -> None:
        """Queue a request. A second one with a live id is an error of that request alone, reported in a step."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these; unknown ids are ignored. Each live one is reported as finished, reason cancelled.

        Its client gets no output for it: whoever aborts knows. What an engine cancels by itself (a shutdown) it may
        tell the client.
        """
        ...

    def tell(self, news: News) -> None:
        """How calls stand was planned anew, or their targets changed. Only where `facts.has_step_planner`."""
        ...

    async def call_utility(self, call: bytes) -> tuple[bytes, ...]:
        """Run an administrative call in the engine's codec and return the encoded answer. Raises TempoError."""
        ...

    def live_requests(self) -> tuple[str, ...]:
        """Ids of the requests that were submitted and have not finished."""
        ...

    async def shutdown(self) -> None:
        """Stop the engine and everything it started. Idempotent; returns when no process is left."""
        ...
