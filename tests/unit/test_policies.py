"""One contract for every policy, and what each of them is for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.config import SchedulingConfig
from tempo_router.policies import Policy, build_policy
from tempo_router.policies.base import BEST_EFFORT_KEY
from tempo_router.policies.density import ValueDensity
from tempo_router.prediction import Lengths
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, ProgramId
from tempo_router.slo_queue import SloQueue
from tempo_router.step_time import Pace
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL, context, request, waiting

NAMES = ("fcfs", "edf", "class_priority", "density")

seconds = st.floats(1e-6, 1e9)
slos = st.one_of(
    st.builds(Latency, seconds, seconds),
    st.builds(Deadline, seconds),
    st.builds(ProgramCall, st.just(ProgramId("p")), seconds),
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


def policy(name: str, **config: object) -> Policy:
    return build_policy(SchedulingConfig.model_validate({"policy": name, **config}))


def order(name: str, *requests: object, now_s: float = 0.0, **config: object) -> list[str]:
    """Names of the requests as a queue of this policy gives them out."""
    queue, at = SloQueue(policy(name, **config)), context(now_s)
    for ticket, spec in enumerate(requests, start=1):
        queue.push(spec if not hasattr(spec, "slo") else waiting(spec, ticket), at)
    return [queue.pop(at).spec.request_id for _ in requests]


# ---- the contract ----


@pytest.mark.parametrize("name", NAMES)
@given(spec=specs, pace=paces, now_s=moments, is_relegated=st.booleans())
def test_keys_are_finite_and_the_same_when_asked_twice(name, spec, pace, now_s, is_relegated):
    one, at = waiting(spec, is_relegated=is_relegated), context(now_s, pace)
    key = policy(name).key(one, at)
    assert math.isfinite(key)
    assert key == policy(name).key(one, at)


@pytest.mark.parametrize("name", NAMES)
@given(spec=specs, pace=paces, now_s=moments)
def test_engine_priority_fits_its_type_and_follows_the_key(name, spec, pace, now_s):
    at, reference = context(now_s, pace), waiting(request(slo=CHAT, arrival_s=1.0))
    one = waiting(spec)
    priority = policy(name).engine_priority(one, at)
    assert isinstance(priority, int)
    assert -(2**63) <= priority < 2**63
    if policy(name).key(one, at) < policy(name).key(reference, at):
        assert priority <= policy(name).engine_priority(reference, at)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slo", [CHAT, TOOL, AGENT, BACKGROUND])
def test_equal_requests_go_by_arrival_at_the_router(name, slo):
    assert order(name, *(request(f"r{i}", slo=slo) for i in range(5))) == [f"r{i}" for i in range(5)]


@pytest.mark.parametrize("name", NAMES)
@given(spec=specs, now_s=moments, later_s=st.floats(0, 1e6))
def test_keys_never_fall_with_time(name, spec, now_s, later_s):
    """The queue believes an old key to be a lower bound of the new one."""
    one = waiting(spec)
    assert policy(name).key(one, context(now_s)) <= policy(name).key(one, context(now_s + later_s))


@pytest.mark.parametrize("name", ["edf", "class_priority", "density"])
@given(spec=specs, now_s=moments)
def test_best_effort_and_relegated_work_is_behind_all_targets(name, spec, now_s):
    at = context(now_s)
    last = [waiting(request(slo=BACKGROUND, arrival_s=-1e9)), waiting(spec, is_relegated=True)]
    if not isinstance(spec.slo, BestEffort):
        key = policy(name).key(waiting(spec), at)
        assert all(key < policy(name).key(one, at) for one in last)


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
    """Invariant 11 of scheduler.md: with twice the bonus per request at weight 1 every key moves by the same bins."""
    density = ValueDensity(request_weight=1.0)
    requests = [waiting(request(f"r{n}", slo=TOOL, prompt_tokens=37 * n + 1), n) for n in range(40)]
    once = [density.key(one, context(1.0, mean_length=100.0)) for one in requests]
    twice = [density.key(one, context(1.0, mean_length=200.0)) for one in requests]
    assert [a - b for a, b in zip(once, twice, strict=True)] == [16.0] * 40
