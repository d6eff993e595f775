"""Laws of StepPlanner that hold over every history of arrivals, steps, new standings and departures.

The test is the engine: it computes the steps that it is told to, keeps its own count of every answer's tokens, and
checks each plan against the limits of the engine. A twin planner is told the same and must plan the same.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tempo_router.columns import PREFILLING
from tempo_router.config import SchedulingConfig
from tempo_router.events import StepReport
from tempo_router.kv_blocks import KvBlocks
from tempo_router.live_call import LiveCall, StepPlan
from tempo_router.policies import build_policy
from tempo_router.prediction import LengthHistograms
from tempo_router.request import DispatchId, Latency, RequestSpec
from tempo_router.standing import UNRANKED, Standing
from tempo_router.step_planner import StepPlanner
from tempo_router.step_time import StepTimeModel
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL, request

POLICIES = ("fcfs", "class_priority", "vllm_fcfs", "tempo")
SLOS = (CHAT, TOOL, AGENT, BACKGROUND)
PROMPTS = (1, 7, 16, 63, 150, 290)
OUTPUTS = (1, 2, 20, 60)
BLOCK_SIZE = 16
LARGEST = max(PROMPTS) + max(OUTPUTS) + 1

STANDINGS = st.one_of(
    st.just(UNRANKED),
    st.builds(
        Standing,
        density=st.sampled_from((0.0, 0.01, 1.0, 100.0)),
        is_admitted=st.booleans(),
        later_s=st.sampled_from((0.0, 5.0)),
        is_relegated=st.sampled_from((False, False, True)),
    ),
)


class WatchedPlanner(StepPlanner):
    """Whenever a call loses its blocks: it is the last of those that can, and behind the one that asks.

    by_choice: how often each call lost them to one that asked.
    """

    watched = 0
    asker: LiveCall | None = None
    in_step: frozenset[DispatchId] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.by_choice: Counter[DispatchId] = Counter()

    def _evict_for(self, call: LiveCall, needed: int, planned: Sequence[tuple[LiveCall, int]]) -> bool:
        self.asker, self.in_step = call, frozenset(other.call_id for other, _ in planned)
        try:
            return super()._evict_for(call, needed, planned)
        finally:
            self.asker, self.in_step = None, frozenset()

    def is_spared(self, call: LiveCall) -> bool:
        if self.asker is None or not self._policy.spares:
            return False
        is_begun = isinstance(call.spec.slo, Latency) and call.new_tokens > 0 and not call.standing.is_relegated
        return is_begun or self.by_choice[call.call_id] >= 2

    def _evict(self, call: LiveCall) -> None:
        self.watched += 1
        calls = list(self.live)
        keys = self._policy.arrange(calls, self.context(self._now_s))
        rank = {one.call_id: (key, one.ticket) for one, key in zip(calls, keys, strict=True)}
        assert call.call_id not in self.in_step, "evicted from its own step"
        assert not self.is_spared(call), "a stream that is read, or one that gave way twice, lost its blocks by choice"
        if self.asker is not None:
            assert self.asker.standing.is_admitted, "a deferred call took another's blocks"
            assert rank[call.call_id] > rank[self.asker.call_id], "evicted by a call that is behind it"
        can_lose = [one for one in calls if one.blocks and one.call_id not in self.in_step and not self.is_spared(one)]
        last = max(rank[one.call_id] for one in can_lose)
        assert rank[call.call_id] == last, "evicted, and one behind it was not"
        if self.asker is not None:
            self.by_choice[call.call_id] += 1
        super()._evict(call)


Shape = tuple[tuple[tuple[DispatchId, int], ...], int, int]
"""A plan without its objects: (prefills, decodes, context)."""


class PlannerMachine(RuleBasedStateMachine):
    """Histories of one engine, told to two planners."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        slots=st.sampled_from((1, 2, 4, 8)),
        max_step_tokens=st.sampled_from((16, 100, 2048)),
        spare_blocks=st.sampled_from((0, 3, 12, 200)),
    )
    def start(self, policy: str, slots: int, max_step_tokens: int, spare_blocks: int) -> None:
        self.rule = build_policy(SchedulingConfig.model_validate({"policy": policy})).batch
        self.slots = slots
        self.max_step_tokens = max_step_tokens
        # Any call fits alone, so an engine with calls always has something to do.
        self.blocks = -(-LARGEST // BLOCK_SIZE) + spare_blocks
        self.planners = [self.new_planner(policy) for _ in range(2)]
        self.kvs = [planner._kv for planner in self.planners]
        self.now_s = 0.0
        self.names = 0
        self.specs: dict[DispatchId, RequestSpec] = {}
        self.tokens: dict[DispatchId, int] = {}
        self.targets: dict[DispatchId, int] = {}

    def new_planner(self, policy: str) -> WatchedPlanner:
        return WatchedPlanner(
            build_policy(SchedulingConfig.model_validate({"policy": policy})),
            slots=self.slots,
            max_step_tokens=self.max_step_tokens,
            kv=KvBlocks(self.blocks, BLOCK_SIZE),
            steps=StepTimeModel(),
        )

    # ---- rules ----

    @rule(
        slo=st.sampled_from(SLOS),
        prompt=st.sampled_from(PROMPTS),
        output=st.sampled_from(OUTPUTS),
        standing=STANDINGS,
        prefix=st.sampled_from(("", "", "a", "b")),
        count=st.sampled_from((1, 4, 10)),
    )
    def arrive(self, slo: object, prompt: int, output: int, standing: Standing, prefix: str, count: int = 1) -> None:
        for _ in range(count):
            self.names += 1
            call_id = DispatchId(self.names)
            spec = request(
                f"r{self.names}",
                slo=slo,  # type: ignore[arg-type]  # drawn from SLOS
                arrival_s=self.now_s,
                prompt_tokens=prompt,
                max_output_tokens=output,
            )
            spec = replace(spec, prefix_id=prefix, prefix_tokens=prompt if prefix else 0)
            self.specs[call_id], self.tokens[call_id], self.targets[call_id] = spec, 0, output
            for planner in self.planners:
                planner.add(call_id, spec, LengthHistograms().lookup(spec), standing, self.now_s)

    @rule(count=st.integers(1, 25), late=st.booleans(), pause_s=st.sampled_from((0.0, 0.01, 0.4, -0.02, -30.0)))
    def steps(self, count: int, late: bool, pause_s: float) -> None:
        """The clock runs on, stands still (a pause of minus a step's duration), or is set back."""
        for number in range(count):
            plan = self.one_plan()
            if plan is None:
                return
            if late and number == 0:
                # While a step is being computed calls come, and are planned anew.
                self.arrive(CHAT, 16, 2, UNRANKED, "a")
            self.compute(plan)
            self.now_s += pause_s

    @precondition(lambda self: self.specs)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(sorted(self.specs))))

    @precondition(lambda self: self.specs)
    @rule(data=st.data(), standing=STANDINGS)
    def retune(self, data: st.DataObject, standing: Standing) -> None:
        call_id = data.draw(st.sampled_from(sorted(self.specs)))
        for planner in self.planners:
            planner.retune(call_id, standing)

    @precondition(lambda self: self.specs)
    @rule(data=st.data(), slo=st.sampled_from(SLOS))
    def retarget(self, data: st.DataObject, slo: object) -> None:
        call_id = data.draw(st.sampled_from(sorted(self.specs)))
        for planner in self.planners:
            planner.retarget(call_id, slo)  # type: ignore[arg-type]  # drawn from SLOS

    @rule(cap_s=st.sampled_from((None, 0.001, 0.02, 1.0)))
    def cap(self, cap_s: float | None) -> None:
        for planner in self.planners:
            planner.step_cap_s = cap_s

    def everyone_leaves(self) -> None:
        for call_id in list(self.specs):
            self.remove(call_id)
        assert [kv.held for kv in self.kvs] == [0, 0], "blocks are held by nobody"

    # ---- laws ----

    @invariant()
    def nothing_is_miscounted(self) -> None:
        for planner in self.planners:
            planner.audit()
        assert {call.call_id: call.new_tokens for call in self.planners[0].live} == self.tokens

    @invariant()
    def the_kept_columns_order_as_the_calls_themselves_do(self) -> None:
        planner = self.planners[0]
        calls = list(planner.live)
        keys = planner._policy.arrange(calls, planner.context(self.now_s))
        anew = sorted(zip(keys, calls, strict=True), key=lambda one: (one[0], one[1].ticket))
        kept = planner._sorted(calls, self.now_s)
        assert [call.call_id for call in kept] == [call.call_id for _, call in anew]

    @invariant()
    def the_first_prompts_are_those_with_the_least_keys(self) -> None:
        """Between two looks at all of them, however they came there."""
        planner = self.planners[0]
        if planner._newcomers or not planner._first.are_known(self.slots):
            return
        ranked = planner._table.calls(planner._table.ranked(planner._table.in_phase(PREFILLING)))
        first = planner._ordered_prompts()
        assert first == ranked[: len(first)]
        assert len(first) >= min(self.slots, len(ranked))

    def teardown(self) -> None:
        if hasattr(self, "planners"):
            self.everyone_leaves()

    def one_plan(self) -> StepPlan | None:
        plans = [planner.plan(self.now_s) for planner in self.planners]
        shapes = [shape_of(plan) for plan in plans]
        assert shapes[0] == shapes[1], f"the same history gave {shapes}"
        self._twin = plans[1]
        plan = plans[0]
        assert (plan is None) == (not self.specs), f"{len(self.specs)} calls live, each fits alone, but nothing runs"
        if plan is None:
            return None
        self.nothing_is_miscounted()
        decoding = list(self.planners[0].decoding)
        prompts = [call for call, _ in plan.prefills]
        running = [call.call_id for call in prompts]
        if plan.decodes:
            running += [call.call_id for call in decoding]
            assert plan.decodes == len(decoding)
            assert plan.context_tokens == sum(self.context(call) + 1 for call in decoding)
        assert running, "an empty step"
        assert len(set(running)) == len(running), f"a call runs twice in {running}"
        assert len(running) <= self.slots, f"{len(running)} sequences in {self.slots} slots"
        self.check_tokens(plan)
        for call, tokens in plan.prefills:
            assert 1 <= tokens <= self.context(call) - call.computed, f"{tokens} tokens of a prompt that misses fewer"
            assert call.blocks * BLOCK_SIZE > self.context(call), "a prompt runs without room for its context"
        return plan

    def check_tokens(self, plan: StepPlan) -> None:
        tokens = plan.prefill_tokens + plan.decodes
        if self.rule.kind == "prefill_first" and plan.prefills:
            assert not plan.decodes
            assert tokens <= self.rule.step_tokens or len(plan.prefills) == 1, f"{tokens} tokens in {plan.prefills}"
            return
        assert tokens <= self.max_step_tokens, f"{tokens} tokens in a step of {self.max_step_tokens}"
        if self.rule.kind == "chunked":
            assert tokens <= self.rule.step_tokens

    def context(self, call: LiveCall) -> int:
        """By our own count."""
        return self.specs[call.call_id].prompt_tokens + self.tokens[call.call_id]

    def compute(self, plan: StepPlan) -> None:
        if plan.decodes:
            for call in self.planners[0].decoding:
                self.tokens[call.call_id] += 1
        whole = [call.call_id for call, tokens in plan.prefills if call.computed + tokens == call.to_compute]
        for call_id in whole:
            self.tokens[call_id] += 1
        duration_s = 0.01 + 1e-4 * plan.prefill_tokens + 1e-4 * plan.decodes
        report = StepReport(duration_s, plan.prefill_tokens, plan.decodes, plan.context_tokens, plan.attention_tokens)
        assert self._twin is not None
        for planner, own in zip(self.planners, (plan, self._twin), strict=True):
            completed = planner.stepped(own)
            planner._steps.observe(report)
            assert [call.call_id for call in completed] == whole
        self.now_s += duration_s
        self.nothing_is_miscounted()
        for call_id, tokens in list(self.tokens.items()):
            if tokens >= self.targets[call_id]:
                self.remove(call_id)

    def remove(self, call_id: DispatchId) -> None:
        for planner in self.planners:
            call = planner.find(call_id)
            assert call is not None
            planner.remove(call)
        del self.specs[call_id], self.tokens[call_id], self.targets[call_id]


