"""Who goes where now, without a router around it. What a whole router does with it is in test_router.py."""

from dataclasses import replace

import pytest

from tempo_router.actions import Action, Dispatch, Expire, Relegate
from tempo_router.config import SchedulingConfig
from tempo_router.dispatcher import Dispatcher
from tempo_router.fleet import Fleet
from tempo_router.groups import GroupBook
from tempo_router.hopeless import HopelessTimers
from tempo_router.ledger import Ledger
from tempo_router.policies import build_policy
from tempo_router.prediction import LengthHistograms
from tempo_router.prefixes import PrefixMemory
from tempo_router.replicas import Replica
from tempo_router.request import ProgramCall, ProgramId, ReplicaId, RequestId, Slo
from tempo_router.standing import Standing
from tempo_router.step_time import StepTimeModel
from tempo_router.waiting import WaitingRequest
from tempo_router.waiting_line import WaitingLine
from tests.builders import BACKGROUND, TOOL, capacity, context, dispatched, request


class Desk:
    """A dispatcher and what it shares with a router."""

    def __init__(self, policy: str = "fcfs", *, has_plan: bool = False, **config: object) -> None:
        settings = SchedulingConfig.model_validate({"policy": policy, "replica_queue_depth": 0, **config})
        order = build_policy(settings)
        self.line = WaitingLine(order)
        self.fleet = Fleet(epoch=0, queue_depth=settings.replica_queue_depth, is_deep=order.preempts and not has_plan)
        self.groups = GroupBook()
        self.ledger = Ledger()
        self.prefixes = PrefixMemory()
        shared = (self.line, self.fleet, self.groups, self.ledger, self.prefixes, HopelessTimers())
        self.dispatcher = Dispatcher(settings, order, *shared, has_plan=has_plan)
        self.tickets = 0

    def attach(self, name: str = "gpu0", max_running: int = 1, kv_tokens: int = 10_000, at_s: float = 0.0) -> Replica:
        replica = self.fleet.attach(ReplicaId(name), capacity(max_running, kv_tokens), StepTimeModel())
        self.fleet.recount()
        self.dispatcher.replicas_changed(context(at_s))
        return replica

    def enter(self, name: str, at_s: float = 0.0, prefix_id: str = "", **spec: object) -> WaitingRequest:
        made = request(name, **{"arrival_s": at_s, **spec})  # type: ignore[arg-type]  # see request()
        made = replace(made, prefix_id=prefix_id, prefix_tokens=50 if prefix_id else 0)
        self.tickets += 1
        one = WaitingRequest(made, self.tickets, at_s, LengthHistograms().lookup(made), 0.1, float("inf"))
        self.groups.entered(made)
        self.ledger.arrived(one)
        self.dispatcher.enter(one, context(at_s))
        return one

    def dispatch(self, at_s: float = 0.0) -> list[Action]:
        actions: list[Action] = []
        if self.dispatcher.may_dispatch(at_s):
            self.dispatcher.dispatch(context(at_s), actions)
        self.line.audit()
        self.fleet.audit()
        self.dispatcher.audit()
        return actions

    def end(self, name: str) -> None:
        call = self.fleet.running[RequestId(name)]
        self.fleet.release(call)
        self.groups.left(call.spec, was_running=True)
        self.ledger.left(call.spec)


@pytest.mark.parametrize("policy", ["fcfs", "edf", "jitserve", "lsdf"])
def test_a_dispatcher_that_says_it_cannot_dispatch_would_not(policy: str):
    desk = Desk(policy)
    desk.attach(max_running=2)
    refused = started = 0
    for number in range(60):
        at_s = number * 0.1
        desk.enter(f"r{number}", at_s)
        may, actions = desk.dispatcher.may_dispatch(at_s), []
        desk.dispatcher.dispatch(context(at_s), actions)
        assert may or not actions, f"at {at_s} s: {actions}"
        refused += not may
        started += len(dispatched(actions))
        if number % 3 == 0:
            desk.end(next(iter(desk.fleet.running)))
    assert started >= 20
    assert refused


def deferred(desk: Desk, name: str, slo: Slo) -> WaitingRequest:
    one = desk.enter(name, slo=slo)
    one.standing = Standing(density=5.0, is_admitted=False)
    return one


