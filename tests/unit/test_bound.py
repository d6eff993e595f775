"""The bound against optima known by hand, and against what a plain schedule achieves."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation import bound
from tempo_router.simulation.bound import request_goodput_bound, token_goodput_bound
from tempo_router.simulation.engine_limits import EngineLimits
from tempo_router.simulation.experiment import FigureCache, bound_tokens_per_s
from tempo_router.simulation.generate import generate, generator_config
from tempo_router.simulation.linear_program import LinearProgram
from tempo_router.simulation.simulator import Knowledge, Setup, simulate
from tempo_router.simulation.step_profiles import (
    EngineShape,
    LayeredStepTime,
    LinearStepTime,
    Prefill,
    StepProfile,
    StepTime,
    load_profile,
    scaled,
)
from tempo_router.simulation.trace import Trace, TraceCall, Unit, UnitSlo

SHAPE = EngineShape(kv_tokens=100_000, block_size=16, max_running=8, max_step_tokens=100, max_model_len=8192)


def profile(step_time: StepTime, shape: EngineShape = SHAPE) -> StepProfile:
    return StepProfile("test", "made up", step_time, shape)


def linear(
    base_s: float = 0.01, token_s: float = 0.001, decode_s: float = 0.001, context_s: float = 0.0, pair_s: float = 0.0
) -> StepProfile:
    return profile(LinearStepTime(base_s, token_s, decode_s, context_s, pair_s))


LAYERED = profile(
    LayeredStepTime(
        host_s=0.001,
        layers=4,
        linear_tokens=(1, 8, 32, 100),
        linear_s=(0.001, 0.0012, 0.003, 0.012),
        decode_fixed_s=0.0001,
        decode_s_per_context_token=1e-7,
        prefill_fixed_s=0.0002,
        prefill_s_per_chunk_x_past=1e-6,
        prefill_s_per_chunk_squared=8e-7,
        all_reduces=2,
        all_reduce_fixed_s=0.0001,
        all_reduce_s_per_token=1e-5,
        head_fixed_s=0.0005,
        head_s_per_row=0.0001,
    )
)


def call(prompt: int, output: int, parents: tuple[int, ...] = (), gap_s: float = 0.0, prefix: int = 0) -> TraceCall:
    return TraceCall("call", prompt, output, parents=parents, gap_s=gap_s, prefix_id="p", prefix_tokens=prefix)


def unit(slo: UnitSlo, *calls: TraceCall, arrival_s: float = 0.0) -> Unit:
    return Unit("unit", arrival_s, slo, calls, is_program=len(calls) > 1)


def trace(*units: Unit) -> Trace:
    return Trace("test", tuple(sorted(units, key=lambda unit: unit.arrival_s)))


def total(trace: Trace, *profiles: StepProfile, slots: int = 4, bucket_s: float = 0.05) -> float:
    return token_goodput_bound(trace, profiles or (linear(),), slots, bucket_s=bucket_s).total


def test_a_unit_that_fits_counts_in_full():
    # Prefill 0.11 s, then nine steps of 0.011 s: 0.209 s.
    assert total(trace(unit(Deadline(0.22), call(100, 10)))) == pytest.approx(10)


def test_a_unit_that_cannot_end_in_time_alone_on_the_engine_counts_nothing():
    assert total(trace(unit(Deadline(0.19), call(100, 10)))) == 0


def test_a_cached_prefix_makes_a_unit_possible():
    assert total(trace(unit(Deadline(0.19), call(100, 10, prefix=50)))) == pytest.approx(10)


def test_of_two_units_that_exclude_each_other_little_more_than_one_counts():
    """Each needs 1.1 s of prefill in 1.2 s; what a fraction of the other adds is the relaxation's slack."""
    rivals = [unit(Deadline(1.2), call(1000, 1)) for _ in range(2)]
    bound = request_goodput_bound(trace(*rivals), [linear()], 4, bucket_s=0.05)
    assert 1 <= bound.total <= 1.2 / 1.1 + 0.05


def test_two_replicas_serve_two_units_that_one_cannot():
    rivals = [unit(Deadline(1.2), call(1000, 1)) for _ in range(2)]
    assert total(trace(*rivals), linear(), linear()) == pytest.approx(2)
    assert total(trace(*rivals), linear(), linear(base_s=0.02)) == pytest.approx(2)