def shape_of(plan: StepPlan | None) -> Shape | None:
    if plan is None:
        return None
    return tuple((call.call_id, tokens) for call, tokens in plan.prefills), plan.decodes, plan.context_tokens


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("policy", POLICIES)
def test_a_crowded_engine_keeps_the_laws(policy: str, seed: int):
    """Chance seldom crowds an engine in the short histories above; here there are always more calls than room."""
    rng = random.Random(f"{policy}:{seed}")
    machine = PlannerMachine()
    machine.start(policy, rng.choice((4, 8)), rng.choice((16, 100, 2048)), rng.choice((3, 8)))
    for _ in range(150):
        while len(machine.specs) < 3 * machine.slots:
            prefix = rng.choice(("", "", "a", "b"))
            machine.arrive(rng.choice(SLOS), rng.choice(PROMPTS), rng.choice(OUTPUTS), any_standing(rng), prefix)
        for call_id in rng.sample(sorted(machine.specs), 3):
            standing = any_standing(rng)
            for planner in machine.planners:
                planner.retune(call_id, standing)
        machine.steps(rng.randint(1, 8), rng.random() < 0.2, rng.choice((0.0, 0.01, 0.1)))
        if machine.specs and rng.random() < 0.1:
            machine.remove(rng.choice(sorted(machine.specs)))
    planner = machine.planners[0]
    machine.everyone_leaves()

    assert planner.watched == planner.evictions > 0, "nothing was ever short of room: this test tests nothing"
    assert bool(planner.holds) == planner._policy.preempts, "calls are held by policies that preempt, and by no other"


