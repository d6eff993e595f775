"""What /metrics says of Tempo itself."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from deployments.own_metrics import export
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
