import math
from statistics import fmean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.generate import GeneratorConfig, Lengths, generate, generator_config
from tempo_router.simulation.trace_file import read_trace, write_trace
from tempo_router.simulation.trace_statistics import trace_statistics

SEED = 11
LONG = {"duration_s": 20_000, "latency_weight": 1, "deadline_weight": 0, "program_weight": 0}


def statistics(**settings_):
    return trace_statistics(generate(generator_config(LONG | settings_), SEED))


def test_poisson_gaps_have_a_variation_of_one():
    """The whole point of a Poisson process; a mistake here makes every queue too short or too long."""
    found = statistics(rate_per_s=1.0)

    assert 0.9 <= found.gap_cv <= 1.1
    assert found.arrivals_per_s == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("cv", [0.5, 2.0, 4.0])
def test_gamma_gaps_have_the_variation_that_was_asked_for(cv):
    found = statistics(arrivals="gamma", cv=cv)

    assert found.gap_cv == pytest.approx(cv, rel=0.1)
    assert found.arrivals_per_s == pytest.approx(1.0, rel=0.1)


def test_bursts_vary_more_than_poisson_at_the_same_rate():
    found = statistics(arrivals="bursts", burst_ratio=8)

    assert found.gap_cv > 1.3
    assert found.peak_over_mean > 2.5
    assert found.arrivals_per_s == pytest.approx(1.0, rel=0.05)


def test_a_burst_of_ratio_one_is_no_burst():
    assert 0.9 <= statistics(arrivals="bursts", burst_ratio=1).gap_cv <= 1.1


def test_a_day_begins_at_night():
    """With a depth of 0.8 the quarter around the peak sees 1.72 times the mean, the one around midnight 0.28 times."""
    trace = generate(generator_config(LONG | {"arrivals": "diurnal", "diurnal_period_s": 20_000}), SEED)
    night = sum(not 2500 <= unit.arrival_s < 17_500 for unit in trace.units)
    noon = sum(7500 <= unit.arrival_s < 12_500 for unit in trace.units)

    assert night == pytest.approx(5000 * (1 - 0.8 * math.sqrt(8) / math.pi), rel=0.1)
    assert noon == pytest.approx(5000 * (1 + 0.8 * math.sqrt(8) / math.pi), rel=0.1)


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "bursts", "diurnal"])
def test_every_kind_of_arrivals_keeps_the_order_and_the_window(arrivals):
    trace = generate(GeneratorConfig(arrivals=arrivals, duration_s=300, diurnal_period_s=200), SEED)
    times = [unit.arrival_s for unit in trace.units]

    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] <= 300
    assert len(times) == pytest.approx(300, rel=0.3)


def test_classes_come_by_their_weights():
    config = GeneratorConfig(
        latency_weight=1, deadline_weight=2, program_weight=1, best_effort_weight=4, duration_s=4000
    )
    counts = trace_statistics(generate(config, SEED)).units_by_class

    for name, share in {"latency": 1 / 8, "deadline": 2 / 8, "program": 1 / 8, "best_effort": 4 / 8}.items():
        assert counts[name] / sum(counts.values()) == pytest.approx(share, rel=0.15)


def test_the_default_mix_resembles_what_its_docstring_says():
    found = trace_statistics(generate(GeneratorConfig(duration_s=7200), SEED))

    assert found.calls_by_app["deep-research"] / found.calls == pytest.approx(0.72, abs=0.04)
    assert found.calls_by_app["agent"] / found.calls == pytest.approx(0.035, abs=0.01)
    assert found.prompt_tokens == pytest.approx((1000, 5500, 19_000), rel=0.2)
    assert found.output_tokens == pytest.approx((165, 1000, 1024), rel=0.1)
    assert 0.1 < found.prefix_share < 0.35
    assert found.stages_p50 == 6


def test_targets_scale_with_the_factor_and_programs_get_time_per_stage():
    trace = generate(GeneratorConfig(slo_factor=0.5, best_effort_weight=1), SEED)

    for unit in trace.units:
        if unit.is_program:
            assert unit.slo == Deadline(10.0 * (unit.calls[-1].stage + 1))
        else:
            assert unit.slo in (Latency(1.0, 0.05), Deadline(10.0), BestEffort())


def test_research_stages_alternate_between_notes_and_texts_and_only_searches_fan_out():
    trace = generate(GeneratorConfig(program_weight=1, latency_weight=0, deadline_weight=0), SEED)
    programs = [unit for unit in trace.units if unit.app == "deep-research"]
    widths: dict[int, set[int]] = {}
    for unit in programs:
        stages = unit.calls[-1].stage + 1
        assert stages in {4, 6}
        for stage in range(stages):
            calls = [call for call in unit.calls if call.stage == stage]
            above = [i for i, call in enumerate(unit.calls) if call.stage == stage - 1]
            assert all(list(call.parents) == above for call in calls)
            assert all(call.prompt_tokens + call.output_tokens <= 8192 for call in calls)
            if stage < stages - 1:
                widths.setdefault(stage, set()).add(len(calls))

    assert widths == {0: {1}, 1: {1, 2, 3}, 2: {1}, 3: {1, 2, 3}, 4: {1}}
    notes = [call.output_tokens for unit in programs for call in unit.calls if call.stage % 2 == 0]
    texts = [call.output_tokens for unit in programs for call in unit.calls if call.stage % 2]
    assert median(texts) > 8 * median(notes)