def test_a_gamble_starts_on_a_replica_where_no_prompt_waits_and_the_next_waits_for_its_first_token():
    desk = Desk("tempo", has_plan=True)
    replica = desk.attach(max_running=4)
    for name in ("a", "b"):
        deferred(desk, name, TOOL)
    assert dispatched(desk.dispatch()) == [("a", "gpu0")]
    assert dispatched(desk.dispatch(0.1)) == []
    call = desk.fleet.running[RequestId("a")]
    replica.progress([call], [(call.dispatch_id, 1)])
    assert dispatched(desk.dispatch(0.2)) == [("b", "gpu0")]


def test_a_whole_program_is_begun_unplanned_only_where_steps_are_well_below_their_cap():
    desk = Desk("tempo", has_plan=True)
    replica = desk.attach()
    deferred(desk, "p", ProgramCall(ProgramId("p"), 60.0))
    desk.dispatcher.step_cap_s = replica.steps.tau_s
    assert dispatched(desk.dispatch()) == []
    desk.dispatcher.step_cap_s = 2.0 * replica.steps.tau_s
    assert dispatched(desk.dispatch(0.1)) == [("p", "gpu0")]


def test_a_short_answer_behind_programs_that_may_not_begin_is_found():
    desk = Desk("tempo", has_plan=True)
    replica = desk.attach()
    desk.dispatcher.step_cap_s = replica.steps.tau_s
    for number in range(3):
        deferred(desk, f"p{number}", ProgramCall(ProgramId(f"p{number}"), 60.0))
    deferred(desk, "answer", TOOL)
    assert dispatched(desk.dispatch()) == [("answer", "gpu0")]


def test_best_effort_waits_while_steps_near_their_cap_serve_what_can_be_in_time():
    desk = Desk("tempo", has_plan=True)
    replica = desk.attach(max_running=4)
    desk.enter("sure", slo=TOOL).standing = Standing(density=5.0, is_admitted=True)
    assert dispatched(desk.dispatch()) == [("sure", "gpu0")]
    desk.enter("background", slo=BACKGROUND)
    desk.enter("late", slo=TOOL).is_given_up = True
    call = desk.fleet.running[RequestId("sure")]
    replica.progress([call], [(call.dispatch_id, 1)])
    desk.dispatcher.step_cap_s = replica.steps.tau_s
    assert dispatched(desk.dispatch(0.1)) == []
    desk.end("sure")
    assert dispatched(desk.dispatch(0.2)) == [("background", "gpu0"), ("late", "gpu0")]


def test_best_effort_that_starves_gets_a_turn_between_admitted_work_although_steps_are_at_their_cap():
    desk = Desk("tempo", has_plan=True, starvation_s=10.0)
    replica = desk.attach(max_running=40)
    replica.capacity = replace(replica.capacity, has_step_planner=True)
    desk.dispatcher.step_cap_s = replica.steps.tau_s
    desk.enter("sure", slo=TOOL).standing = Standing(density=5.0, is_admitted=True)
    desk.dispatch()
    desk.enter("background", slo=BACKGROUND)
    sent: list[str] = []
    for number in range(20):
        one = desk.enter(f"next{number}", 20.0, slo=TOOL)
        one.standing = Standing(density=5.0, is_admitted=True)
        desk.line.queue.rekey(one, context(20.0))
        sent += [name for name, _ in dispatched(desk.dispatch(20.0))]
    assert "background" in sent
    assert sent.index("background") >= 14, "one dispatch of sixteen"


def test_among_best_effort_alone_smaller_ones_pass_one_that_lacks_cache_for_a_while():
    desk = Desk("tempo", has_plan=True)
    desk.attach(max_running=8, kv_tokens=1000)
    desk.enter("running", slo=BACKGROUND, prompt_tokens=600)
    desk.dispatch()
    for number in range(6):
        desk.enter(f"large{number}", slo=BACKGROUND, prompt_tokens=700)
    desk.enter("small", slo=BACKGROUND, prompt_tokens=50, max_output_tokens=20)
    assert dispatched(desk.dispatch()) == [("small", "gpu0")]
    desk.end("small")
    desk.dispatcher.look_again()
    desk.dispatch(1.5)
    desk.enter("later", 1.6, slo=BACKGROUND, prompt_tokens=50, max_output_tokens=20)
    assert dispatched(desk.dispatch(1.6)) == [], "the replica is kept free for the large one"
    desk.end("running")
    assert dispatched(desk.dispatch(1.7))[0] == ("large0", "gpu0")


