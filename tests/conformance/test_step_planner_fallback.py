"""An engine whose vLLM is not as the step planner needs it: it serves, by vLLM's priority policy, and says so once."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("vllm")

from vllm.config import VllmConfig  # noqa: E402
from vllm.v1.core.sched import interface  # noqa: E402
from vllm.v1.core.sched.request_queue import PriorityRequestQueue, RequestQueue  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402

from cluster.codec import capacity_from_facts  # noqa: E402
from deployments.own_metrics import export  # noqa: E402
from tempo_router.config import SchedulingConfig  # noqa: E402
from tests.builders import attached, router  # noqa: E402
from tests.contract.test_engine import Listener  # noqa: E402
from tests.vllm_payload import encode_request  # noqa: E402
from workers import vllm_check, vllm_start  # noqa: E402
from workers.default_model import ensure_default_model  # noqa: E402
from workers.engine import EngineCall  # noqa: E402
from workers.vllm_engine import VllmEngine, start_vllm_engine  # noqa: E402
from workers.worker import _facts_message  # noqa: E402

ENGINE_KWARGS = {"max_num_seqs": 1, "max_num_batched_tokens": 128, "max_model_len": 1024, "block_size": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(ensure_default_model(tmp_path_factory.mktemp("data")))


def change_a_signature(patch: pytest.MonkeyPatch) -> str:
    preempt = Scheduler._preempt_request

    def changed(self: Any, request: Any, timestamp: float, drop_stale_output: bool = False, reason: str = "") -> Any:
        return preempt(self, request, timestamp, drop_stale_output)

    patch.setattr(Scheduler, "_preempt_request", changed)
    return "Scheduler._preempt_request takes (self, request, timestamp, drop_stale_output, reason)"


def rename_what_is_imported(patch: pytest.MonkeyPatch) -> str:
    """The planner's module cannot even be imported."""
    patch.setattr(interface, "StateOfPause", interface.PauseState, raising=False)
    patch.delattr(interface, "PauseState")
    patch.delitem(sys.modules, "workers.tempo_scheduler", raising=False)
    return "cannot import name 'PauseState'"


def ask_more_of_queues(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(RequestQueue, "find_request", lambda self, request_id: None, raising=False)
    patch.setattr(RequestQueue, "__abstractmethods__", RequestQueue.__abstractmethods__ | {"find_request"})
    return "RequestQueue asks for find_request, which PlannedQueue does not have"


def rename_a_field_of_the_configuration(patch: pytest.MonkeyPatch) -> str:
    """What the class declares; vLLM itself goes on reading what its objects have."""
    patch.delattr(VllmConfig, "speculative_config")
    patch.delitem(VllmConfig.__annotations__, "speculative_config")
    return "VllmConfig has no speculative_config"


def hide_the_source(patch: pytest.MonkeyPatch) -> str:
    """Compiled, as some distributions are."""
    code = Scheduler.schedule.__code__
    patch.setattr(Scheduler.schedule, "__code__", code.replace(co_filename="<compiled>"))
    return "Scheduler.schedule does not read next_decode_eligible_step"


@pytest.fixture(autouse=True)
def classes_are_looked_at_anew():
    vllm_check._names_set_by.cache_clear()
    yield
    vllm_check._names_set_by.cache_clear()


@pytest.mark.parametrize(
    ("change", "scheduling_policy"),
    [
        (change_a_signature, None),
        (rename_what_is_imported, None),
        (ask_more_of_queues, "fcfs"),
        (rename_a_field_of_the_configuration, None),
        (hide_the_source, None),
    ],
)
async def test_the_engine_serves_by_priority_and_says_why_once(
    model, monkeypatch, change: Callable[[pytest.MonkeyPatch], str], scheduling_policy: str | None
):
    reason = change(monkeypatch)
    listener = Listener()
    chosen = {"scheduling_policy": scheduling_policy} if scheduling_policy else {}
    with structlog.testing.capture_logs() as logs:
        engine = await start_vllm_engine(
            model,
            {**ENGINE_KWARGS, **chosen},
            on_step=listener.on_step,
            on_death=listener.on_death,
            scheduling=SchedulingConfig(policy="tempo"),
        )
    try:
        assert engine._live_core.scheduler.policy.value == "priority"
        assert isinstance(engine._live_core.scheduler.waiting, PriorityRequestQueue)
        order = await finished_in_order(engine, listener)
    finally:
        await engine.shutdown()

    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [entry["event"] for entry in warnings] == ["step_planner_off"]
    assert len(warnings[0]["reasons"]) == 1
    assert reason in warnings[0]["reasons"][0]
    assert ("scheduling_policy='fcfs' does not count" in warnings[0]["effect"]) == (scheduling_policy is not None)
    assert order == ["first", "urgent", "later"]
    assert listener.deaths == []
    assert_it_is_seen(engine)


def test_a_configuration_with_other_fields_is_not_asked_what_it_is(monkeypatch):
    """The one here has nothing but a scheduler: whatever else is read of it raises."""
    reason = rename_a_field_of_the_configuration(monkeypatch)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=None))
    planner, obstacles = vllm_start._find_planner(config)
    assert planner is not None
    assert obstacles == [reason]


async def finished_in_order(engine: VllmEngine, listener: Listener) -> list[str]:
    """One runs at a time; of the two that wait then, the one that came last has the better priority."""

    def call(name: str, priority: int, max_tokens: int) -> EngineCall:
        payload = encode_request(name, range(97, 117), max_tokens=max_tokens, ignore_eos=True)
        return EngineCall(name, "ingress", priority, payload, 20, max_tokens)

    engine.submit(call("first", 0, 800))
    await listener.until(lambda: listener.tokens()["first"] > 0 or bool(listener.deaths))
    engine.submit(call("later", 7, 4))
    engine.submit(call("urgent", 3, 4))
    await listener.until(lambda: len(listener.finished()) == 3 or bool(listener.deaths))
    assert listener.tokens() == {"first": 800, "later": 4, "urgent": 4}
    return [name for name, _ in listener.finished()]


def assert_it_is_seen(engine: VllmEngine) -> None:
    """By the router, whose snapshot has it, and by whoever scrapes the metrics."""
    core = router()
    core.handle(replace(attached("gpu0"), capacity=capacity_from_facts(_facts_message(engine.facts))))
    assert [one.has_step_planner for one in core.snapshot().replicas] == [False]
    registry = CollectorRegistry()
    export(lambda: [engine.facts], are_planned=True, registry=registry)
    assert registry.get_sample_value("tempo_step_planner_fallback_replicas") == 1.0


async def test_another_scheduler_goes_on_by_its_own_policy(model):
    """Named by the user: it stays, and the warning does not speak of vLLM's priority policy."""
    listener = Listener()
    named = {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler", "scheduling_policy": "fcfs"}
    with structlog.testing.capture_logs() as logs:
        engine = await start_vllm_engine(
            model,
            {**ENGINE_KWARGS, **named},
            on_step=listener.on_step,
            on_death=listener.on_death,
            scheduling=SchedulingConfig(policy="tempo"),
        )
    policy = engine._live_core.scheduler.policy.value
    await engine.shutdown()

    (warning,) = [entry for entry in logs if entry["event"] == "step_planner_off"]
    assert warning["reasons"] == [f"scheduler_cls is {named['scheduler_cls']!r}"]
    assert "that scheduler composes the steps" in warning["effect"]
    assert policy == "fcfs"
    assert engine.facts.has_step_planner is False
