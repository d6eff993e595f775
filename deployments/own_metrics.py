"""What `/metrics` says of Tempo, beside vLLM's own metrics: of one ingress (README.md has the list)."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from cluster.program_desk import ViewConsole
from deployments.program_client import ProgramClient
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.metrics import Outcome
from tempo_router.request import Slo, slo_class

_TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_TTLT_BUCKETS_S = (0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0, 600.0)

_ROUTER_WAIT_S = 2.0
"""A scrape waits no longer for the router. Prometheus gives up after 10 s, unless told otherwise."""


class Replica(Protocol):
    """What is asked of a worker's engine (the message EngineFacts)."""

    @property
    def has_step_planner(self) -> bool:
        """Tempo composes its steps."""
        ...


class OwnMetrics:
    """A collector of prometheus_client.

    replicas: those that this ingress is attached to, which are all of the deployment once it is ready.
    are_planned: the configuration wants Tempo to compose their steps.
    """

    def __init__(self, replicas: Callable[[], Iterable[Replica]], *, are_planned: bool) -> None:
        self._replicas = replicas
        self._are_planned = are_planned

    def collect(self) -> Iterator[Metric]:
        """Every metric, as of now."""
        replicas = list(self._replicas())
        fallbacks = sum(self._are_planned and not one.has_step_planner for one in replicas)
        yield GaugeMetricFamily("tempo_replicas", "Replicas that this ingress is attached to.", len(replicas))
        yield GaugeMetricFamily(
            "tempo_step_planner_fallback_replicas",
            "Attached replicas where engine.step_planner could not be turned on, so that the engine composes steps.",
            fallbacks,
        )


def export(
    replicas: Callable[[], Iterable[Replica]], *, are_planned: bool, registry: CollectorRegistry = REGISTRY
) -> None:
    """Serve them from now on, with the process's other metrics. Once per process."""
    registry.register(OwnMetrics(replicas, are_planned=are_planned))


class RouterMetrics:
    """A collector of what the router knows: its queue, its replicas, its writing; `ask` first, before every scrape.

    All ingresses say the same, as there is one router. If it does not answer, nothing is said.
    """

    def __init__(self, client: ProgramClient, registry: CollectorRegistry = REGISTRY) -> None:
        self._client = client
        self._told: dict[str, Any] | None = None
        registry.register(self)

    async def ask(self) -> None:
        """Have the router tell what is to be served."""
        try:
            async with asyncio.timeout(_ROUTER_WAIT_S):
                self._told = await self._client.ask(ViewConsole(most=0))
        except (TimeoutError, RouterUnavailableError, ProgramError):
            # Series that end show it; old values would look like new ones.
            self._told = None

    def collect(self) -> Iterator[Metric]:
        """Every metric, as told last."""
        queue = self._told["queue"] if self._told is not None else {"states": {}, "replicas": []}
        yield from _of_queue(queue["states"])
        yield from _of_replicas(queue["replicas"])
        if self._told is not None:
            yield from _of_store(self._told["store"])


def _of_queue(states: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
    requests = GaugeMetricFamily(
        "tempo_queue_requests",
        "Engine requests in the router's hands, by class and state; in_turn, deferred, relegated and unplaceable ones "
        "wait at the router, the others have been sent to an engine.",
        labels=("slo_class", "state"),
    )
    for name, counts in states.items():
        for state, count in counts.items():
            requests.add_metric((name, state), count)
    yield requests


def _of_replicas(replicas: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    error = GaugeMetricFamily(
        "tempo_step_time_error_ratio",
        "Mean error of estimated step times, relative to what the steps took, by replica.",
        labels=("replica",),
    )
    unsure = GaugeMetricFamily(
        "tempo_step_time_unsure",
        "1 where that error was above 30 % for a minute, so that costs and steps keep a margin.",
        labels=("replica",),
    )
    for one in replicas:
        error.add_metric((one["replica_id"],), one["step_error"])
        unsure.add_metric((one["replica_id"],), float(one["is_unsure"]))
    yield error
    yield unsure


def _of_store(store: Mapping[str, Any]) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "tempo_redis_away", "1 while Redis takes no changes of programs, so that they wait.", store["is_store_away"]
    )
    yield GaugeMetricFamily(
        "tempo_unwritten_program_changes", "Changes of programs that Redis has not been told yet.", store["unwritten"]
    )
    yield CounterMetricFamily(
        "tempo_refused_program_changes",
        "Changes of programs that Redis refused for good, since the router started.",
        store["refused"],
    )


class RequestMetrics:
    """Counts engine requests of this ingress by class: with `n` = 3 one HTTP request is three.

    registry: where they are served from; None counts for nobody.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        by_class = ("slo_class",)
        self._ended = Counter(
            "tempo_requests",
            "Requests that ended, by class and by what became of the target: met, missed, or none (best effort).",
            ("slo_class", "target"), registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "tempo_refused_requests", "Of the ended ones, those that were refused or expired, by reason.",
            ("slo_class", "reason"),
            registry=registry,
        )  # fmt: skip
        self._relegated = Counter(
            "tempo_relegated_requests", "Requests whose target came out of reach while they waited or ran.", by_class,
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "tempo_output_tokens",
            "Answer tokens delivered, by what they were worth: good, late, or none (best effort).",
            ("slo_class", "worth"), registry=registry,
        )  # fmt: skip
        self._ttft_s = Histogram(
            "tempo_time_to_first_token_seconds", "From the arrival at the ingress.", by_class,
            buckets=_TTFT_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._ttlt_s = Histogram(
            "tempo_time_to_last_token_seconds", "From the arrival at the ingress, of whole answers.", by_class,
            buckets=_TTLT_BUCKETS_S, registry=registry,
        )  # fmt: skip

    def refused(self, slo: Slo, reason: str) -> None:
        """The router did not take a request, or dropped it. reason: one of a closed set."""
        self._refused.labels(slo_class(slo), reason).inc()

    def relegated(self, slo: Slo) -> None:
        """A request goes on without hope."""
        self._relegated.labels(slo_class(slo)).inc()

    def ended(self, outcome: Outcome, *, completed: bool) -> None:
        """A request ended, however. completed: its answer came to its own end."""
        name = outcome.slo_class
        target = "none" if outcome.is_met is None else "met" if outcome.is_met else "missed"
        self._ended.labels(name, target).inc()
        unjudged = outcome.output_tokens - outcome.good_tokens - outcome.late_tokens
        for worth, tokens in (("good", outcome.good_tokens), ("late", outcome.late_tokens), ("none", unjudged)):
            if tokens:
                self._tokens.labels(name, worth).inc(tokens)
        if outcome.ttft_s is not None:
            self._ttft_s.labels(name).observe(outcome.ttft_s)
        if outcome.ttlt_s is not None and completed:
            self._ttlt_s.labels(name).observe(outcome.ttlt_s)
