"""One contract for every policy, and what the project's own ones are for."""

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_router.config import SchedulingConfig
from tempo_router.ledger import Ledger
from tempo_router.policies import POLICY_NAMES, Policy, build_policy
from tempo_router.policies.base import BEST_EFFORT_KEY
from tempo_router.policies.density import ValueDensity
from tempo_router.prediction import ATOMS, Lengths
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, ProgramId, ReplicaId
from tempo_router.slo_queue import SloQueue
from tempo_router.standing import UNRANKED, Standing
from tempo_router.step_time import Pace
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL, context, live, produced, request, waiting

RISING = (
    "fcfs",
    "vllm_fcfs",
    "class_fcfs",
    "class_priority",
    "edf",
    "edf_preemptive",
    "density",
    "srpt",
    "llmd",
    "qoserve",
    "hygen",
    "bros",
)
"""Keys of these never fall while a request waits, so their queue is exact without looking at all of it."""

MINDS_TARGETS = ("edf", "edf_preemptive", "class_priority", "density", "llmd", "qoserve", "bros")
"""These put best effort, and what can no longer meet its target, behind all else that waits."""

few = settings(max_examples=25)
"""Crowds are costly to draw, and every policy gets its own."""

seconds = st.floats(1e-6, 1e9)
slos = st.one_of(
    st.builds(Latency, seconds, seconds),
    st.builds(Deadline, seconds),
    st.builds(ProgramCall, st.sampled_from([ProgramId("p"), ProgramId("q")]), seconds),
    st.builds(BestEffort),
)
specs = st.builds(
    request,
    slo=slos,
    arrival_s=st.floats(-1e9, 1e9),
    prompt_tokens=st.integers(0, 10**7),
    max_output_tokens=st.integers(1, 10**7),
    generated_tokens=st.integers(0, 10**7),
)
paces = st.builds(
    Pace,
    prefill_token_s=st.floats(1e-9, 1),
    share_s=st.floats(1e-9, 10),
    decode_s=st.floats(0, 1),
    context_token_s=st.floats(0, 1e-3),
    tau_s=st.floats(1e-6, 100),
    alone_s=st.floats(1e-6, 100),
)
moments = st.floats(-1e9, 1e12)
lengths_known = st.sampled_from(
    [
        Lengths(tuple(20.0 + 3 * n for n in range(ATOMS))),
        Lengths(tuple(1.5**n for n in range(1, ATOMS + 1))),
        Lengths((1.0,) * ATOMS),
        Lengths((1e6,) * ATOMS),
    ]
)
standings = st.sampled_from(
    [
        UNRANKED,
        Standing(density=3.0, is_admitted=True, later_s=2.0),
        Standing(density=50.0, is_admitted=False),
        Standing(density=0.0, is_admitted=False, is_relegated=True),
    ]
)


@st.composite
def crowds(draw, most=8):
    """Calls of one engine, in order of their tickets: waiting for prefill, in it, or decoding."""
    jobs = []
    for ticket in range(1, draw(st.integers(1, most)) + 1):
        spec = request(
            f"r{ticket}",
            slo=draw(slos),
            arrival_s=draw(st.floats(-100, 100)),
            prompt_tokens=draw(st.integers(1, 30_000)),
            max_output_tokens=draw(st.integers(1, 5000)),
            app=draw(st.sampled_from(["", "chat", "agent"])),
        )
        generated = draw(st.integers(0, spec.max_output_tokens))
        missing = draw(st.sampled_from([0, 1, spec.prompt_tokens + generated]))
        jobs.append(
            live(
                spec,
                ticket,
                draw(lengths_known),
                generated_tokens=generated,
                missing_tokens=missing,
                is_relegated=draw(st.booleans()),
                standing=draw(standings),
            )
        )
    return jobs


def policy(name: str, **config: object) -> Policy:
    return build_policy(SchedulingConfig.model_validate({"policy": name, **config}))


