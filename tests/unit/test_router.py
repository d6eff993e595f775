"""Stories of single decisions. The laws over whole histories are in tests/property/test_router_core.py."""

from dataclasses import replace

import pytest

from tempo_router.actions import Abort, Admit, Defer, Dispatch, Evict, Expire, Reject, Relegate, Retune
from tempo_router.config import SchedulingConfig
from tempo_router.errors import InvalidEventError
from tempo_router.events import (
    Cancelled,
    DrainStarted,
    ReplicaAttached,
    ReplicaCapacity,
    ReplicaDraining,
    ReplicaLost,
    RunningCall,
    Settled,
    StepReport,
    Ticked,
)
from tempo_router.prediction import LengthHistograms
from tempo_router.request import BestEffort, Deadline, DispatchId, Latency, ReplicaId, RequestId
from tempo_router.router import RouterCore
from tests.builders import BACKGROUND, CHAT, TOOL, arrived, attached, capacity, dispatched, progressed, request, router


def kinds(actions):
    return [type(action) for action in actions]


def adopted(number: int, request_id: str, **spec: object) -> RunningCall:
    """A call that a replica runs since an earlier life of the router."""
    return RunningCall(DispatchId(number), request(request_id, **spec), new_tokens=1)


# ---- the way of a request ----


def test_request_goes_to_a_free_replica_at_once():
    core = router("gpu0", epoch=3)
    admit, dispatch = core.handle(arrived("r", 1.0))
    assert isinstance(admit, Admit)
    assert dispatch == Dispatch(DispatchId(3 << 32 | 1), RequestId("r"), 0, ReplicaId("gpu0"), 1_000_000)
    assert core.knows(RequestId("r"), 0)
    core.audit()


def test_nothing_is_dispatched_before_the_router_has_settled():
    core = RouterCore(SchedulingConfig())
    core.handle(attached())
    assert kinds(core.handle(arrived("r"))) == [Admit]
    assert dispatched(core.handle(Settled(0.5))) == [("r", "gpu0")]


def test_replica_holds_its_slots_and_a_short_queue_and_no_more():
    core = router("gpu0", max_running=2, replica_queue_depth=1)
    sent = [dispatched(core.handle(arrived(f"r{n}"))) for n in range(5)]
    assert [len(each) for each in sent] == [1, 1, 1, 0, 0]
    after = core.handle(progressed("gpu0", 1.0, {1: 5}, {1: "completed"}))
    assert dispatched(after) == [("r3", "gpu0")]


def test_engine_that_cannot_keep_up_with_long_prompts_gets_no_more_than_the_queue_depth():
    """Calls wait in it and the prompt already sent fills what it has free: the rest stays here, in our order."""
    core = router("gpu0", max_running=8, replica_queue_depth=1)
    core.handle(arrived("r0"))
    core.handle(progressed("gpu0", 0.1, {1: 1}, engine_waiting=1))
    assert dispatched(core.handle(arrived("r1", prompt_tokens=1000))) == [("r1", "gpu0")]
    assert dispatched(core.handle(arrived("r2"))) == []
    assert dispatched(core.handle(progressed("gpu0", 0.2, {2: 1}, engine_waiting=0))) == [("r2", "gpu0")]


def test_request_of_a_lost_replica_is_evicted_and_goes_first_when_it_comes_again():
    """It keeps its arrival, so first come puts it ahead of newer ones."""
    core = router("gpu0", max_running=1)
    for n, name in enumerate(["old", "mid", "new"]):
        core.handle(arrived(name, float(n)))
    assert core.handle(ReplicaLost(3.0, ReplicaId("gpu0"))) == [Evict(RequestId("old"), 0)]
    assert not core.knows(RequestId("old"), 0)
    core.handle(arrived("old", 3.1, arrival_s=0.0, attempt=1, generated_tokens=7))
    assert dispatched(core.handle(attached("gpu1", 4.0, max_running=1))) == [("old", "gpu1")]