def test_a_stream_that_starts_late_counts_from_the_token_where_it_has_caught_up():
    """First token at 0.11 s, due 0.0 + 0.02 i; token i comes at 0.11 + 0.011 i at best: in time from 13 on."""
    assert total(trace(unit(Latency(0.0, 0.02), call(100, 20)))) == pytest.approx(7)


def test_a_stream_paced_faster_than_a_step_counts_up_to_where_it_falls_behind():
    """Token i comes at 0.11 + 0.011 i at best and is due at 0.13 + 0.001 i: the first three."""
    assert total(trace(unit(Latency(0.13, 0.001), call(100, 20)))) == pytest.approx(3)


def test_a_stream_with_a_late_token_is_not_a_met_request():
    late = trace(unit(Latency(0.13, 0.001), call(100, 20)))
    assert request_goodput_bound(late, [linear()], 4).total == 0
    in_time = trace(unit(Latency(0.13, 0.02), call(100, 20)))
    assert request_goodput_bound(in_time, [linear()], 4).total == pytest.approx(1)


def test_a_program_whose_critical_path_is_too_long_counts_nothing():
    """Two calls one after the other take 0.418 s, and 0.1 s pass between them; side by side they would fit."""
    chain = (call(100, 10), call(100, 10, parents=(0,), gap_s=0.1))
    assert total(trace(unit(Deadline(0.51), *chain))) == 0
    assert total(trace(unit(Deadline(0.53), *chain))) == pytest.approx(20)
    assert total(trace(unit(Deadline(0.51), call(100, 10), call(100, 10)))) == pytest.approx(20)


@pytest.mark.parametrize(
    ("slo", "calls"),
    [
        (Deadline(1.1), [call(1, 90)]),
        (Deadline(1.1), [call(1, 45), call(1, 44, parents=(0,))]),
        # Nothing but the last tokens needs that many steps; the bound counts them in groups, so two of ten prompts fit.
        (Latency(0.2, 0.01), [call(1, 90)]),
    ],
    ids=["answer", "program", "stream"],
)
def test_tokens_in_a_row_forbid_the_large_steps_that_would_serve_more_prompts(slo, calls):
    """They come one in a step, so 90 steps are needed: 1 s of 1.1. Three more rows in a step do not help."""
    in_a_row = unit(slo, *calls)
    workload = trace(in_a_row, *(unit(Deadline(1.1), call(100, 1)) for _ in range(10)))
    tight = total(workload)
    loose = token_goodput_bound(workload, [linear()], 4, bucket_s=0.05, serial_steps=False)
    assert in_a_row.output_tokens + 1 <= tight <= in_a_row.output_tokens + (2.5 if "Latency" in repr(slo) else 1.5)
    assert loose.total > tight + 2


def test_with_two_replicas_the_steps_of_both_serve_a_path():
    long_answer = unit(Deadline(1.1), call(1, 90))
    prompts = [unit(Deadline(1.1), call(100, 1)) for _ in range(10)]
    assert total(trace(long_answer, *prompts), linear(), linear()) == pytest.approx(100, abs=0.5)


def test_the_assumption_of_steps_in_a_row_is_named_only_where_it_is_used():
    workload = trace(unit(Deadline(1.0), call(1, 2)))
    tight = token_goodput_bound(workload, [linear()], 4)
    loose = token_goodput_bound(workload, [linear()], 4, serial_steps=False)
    assert len(tight.assumptions) == len(loose.assumptions) + 1


def test_best_effort_counts_nothing():
    bound = token_goodput_bound(trace(unit(BestEffort(), call(10, 10))), [linear()], 4)
    assert (bound.total, bound.per_s, bound.solve_s) == (0, 0, 0)


def test_the_optimum_is_told_by_class_and_sums_to_the_bound():
    units = [
        unit(Latency(0.5, 0.1), call(50, 5)),
        unit(Deadline(1.0), call(50, 7), arrival_s=0.5),
        unit(Deadline(2.0), call(50, 4), call(50, 9, parents=(0,)), arrival_s=1.0),
    ]
    bound = token_goodput_bound(trace(*units), [linear()], 4, bucket_s=0.1)
    assert bound.offered == {"latency": 5, "deadline": 7, "program": 13}
    assert bound.accepted == pytest.approx(bound.offered)
    assert bound.total == pytest.approx(25)
    assert bound.per_s == pytest.approx(25)