def test_best_effort_does_not_keep_out_a_gamble():
    desk = Desk("tempo", has_plan=True)
    desk.attach(max_running=1)
    desk.enter("background", slo=BACKGROUND)
    gamble = deferred(desk, "gamble", TOOL)
    desk.line.queue.rekey(gamble, context(0.0))
    assert dispatched(desk.dispatch()) == [("gamble", "gpu0")]


def test_with_nobody_waiting_there_is_nothing_to_dispatch():
    desk = Desk()
    desk.attach()
    assert not desk.dispatcher.may_dispatch(0.0)


def test_after_a_look_that_found_no_cache_only_a_smaller_newcomer_is_worth_another():
    desk = Desk()
    desk.attach(max_running=4, kv_tokens=1000)
    desk.enter("running", prompt_tokens=600)
    desk.enter("large", prompt_tokens=700)
    assert dispatched(desk.dispatch()) == [("running", "gpu0")]
    assert not desk.dispatcher.may_dispatch(0.0)
    desk.enter("larger", 0.1, prompt_tokens=800)
    assert not desk.dispatcher.may_dispatch(0.1)
    desk.enter("small", 0.2, prompt_tokens=50, max_output_tokens=20)
    assert dispatched(desk.dispatch(0.2)) == [("small", "gpu0")]
    desk.end("running")
    assert dispatched(desk.dispatch(0.3)) == [("large", "gpu0")]


def test_a_replica_kept_free_for_a_request_is_free_for_all_again_when_that_request_leaves():
    desk = Desk()
    desk.attach(max_running=4, kv_tokens=1000)
    desk.enter("running", prompt_tokens=600)
    large = desk.enter("large", prompt_tokens=700)
    desk.dispatch()
    desk.dispatcher.look_again()
    assert desk.dispatch(1.5) == []  # it has been overtaken for long enough
    desk.enter("small", 1.6, prompt_tokens=50, max_output_tokens=20)
    assert desk.dispatch(1.6) == []
    desk.dispatcher.withdraw(large)
    assert dispatched(desk.dispatch(1.7)) == [("small", "gpu0")]


def test_what_fits_nowhere_waits_aside_until_a_replica_comes_that_can_hold_it():
    desk = Desk()
    desk.attach("small", max_running=4, kv_tokens=500)
    desk.enter("large", prompt_tokens=800)
    assert desk.dispatch() == []
    assert list(desk.line.unplaceable) == ["large"]
    desk.attach("large", kv_tokens=2000, at_s=1.0)
    assert dispatched(desk.dispatch(1.0)) == [("large", "large")]
    assert not desk.line.unplaceable


@pytest.mark.parametrize(("affinity", "expected"), [(True, "gpu1"), (False, "gpu0")])
def test_a_request_goes_where_its_prefix_is_cached_if_affinity_is_on(affinity: bool, expected: str):
    desk = Desk(switches={"affinity": affinity})
    for name in ("gpu0", "gpu1"):
        desk.attach(name, max_running=4)
    one = desk.enter("r", prefix_id="p")
    desk.prefixes.remember(one.spec, ReplicaId("gpu1"), 0)
    assert dispatched(desk.dispatch()) == [("r", expected)]


@pytest.mark.parametrize(
    ("hopeless", "generated", "action"), [("refuse", 0, Expire), ("refuse", 5, Relegate), ("relegate", 0, Relegate)]
)
def test_who_is_given_up_leaves_or_waits_on_as_best_effort(hopeless: str, generated: int, action: type[Action]):
    desk = Desk(hopeless=hopeless)
    desk.attach()
    one = desk.enter("r", slo=TOOL, generated_tokens=generated, attempt=1)
    actions: list[Action] = []
    desk.dispatcher.give_up(one, context(), actions)
    assert actions == [action(one.spec.request_id)]
    is_left = action is Expire
    assert (desk.line.requests == {}) == is_left
    assert one.is_relegated != is_left
    assert [type(each) for each in desk.dispatch()] == ([] if is_left else [Dispatch])


def test_late_requests_are_given_up_when_their_turn_comes():
    desk = Desk()
    desk.attach()
    desk.enter("late", slo=TOOL)
    desk.enter("in time", 100.0, slo=TOOL)
    assert [type(one) for one in desk.dispatch(100.0)] == [Relegate, Dispatch]