def test_call_that_the_replica_gave_up_is_evicted():
    core = router("gpu0")
    core.handle(arrived("r"))
    assert core.handle(progressed("gpu0", 1.0, finished={1: "lost"})) == [Evict(RequestId("r"), 0)]


# ---- verdicts ----


def test_full_queue_refuses_with_the_time_it_takes_to_work_it_off():
    core = router(max_waiting_requests=2)
    core.handle(arrived("r0"))
    core.handle(arrived("r1"))
    (reject,) = core.handle(arrived("r2"))
    assert isinstance(reject, Reject)
    assert reject.reason == "queue_full"
    assert reject.retry_after_s >= 1


def test_retry_after_grows_with_the_queue_and_falls_with_the_replicas():
    """4000 tokens of answer and 100 of prompt are seconds of work each: ten replicas need a tenth of the time."""

    def retry_after(replicas: int, waiting: int) -> float:
        core = router(max_waiting_requests=waiting)
        for _ in range(50):
            core.lengths.observe(request(), 4000, is_complete=True)
        for n in range(replicas):
            core.handle(attached(f"gpu{n}", kv_tokens=101))
        for n in range(waiting + 4 * replicas + 1):
            actions = core.handle(arrived(f"r{n}", max_output_tokens=4000))
            if isinstance(actions[0], Reject):
                return actions[0].retry_after_s
        raise AssertionError("nothing was refused")

    assert retry_after(1, 100) > 1.5 * retry_after(1, 50)
    assert retry_after(1, 100) > 5 * retry_after(10, 100)


def test_bound_on_waiting_tokens_holds_for_long_prompts():
    core = router(max_waiting_tokens=1000)
    assert kinds(core.handle(arrived("r0", prompt_tokens=900))) == [Admit]
    assert core.handle(arrived("r1", prompt_tokens=200))[0].reason == "queue_full"
    assert kinds(core.handle(arrived("r2", prompt_tokens=100))) == [Admit]


def test_prompt_that_no_replica_can_hold_is_too_large():
    core = router()
    core.handle(attached("gpu0", kv_tokens=1000))
    core.handle(attached("gpu1", kv_tokens=2000))
    assert core.handle(arrived("r0", prompt_tokens=2000)) == [Reject(RequestId("r0"), 0, "too_large", None)]
    assert dispatched(core.handle(arrived("r1", prompt_tokens=1999))) == [("r1", "gpu1")]


def test_without_replicas_a_request_waits_with_a_finite_estimate():
    core = router()
    (admit,) = core.handle(arrived("r", slo=BACKGROUND, prompt_tokens=10**6))
    assert 60 < admit.expected_wait_s < 1e6


@pytest.mark.parametrize(("hopeless", "expected"), [("refuse", [Reject]), ("relegate", [Admit, Relegate])])
def test_deadline_that_has_passed_at_arrival(hopeless, expected):
    core = router(hopeless=hopeless)
    actions = core.handle(arrived("r", 100.0, arrival_s=70.0, slo=TOOL))
    assert kinds(actions) == expected
    if hopeless == "refuse":
        assert (actions[0].reason, actions[0].retry_after_s) == ("deadline_impossible", None)
    else:
        assert actions[0].success_probability == 0.0


def test_later_attempts_are_never_refused():
    core = router(max_waiting_requests=1, hopeless="refuse")
    core.handle(arrived("r0", slo=BACKGROUND))
    core.handle(DrainStarted(0.0))
    late = arrived("r1", 100.0, arrival_s=0.0, slo=TOOL, attempt=1, generated_tokens=3)
    assert kinds(core.handle(late)) == [Admit, Relegate]


def test_draining_router_refuses_the_new_and_serves_the_waiting():
    core = router("gpu0", max_running=1)
    core.handle(arrived("r0"))
    core.handle(arrived("r1"))
    core.handle(DrainStarted(1.0))
    assert core.handle(arrived("r2", 1.0)) == [Reject(RequestId("r2"), 0, "draining", None)]
    assert dispatched(core.handle(progressed("gpu0", 2.0, finished={1: "completed"}))) == [("r1", "gpu0")]


