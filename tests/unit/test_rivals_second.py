"""What each is for: Autellix, VTC, QLM, ALISE, SLOs-Serve, Tempo's first order and the forms of JITServe."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.ledger import Ledger
from tempo_router.policies.alise import SpeculativeQueues
from tempo_router.policies.atlas import LeastAttainedPath
from tempo_router.policies.base import BEST_EFFORT_KEY, quantile_left
from tempo_router.policies.jitserve import JitServe
from tempo_router.policies.jitserve_tuned import JitServeTuned
from tempo_router.policies.lsdf import LargestServiceDensity
from tempo_router.policies.plas import LeastAttainedProgram
from tempo_router.policies.qlm import RequestGroups
from tempo_router.policies.service_gain import discount
from tempo_router.policies.slos_serve import PlannedAdmission, most_that_fit
from tempo_router.policies.vtc import VirtualTokenCounter
from tempo_router.prediction import ATOMS, Lengths
from tempo_router.request import Deadline, Latency, ProgramCall, ProgramId, ReplicaId
from tests.builders import BACKGROUND, TOOL, context, live, request, waiting

HUNDRED = Lengths((100.0,) * ATOMS)
SPREAD = Lengths(tuple(10.0 * n for n in range(1, ATOMS + 1)))
TAU_S = 0.01


def exactly(tokens: float) -> Lengths:
    return Lengths((float(tokens),) * ATOMS)


def call(program_id="p", ttlt_s=60.0):
    return ProgramCall(ProgramId(program_id), ttlt_s)


def ended(ledger, job, run_s, output_tokens=10):
    ledger.arrived(job)
    ledger.started(job, ReplicaId("gpu0"), 0.0)
    ledger.left(job.spec, run_s=run_s, output_tokens=output_tokens)


def staged(name, stage, program_id="p", arrival_s=0.0, ttlt_s=60.0, **more):
    spec = request(name, slo=call(program_id, ttlt_s), arrival_s=arrival_s, app="agent", **more)
    object.__setattr__(spec, "stage", stage)
    return spec


# ---- what they share ----


def test_a_quantile_is_that_of_the_answers_longer_than_what_is_there():
    assert quantile_left(SPREAD, 0.5, 0, 1000) == 100.0
    assert quantile_left(SPREAD, 0.95, 0, 1000) == 190.0
    assert quantile_left(SPREAD, 0.5, 100, 1000) == 50.0
    assert quantile_left(SPREAD, 0.95, 0, 120) == 120.0


def test_a_quantile_beyond_all_answers_seen_is_that_of_the_tail():
    assert quantile_left(HUNDRED, 0.5, 200, 1000) == pytest.approx(40 * math.log(2))


@given(share=st.floats(0.01, 0.99), generated=st.integers(0, 400), limit=st.integers(1, 500))
def test_a_higher_quantile_is_never_smaller_and_something_is_always_left(share, generated, limit):
    lower = quantile_left(SPREAD, share / 2, generated, limit)
    assert 1.0 <= lower <= quantile_left(SPREAD, share, generated, limit)


@given(wanted_s=st.floats(-10, 100), taken_s=st.floats(0, 100), later_s=st.floats(0, 100), alpha=st.floats(0, 200))
def test_a_gain_is_never_more_than_whole_and_never_rises_with_lateness(wanted_s, taken_s, later_s, alpha):
    assert 1.0 >= discount(wanted_s, taken_s, alpha) >= discount(wanted_s, taken_s + later_s, alpha) >= 0.0


def test_a_ledger_learns_how_the_stages_of_an_app_share_its_time():
    ledger = Ledger()
    assert ledger.share_through("agent", 0) is None
    ended(ledger, waiting(staged("a", 0)), 1.0)
    ended(ledger, waiting(staged("b", 1)), 2.0)
    ended(ledger, waiting(staged("c", 1)), 3.0)
    ledger.program_ended(ProgramId("p"))
    assert ledger.share_through("agent", 0) == pytest.approx(0.25)
    assert ledger.share_through("agent", 1) == pytest.approx(1.0)
    assert ledger.share_through("agent", 2) is None
    assert ledger.share_through("other", 0) is None


def test_a_program_that_was_given_up_teaches_nothing():
    ledger = Ledger()
    ended(ledger, waiting(staged("a", 0)), 1.0)
    ledger.arrived(waiting(staged("b", 1)))
    ledger.program_ended(ProgramId("p"))
    assert ledger.share_through("agent", 0) is None


# ---- Autellix ----


def test_a_call_of_a_program_that_had_much_service_goes_behind_a_later_one_of_a_fresh_program():
    ledger = Ledger()
    ended(ledger, waiting(staged("first", 0, "old")), 5.0)
    later = waiting(staged("second", 1, "old", arrival_s=1.0))
    fresh = waiting(staged("other", 0, "new", arrival_s=2.0))
    ledger.arrived(later)
    ledger.arrived(fresh)
    at = context(2.0, ledger=ledger)
    assert LeastAttainedProgram().key(fresh, at) < LeastAttainedProgram().key(later, at)


def test_a_program_that_waited_eight_times_as_long_as_it_ran_is_promoted():
    ledger = Ledger()
    ended(ledger, waiting(staged("first", 0)), 5.0)
    later = waiting(staged("second", 1, arrival_s=5.0))
    ledger.arrived(later)
    plas = LeastAttainedProgram()
    assert plas.key(later, context(44.9, ledger=ledger)) > BEST_EFFORT_KEY
    assert plas.key(later, context(45.1, ledger=ledger)) == 5.0


def test_a_call_that_outlives_its_quantum_sinks():
    at = context(20.0)
    keys = [LeastAttainedProgram().key(live(request(), generated_tokens=n), at) for n in (0, 99, 100, 200, 400)]
    assert keys == [0.0, 0.0, BEST_EFFORT_KEY, 2 * BEST_EFFORT_KEY, 3 * BEST_EFFORT_KEY]


def test_calls_side_by_side_count_once_on_the_longest_path_and_each_in_the_attained_service():
    ledger = Ledger()
    for name in ("a", "b", "c"):
        ended(ledger, waiting(staged(name, 0)), 0.9)
    one = waiting(staged("joined", 1, arrival_s=1.0))
    ledger.arrived(one)
    at = context(1.0, ledger=ledger)
    assert LeastAttainedPath().key(one, at) == 1.0
    assert LeastAttainedProgram().key(one, at) == 2 * BEST_EFFORT_KEY + 1.0


# ---- VTC ----


def test_the_tenant_with_the_least_service_goes_first():
    ledger = Ledger()
    specs = [request("heavy", prompt_tokens=1000), request("light", prompt_tokens=10), request("heavy again")]
    for spec, tenant in zip(specs, ("big", "small", "big"), strict=True):
        object.__setattr__(spec, "tenant", tenant)
    heavy, light, again = (waiting(spec, ticket) for ticket, spec in enumerate(specs))
    for job in (heavy, light, again):
        ledger.arrived(job)
    at = context(ledger=ledger)
    assert VirtualTokenCounter().key(light, at) == VirtualTokenCounter().key(again, at) == 0.0
    ledger.started(heavy, ReplicaId("gpu0"), 0.0)
    assert VirtualTokenCounter().key(light, at) < VirtualTokenCounter().key(again, at) == 1000.0


# ---- ALISE ----


def test_short_answers_go_first_and_age_makes_good_each_queue():
    alise = SpeculativeQueues(aging_s=8.0)
    short = waiting(request("short", arrival_s=10.0), lengths=exactly(20))
    longer = [waiting(request("longer", arrival_s=at_s), lengths=exactly(45)) for at_s in (10.0, 0.0)]
    keys = [alise.key(one, context()) for one in longer]
    assert alise.key(short, context()) < keys[0]
    assert keys[1] < alise.key(short, context()) <= keys[1] + alise.aging_s


# ---- QLM ----


def test_groups_that_wait_too_long_in_any_case_leave_the_others_their_place():
    """40 streams due in 2 s with 1000 tokens each: at 2000 tokens/s only the first few beyond the slots are in time."""
    jobs = [
        live(request(f"r{n}", arrival_s=0.01 * n, max_output_tokens=5000), n, exactly(1000), missing_tokens=100)
        for n in range(40)
    ]
    hopeful = live(request("last", slo=Deadline(30.0), arrival_s=1.0), 41, exactly(20), missing_tokens=100)
    keys = RequestGroups(group_size=4).arrange([*jobs, hopeful], context(1.5, slots=8))
    assert keys[:8] == [float(n) for n in range(8)]
    assert keys[-1] < max(keys[:-1])


@given(count=st.integers(1, 60), seed=st.integers(0, 99))
def test_groups_keep_the_order_of_arrival_inside(count, seed):
    chance = random.Random(seed)
    jobs = [
        live(request(f"r{n}", arrival_s=chance.uniform(0, 1)), n, HUNDRED, missing_tokens=100) for n in range(count)
    ]
    keys = RequestGroups().arrange(jobs, context(1.0))
    by_key = [job.spec.arrival_s for _, job in sorted(zip(keys, jobs, strict=True), key=lambda pair: pair[0])]
    assert by_key == sorted(by_key)


# ---- SLOs-Serve ----


@given(
    jobs=st.lists(st.tuples(st.floats(0.1, 5.0), st.floats(0.05, 2.0)), min_size=1, max_size=7),
    load=st.floats(0, 0.1),
    decode_load=st.floats(0, 0.5),
)
def test_the_largest_set_that_fits_is_admitted(jobs, load, decode_load):
    """Against trying all subsets."""
    candidates = [(due_s, cost_s, index) for index, (due_s, cost_s) in enumerate(sorted(jobs))]

    def fits(subset):
        left_s, before_s, admitted = 0.0, 0.0, 0
        for due_s, cost_s, index in candidates:
            left_s += (due_s - before_s) * max(1 - decode_load - load * admitted, 0.2)
            before_s = due_s
            if index in subset:
                left_s, admitted = left_s - cost_s, admitted + 1
                if left_s < 0:
                    return False
        return True

    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(jobs)), size) for size in range(len(jobs) + 1)
    )
    most = max(len(subset) for subset in subsets if fits(subset))
    chosen = most_that_fit(candidates, 10, decode_load, load, 0.2)
    assert len(chosen) == most
    assert fits(chosen)


def test_a_prompt_that_leaves_no_time_for_two_others_is_declined():
    chat = Latency(1.0, 0.1)
    jobs = [
        live(request("long", slo=chat, prompt_tokens=45_000), 1, HUNDRED, missing_tokens=45_000),
        live(request("a", slo=chat, prompt_tokens=20_000), 2, HUNDRED, missing_tokens=20_000),
        live(request("b", slo=chat, prompt_tokens=20_000), 3, HUNDRED, missing_tokens=20_000),
        live(request("decoding", slo=chat), 4, HUNDRED, generated_tokens=1),
        live(request("background", slo=BACKGROUND), 5, HUNDRED, missing_tokens=100),
    ]
    keys = PlannedAdmission().arrange(jobs, context(0.0))
    order = [job.spec.request_id for _, job in sorted(zip(keys, jobs, strict=True), key=lambda pair: pair[0])]
    assert order == ["decoding", "a", "b", "long", "background"]


# ---- Tempo's first version, and JITServe ----


@pytest.mark.parametrize("policy", [LargestServiceDensity(), JitServe(), JitServeTuned(input_weight=1.0)])
def test_more_gain_for_the_same_time_goes_first(policy):
    large = waiting(request("large", slo=TOOL, prompt_tokens=2000), 1, HUNDRED)
    small = waiting(request("small", slo=TOOL, prompt_tokens=100), 2, HUNDRED)
    assert policy.key(large, context()) < policy.key(small, context())


@pytest.mark.parametrize("policy", [LargestServiceDensity(alpha=100.0), JitServe(), JitServeTuned()])
def test_an_answer_that_must_be_late_goes_behind_one_that_need_not(policy):
    late = waiting(request("late", slo=Deadline(0.5)), 1, HUNDRED)
    in_time = waiting(request("in time", slo=Deadline(5.0)), 2, HUNDRED)
    assert policy.key(in_time, context(0.1)) < policy.key(late, context(0.1))


@pytest.mark.parametrize("policy", [LargestServiceDensity(), JitServe(), JitServeTuned()])
def test_calls_of_a_program_share_one_key(policy):
    ledger = Ledger()
    jobs = [
        live(staged("a", 0), 1, exactly(50)),
        live(staged("b", 0), 2, exactly(150)),
        live(staged("c", 0, "q"), 3, exactly(150), missing_tokens=500),
    ]
    for job in jobs:
        ledger.arrived(job)
    for keys in (
        policy.arrange(jobs, context(1.0, ledger=ledger)),
        [policy.key(job, context(1.0, ledger=ledger)) for job in jobs],
    ):
        assert keys[0] == keys[1] != keys[2]


def test_the_published_code_never_looks_at_a_length_again_and_the_tuned_form_does():
    """After 100 of at most 200 tokens, with a deadline that only the refined bound leaves in reach."""
    longer = waiting(request("r", slo=Deadline(2.1), generated_tokens=100), 1, SPREAD)
    at = context(1.3)
    assert JitServe().key(longer, at) < 0
    assert JitServeTuned(share=0.5).key(longer, at) < JitServeTuned(share=0.95).key(longer, at) < 0


def test_an_answer_beyond_its_bound_goes_first_in_the_published_code_and_a_stream_last():
    """Defect A5 of the artifact."""
    jobs = [
        live(request("beyond", slo=TOOL), 1, HUNDRED, generated_tokens=150),
        live(request("within", slo=TOOL), 2, HUNDRED, generated_tokens=50),
        live(request("stream beyond"), 3, HUNDRED, generated_tokens=150),
    ]
    beyond, within, stream = JitServe().arrange(jobs, context(1.0))
    assert beyond < within < 0 < stream


def test_the_first_stage_of_a_known_app_goes_last_in_the_published_code():
    """Defect A6: the stage's own share of the time is left out, and the first has nothing before it."""
    ledger = Ledger()
    ended(ledger, waiting(staged("a", 0, "done")), 1.0)
    ended(ledger, waiting(staged("b", 1, "done")), 1.0)
    ledger.program_ended(ProgramId("done"))
    one = waiting(staged("first", 0), 1, HUNDRED)
    ledger.arrived(one)
    at = context(0.0, ledger=ledger)
    # The key is the time that it would take: it is worth nothing.
    assert JitServe(counts_own_stage=False, program_length=0).key(one, at) == pytest.approx(100 * TAU_S)
    assert JitServe(counts_own_stage=True, program_length=0).key(one, at) < 0