def test_step_times_of_unknown_form_are_refused():
    class Constant:
        def duration_s(self, prefills: Sequence[Prefill], decodes: int, context_tokens: int) -> float:
            return 1.0

    with pytest.raises(ConfigError, match="Constant"):
        token_goodput_bound(trace(), [profile(Constant())], 4)


@pytest.mark.parametrize(("profiles", "slots", "bucket_s"), [([], 4, 1.0), ([linear()], 0, 1.0), ([linear()], 4, 0.0)])
def test_settings_out_of_range_are_refused(profiles, slots, bucket_s):
    with pytest.raises(ConfigError, match="above zero"):
        token_goodput_bound(trace(), profiles, slots, bucket_s=bucket_s)


@pytest.mark.parametrize(("bucket_s", "ttlt_s"), [(1e-6, 0.22), (5e-324, 0.22), (4.0, 1e9)])
def test_too_many_buckets_are_refused_with_a_width_that_will_do(bucket_s, ttlt_s):
    many = trace(unit(Deadline(ttlt_s), call(100, 10)))
    with pytest.raises(ConfigError, match="buckets, at most 200000 are possible; take") as caught:
        total(many, bucket_s=bucket_s)
    told_s = float(str(caught.value).split("take ")[1].split(" s")[0])
    assert ttlt_s / 200_000 <= told_s <= 1.2 * ttlt_s / 200_000


# ---- laws over random traces ----


def random_unit(rng: random.Random) -> Unit:
    kind = rng.choice(["stream", "deadline", "program"])
    calls = [call(rng.randint(1, 250), rng.randint(1, 30), prefix=rng.choice([0, 0, 40]))]
    if kind == "program":
        for i in range(1, rng.randint(2, 4)):
            parents = tuple(sorted(rng.sample(range(i), rng.randint(0, i))))
            calls.append(call(rng.randint(1, 250), rng.randint(1, 30), parents, rng.choice([0.0, 0.1])))
    slo = Latency(rng.uniform(0.05, 1), rng.uniform(0.005, 0.05)) if kind == "stream" else Deadline(rng.uniform(0.1, 3))
    return unit(slo, *calls, arrival_s=rng.uniform(0, 2))


def random_trace(rng: random.Random) -> Trace:
    return trace(*(random_unit(rng) for _ in range(rng.randint(1, 10))))


def achieved(trace: Trace, profile: StepProfile, slots: int, rng: random.Random) -> int:
    """Good tokens of that engine."""
    made = computed(trace, profile, slots, rng)
    return sum(good_tokens(unit, times) for unit, times in zip(trace.units, made, strict=True))


def computed(  # noqa: C901 - an engine in one place reads best
    trace: Trace, profile: StepProfile, slots: int, rng: random.Random
) -> list[list[list[float]]]:
    """Token times of a plain engine that takes units in random order of importance and batches what is ready.

    By unit, call and token.
    """
    rank = {id(unit): rng.random() for unit in trace.units}
    chunk_limit = rng.choice([16, 50, profile.shape.max_step_tokens])
    now = 0.0
    past: dict[tuple[int, int], int] = {}
    made: dict[tuple[int, int], list[float]] = {}
    while True:
        ready, wake = [], []
        for u, unit in enumerate(trace.units):
            for c, call in enumerate(unit.calls):
                if len(made.get((u, c), ())) == call.output_tokens:
                    continue
                ends = [made.get((u, p), []) for p in call.parents]
                if any(len(e) < unit.calls[p].output_tokens for e, p in zip(ends, call.parents, strict=True)):
                    continue
                release = max((e[-1] for e in ends), default=unit.arrival_s) + (call.gap_s if ends else 0.0)
                (ready if release <= now else wake).append((rank[id(unit)], u, c, release))
        if not ready and not wake:
            break
        if not ready:
            now = min(release for *_, release in wake)
            continue
        prefills, decoding, context, budget = [], [], 0, profile.shape.max_step_tokens
        chunks = []
        for _, u, c, _ in sorted(ready)[:slots]:
            call = trace.units[u].calls[c]
            done = past.setdefault((u, c), min(call.prefix_tokens, call.prompt_tokens - 1))
            if budget == 0:
                break
            if done < call.prompt_tokens:
                chunk = min(budget, chunk_limit, call.prompt_tokens - done)
                prefills.append(Prefill(chunk, done))
                chunks.append((u, c, chunk))
                budget -= chunk
            else:
                decoding.append((u, c))
                context += call.prompt_tokens + len(made[u, c])
                budget -= 1
        now += profile.step_time.duration_s(prefills, len(decoding), context)
        for u, c, chunk in chunks:
            past[u, c] += chunk
            if past[u, c] == trace.units[u].calls[c].prompt_tokens:
                made[u, c] = [now]
        for key in decoding:
            made[key].append(now)
    return [[made[u, c] for c in range(len(unit.calls))] for u, unit in enumerate(trace.units)]