def order(name: str, *requests: object, now_s: float = 0.0, **config: object) -> list[str]:
    """Names of the requests as a queue of this policy gives them out."""
    queue, at = SloQueue(policy(name, **config)), context(now_s)
    for ticket, spec in enumerate(requests, start=1):
        queue.push(spec if not hasattr(spec, "slo") else waiting(spec, ticket), at)
    return [queue.pop(at).spec.request_id for _ in requests]


def ledger_of(jobs) -> Ledger:
    """A ledger that has seen these jobs come, and half of them start and produce."""
    ledger = Ledger()
    for job in jobs:
        ledger.arrived(job)
        if job.ticket % 2:
            ledger.started(job, ReplicaId("gpu0"), 0.5)
            produced(ledger, job.spec, job.generated_tokens)
    return ledger


# ---- the contract ----


@pytest.mark.parametrize("name", POLICY_NAMES)
@few
@given(spec=specs, pace=paces, now_s=moments, is_relegated=st.booleans(), standing=standings)
def test_keys_are_finite_and_the_same_when_asked_twice(name, spec, pace, now_s, is_relegated, standing):
    one = waiting(spec, is_relegated=is_relegated)
    one.standing = standing
    at = context(now_s, pace, ledger=ledger_of([one]))
    key = policy(name).key(one, at)
    assert math.isfinite(key)
    assert key == policy(name).key(one, at)


@pytest.mark.parametrize("name", POLICY_NAMES)
@few
@given(spec=specs, pace=paces, now_s=moments)
def test_engine_priority_fits_its_type_and_follows_the_key(name, spec, pace, now_s):
    reference, one = waiting(request("reference", slo=CHAT, arrival_s=1.0)), waiting(spec)
    at = context(now_s, pace, ledger=ledger_of([reference, one]))
    priority = policy(name).engine_priority(one, at)
    assert isinstance(priority, int)
    assert -(2**63) <= priority < 2**63
    if policy(name).key(one, at) < policy(name).key(reference, at):
        assert priority <= policy(name).engine_priority(reference, at)


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("slo", [CHAT, TOOL, AGENT, BACKGROUND])
def test_equal_requests_go_by_arrival_at_the_router(name, slo):
    assert order(name, *(request(f"r{i}", slo=slo) for i in range(5))) == [f"r{i}" for i in range(5)]


@pytest.mark.parametrize("name", POLICY_NAMES)
@few
@given(jobs=crowds(), pace=paces, now_s=st.floats(-100, 1e4), slots=st.integers(1, 16), shuffle=st.randoms())
def test_live_calls_get_one_finite_key_each_whatever_order_they_are_given_in(name, jobs, pace, now_s, slots, shuffle):
    at = context(now_s, pace, ledger=ledger_of(jobs), slots=slots)
    keys = policy(name).arrange(jobs, at)
    assert len(keys) == len(jobs)
    assert all(math.isfinite(key) for key in keys)
    assert keys == policy(name).arrange(jobs, at)
    shuffled = list(jobs)
    shuffle.shuffle(shuffled)
    by_ticket = {job.ticket: key for job, key in zip(shuffled, policy(name).arrange(shuffled, at), strict=True)}
    assert keys == [by_ticket[job.ticket] for job in jobs]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_an_engine_without_calls_is_arranged_too(name):
    assert policy(name).arrange([], context()) == []


