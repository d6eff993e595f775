"""Whose KV cache a prompt may take, and when that is worth it."""

import pytest

from tempo_router.config import SchedulingConfig
from tempo_router.eviction import MOST_TAKEN, WORTH, is_worth
from tempo_router.kv_blocks import KvBlocks
from tempo_router.live_call import LiveCall
from tempo_router.policies import build_policy
from tempo_router.policies.base import remaining_s
from tempo_router.prediction import LengthHistograms
from tempo_router.request import DispatchId, Slo
from tempo_router.standing import Standing
from tempo_router.step_planner import StepPlanner
from tempo_router.step_time import StepTimeModel
from tests.builders import BACKGROUND, CHAT, TOOL, request

BLOCK = 16


class Engine:
    """One planner with 40 blocks of cache, stepped by hand."""

    def __init__(self) -> None:
        policy = build_policy(SchedulingConfig(policy="tempo"))
        self.steps = StepTimeModel()
        self.planner = StepPlanner(policy, slots=8, max_step_tokens=2048, kv=KvBlocks(40, BLOCK), steps=self.steps)
        self.planner.step_cap_s = 10.0
        self.now_s = 0.0
        self.names = 0

    def add(self, slo: Slo, prompt_tokens: int, density: float = 1.0, *, is_admitted: bool = True) -> LiveCall:
        self.names += 1
        spec = request(f"r{self.names}", slo=slo, arrival_s=self.now_s, prompt_tokens=prompt_tokens)
        standing = Standing(density, is_admitted=is_admitted)
        lengths = LengthHistograms().lookup(spec)
        return self.planner.add(DispatchId(self.names), spec, lengths, standing, self.now_s)

    def step(self) -> None:
        """The next order, and a step by it."""
        self.now_s += 0.5
        plan = self.planner.plan(self.now_s)
        assert plan is not None
        self.planner.stepped(plan)
        self.planner.audit()

    def ask(self, slo: Slo, density: float = 1000.0) -> LiveCall:
        """Something dense that needs nearly the whole cache comes, and is offered a step."""
        asker = self.add(slo, 600, density)
        self.step()
        return asker


@pytest.fixture
def engine():
    return Engine()


def test_a_dense_prompt_takes_the_cache_of_a_thin_answer(engine):
    thin = engine.add(TOOL, 300, density=0.01)
    engine.step()
    asker = engine.ask(TOOL)

    assert (thin.blocks, thin.times_taken, asker.is_decoding) == (0, 1, True)


def test_a_stream_that_is_read_keeps_its_cache_and_one_that_is_not_gives_it(engine):
    """However thin it is: a reader sees the pause. What can no longer meet its target has no such right."""
    stream = engine.add(CHAT, 300, density=1e-6, is_admitted=False)
    engine.step()
    asker = engine.ask(TOOL)
    assert (stream.is_decoding, asker.blocks) == (True, 0)

    engine.planner.retune(stream.call_id, Standing(1e-6, is_admitted=False, is_relegated=True))
    engine.step()
    assert (stream.blocks, asker.is_decoding) == (0, True)


def test_a_stream_without_a_token_gives_way(engine):
    engine.planner.step_cap_s = 1e-6
    stream = engine.add(CHAT, 500, density=1e-6, is_admitted=False)
    engine.step()
    assert (stream.blocks > 0, stream.new_tokens) == (True, 0)
    engine.ask(TOOL)

    assert (stream.blocks, stream.times_taken) == (0, 1)


def test_nobody_gives_way_more_often_than_twice(engine):
    victim = engine.add(BACKGROUND, 300)
    for _ in range(MOST_TAKEN):
        engine.step()
        assert victim.is_decoding
        asker = engine.ask(TOOL)
        assert (victim.blocks, asker.is_decoding) == (0, True)
        engine.planner.remove(asker)
    engine.step()
    asker = engine.ask(TOOL)

    assert (victim.times_taken, victim.is_decoding, asker.blocks) == (MOST_TAKEN, True, 0)
    engine.planner.remove(victim)
    engine.step()
    assert asker.is_decoding, "it was let in when there was room"


def test_a_full_cache_takes_from_whom_it_must(engine):
    """Decoding calls need their next block; that is no choice."""
    streams = [engine.add(CHAT, 300) for _ in range(2)]
    for _ in range(40):
        engine.step()

    assert engine.planner.evictions > 0
    assert [one.times_taken for one in streams] == [0, 0]


def test_what_is_gained_must_be_twice_what_is_lost(engine):
    asker, victim = engine.add(TOOL, 500, density=3.0), engine.add(TOOL, 100, density=3.0)
    pace = engine.steps.pace()
    gained_s = remaining_s(asker, pace)
    tokens = int(gained_s / WORTH / pace.prefill_s(1))
    while pace.prefill_s(tokens) > gained_s / WORTH:
        tokens -= 1

    assert is_worth(asker, [(victim, tokens)], pace)
    assert not is_worth(asker, [(victim, tokens), (victim, tokens)], pace)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("denser", "expected"), [(100.0, True), (0.01, False)])
def test_only_the_ratio_of_two_densities_counts(engine, scale: float, denser: float, expected: bool):
    victim = engine.add(TOOL, 100, density=scale)
    asker = engine.add(TOOL, 100, density=denser * scale)

    assert is_worth(asker, [(victim, 400)], engine.steps.pace()) == expected


def test_what_is_worth_nothing_loses_nothing(engine):
    asker = engine.add(TOOL, 1, density=1e-9)
    assert is_worth(asker, [(engine.add(BACKGROUND, 100), 100_000)], engine.steps.pace())


def test_without_a_router_seconds_are_compared(engine):
    """Nobody has a density then."""
    asker, victim = engine.add(TOOL, 500, density=0.0), engine.add(TOOL, 100, density=0.0)
    assert is_worth(asker, [(victim, 10)], engine.steps.pace())
    assert not is_worth(asker, [(victim, 100_000)], engine.steps.pace())
