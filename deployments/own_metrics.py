"""What `/metrics` says of Tempo, beside vLLM's own metrics: read from the ingress whenever someone scrapes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily


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