# ---- siblings ----


def test_siblings_share_the_verdict_of_the_first():
    core = router(max_waiting_requests=3)
    core.handle(arrived("other"))
    group = {"group_id": "g", "group_size": 3}
    assert core.handle(arrived("g.0", **group))[0].reason == "queue_full"
    core.handle(Cancelled(0.0, RequestId("other")))
    assert core.handle(arrived("g.1", **group))[0].reason == "queue_full"
    assert core.handle(arrived("g.2", **group))[0].reason == "queue_full"
    core.audit()
    assert len(core._groups) == 0


def test_siblings_of_an_admitted_group_get_in_even_when_the_queue_has_filled():
    core = router(max_waiting_requests=2)
    group = {"group_id": "g", "group_size": 2}
    assert kinds(core.handle(arrived("g.0", **group))) == [Admit]
    assert kinds(core.handle(arrived("other"))) == [Admit]
    assert kinds(core.handle(arrived("g.1", **group))) == [Admit]


def test_siblings_follow_the_first_to_its_replica():
    """The other replica is empty; the prefix is here."""
    core = router("gpu0", "gpu1")
    group = {"group_id": "g", "group_size": 3}
    places = [dispatched(core.handle(arrived(f"g.{n}", **group)))[0][1] for n in range(3)]
    assert places == ["gpu0"] * 3
    assert dispatched(core.handle(arrived("alone"))) == [("alone", "gpu1")]


def test_siblings_of_a_lost_replica_go_elsewhere():
    core = router("gpu0", "gpu1", max_running=1)
    group = {"group_id": "g", "group_size": 2}
    core.handle(arrived("g.0", **group))
    assert dispatched(core.handle(arrived("g.1", **group))) == []
    assert dispatched(core.handle(ReplicaLost(1.0, ReplicaId("gpu0")))) == [("g.1", "gpu1")]


def test_siblings_do_not_wait_for_a_replica_on_which_none_of_them_runs_any_longer():
    core = router("gpu0", max_running=1)
    group = {"group_id": "g", "group_size": 2}
    core.handle(arrived("g.0", **group))
    core.handle(arrived("g.1", **group))
    core.handle(arrived("g.0", attempt=1, **group))
    assert dispatched(core.handle(attached("gpu1", 1.0, max_running=2))) == [("g.1", "gpu1"), ("g.0", "gpu1")]


# ---- cancels, resubmissions, attempts ----


def test_cancelled_waiting_request_is_forgotten_and_a_running_one_aborted():
    core = router("gpu0", max_running=1)
    core.handle(arrived("r0"))
    core.handle(arrived("r1"))
    assert core.handle(Cancelled(1.0, RequestId("r1"))) == []
    assert core.handle(Cancelled(1.0, RequestId("r0"))) == [Abort(DispatchId(1), ReplicaId("gpu0"))]
    assert core.handle(Cancelled(1.0, RequestId("r0"))) == []
    assert not core.knows(RequestId("r0"), 0)


def test_aborted_call_holds_its_slot_until_the_replica_says_that_it_ended():
    core = router("gpu0", max_running=1)
    core.handle(arrived("r0"))
    core.handle(Cancelled(1.0, RequestId("r0")))
    assert dispatched(core.handle(arrived("r1", 1.0))) == []
    assert dispatched(core.handle(progressed("gpu0", 1.1, finished={1: "cancelled"}))) == [("r1", "gpu0")]


def test_same_attempt_again_is_admitted_and_changes_nothing():
    core = router("gpu0", max_running=1)
    core.handle(arrived("r0"))
    core.handle(arrived("r1"))
    before = core.snapshot()
    assert kinds(core.handle(arrived("r0"))) == [Admit]
    assert kinds(core.handle(arrived("r1"))) == [Admit]
    assert core.snapshot() == before