def test_a_stage_must_end_by_its_part_of_what_is_left_to_its_program():
    ledger = Ledger()
    for stage in range(4):
        ended(ledger, waiting(staged(f"s{stage}", stage, "done")), 1.0)
    ledger.program_ended(ProgramId("done"))
    one = waiting(staged("first", 0, ttlt_s=8.0), 1, exactly(190))
    ledger.arrived(one)
    tuned = JitServeTuned(splits_above=96)

    def key(now_s, slots):
        return tuned.key(one, context(now_s, ledger=ledger, slots=slots))

    assert key(0.0, 128) == key(0.0, 48)
    assert key(3.0, 128) > key(3.0, 48)


def test_looking_ahead_counts_the_tokens_and_the_time_of_the_stages_to_come():
    """Three stages share the time evenly; at the second, 100 tokens are done, 100 live and 100 ahead."""
    ledger = Ledger()
    for stage in range(3):
        ended(ledger, waiting(staged(f"s{stage}", stage, "done")), 1.0)
    ledger.program_ended(ProgramId("done"))
    ended(ledger, live(staged("before", 0), 1, HUNDRED), 1.0, output_tokens=100)
    second = live(staged("second", 1), 2, HUNDRED)
    ledger.arrived(second)
    at = context(1.0, ledger=ledger)
    assert JitServeTuned().key(second, at) == pytest.approx(-200 / (100 * TAU_S))
    assert JitServeTuned(looks_ahead=True).key(second, at) == pytest.approx(-300 / (200 * TAU_S))