def test_an_agent_reads_again_what_it_has_read_and_written():
    trace = generate(generator_config({"agent.share": 1, "latency_weight": 0, "deadline_weight": 0}), SEED)
    gaps = []
    for unit in trace.units:
        assert 1 <= len(unit.calls) <= 8
        assert unit.calls[0].prefix_tokens == 0
        for before, call in zip(unit.calls, unit.calls[1:], strict=False):
            assert call.parents == (before.stage,)
            assert call.prefix_tokens == before.prompt_tokens + before.output_tokens < call.prompt_tokens
            assert call.prefix_id == unit.unit_id
            assert call.prompt_tokens + call.output_tokens <= 32_768
            gaps.append(call.gap_s)
    assert fmean(gaps) == pytest.approx(4.0, rel=0.1)


def test_a_skew_gives_the_first_tenants_most():
    even = generate(GeneratorConfig(duration_s=4000, tenants=3), SEED)
    skewed = generate(GeneratorConfig(duration_s=4000, tenants=3, tenant_skew=1.0), SEED)

    def shares(trace):
        return [sum(unit.tenant == f"t{i}" for unit in trace.units) / len(trace.units) for i in range(3)]

    assert shares(even) == pytest.approx([1 / 3] * 3, rel=0.1)
    assert shares(skewed) == pytest.approx([6 / 11, 3 / 11, 2 / 11], rel=0.15)


def test_the_seed_decides_everything():
    config = GeneratorConfig(duration_s=200)

    assert generate(config, 1) == generate(config, 1)
    assert generate(config, 1).units != generate(config, 2).units


def test_other_arrivals_bring_the_same_units():
    """So that a change of load or burstiness changes nothing else."""
    calm = generate(GeneratorConfig(duration_s=100), SEED).units
    dense = generate(GeneratorConfig(duration_s=100, arrivals="bursts", rate_per_s=3), SEED).units

    assert [unit.calls for unit in dense[: len(calm)]] == [unit.calls for unit in calm]


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        lambda **values: generator_config(values | {"duration_s": 60}),
        arrivals=st.sampled_from(["gamma", "bursts", "diurnal"]),
        cv=st.floats(0.2, 8),
        rate_per_s=st.floats(0.1, 5),
        burst_share=st.floats(0.01, 0.99),
        burst_s=st.floats(0.1, 1000),
        diurnal_period_s=st.floats(10, 1e6),
        diurnal_depth=st.floats(0, 1),
        best_effort_weight=st.floats(0, 3),
        tenants=st.integers(1, 50),
    ),
    st.integers(),
)
def test_whatever_is_generated_can_be_written_and_read(tmp_path_factory, config, seed):
    trace = generate(config, seed)
    if not trace.units:
        return
    path = tmp_path_factory.mktemp("traces") / f"{trace.name}.csv"
    write_trace(trace, path)

    assert read_trace(path) == trace


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"ratee_per_s": 1}, "ratee_per_s: no such setting; did you mean rate_per_s?"),
        ({"agent.shar": 1}, "agent.shar: no such setting; did you mean agent.share?"),
        ({"rate": 1}, r"rate: no such setting; did you mean rate_per_s\? tempo-router generate --list prints all"),
        ({"chat.outpu": 1}, r"did you mean chat\.output\."),
        ({"colour": 1}, r"colour: no such setting; tempo-router generate --list prints all [0-9]+$"),
        ({"rate_per_s": "x"}, "rate_per_s='x': Input should be a valid number"),
        ({"rate_per_s": 0}, "rate_per_s=0: Input should be greater than 0"),
        ({"rate_per_s": float("nan")}, "rate_per_s=nan"),
        ({"duration_s": 1e9}, "more than 5000000 units"),
        ({"arrivals": "sometimes"}, "'poisson', 'gamma', 'bursts' or 'diurnal'"),
        ({"arrivals": "poisson", "cv": 3}, "set arrivals=gamma"),
        ({"latency_weight": 0, "deadline_weight": 0, "program_weight": 0}, "one must be above"),
        ({"research.stages": [3], "research.stage_weights": [1]}, r"stages=\[3\]: each must be even"),
        ({"research.fan_out_weights": [0, 0]}, "fan_out_weights"),
        ({"agent.min_calls": 9}, "max_calls=8 is below min_calls=9"),
        ({"chat.prompt.at_least": 9000}, "at_most=4800 is below at_least=9000"),
        ({"agent": 1, "agent.share": 1}, "as a whole and in part"),
        ({"agent.share": 1, "agent": 1}, "as a whole and in part"),
    ],
)
def test_settings_that_make_no_sense_are_named(values, problem):
    with pytest.raises(ConfigError, match=problem):
        generator_config(values)


def test_one_number_of_a_group_can_be_set_alone():
    config = generator_config({"chat.prompt.median": "500", "agent.share": "0.5"})

    assert config.chat.prompt == Lengths(median=500, sigma=1.0, at_most=4800)
    assert config.agent.share == 0.5
    assert config.code == GeneratorConfig().code