def test_higher_attempt_of_a_running_request_replaces_it():
    core = router("gpu0", "gpu1")
    core.handle(arrived("r"))
    actions = core.handle(arrived("r", 1.0, arrival_s=0.0, attempt=1, generated_tokens=5))
    assert kinds(actions) == [Admit, Abort, Dispatch]
    assert (core.knows(RequestId("r"), 0), core.knows(RequestId("r"), 1)) == (False, True)
    assert core.handle(progressed("gpu0", 2.0, {1: 3}, {1: "completed"})) == []
    assert core.knows(RequestId("r"), 1)


# ---- attaching ----


def test_running_calls_of_a_former_life_are_adopted_even_if_their_owner_came_first():
    core = router(epoch=2)
    core.handle(arrived("r"))
    assert core.handle(attached("gpu0", 1.0, (adopted(1 << 32 | 9, "r"), adopted(1 << 32 | 8, "s")))) == []
    snapshot = core.snapshot()
    assert (sum(snapshot.waiting.values()), sum(snapshot.running.values())) == (0, 2)
    core.handle(progressed("gpu0", 2.0, {1 << 32 | 9: 1}, {1 << 32 | 9: "completed"}))
    assert not core.knows(RequestId("r"), 0)


def test_request_that_already_runs_elsewhere_is_aborted_on_the_newcomer():
    core = router("gpu0", epoch=2)
    core.handle(arrived("r"))
    newcomer = adopted(1 << 32 | 9, "r")
    assert core.handle(attached("gpu1", 1.0, (newcomer,))) == [Abort(DispatchId(1 << 32 | 9), ReplicaId("gpu1"))]
    assert core.knows(RequestId("r"), 0)


def test_newcomer_with_a_later_attempt_wins():
    core = router("gpu0", epoch=2)
    core.handle(arrived("r"))
    newcomer = adopted(1 << 32 | 9, "r", attempt=1)
    assert core.handle(attached("gpu1", 1.0, (newcomer,))) == [Abort(DispatchId(2 << 32 | 1), ReplicaId("gpu0"))]
    assert core.knows(RequestId("r"), 1)


def test_call_of_an_attempt_that_was_given_up_is_stopped():
    """Its owner has moved on and waits here with the next attempt."""
    core = router(epoch=2)
    core.handle(arrived("r", attempt=1))
    stale = adopted(1 << 32 | 9, "r")
    assert core.handle(attached("gpu0", 1.0, (stale,), max_running=1)) == [
        Abort(DispatchId(1 << 32 | 9), ReplicaId("gpu0"))
    ]
    assert core.knows(RequestId("r"), 1)


def test_call_that_was_evicted_is_stopped_when_its_replica_comes_back():
    """The link broke, the router gave the call up, its owner submits again: two attempts must not go on."""
    core = router("gpu0")
    core.handle(arrived("r"))
    core.handle(ReplicaLost(1.0, ReplicaId("gpu0")))
    back = attached("gpu0", 2.0, (adopted(1, "r"),))
    assert core.handle(back) == [Abort(DispatchId(1), ReplicaId("gpu0"))]


def test_replica_that_attaches_again_keeps_what_it_lists_and_loses_the_rest():
    core = router("gpu0")
    core.handle(arrived("kept"))
    core.handle(arrived("gone"))
    again = attached("gpu0", 1.0, (adopted(1, "kept"),))
    assert core.handle(again) == [Evict(RequestId("gone"), 0)]
    assert core.knows(RequestId("kept"), 0)


def test_abort_is_repeated_to_a_replica_that_still_runs_the_call():
    core = router("gpu0")
    core.handle(arrived("r"))
    core.handle(Cancelled(1.0, RequestId("r")))
    assert core.handle(attached("gpu0", 2.0, (adopted(1, "r"),))) == [Abort(DispatchId(1), ReplicaId("gpu0"))]


