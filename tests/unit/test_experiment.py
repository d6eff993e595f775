"""Cells of a comparison: what load means, what is cached, what is refused; real simulations of a few seconds."""

import json
from dataclasses import replace

import pytest

from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Latency
from tempo_router.simulation import experiment, transform
from tempo_router.simulation.experiment import (
    OBJECTIVES,
    Cell,
    FigureCache,
    backlog,
    bound_slots,
    fleet,
    fleet_name,
    identity,
    offered,
    output_rate,
    recorded_tokens_per_s,
    replicas_needed,
    run_cell,
    saturated_tokens_per_s,
    scheduling_of,
    trace_digest,
    without_targets,
    write_atomically,
)
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.report import UnitOutcome
from tempo_router.simulation.rows import COLUMNS, IDENTITY
from tempo_router.simulation.step_profiles import load_profile
from tempo_router.simulation.trace import Trace, TraceCall, Unit

H100 = "llama-3-8b:h100-80g:1"
TRACE = generate(GeneratorConfig(duration_s=15.0, rate_per_s=2.0), seed=1)


@pytest.fixture
def cache(tmp_path):
    return FigureCache(tmp_path / "figures")


def cell(**values):
    return Cell(
        **{"trace": TRACE, "profile_names": (H100,), "profile_path": None, "load": 1.0, "policy": "fcfs", **values}
    )


def finished(first_s, last_s, tokens):
    return UnitOutcome(
        "u", "", "", "best_effort", 0.0, "finished", None, 1, 0, tokens, 0, 0, 0.0, first_s, last_s, None
    )


# ---- load


def test_backlog_has_every_call_once_without_targets_or_dependencies():
    calls = backlog(TRACE)
    assert [unit.calls[0].request_id for unit in calls.units] == [
        call.request_id for unit in TRACE.units for call in unit.calls
    ]
    assert sum(unit.output_tokens for unit in calls.units) == sum(unit.output_tokens for unit in TRACE.units)
    assert all(unit.arrival_s == 0 and isinstance(unit.slo, BestEffort) for unit in calls.units)
    assert all(not unit.calls[0].parents and unit.calls[0].gap_s == 0 for unit in calls.units)


def test_output_rate_leaves_filling_and_emptying_out():
    # A slow start, 90 tokens within 10 s, then a straggler that takes 80 s for the last 5.
    outcomes = [finished(0.0, 10.0, 5), finished(10.0, 20.0, 90), finished(20.0, 100.0, 5)]
    assert output_rate(outcomes, (0.05, 0.95)) == pytest.approx(9.0, rel=1e-6)
    assert output_rate(outcomes, (0.0, 1.0)) == pytest.approx(1.0, rel=1e-6)


def test_output_rate_counts_an_answer_of_one_token_when_it_came():
    assert output_rate([finished(4.0, 4.0, 1)], (0.0, 1.0)) == pytest.approx(0.25, rel=1e-6)


def test_output_rate_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="KV memory"):
        output_rate([], (0.1, 0.9))


def test_first_come_delivers_the_reference_however_fast_the_trace_comes(cache):
    """Else load 1.0 would not be what engines deliver at most."""
    units = [
        Unit(f"u{i}", 0.05 * i, Latency(2.0, 0.1), (TraceCall(f"u{i}", prompt_tokens=900, output_tokens=60),))
        for i in range(1500)
    ]
    trace, profile = Trace("alike", tuple(units)), load_profile(H100)
    reference = saturated_tokens_per_s(trace, (profile,), 64, cache=cache)
    for load in (0.9, 1.2, 2.0):
        flood = transform.faster(without_targets(trace), load * reference / recorded_tokens_per_s(trace))
        delivered = output_rate(experiment._first_come(flood, profile, 64, lambda _: None), (0.1, 0.9))
        assert delivered == pytest.approx(min(load, 1.0) * reference, rel=0.03)


def test_a_busy_engine_cannot_beat_its_own_step_times(cache):
    """All slots decode in every step, nothing else: 4 tokens per step of 4 decodes is the most there can be."""
    units = tuple(
        Unit(f"u{i}", 0.1 * i, Latency(2.0, 0.1), (TraceCall(f"u{i}", prompt_tokens=16, output_tokens=400),))
        for i in range(12)
    )
    profile = load_profile(H100)
    rate = saturated_tokens_per_s(Trace("short prompts", units), (profile,), 4, cache=cache)
    limit = 4 / profile.step_time.duration_s((), 4, 4 * 16)
    assert 0.85 * limit < rate < limit