@pytest.mark.parametrize("name", POLICY_NAMES)
@few
@given(jobs=crowds(5), pace=paces, pushed_s=st.floats(-100, 100), later_s=st.floats(0, 1000))
def test_a_refreshed_queue_gives_out_requests_in_the_order_of_their_keys(name, jobs, pace, pushed_s, later_s):
    """Of the moment at which they leave; were a policy called static wrongly, old keys would decide."""
    waiters = [waiting(job.spec, job.ticket, job.lengths, is_relegated=job.is_relegated) for job in jobs]
    ledger, rule = ledger_of(waiters), policy(name)
    queue = SloQueue(rule)
    for one in waiters:
        queue.push(one, context(pushed_s, ledger=ledger))
    at = context(pushed_s + later_s, pace, ledger=ledger)
    queue.refresh(len(waiters), at)
    expected = sorted(waiters, key=lambda one: (rule.key(one, at), one.ticket))
    assert [queue.pop(at).ticket for _ in waiters] == [one.ticket for one in expected]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_arranging_a_thousand_calls_takes_less_than_half_a_second(name):
    """CPU time of the best of three: an engine step takes 10 ms, and an order stands for at least five of them."""
    seed = 7
    chance = random.Random(seed)
    lengths = [Lengths(tuple(sorted(chance.uniform(1, 2000) for _ in range(ATOMS)))) for _ in range(30)]
    jobs = []
    for ticket in range(1, 1001):
        slo = chance.choice([CHAT, TOOL, BACKGROUND, ProgramCall(ProgramId(f"p{ticket % 40}"), 60.0)])
        spec = request(
            f"r{ticket}",
            slo=slo,
            arrival_s=chance.uniform(0, 30),
            prompt_tokens=chance.randint(10, 8000),
            max_output_tokens=4000,
        )
        missing = spec.prompt_tokens if chance.random() < 0.8 else 0
        jobs.append(live(spec, ticket, chance.choice(lengths), missing_tokens=missing))
    at = context(30.0, ledger=ledger_of(jobs))
    took_s = []
    for _ in range(3):
        begun_s = time.process_time()
        policy(name).arrange(jobs, at)
        took_s.append(time.process_time() - begun_s)
    assert min(took_s) < 0.5, f"seed {seed}: {min(took_s):.3f} s"


@pytest.mark.parametrize("name", POLICY_NAMES)
@few
@given(spec=specs, pace=paces, now_s=moments)
def test_keys_called_static_depend_on_the_request_alone(name, spec, pace, now_s):
    rule, one = policy(name), waiting(spec)
    if rule.is_static:
        assert rule.key(one, context(now_s, pace)) == rule.key(one, context(0.0))


@pytest.mark.parametrize("name", RISING)
@few
@given(spec=specs, now_s=moments, later_s=st.floats(0, 1e6))
def test_keys_never_fall_with_time(name, spec, now_s, later_s):
    """The queue believes an old key to be a lower bound of the new one."""
    one = waiting(spec)
    assert policy(name).key(one, context(now_s)) <= policy(name).key(one, context(now_s + later_s))


@pytest.mark.parametrize("name", MINDS_TARGETS)
@given(spec=specs, now_s=moments)
def test_best_effort_and_relegated_work_is_behind_all_targets(name, spec, now_s):
    at = context(now_s)
    last = [waiting(request(slo=BACKGROUND, arrival_s=-1e9)), waiting(spec, is_relegated=True)]
    if not isinstance(spec.slo, BestEffort):
        key = policy(name).key(waiting(spec), at)
        assert all(key < policy(name).key(one, at) for one in last)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_says_how_it_orders_and_where_it_comes_from(name):
    text = type(policy(name)).__doc__
    assert "Ties" in text or "ticket" in text
    assert "tarve" in text
    assert "Source" in text


# ---- what each is for ----


def test_fcfs_goes_by_arrival_whatever_the_class():
    assert order(
        "fcfs",
        request("late", arrival_s=2.0, slo=CHAT),
        request("early", arrival_s=1.0, slo=BACKGROUND),
    ) == ["early", "late"]


def test_edf_goes_by_what_falls_due():
    """A stream's first token is due 2 s after its arrival, the tool's answer at 1.5 s."""
    assert order(
        "edf",
        request("background", slo=BACKGROUND),
        request("chat", slo=CHAT),
        request("tool", slo=Deadline(1.5)),
        request("chat again", slo=CHAT, generated_tokens=30),
    ) == ["tool", "chat", "chat again", "background"]