def test_draining_replica_gets_nothing_new():
    core = router("gpu0")
    core.handle(ReplicaDraining(0.0, ReplicaId("gpu0")))
    assert kinds(core.handle(arrived("r"))) == [Admit]
    core.handle(attached("gpu0", 1.0))
    assert sum(core.snapshot().running.values()) == 0, "attaching again does not end a drain"


def test_draining_replica_is_passed_over_for_a_busier_one():
    core = router("gpu0", "gpu1")
    core.handle(arrived("r0"))
    core.handle(arrived("r1"))
    core.handle(ReplicaDraining(0.0, ReplicaId("gpu0")))
    assert [dispatched(core.handle(arrived(f"more{n}")))[0][1] for n in range(3)] == ["gpu1"] * 3


# ---- news that is late, and news that cannot be ----


def test_late_news_is_ignored():
    core = router("gpu0", epoch=4)
    core.handle(arrived("r"))
    number = 4 << 32 | 1
    core.handle(progressed("gpu0", 1.0, finished={number: "completed"}))
    assert core.handle(progressed("gpu0", 2.0, {number: 3}, {number: "completed"})) == []
    assert core.handle(progressed("gpu0", 2.0, {3 << 32 | 77: 1})) == []
    assert core.handle(progressed("stranger", 2.0, {number: 1})) == []
    assert core.handle(ReplicaLost(2.0, ReplicaId("stranger"))) == []


@pytest.mark.parametrize("number", [4 << 32, 4 << 32 | 2])
def test_dispatch_that_was_never_made_is_refused_and_changes_nothing(number):
    core = router("gpu0", epoch=4)
    core.handle(arrived("r"))
    before = core.snapshot()
    with pytest.raises(InvalidEventError, match="never made"):
        core.handle(progressed("gpu0", 1.0, {4 << 32 | 1: 1, number: 1}))
    with pytest.raises(InvalidEventError, match="never made"):
        core.handle(attached("gpu1", 1.0, (adopted(number, "s"),)))
    assert core.snapshot() == before


def test_report_on_the_call_of_another_replica_is_refused():
    core = router("gpu0", "gpu1")
    core.handle(arrived("r"))
    with pytest.raises(InvalidEventError, match="runs on 'gpu0'"):
        core.handle(progressed("gpu1", 1.0, {1: 1}))


def test_clock_that_stands_still_or_steps_back_does_no_harm():
    core = router("gpu0", policy="density", max_running=1)
    for at_s in (5.0, 5.5, 5.5 - 1e-12, -1e9, float("nan"), float("-inf"), 4.0):
        core.handle(arrived(f"r{at_s}", at_s, arrival_s=5.0, slo=CHAT))
        core.handle(Ticked(at_s))
        core.audit()
    assert core.snapshot().waiting["latency"] == 6


# ---- hopeless work, starvation, room ----


def test_waiting_deadline_is_relegated_when_it_can_no_longer_be_met_and_still_served():
    core = router("gpu0", policy="edf", max_running=1)
    core.handle(arrived("first"))
    core.handle(progressed("gpu0", 0.1, {1: 1}))
    core.handle(arrived("tool", slo=Deadline(3.0)))
    assert core.handle(Ticked(2.0)) == []
    assert core.handle(Ticked(3.0)) == [Relegate(RequestId("tool"))]
    assert core.handle(Ticked(9.0)) == []
    assert dispatched(core.handle(progressed("gpu0", 10.0, finished={1: "completed"}))) == [("tool", "gpu0")]


def test_relegated_work_is_never_in_the_way_of_work_that_can_meet_its_target():
    core = router("gpu0", policy="density", max_running=1)
    core.handle(arrived("first"))
    core.handle(arrived("late", slo=Deadline(3.0)))
    core.handle(arrived("fresh", 5.0, slo=TOOL))
    assert dispatched(core.handle(progressed("gpu0", 5.1, finished={1: "completed"}))) == [("fresh", "gpu0")]