def test_a_fleet_delivers_the_sum_of_its_replicas(cache):
    fast, slow = load_profile(H100), load_profile("llama-3-8b:a100-80g:1")
    alone = [saturated_tokens_per_s(TRACE, (profile,), 32, cache=cache) for profile in (fast, slow)]
    assert alone[0] > alone[1]
    assert saturated_tokens_per_s(TRACE, (fast, slow, fast), 32, cache=cache) == pytest.approx(2 * alone[0] + alone[1])


@pytest.mark.parametrize("seed", [0, 5])
def test_load_scales_arrivals_to_the_saturated_throughput(seed):
    moved = offered(cell(load=1.5, seed=seed), saturated=1000.0)
    assert recorded_tokens_per_s(moved) == pytest.approx(1500.0)
    assert (moved.units[0].calls == TRACE.units[0].calls) == (seed == 0)


def test_a_load_offers_the_same_whatever_slots_a_policy_runs_with(cache):
    few, many = (run_cell(cell(load=1.5, slots=slots), cache=cache) for slots in (4, 128))
    assert few["offered_tokens_per_s"] == many["offered_tokens_per_s"]
    assert few["saturated_tokens_per_s"] == many["saturated_tokens_per_s"]
    assert few["token_goodput"] != many["token_goodput"]
    assert [bound_slots(cell(slots=slots)) for slots in (4, 128, 256)] == [128, 128, 256]


def test_other_targets_need_no_reference_of_their_own(cache):
    profiles = (load_profile(H100),)
    plain = saturated_tokens_per_s(TRACE, profiles, 32, cache=cache)
    changed = transform.with_slo_scale(TRACE, 0.5)
    assert saturated_tokens_per_s(changed, profiles, 32, cache=cache) == plain
    assert len(list(cache.folder.iterdir())) == 1
    saturated_tokens_per_s(Trace(TRACE.name, TRACE.units[1:]), profiles, 32, cache=cache)
    assert len(list(cache.folder.iterdir())) == 2


# ---- rows


def test_a_row_has_every_documented_column_and_is_json(cache):
    row = run_cell(cell(policy="tempo", objective="balanced"), cache=cache)
    assert set(row) == {column.name for column in COLUMNS}
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["wall_s"] is None
    assert row["bound_token_goodput"] is None


def test_shortest_remaining_time_runs_with_true_lengths_unless_told_otherwise(cache):
    row = run_cell(cell(policy="srpt", load=2.0, slots=8), cache=cache)
    assert row["knowledge"] == "true"
    assert row == run_cell(cell(policy="srpt", load=2.0, slots=8, knowledge="true"), cache=cache)
    learned = run_cell(cell(policy="srpt", load=2.0, slots=8, knowledge="learned"), cache=cache)
    assert learned["knowledge"] == "learned"
    assert learned["token_goodput"] != row["token_goodput"], "lengths do not matter here: this tests nothing"


def test_equal_cells_give_equal_rows(cache):
    assert run_cell(cell(policy="edf", seed=2), cache=cache) == run_cell(cell(policy="edf", seed=2), cache=cache)


def test_wall_time_is_that_of_the_given_clock(cache):
    readings = iter([10.0, 12.5])
    assert run_cell(cell(), clock=lambda: next(readings), cache=cache)["wall_s"] == 2.5


def test_progress_ends_at_one(cache):
    shares = []
    run_cell(cell(), shares.append, cache=cache)
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_goodput_stays_below_the_bound(cache):
    row = run_cell(cell(policy="tempo", load=2.0), with_bound=True, cache=cache)
    assert 0 < row["token_goodput"] <= row["bound_token_goodput"] <= row["offered_tokens_per_s"] * 1.000001


def test_identity_tells_all_cells_apart():
    other = generate(GeneratorConfig(duration_s=15.0, rate_per_s=2.0), seed=2)
    variants = [{}, {"trace": other}, {"profile_names": (H100, H100)}, {"load": 2.0}, {"policy": "edf"},
                {"objective": "gain"}, {"seed": 1}, {"slots": 64}, {"sheds": False}, {"tuned": True},
                {"knowledge": "none"}, {"is_recorded": True}, {"patience": 1.5}, {"retries": 2},
                {"time_scale": 1.4}, {"kv_scale": 0.25}, {"switches": {"reserve": False}}]  # fmt: skip
    identities = [json.dumps(identity(cell(**values)), sort_keys=True) for values in variants]
    assert len(set(identities)) == len(variants)
    names = {column.name for column in IDENTITY} - {"saturated_tokens_per_s"}
    assert set(identity(cell())) == names


def test_fleets_are_named_by_what_is_in_them():
    assert fleet_name(("a", "b", "a")) == "2 x a + b"
    assert fleet_name(("a",)) == "a"


def test_a_digest_is_that_of_the_content_and_not_of_the_name():
    assert trace_digest(TRACE) == trace_digest(replace(TRACE, name="other"))
    assert trace_digest(TRACE) != trace_digest(Trace(TRACE.name, TRACE.units[1:]))