Made = tuple[tuple[float, ...], ...]
"""When each token of each call was made."""


def best_of_all_schedules(trace: Trace, profile: StepProfile, slots: int) -> int:
    """Every schedule that computes prompts whole, tried in turn: units of one or two calls, a few tokens each."""
    jobs = [(u, c) for u, unit in enumerate(trace.units) for c in range(len(unit.calls))]
    place = {job: i for i, job in enumerate(jobs)}

    def release_s(job: tuple[int, int], made: Made) -> float:
        unit = trace.units[job[0]]
        call = unit.calls[job[1]]
        ends = []
        for parent in call.parents:
            times = made[place[job[0], parent]]
            ends.append(times[-1] if len(times) == unit.calls[parent].output_tokens else math.inf)
        return max(ends) + call.gap_s if ends else unit.arrival_s

    def schedules(now: float, made: Made) -> Iterator[Made]:
        open_jobs = [i for i, (u, c) in enumerate(jobs) if len(made[i]) < trace.units[u].calls[c].output_tokens]
        if not open_jobs:
            yield made
            return
        releases = {i: release_s(jobs[i], made) for i in open_jobs}
        ready = [i for i in open_jobs if releases[i] <= now]
        later = [at for at in releases.values() if now < at < math.inf]
        if later:
            yield from schedules(min(later), made)
        for size in range(1, min(slots, len(ready)) + 1):
            for chosen in itertools.combinations(ready, size):
                prefills, context, tokens = [], 0, 0
                for i in chosen:
                    call = trace.units[jobs[i][0]].calls[jobs[i][1]]
                    if made[i]:
                        context += call.prompt_tokens + len(made[i])
                        tokens += 1
                    else:
                        prefills.append(Prefill(call.prompt_tokens, 0))
                        tokens += call.prompt_tokens
                if tokens > profile.shape.max_step_tokens:
                    continue
                end = now + profile.step_time.duration_s(prefills, size - len(prefills), context)
                yield from schedules(
                    end, tuple((*times, end) if i in chosen else times for i, times in enumerate(made))
                )

    return max(
        sum(
            good_tokens(unit, [made[place[u, c]] for c in range(len(unit.calls))]) for u, unit in enumerate(trace.units)
        )
        for made in schedules(0.0, ((),) * len(jobs))
    )


def good_tokens(unit: Unit, times: Sequence[Sequence[float]]) -> int:
    match unit.slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            return sum(at <= unit.arrival_s + ttft_s + i * tbt_s for i, at in enumerate(times[0]))
        case Deadline(ttlt_s=ttlt_s):
            return unit.output_tokens if max(t[-1] for t in times) <= unit.arrival_s + ttlt_s else 0
        case _:
            return 0


A100 = load_profile("llama-3-8b:a100-80g:1")
H100 = load_profile("llama-3-8b:h100-80g:1")
PROFILES = [linear(), linear(context_s=1e-6, pair_s=1e-6), linear(base_s=0.002, token_s=0.0003), LAYERED]


@pytest.mark.parametrize("which", [linear(context_s=1e-6, pair_s=1e-6), LAYERED])
def test_an_engine_of_twice_the_speed_gets_in_half_the_time_what_the_other_gets(which):
    rng = random.Random(7)
    workload = random_trace(rng)
    half = trace(*(_twice_as_fast(unit) for unit in workload.units))
    fast = total(half, scaled(which, time=0.5), slots=3, bucket_s=0.05)
    assert fast == pytest.approx(total(workload, which, slots=3, bucket_s=0.1), rel=1e-3)
    assert fast > 0