def test_hopeless_work_expires_where_the_operator_wants_it_refused_but_running_work_goes_on():
    core = router("gpu0", hopeless="refuse", max_running=1)
    core.handle(arrived("running", slo=Deadline(3.0)))
    core.handle(progressed("gpu0", 0.1, {1: 1}))
    core.handle(arrived("waiting", slo=Deadline(3.0)))
    assert core.handle(Ticked(4.0)) == [Expire(RequestId("waiting"))]
    assert core.knows(RequestId("running"), 0)
    assert not core.knows(RequestId("waiting"), 0)


def test_hopeless_work_that_waits_in_its_engine_is_taken_back():
    core = router("gpu0", hopeless="refuse")
    core.handle(arrived("r", slo=Deadline(3.0)))
    assert core.handle(Ticked(4.0)) == [Abort(DispatchId(1), ReplicaId("gpu0")), Expire(RequestId("r"))]
    assert not core.knows(RequestId("r"), 0)


def test_hopeless_work_that_waits_in_its_engine_goes_on_as_best_effort_where_the_operator_wants_it():
    core = router("gpu0", hopeless="relegate")
    core.handle(arrived("r", slo=Deadline(3.0)))
    assert core.handle(Ticked(4.0)) == [Relegate(RequestId("r"))]
    assert core.handle(Ticked(5.0)) == []
    assert core.knows(RequestId("r"), 0)


def test_what_was_given_up_in_its_engine_stays_so_whatever_later_plans_say():
    core = router(policy="tempo")
    core.handle(replace(attached("gpu0"), capacity=replace(capacity(4), has_step_planner=True)))
    core.handle(arrived("r", slo=Latency(4.0, 0.1), max_output_tokens=500))
    core.handle(arrived("tool", 0.1, slo=Deadline(60.0)))
    assert Relegate(RequestId("r")) in core.handle(Ticked(5.0))
    later = [action for at_s in (6.0, 7.0) for action in core.handle(Ticked(at_s))]
    told = [dict(action.standings)[DispatchId(1)].is_relegated for action in later if isinstance(action, Retune)]
    assert told == [True, True]
    assert core.is_relegated(RequestId("r"))
    assert not [action for action in later if isinstance(action, Defer)], "it has no place to lose"
    core.audit()


def test_answer_that_has_begun_is_not_broken_off():
    core = router(hopeless="refuse")
    core.handle(arrived("r", 0.0, slo=Deadline(3.0), attempt=1, generated_tokens=9))
    assert core.handle(Ticked(4.0)) == [Relegate(RequestId("r"))]


def test_stream_is_relegated_when_its_first_token_would_be_late_by_a_quarter_of_its_target():
    core = router(policy="density")
    core.handle(arrived("r", slo=Latency(4.0, 0.1), max_output_tokens=50))
    assert core.handle(Ticked(4.0)) == []
    assert core.handle(Ticked(5.0)) == [Relegate(RequestId("r"))]


def test_stream_that_has_begun_is_relegated_only_when_not_one_token_could_be_in_time():
    core = router(policy="density")
    core.handle(arrived("r", slo=Latency(1.0, 0.1), attempt=1, generated_tokens=5, max_output_tokens=50))
    assert core.handle(Ticked(3.0)) == []
    assert core.handle(Ticked(7.0)) == [Relegate(RequestId("r"))]


def test_starving_work_gets_one_dispatch_in_sixteen():
    core = router("gpu0", policy="class_priority", max_running=1, starvation_s=10.0)
    core.handle(arrived("first"))
    for n in range(5):
        core.handle(arrived(f"background{n}", slo=BACKGROUND))
    for n in range(40):
        core.handle(arrived(f"chat{n}", 20.0, slo=CHAT))
    served = []
    for n in range(1, 35):
        served += [name for name, _ in dispatched(core.handle(progressed("gpu0", 20.0, finished={n: "completed"})))]
    places = [place for place, name in enumerate(served) if name.startswith("background")]
    assert [served[place] for place in places] == ["background0", "background1"]
    assert places[1] - places[0] == 16