def test_class_priority_goes_by_class_then_by_due_time():
    assert order(
        "class_priority",
        request("background", slo=BACKGROUND),
        request("agent", slo=ProgramCall(ProgramId("p"), 0.1)),
        request("tool, urgent", slo=Deadline(0.5)),
        request("tool", slo=TOOL),
        request("chat, patient", slo=Latency(100.0, 1.0)),
        request("chat", slo=CHAT),
    ) == ["chat", "chat, patient", "tool, urgent", "tool", "agent", "background"]


def test_density_prefers_what_is_cheap_for_its_worth():
    """Equal answers, a prompt a hundred times longer: the same worth for more work."""
    assert order(
        "density",
        request("long prompt", prompt_tokens=50_000),
        request("short prompt", prompt_tokens=500),
    ) == ["short prompt", "long prompt"]


def test_density_counts_only_what_is_still_to_do():
    """After 180 of 200 tokens little is left for the same bonus: what was started is finished first."""
    lengths = Lengths((200.0,) * 20)
    started = waiting(request("started", slo=TOOL, generated_tokens=180), 2, lengths)
    fresh = waiting(request("fresh", slo=TOOL), 1, lengths)
    density, at = ValueDensity(), context(0.5)
    assert density.key(started, at) < density.key(fresh, at)


def test_density_lets_a_request_sink_when_its_bonus_is_gone_and_further_with_every_lost_token():
    density, one = ValueDensity(), waiting(request("chat", slo=CHAT, max_output_tokens=10_000))
    keys = [density.key(one, context(now_s)) for now_s in (0.0, 1.5, 2.5, 20.0, 200.0)]
    assert keys[0] == keys[1] < keys[2] < keys[3] < keys[4] == BEST_EFFORT_KEY


def test_density_of_a_deadline_falls_to_nothing_as_time_runs_out():
    density, one = ValueDensity(), waiting(request("tool", slo=TOOL))
    keys = [density.key(one, context(now_s)) for now_s in (0.0, 17.0, 19.0, 19.9, 20.1)]
    assert keys == sorted(keys)
    assert keys[0] < keys[2] < keys[4] == BEST_EFFORT_KEY


def test_request_weight_decides_between_tokens_and_requests():
    """A long answer has more tokens per second of work (its prompt is paid once); a short one is one request sooner."""
    long_one = waiting(request("long", prompt_tokens=5000), 1, Lengths((1000.0,) * 20))
    long_one.spec = request("long", prompt_tokens=5000, max_output_tokens=1000)
    short = waiting(request("short", prompt_tokens=5000), 2, Lengths((20.0,) * 20))
    at = context(0.0)
    tokens, requests = ValueDensity(request_weight=0.0), ValueDensity(request_weight=1.0)
    assert tokens.key(long_one, at) < tokens.key(short, at)
    assert requests.key(short, at) < requests.key(long_one, at)


def test_scaling_all_values_by_a_power_of_two_changes_no_order():
    """With twice the bonus per request at weight 1 every key moves by the same bins."""
    density = ValueDensity(request_weight=1.0)
    requests = [waiting(request(f"r{n}", slo=TOOL, prompt_tokens=37 * n + 1), n) for n in range(40)]
    once = [density.key(one, context(1.0, mean_length=100.0)) for one in requests]
    twice = [density.key(one, context(1.0, mean_length=200.0)) for one in requests]
    assert [a - b for a, b in zip(once, twice, strict=True)] == [16.0] * 40


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_class_blind_policies_are_those_whose_order_no_target_changes(name):
    """A chat, a tool's call and best effort, alike in everything else, have the same key."""
    policy = build_policy(SchedulingConfig(policy=name))

    def key(slo) -> float:
        return policy.key(waiting(request("a", slo=slo), 1), context())

    assert (key(CHAT) == key(TOOL) == key(BACKGROUND)) == policy.is_class_blind