def test_scaled_engines_are_slower_and_have_less_memory():
    (plain,), (scaled,) = fleet(cell()), fleet(cell(time_scale=1.4, kv_scale=0.5))
    assert scaled.step_time.duration_s((), 8, 800) == pytest.approx(1.4 * plain.step_time.duration_s((), 8, 800))
    assert scaled.shape.kv_tokens <= 0.5 * plain.shape.kv_tokens


# ---- settings


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_objectives_are_settings_of_the_scheduler(objective):
    config = scheduling_of(cell(policy="tempo", objective=objective))
    assert config.policy == "tempo"
    for name, value in OBJECTIVES[objective].items():
        assert getattr(config, name) == value


def test_switches_go_to_the_section_that_has_them():
    config = scheduling_of(cell(switches={"reserve": False, "reserve_factor": 0.5}))
    assert config.switches.reserve is False
    assert config.switches.timeline is True
    assert config.reserve_factor == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "temp"}, "policy='temp': no such policy; did you mean 'tempo'"),
        ({"objective": "tokens"}, "did you mean 'token'"),
        ({"knowledge": "learnt"}, "did you mean 'learned'"),
        ({"switches": {"resrve": False}}, "did you mean 'reserve'"),
        ({"switches": {"reserve": "perhaps"}}, "switches: reserve='perhaps': Input should be a valid boolean"),
        ({"switches": {"policy": "edf"}}, "switches: policy='edf': is no switch here; use --policy"),
        ({"switches": {"hopeless": "refuse"}}, "hopeless='refuse': is no switch here; use --no-shedding"),
        ({"switches": {"objective": "gain"}}, "objective='gain': is no switch here; use --objective"),
        ({"switches": {"switches": {"reserve": False}}}, "one by one, such as reserve=false"),
        ({"load": 0.0}, "load=0.0: must be above zero"),
        ({"load": float("nan")}, "load=nan"),
        ({"slots": 0}, "slots=0"),
        ({"profile_names": ()}, "name one step-time profile for each replica"),
        ({"profile_names": ("llama",)}, "no such step-time profile"),
        ({"trace": Trace("lone", (replace(TRACE.units[0], arrival_s=0.0),))}, "no rate of arrivals"),
        ({"trace": Trace("empty", ())}, "no rate of arrivals"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name_and_value(values, message, cache):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        run_cell(cell(**values), cache=cache)
    assert not cache.folder.exists()


# ---- cache


def test_references_are_measured_once(cache, monkeypatch):
    first = saturated_tokens_per_s(TRACE, (load_profile(H100),), 32, cache=cache)
    (file,) = cache.folder.iterdir()
    file.write_text(json.dumps({"value": 2 * first}))
    assert saturated_tokens_per_s(TRACE, (load_profile(H100),), 32, cache=cache) == 2 * first
    assert saturated_tokens_per_s(TRACE, (load_profile(H100),), 33, cache=cache) != 2 * first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"value": null}', '{"value": NaN}', '{"other": 1}'])
def test_a_damaged_figure_is_measured_anew(cache, text):
    cache.put("saturated", "k", 5.0, {})
    assert cache.get("saturated", "k") == 5.0
    (file,) = cache.folder.iterdir()
    file.write_text(text)
    assert cache.get("saturated", "k") is None


def test_a_cache_that_cannot_be_written_says_so_and_what_was_measured_counts(tmp_path):
    (tmp_path / "file").write_text("")
    cache = FigureCache(tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="set XDG_CACHE_HOME"):
        row = run_cell(cell(), cache=cache)
    assert row["token_goodput"] > 0
    assert cache.get("saturated", "k") is None


def test_the_cache_belongs_to_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert experiment.default_cache_folder() == tmp_path / "tempo" / "figures"


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "folder" / "rows.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


# ---- replicas


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 9, 16])
def test_bisection_finds_the_smallest_fleet_that_is_enough(needed):
    tried = []

    def run(one):
        replicas = len(one.profile_names)
        tried.append(replicas)
        assert one.load * replicas == pytest.approx(3.0)
        return {"attainment": 0.96 if replicas >= needed else 0.9}

    found, rows = replicas_needed(cell(load=3.0), 0.95, most=16, run=run)
    assert found == needed
    assert sorted(rows) == sorted(tried)
    assert len(tried) == len(set(tried)) <= 8


def test_a_fleet_that_is_never_enough_is_said_to_be_none():
    found, rows = replicas_needed(cell(load=3.0), 0.95, most=6, run=lambda _: {"attainment": 0.5})
    assert found is None
    assert max(rows) == 6