def test_a_late_stream_is_worth_the_tokens_that_it_can_still_save():
    """1 s late and 0.09 s made good with each token: about 11 of 100 are lost."""
    one = live(request("r"), 1, HUNDRED)
    on_time = JitServeTuned(counts_prefill=False).key(one, context(0.0))
    late = JitServeTuned(counts_prefill=False).key(one, context(3.0 - TAU_S))
    assert late / on_time == pytest.approx(1 - 1 / 0.09 / 100, rel=1e-6)


def test_the_window_prefers_like_prompts_of_nearly_equal_worth():
    """Four slots, five calls of nearly one priority: the run of four neighbours in length, not the best four."""
    jobs = [
        live(request(f"r{n}", prompt_tokens=tokens), n, HUNDRED, missing_tokens=missing)
        for n, (tokens, missing) in enumerate([(100, 300), (110, 300), (120, 300), (130, 310), (9000, 299)])
    ]
    at = context(0.0, slots=4)

    def chosen(cutoff):
        keys = JitServeTuned(cutoff=cutoff).arrange(jobs, at)
        return sorted(index for index, _ in sorted(enumerate(keys), key=lambda pair: pair[1])[:4])

    assert chosen(1.0) == [0, 1, 2, 4]
    assert chosen(0.8) == [1, 2, 3, 4] or chosen(0.8) == [0, 1, 2, 3]