def test_large_request_is_not_overtaken_for_ever():
    """Small ones keep the cache nearly full. After a second a replica is kept free until the large one fits."""
    core = router(policy="fcfs")
    core.handle(attached("gpu0", kv_tokens=1000))
    core.handle(arrived("small0", prompt_tokens=300, max_output_tokens=1))
    core.handle(arrived("small1", prompt_tokens=300, max_output_tokens=1))
    assert dispatched(core.handle(arrived("large", 0.1, prompt_tokens=900, max_output_tokens=1))) == []
    assert dispatched(core.handle(arrived("small2", 0.2, prompt_tokens=300, max_output_tokens=1))) == [
        ("small2", "gpu0")
    ]
    core.handle(Ticked(1.2))
    core.handle(arrived("small3", 1.3, prompt_tokens=300, max_output_tokens=1))
    for number in (1, 2):
        assert dispatched(core.handle(progressed("gpu0", 1.4, finished={number: "completed"}))) == []
    assert dispatched(core.handle(progressed("gpu0", 1.5, finished={3: "completed"}))) == [("large", "gpu0")]
    core.audit()


@pytest.mark.parametrize("trouble", [ReplicaLost(1.5, ReplicaId("gpu0")), ReplicaDraining(1.5, ReplicaId("gpu0"))])
def test_replica_that_was_kept_free_goes_away_and_the_large_request_finds_another(trouble):
    core = router(policy="fcfs")
    core.handle(attached("gpu0", kv_tokens=1000))
    core.handle(arrived("small", prompt_tokens=300, max_output_tokens=1))
    core.handle(arrived("large", 0.1, prompt_tokens=900, max_output_tokens=1))
    core.handle(Ticked(1.2))
    core.handle(trouble)
    assert dispatched(core.handle(attached("gpu1", 2.0, kv_tokens=1000))) == [("large", "gpu1")]
    core.audit()


def test_small_replica_that_attaches_takes_what_the_large_ones_reserve_more_for():
    """On the large one 200 tokens are set aside for the answer; the small one can hold the prompt and some of it."""
    core = router(policy="fcfs")
    core.handle(attached("large", kv_tokens=350))
    core.handle(arrived("first", max_output_tokens=200))
    core.handle(arrived("second", max_output_tokens=200))
    assert core.snapshot().waiting["latency"] == 1
    assert dispatched(core.handle(attached("small", 0.1, kv_tokens=150))) == [("second", "small")]


def test_empty_replica_finds_its_request_behind_many_that_it_cannot_hold():
    core = router(policy="fcfs")
    core.handle(attached("small", kv_tokens=200, max_running=1))
    core.handle(attached("large", kv_tokens=1000))
    core.handle(arrived("fills small", prompt_tokens=100, max_output_tokens=1))
    core.handle(arrived("fills large", prompt_tokens=950, max_output_tokens=1))
    for n in range(30):
        core.handle(arrived(f"large{n}", prompt_tokens=900, max_output_tokens=1))
    core.handle(arrived("last", prompt_tokens=150, max_output_tokens=1))
    actions = core.handle(progressed("small", 0.1, finished={1: "completed"}))
    assert dispatched(actions) == [("last", "small")]


def test_request_that_fits_only_an_empty_replica_is_served():
    """Its expected answer alone is larger than the cache: the reserve gives way, the request does not."""
    core = router()
    core.handle(attached("gpu0", kv_tokens=110))
    assert dispatched(core.handle(arrived("r", prompt_tokens=105, max_output_tokens=5000))) == [("r", "gpu0")]


