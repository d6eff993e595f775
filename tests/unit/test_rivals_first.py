"""What each of the simple rivals is for: one story per rule."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.policies.base import CHUNKED, BatchRule, remaining_s
from tempo_router.policies.bros import LeastSlack
from tempo_router.policies.class_fcfs import ClassArrival
from tempo_router.policies.class_priority import ClassPriority
from tempo_router.policies.edf import EarliestDeadline
from tempo_router.policies.edf_preemptive import PreemptiveEarliestDeadline
from tempo_router.policies.fcfs import FirstCome
from tempo_router.policies.hygen import OnlineFirst
from tempo_router.policies.llmd import SloDeadline
from tempo_router.policies.ltr import ShortestPredicted
from tempo_router.policies.qoserve import DeadlinePlusWork
from tempo_router.policies.srpt import ShortestRemaining
from tempo_router.policies.vllm_fcfs import WholePromptsFirst
from tempo_router.prediction import Lengths
from tempo_router.request import Deadline, Latency, ProgramCall, ProgramId
from tests.builders import BACKGROUND, CHAT, PACE, TOOL, context, live, request, waiting


def known(tokens: float) -> Lengths:
    """An answer of which the length is known."""
    return Lengths((tokens,) * 20)


def order(policy, *jobs, now_s=0.0):
    """Names of the jobs, first to be served first."""
    at = context(now_s)
    ranked = sorted(jobs, key=lambda job: (policy.key(job, at), job.ticket))
    return [job.spec.request_id for job in ranked]


# ---- arrival ----


def test_whole_prompts_go_first_in_vllm_and_in_chunks_in_sarathi():
    assert (WholePromptsFirst().batch.kind, WholePromptsFirst().batch.step_tokens) == ("prefill_first", 8192)
    assert (FirstCome().batch.kind, FirstCome().batch.step_tokens) == ("chunked", 512)


@given(arrivals=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8, unique=True))
def test_both_first_come_policies_order_by_arrival_alone(arrivals):
    slos = (CHAT, TOOL, BACKGROUND)
    jobs = [
        waiting(request(str(at_s), slo=slos[ticket % 3], arrival_s=at_s), ticket, is_relegated=ticket % 2 == 0)
        for ticket, at_s in enumerate(arrivals)
    ]
    expected = [str(at_s) for at_s in sorted(arrivals)]
    assert order(FirstCome(), *jobs) == order(WholePromptsFirst(), *jobs) == expected


# ---- classes ----


def test_the_plain_class_order_goes_by_arrival_inside_a_class_however_urgent():
    assert order(
        ClassArrival(),
        waiting(request("background", slo=BACKGROUND, arrival_s=-50.0)),
        waiting(request("agent", slo=ProgramCall(ProgramId("p"), 0.1), arrival_s=0.0)),
        waiting(request("tool, urgent", slo=Deadline(0.5), arrival_s=2.0)),
        waiting(request("tool", slo=TOOL, arrival_s=1.0)),
        waiting(request("chat, urgent", slo=Latency(0.1, 0.01), arrival_s=2.0)),
        waiting(request("chat", slo=CHAT, arrival_s=1.0)),
    ) == ["chat", "chat, urgent", "tool", "tool, urgent", "agent", "background"]


def test_only_the_strong_class_order_knows_that_a_request_is_late():
    late = waiting(request("late", slo=CHAT, arrival_s=0.0), is_relegated=True)
    tool = waiting(request("tool", slo=TOOL, arrival_s=1.0), 2)
    assert order(ClassArrival(), late, tool) == ["late", "tool"]
    assert order(ClassPriority(), late, tool) == ["tool", "late"]


# ---- deadlines ----


@given(
    slos=st.lists(
        st.one_of(st.builds(Latency, st.floats(0.1, 50), st.floats(0.01, 1)), st.builds(Deadline, st.floats(0.1, 99))),
        min_size=2,
        max_size=6,
    ),
    generated=st.integers(0, 100),
)
def test_preemptive_edf_has_the_order_of_edf_and_differs_in_preempting(slos, generated):
    at = context()
    jobs = [live(request(str(n), slo=slo), n, generated_tokens=generated) for n, slo in enumerate(slos)]
    assert PreemptiveEarliestDeadline().arrange(jobs, at) == EarliestDeadline().arrange(jobs, at)
    assert PreemptiveEarliestDeadline.preempts
    assert not EarliestDeadline.preempts


def test_a_stream_ahead_of_its_schedule_yields_under_preemptive_edf():
    """After 30 tokens its next is due at 2 + 30 x 0.1 = 5 s, behind an answer that is due at 4 s."""
    ahead = live(request("ahead", slo=CHAT), 1, generated_tokens=30)
    tool = waiting(request("tool", slo=Deadline(4.0)), 2)
    fresh = waiting(request("fresh", slo=CHAT), 3)
    assert order(PreemptiveEarliestDeadline(), ahead, tool, fresh) == ["fresh", "tool", "ahead"]


def test_llmd_dispatches_by_arrival_plus_stated_target_and_what_states_none_last():
    assert order(
        SloDeadline(),
        waiting(request("no target", slo=BACKGROUND, arrival_s=-9.0)),
        waiting(request("loose", slo=Latency(10.0, 0.1)), 2),
        waiting(request("whole answer", slo=Deadline(4.0)), 3),
        waiting(request("tight, later", slo=Latency(0.5, 0.1), arrival_s=3.0), 4),
    ) == ["tight, later", "whole answer", "loose", "no target"]


def test_llmd_does_not_see_tokens_and_leaves_the_engine_to_first_come_first_served():
    fresh, old = live(request("a", slo=CHAT)), live(request("b", slo=CHAT), 2, generated_tokens=500)
    assert SloDeadline().key(fresh, context()) == SloDeadline().key(old, context())
    urgent_but_new = live(request("c", slo=Deadline(0.1)), 3, since_s=7.0)
    patient_but_old = live(request("d", slo=Deadline(99.0)), 4, since_s=6.0)
    keys = SloDeadline().arrange([urgent_but_new, patient_but_old], context())
    assert keys[1] < keys[0]


# ---- lengths ----


def test_ltr_takes_short_answers_first_whatever_they_have_done_and_whenever_they_are_due():
    assert order(
        ShortestPredicted(),
        live(request("long, nearly done", slo=CHAT), 1, known(180), generated_tokens=179),
        waiting(request("short", slo=TOOL), 2, known(20)),
        waiting(request("middle", slo=BACKGROUND), 3, known(100)),
    ) == ["short", "middle", "long, nearly done"]


def test_ltr_promotes_what_has_waited_too_long_until_it_has_started():
    ltr = ShortestPredicted(starved_after_s=10.0)
    long_one = request("long", max_output_tokens=5000)
    short = waiting(request("short", arrival_s=11.0), 2, known(20))
    assert order(ltr, waiting(long_one, 1, known(4000)), short, now_s=9.0) == ["short", "long"]
    assert order(ltr, waiting(long_one, 1, known(4000)), short, now_s=12.0) == ["long", "short"]
    started = live(long_one, 1, known(4000), generated_tokens=1)
    assert order(ltr, started, short, now_s=12.0) == ["short", "long"]


def test_srpt_counts_what_is_left_and_the_prompt_with_it():
    assert order(
        ShortestRemaining(),
        live(request("long, nearly done"), 1, known(180), generated_tokens=179),
        waiting(request("short answer, huge prompt", prompt_tokens=30_000), 2, known(5)),
        waiting(request("short", prompt_tokens=100), 3, known(20)),
    ) == ["long, nearly done", "short", "short answer, huge prompt"]


@given(prompt=st.integers(1, 10_000), length=st.integers(2, 199), done=st.integers(0, 197))
def test_remaining_work_shrinks_with_every_token_and_with_every_chunk(prompt, length, done):
    spec = request(prompt_tokens=prompt)
    states = [
        live(spec, 1, known(length), missing_tokens=prompt),
        live(spec, 1, known(length), missing_tokens=prompt // 2),
        live(spec, 1, known(length)),
        live(spec, 1, known(length), generated_tokens=min(done, length - 1)),
    ]
    costs = [remaining_s(state, PACE) for state in states]
    assert all(later <= earlier for earlier, later in pairwise(costs))
    assert costs[-1] > 0


# ---- QoServe ----


def test_qoserve_charges_prompts_of_streams_and_prompts_and_answers_of_others():
    """At 8 ms a token: 100 tokens of prompt are 0.8 s, 50 of answer 0.4 s, on top of due times of 2 s and 20 s."""
    policy, at = DeadlinePlusWork(work_ratio=0.0, alpha_s=0.008), context()
    assert policy.key(waiting(request(slo=CHAT), 1, known(50)), at) == pytest.approx(2.8)
    assert policy.key(waiting(request(slo=TOOL), 1, known(50)), at) == pytest.approx(21.2)


def test_qoserve_expects_an_answer_that_few_exceed():
    """Ten of 10 tokens and ten of 90: mean 50, deviation 40, so 130 with two of them; never more than is allowed."""
    policy, at = DeadlinePlusWork(work_ratio=0.0, alpha_s=1.0), context()
    lengths = Lengths((10.0,) * 10 + (90.0,) * 10)
    spec = request(slo=TOOL, prompt_tokens=1, max_output_tokens=1000)
    assert policy.key(waiting(spec, 1, lengths), at) == pytest.approx(20 + 1 + 130)
    bounded = request(slo=TOOL, prompt_tokens=1, max_output_tokens=60)
    assert policy.key(waiting(bounded, 1, lengths), at) == pytest.approx(20 + 1 + 60)


def test_qoserve_never_holds_what_decodes_not_even_what_is_late():
    decoding = live(request("decoding", slo=TOOL), 1, known(100), generated_tokens=1, is_relegated=True)
    urgent = waiting(request("urgent", slo=Latency(0.1, 0.1), prompt_tokens=1), 2, known(1))
    assert order(DeadlinePlusWork(), urgent, decoding) == ["decoding", "urgent"]


def test_qoserve_is_deadline_order_on_an_idle_engine_and_prefers_little_work_on_a_full_one():
    long_one = live(request("long", slo=Deadline(10.0), prompt_tokens=3000), 1, known(10), missing_tokens=3000)
    short = live(request("short", slo=Deadline(15.0), prompt_tokens=100), 2, known(10), missing_tokens=100)
    policy = DeadlinePlusWork(alpha_s=0.008, idle_alpha_s=0.001, work_ratio=0.0)
    idle = policy.arrange([long_one, short], context(slots=128))
    full = policy.arrange([long_one, short], context(slots=2))
    assert idle[0] < idle[1]
    assert full[1] < full[0]


def test_qoserve_can_charge_gpu_seconds_instead_of_tokens():
    spec = request(slo=TOOL, prompt_tokens=1000)
    job = waiting(spec, 1, known(50))
    key = DeadlinePlusWork(alpha_s=0.0, work_ratio=4.0).key(job, context())
    assert key == pytest.approx(20 + 4 * remaining_s(job, PACE))


# ---- HyGen and BROS ----


def test_hygen_serves_streams_then_what_has_started_then_the_rest_by_arrival():
    assert order(
        OnlineFirst(),
        waiting(request("urgent tool", slo=Deadline(0.1), arrival_s=2.0)),
        waiting(request("background", slo=BACKGROUND, arrival_s=1.0), 2),
        live(request("tool, decoding", slo=TOOL, arrival_s=9.0), 3, generated_tokens=5),
        waiting(request("chat", slo=CHAT, arrival_s=99.0), 4),
    ) == ["chat", "tool, decoding", "background", "urgent tool"]


def test_hygen_lets_a_cached_prompt_overtake_until_the_other_is_much_older():
    """1,000 cached tokens at 5 ms each are worth five seconds of age."""
    cached = waiting(request("cached", slo=TOOL, arrival_s=10.0, prompt_tokens=2000), 2)
    cached.cached_tokens = 1000
    policy = OnlineFirst(credit_s=0.005)
    assert order(policy, cached, waiting(request("older", slo=TOOL, arrival_s=6.0))) == ["cached", "older"]
    assert order(policy, cached, waiting(request("oldest", slo=TOOL, arrival_s=4.0))) == ["oldest", "cached"]


def test_bros_orders_by_slack_and_so_a_long_answer_before_a_short_one_of_the_same_deadline():
    """At 10 ms a step 1,000 tokens take 10 s of the 20: less slack than ten tokens leave, more than a first token."""
    assert order(
        LeastSlack(),
        waiting(request("short", slo=TOOL), 1, known(10)),
        waiting(request("long", slo=TOOL, max_output_tokens=2000), 2, known(1000)),
        waiting(request("chat", slo=CHAT), 3, known(1000)),
    ) == ["chat", "long", "short"]


def test_bros_slack_of_a_stream_is_that_of_its_next_token_alone():
    policy, at = LeastSlack(), context()
    ahead = live(request("a", slo=CHAT), 1, known(150), generated_tokens=40)
    assert policy.key(ahead, at) == pytest.approx(2.0 + 40 * 0.1 - 0.01)


def test_bros_best_effort_goes_last_and_by_the_least_prompt_to_bring_in():
    assert order(
        LeastSlack(),
        waiting(request("big", slo=BACKGROUND, prompt_tokens=5000, arrival_s=0.0)),
        waiting(request("small", slo=BACKGROUND, prompt_tokens=50, arrival_s=1.0), 2),
        live(request("in cache", slo=BACKGROUND, arrival_s=2.0), 3, generated_tokens=3),
        waiting(request("tool", slo=TOOL, arrival_s=3.0), 4),
    ) == ["tool", "in cache", "small", "big"]


@pytest.mark.parametrize("policy", [DeadlinePlusWork, OnlineFirst, LeastSlack])
def test_policies_that_watch_the_step_time_can_be_given_a_cap(policy):
    assert policy().batch == CHUNKED
    assert policy(batch=BatchRule(kind="capped", cap_s=0.05)).batch.cap_s == 0.05