@given(seed=st.integers(0, 200), slots=st.integers(1, 10), cutoff=st.floats(0.3, 0.99))
def test_a_window_is_a_run_of_neighbours_and_none_has_a_higher_sum(seed, slots, cutoff):
    """Against trying all runs."""
    chance = random.Random(seed)
    jobs = [
        live(
            request(f"r{n}", prompt_tokens=chance.randint(1, 500)),
            n,
            exactly(chance.randint(1, 300)),
            missing_tokens=50,
        )
        for n in range(slots + chance.randint(1, 12))
    ]
    at = context(0.5, slots=slots)
    worth = [-key for key in JitServeTuned(cutoff=1.0).arrange(jobs, at)]
    keys = JitServeTuned(cutoff=cutoff).arrange(jobs, at)
    chosen = [index for index, key in enumerate(keys) if key < -BEST_EFFORT_KEY / 4]
    threshold = cutoff * sorted(worth, reverse=True)[slots - 1]
    able = sorted(
        (index for index in range(len(jobs)) if worth[index] >= threshold),
        key=lambda index: (jobs[index].spec.prompt_tokens, -worth[index], jobs[index].ticket),
    )
    runs = [able[start : start + slots] for start in range(len(able) - slots + 1)]
    assert chosen in [sorted(run) for run in runs]
    highest = max(sum(worth[index] for index in run) for run in runs)
    assert sum(worth[index] for index in chosen) == pytest.approx(highest)


def test_a_running_call_gives_way_only_for_more_than_its_stall_costs():
    running = live(request("running", prompt_tokens=3000), 1, HUNDRED)
    waiting_one = live(request("waiting", slo=Deadline(20.0)), 3, exactly(100), generated_tokens=50, missing_tokens=150)
    at = context(0.0, slots=1)
    free = JitServeTuned(stall_weight=0.0).arrange([running, waiting_one], at)
    tested = JitServeTuned(stall_weight=1.0).arrange([running, waiting_one], at)
    assert free[1] < free[0]
    assert tested[0] < tested[1]


def test_a_stream_far_ahead_of_its_schedule_leaves_its_slot_for_a_frame():
    ahead = live(request("ahead"), 1, exactly(300), generated_tokens=100)
    other = live(request("other"), 2, HUNDRED, missing_tokens=5000)
    at = context(2.5, slots=1)
    kept = JitServeTuned(paces=False).arrange([ahead, other], at)
    paced = JitServeTuned(paces=True).arrange([ahead, other], at)
    assert kept[0] < kept[1]
    assert paced[1] < paced[0] < BEST_EFFORT_KEY