def test_request_that_no_replica_holds_any_longer_waits_for_one_and_blocks_nobody():
    core = router("gpu0", max_running=1)
    core.handle(arrived("first"))
    core.handle(arrived("large", prompt_tokens=9_000))
    core.handle(ReplicaLost(1.0, ReplicaId("gpu0")))
    core.handle(attached("small", 2.0, kv_tokens=500))
    assert core.snapshot().unplaceable == 1
    assert dispatched(core.handle(arrived("r", 2.0))) == [("r", "small")]
    assert dispatched(core.handle(attached("gpu1", 3.0))) == [("large", "gpu1")]


def test_least_loaded_replica_is_chosen():
    core = router("gpu0", "gpu1")
    core.handle(arrived("long", max_output_tokens=2000))
    core.handle(arrived("short", max_output_tokens=10))
    assert dispatched(core.handle(arrived("next", max_output_tokens=10))) == [("next", "gpu1")]


# ---- learning ----


def lengths_learnt(core: RouterCore) -> list[dict]:
    return core.lengths.snapshot()["histograms"][-1:]


def test_completed_answers_are_learnt_with_what_earlier_attempts_produced():
    core = router("gpu0")
    core.handle(arrived("r", attempt=1, generated_tokens=10))
    core.handle(progressed("gpu0", 1.0, {1: 6}, {1: "completed"}, output_tokens=6))
    expected = LengthHistograms()
    expected.observe(request(), 16, is_complete=True)
    assert lengths_learnt(core) == expected.snapshot()["histograms"][-1:]


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("replica_tells_first", [True, False])
def test_cancel_says_whether_the_answer_was_cut_off(is_complete, replica_tells_first):
    """A stop string ends an answer by a cancel, of which the worker may hear before the router or after it."""
    core = router("gpu0")
    core.handle(arrived("r"))
    core.handle(progressed("gpu0", 1.0, {1: 12}))
    news = [
        progressed("gpu0", 2.0, finished={1: "cancelled"}, output_tokens=12),
        Cancelled(2.0, RequestId("r"), is_complete),
    ]
    for event in news if replica_tells_first else reversed(news):
        core.handle(event)
    expected = LengthHistograms()
    expected.observe(request(), 12, is_complete=is_complete)
    assert lengths_learnt(core) == expected.snapshot()["histograms"][-1:]


def test_steps_are_learnt_per_replica_and_over_all():
    core = router("gpu0", "gpu1")
    for n in range(200):
        core.handle(progressed("gpu0", float(n), step=StepReport(0.5, 0, 10, 1000)))
    fast, slow = sorted(replica.tau_s for replica in core.snapshot().replicas)
    assert slow == pytest.approx(0.5, rel=0.05)
    assert fast < 0.1
    assert core.steps.tau_s == pytest.approx(0.5, rel=0.05)


def test_attach_again_with_another_capacity_is_believed():
    core = router("gpu0", max_running=1)
    core.handle(arrived("r0"))
    core.handle(arrived("r1"))
    again = attached("gpu0", 1.0, (adopted(1, "r0"),), max_running=2)
    assert isinstance(again, ReplicaAttached)
    assert dispatched(core.handle(again)) == [("r1", "gpu0")]


@pytest.mark.parametrize(("slo", "tau_s"), [(BestEffort(), 0.03), (Deadline(1e4), 0.1)])
def test_steps_without_a_target_among_their_calls_say_nothing_of_how_long_others_take(slo, tau_s):
    """An engine with a step planner makes them longer than the cap of 30 ms."""
    core = router(policy="tempo")
    core.handle(ReplicaAttached(0.0, ReplicaId("gpu0"), ReplicaCapacity(4, 8192, 100_000, has_step_planner=True)))
    core.handle(Settled(0.0))
    core.handle(arrived("r", 0.0, slo=slo, prompt_tokens=100))
    for number in range(1, 300):
        core.handle(progressed(at_s=0.1 * number, step=StepReport(0.1, 1000, 1, 200)))
    assert core.steps.pace().tau_s == pytest.approx(tau_s, rel=0.05)