def test_after_the_clock_was_set_back_the_order_is_looked_at_again():
    planner = WatchedPlanner(
        build_policy(SchedulingConfig(policy="tempo")),
        slots=1,
        max_step_tokens=2048,
        kv=KvBlocks(100, BLOCK_SIZE),
        steps=StepTimeModel(),
    )
    calls = [
        planner.add(DispatchId(n), spec, LengthHistograms().lookup(spec), Standing(density, is_admitted=True), 1000.0)
        for n, density in ((1, 100.0), (2, 1.0))
        for spec in [request(f"r{n}", slo=TOOL, arrival_s=999.0)]
    ]
    first = planner.plan(1000.0)
    assert [call.call_id for call, _ in first.prefills] == [1]
    planner.stepped(first)
    assert planner.plan(1000.01).decodes == 1
    for number, density in ((1, 1.0), (2, 100.0)):
        planner.retune(DispatchId(number), Standing(density, is_admitted=True))
    # An hour is lost. Whoever was put off for 0.3 s must not wait for the hour to pass again.
    after = planner.plan(-2600.0)

    assert ([call.call_id for call, _ in after.prefills], after.decodes) == ([2], 0)
    assert (calls[0].is_decoding, planner.held) == (False, 1)


def any_standing(rng: random.Random) -> Standing:
    return Standing(rng.choice((0.0, 0.01, 1.0, 100.0)), rng.random() < 0.6, rng.choice((0.0, 5.0)), rng.random() < 0.2)


TestStepPlanner = PlannerMachine.TestCase
TestStepPlanner.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