def _twice_as_fast(unit: Unit) -> Unit:
    calls = tuple(replace(call, gap_s=call.gap_s / 2) for call in unit.calls)
    match unit.slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            slo: UnitSlo = Latency(ttft_s / 2, tbt_s / 2)
        case Deadline(ttlt_s=ttlt_s):
            slo = Deadline(ttlt_s / 2)
        case _:
            slo = unit.slo
    return replace(unit, arrival_s=unit.arrival_s / 2, calls=calls, slo=slo)


@settings(max_examples=30, deadline=None)
@example(seed=1105, slots=1, which=linear(context_s=1e-6, pair_s=1e-6), bucket_s=1.0)
@given(
    seed=st.integers(0, 2**32), slots=st.integers(1, 5), which=st.sampled_from(PROFILES), bucket_s=st.floats(0.03, 1.0)
)
def test_no_schedule_gets_more_than_the_bound(seed, slots, which, bucket_s):
    rng = random.Random(seed)
    workload = random_trace(rng)
    bound = total(workload, which, slots=slots, bucket_s=bucket_s)
    best = max(achieved(workload, which, slots, rng) for _ in range(5))
    note(f"seed {seed}: bound {bound}, achieved {best}")
    assert bound >= best - 1e-6


def in_time(unit: Unit, times: Sequence[Sequence[float]]) -> Unit:
    """The unit with the tightest targets that these token times meet."""
    start = unit.arrival_s
    if not isinstance(unit.slo, Latency):
        return replace(unit, slo=Deadline(max(made[-1] for made in times) - start))
    (made,) = times
    tbt_s = max(((at - made[0]) / i for i, at in enumerate(made) if i), default=0.01)
    return replace(unit, slo=Latency(made[0] - start, tbt_s))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 8),
    which=st.sampled_from(PROFILES),
    bucket_s=st.floats(0.005, 1.0),
    counts_units=st.booleans(),
)
def test_targets_read_off_a_schedule_can_all_be_met(seed, slots, which, bucket_s, counts_units):
    """No slack anywhere: a limit that asks a little too much of any unit, bucket or step takes something away."""
    rng = random.Random(seed)
    workload = trace(*(random_unit(rng) for _ in range(rng.randint(2, 16))))
    made = computed(workload, which, slots, rng)
    workload = trace(*(in_time(unit, times) for unit, times in zip(workload.units, made, strict=True)))
    note(f"seed {seed}")
    if counts_units:
        bound = request_goodput_bound(workload, [which], slots, bucket_s=bucket_s).total
        assert bound >= len(workload.units) - 1e-3
    else:
        bound = total(workload, which, slots=slots, bucket_s=bucket_s)
        assert bound >= sum(unit.output_tokens for unit in workload.units) - 1e-3


def tiny_trace(rng: random.Random) -> Trace:
    """At most seven tokens in at most four calls, with targets near what they take."""
    units: list[Unit] = []
    calls, tokens = 4, 7
    while calls and tokens and len(units) < 3:
        chain = [call(rng.randint(1, 45), min(tokens, rng.randint(1, 3)))]
        tokens -= chain[0].output_tokens
        if calls > 1 and tokens and rng.random() < 0.4:
            chain.append(call(rng.randint(1, 45), 1, (0,), rng.choice([0.0, 0.02])))
            tokens -= 1
        calls -= len(chain)
        is_stream = len(chain) == 1 and rng.random() < 0.3
        slo = (
            Latency(rng.uniform(0.02, 0.1), rng.uniform(0.01, 0.03)) if is_stream else Deadline(rng.uniform(0.05, 0.2))
        )
        units.append(unit(slo, *chain, arrival_s=rng.choice([0.0, rng.uniform(0, 0.1)])))
    return trace(*units)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 3), which=st.sampled_from(PROFILES))
