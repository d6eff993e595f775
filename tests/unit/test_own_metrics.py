"""What /metrics says of Tempo itself."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deployments.own_metrics import RequestMetrics, export
from tempo_router.metrics import Outcome, refused_outcome
from tests.builders import AGENT, TOOL
from workers.engine import EngineFacts


def facts(*, has_step_planner: bool) -> EngineFacts:
    return EngineFacts("vllm", "0", "model", 1, 1, 1, 1, 1, 1, ("generate",), has_step_planner=has_step_planner)


@pytest.mark.parametrize(("are_planned", "fallbacks"), [(True, 2.0), (False, 0.0)])
def test_replicas_that_should_plan_their_steps_and_cannot_are_counted(are_planned: bool, fallbacks: float):
    """Where steps are left to the engine on purpose, nothing has fallen back."""
    registry = CollectorRegistry()
    replicas = [facts(has_step_planner=True), facts(has_step_planner=False), facts(has_step_planner=False)]
    export(lambda: replicas, are_planned=are_planned, registry=registry)

    assert registry.get_sample_value("tempo_replicas") == 3.0
    assert registry.get_sample_value("tempo_step_planner_fallback_replicas") == fallbacks


def test_a_scrape_tells_of_the_replicas_of_its_moment():
    registry = CollectorRegistry()
    replicas = [facts(has_step_planner=False)]
    export(lambda: replicas, are_planned=True, registry=registry)
    assert b"tempo_step_planner_fallback_replicas 1.0" in generate_latest(registry)

    replicas.clear()

    assert b"tempo_step_planner_fallback_replicas 0.0" in generate_latest(registry)


def test_what_became_of_requests_is_counted_by_class():
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    metrics.ended(Outcome("latency", 0.25, 3.0, 10, 7, 3, 0.1, False), completed=True)
    metrics.ended(Outcome("latency", 0.15, 2.0, 5, 5, 0, 0.1, True), completed=True)
    metrics.ended(Outcome("best_effort", 4.0, 9.0, 20, 0, 0, 0.5, None), completed=False)
    metrics.ended(refused_outcome(TOOL), completed=False)
    metrics.refused(TOOL, "expired")
    metrics.relegated(AGENT)

    def value(name: str, **labels: Any) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("tempo_requests_total", slo_class="latency", target="met") == 1
    assert value("tempo_requests_total", slo_class="latency", target="missed") == 1
    assert value("tempo_requests_total", slo_class="best_effort", target="none") == 1
    assert value("tempo_requests_total", slo_class="deadline", target="missed") == 1
    assert value("tempo_refused_requests_total", slo_class="deadline", reason="expired") == 1
    assert value("tempo_relegated_requests_total", slo_class="program") == 1
    assert value("tempo_output_tokens_total", slo_class="latency", worth="good") == 12
    assert value("tempo_output_tokens_total", slo_class="latency", worth="late") == 3
    assert value("tempo_output_tokens_total", slo_class="best_effort", worth="none") == 20
    assert value("tempo_time_to_first_token_seconds_count", slo_class="latency") == 2
    assert value("tempo_time_to_first_token_seconds_bucket", slo_class="latency", le="0.2") == 1
    assert value("tempo_time_to_last_token_seconds_sum", slo_class="latency") == 5.0
    assert value("tempo_time_to_first_token_seconds_count", slo_class="deadline") is None, "it never had a token"
    assert value("tempo_time_to_first_token_seconds_count", slo_class="best_effort") == 1
    assert value("tempo_time_to_last_token_seconds_count", slo_class="best_effort") is None, "it was broken off"
