"""How much of the queue a replica is given ahead of time."""

from tempo_router.events import Progressed, ReplicaLoad
from tempo_router.request import DispatchId, ReplicaId
from tests.builders import arrived, dispatched, router

# builders.capacity: 2,048 tokens a step.
PROMPT_TOKENS = 500


def busy(at_s: float, *, free_kv_tokens: int) -> Progressed:
    """The engine's step is full of prompts: the first call runs, others wait in it."""
    load = ReplicaLoad(running=1, waiting=3, free_kv_tokens=free_kv_tokens)
    return Progressed(at_s, ReplicaId("gpu0"), load, None, ((DispatchId(1), 1),), ())


def test_an_engine_whose_steps_are_full_of_prompts_gets_two_steps_of_them():
    """Fewer would leave its steps half empty when many requests come at once."""
    core = router("gpu0", max_running=64)
    core.handle(arrived("first", prompt_tokens=PROMPT_TOKENS))
    core.handle(busy(1.0, free_kv_tokens=100_000))
    sent = [actions for n in range(20) for actions in core.handle(arrived(f"r{n}", 2.0, prompt_tokens=PROMPT_TOKENS))]
    assert len(dispatched(sent)) == 9  # 8 * 500 is less than 2 * 2,048; the ninth passes it, later ones wait
    core.audit()


def test_an_engine_without_free_kv_cache_gets_no_more_prompts():
    """They would wait behind what it preempted, out of the router's reach."""
    core = router("gpu0", max_running=64)
    core.handle(arrived("first", prompt_tokens=PROMPT_TOKENS))
    core.handle(busy(1.0, free_kv_tokens=0))
    assert not dispatched(core.handle(arrived("next", 2.0, prompt_tokens=PROMPT_TOKENS)))
    core.audit()