def test_the_best_of_all_schedules_of_a_tiny_workload_is_within_the_bound(seed, slots, which):
    workload = tiny_trace(random.Random(seed))
    best = best_of_all_schedules(workload, which, slots)
    bound = total(workload, which, slots=slots, bucket_s=0.01)
    note(f"seed {seed}: bound {bound}, best {best}, {workload}")
    assert bound >= best - 1e-6


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(2, 128), which=st.sampled_from([*PROFILES, A100]))
def test_no_step_is_shorter_than_its_cheapest_mixture_of_shapes_and_its_attention(seed, slots, which):
    rng = random.Random(seed)
    engine = EngineLimits.of([which], slots)
    ((_, shapes),) = engine.groups
    budget = rng.randint(1, which.shape.max_step_tokens)
    decodes = rng.randint(0, min(slots, budget))
    prefills = []
    rest = budget - decodes
    while rest and decodes + len(prefills) < slots and (not prefills or rng.random() < 0.7):
        prefills.append(Prefill(rng.randint(1, rest), rng.choice([0, rng.randint(0, 6000)])))
        rest -= prefills[-1].chunk
    context = decodes * rng.randint(1, 4000)
    mixture = LinearProgram()
    columns = [mixture.column(-shape.seconds, 1000.0) for shape in shapes]
    mixture.row(columns, [1.0] * len(shapes), 1.0, math.inf)
    mixture.row(columns, [shape.decodes for shape in shapes], decodes, math.inf)
    mixture.row(columns, [shape.prefill for shape in shapes], sum(prefill.chunk for prefill in prefills), math.inf)
    _, point, _, _ = mixture.solve(10.0)
    attention = engine.attention
    least = sum(shape.seconds * count for shape, count in zip(shapes, point, strict=True))
    least += attention.s_per_context_token * context
    for chunk, past in ((prefill.chunk, prefill.past) for prefill in prefills):
        least += attention.s_per_chunk
        least += chunk * (attention.s_per_chunk_x_past * past + attention.s_per_chunk_squared * chunk)
    assert mixture.violation(point) < 1e-6
    assert least <= which.step_time.duration_s(prefills, decodes, context) * (1 + 1e-9) + 1e-12


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["fcfs", "edf", "class_priority", "density", "jitserve", "tempo"]),
    knowledge=st.sampled_from(["learned", "true"]),
    profiles=st.sampled_from([(A100,), (A100, A100), (A100, H100)]),
    slots=st.sampled_from([16, 64, 128]),
)
def test_no_simulated_policy_gets_more_than_the_bound(
    seed: int, policy: str, knowledge: Knowledge, profiles: tuple[StepProfile, ...], slots: int
):
    workload = generate(generator_config({"duration_s": 20.0, "rate_per_s": 3.0 * len(profiles)}), seed)
    report = simulate(workload, Setup(policy, profiles, knowledge=knowledge, max_running=slots))
    good = sum(outcome.good_tokens for outcome in report.units)
    bound = token_goodput_bound(workload, profiles, slots, bucket_s=2.0)
    note(f"seed {seed}: bound {bound.total}, good {good}")
    assert good <= bound.total + 1e-6


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 5))
def test_more_slots_a_faster_engine_and_more_units_never_lower_the_bound(seed, slots):
    rng = random.Random(seed)
    workload = random_trace(rng)
    slow = linear(context_s=1e-6, pair_s=1e-6)
    fast = linear(base_s=0.008, token_s=0.0009, decode_s=0.0009, context_s=9e-7, pair_s=9e-7)
    base = total(workload, slow, slots=slots)
    assert total(workload, slow, slots=slots + 1) >= base - 0.01
    assert total(workload, fast, slots=slots) >= base - 0.01
    # One that does not move the origin of the buckets.
    more = unit(Deadline(1.0), call(50, 10), arrival_s=workload.units[-1].arrival_s)
    assert total(trace(*workload.units, more), slow, slots=slots) >= base - 0.01


def test_a_bound_that_the_time_limit_cut_short_says_so_and_is_no_figure_of_a_row(monkeypatch, tmp_path):
    workload = generate(generator_config({"duration_s": 20.0, "rate_per_s": 3.0}), 0)
    engines = [linear()]
    whole = token_goodput_bound(workload, engines, 8)
    cut_short = token_goodput_bound(workload, engines, 8, time_limit_s=1e-6)
    assert (whole.is_cut_short, cut_short.is_cut_short) == (False, True)
    assert cut_short.total >= whole.total * (1 - 1e-3)

    cache = FigureCache(tmp_path)
    monkeypatch.setattr(bound, "token_goodput_bound", lambda *_: cut_short)
    assert bound_tokens_per_s(workload, engines, 8, cache=cache) is None
    monkeypatch.setattr(bound, "token_goodput_bound", lambda *_: whole)
    assert bound_tokens_per_s(workload, engines, 8, cache=cache) == whole.per_s, "what was cut short is not kept"
