import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.errors import ConfigError
from tempo_router.simulation.step_profiles import (
    LayeredStepTime,
    LinearStepTime,
    Prefill,
    file_profiles,
    load_profile,
    preset_profiles,
    scaled,
)

ENTRY = {
    "model": "m",
    "gpu": "g",
    "tp": 2,
    "layers": 10,
    "lin_layer": {"tokens": [1, 10, 20], "ms": [1.0, 1.9, 3.9], "source": "made up"},
    "attn_decode_layer": {"fixed_ms": 0.5, "ms_per_gb": 2.0, "gb_per_ctx_token": 0.001},
    "attn_prefill_layer": {"fixed_ms": 0.25, "ms_per_chunk_x_past": 0.01, "ms_per_chunk_sq": 0.02},
    "all_reduce": {"per_layer": 2, "fixed_ms": 0.1, "ms_per_mb": 0.5, "mb_per_token": 0.01},
    "lm_head": {"fixed_ms": 3.0, "ms_per_row": 0.1},
    "kv_capacity_tokens": 100_007,
}
CONTENT = {"version": 1, "unit": "ms", "cpu_overhead_ms_default": 1.5, "profiles": [ENTRY]}


@pytest.fixture
def profile_file(tmp_path):
    path = tmp_path / "step_time.json"
    path.write_text(json.dumps(CONTENT))
    return path


def test_the_presets_say_where_they_come_from():
    presets = preset_profiles()
    assert set(presets) == {"toy-cpu", "llama-3-8b:a100-80g:1", "llama-3-8b:h100-80g:1"}
    assert all(profile.source for profile in presets.values())


def test_the_linear_formula_term_by_term():
    times = LinearStepTime(1.0, 0.1, 0.01, 0.001, 0.0001)
    # 1 + 0.1 * 12 + 0.01 * 3 + 0.001 * 50 + 0.0001 * (10 * (4 + 5) + 2 * (0 + 1))
    assert times.duration_s([Prefill(10, 4), Prefill(2, 0)], 3, 50) == pytest.approx(2.2892)


def test_the_layered_formula_term_by_term(profile_file):
    """10 tokens: 6 decodes of 100 context tokens in all, and a chunk of 4 after 3."""
    times = file_profiles(profile_file)["m:g:2"].step_time
    linear, decode = 1.9, 0.5 + 2.0 * 0.001 * 100
    prefill = 0.25 + 0.01 * 4 * 3 + 0.02 * 16
    reduce = 2 * (0.1 + 0.5 * 0.01 * 10)
    head = 3.0 + 0.1 * 7
    expected_ms = 1.5 + 10 * (linear + decode + prefill + reduce) + head
    assert times.duration_s([Prefill(4, 3)], 6, 100) == pytest.approx(expected_ms / 1000)


@pytest.mark.parametrize(("tokens", "linear_ms"), [(1, 1.0), (4, 1.3), (10, 1.9), (15, 2.9), (20, 3.9), (40, 7.8)])
def test_linear_parts_are_interpolated_and_grow_in_proportion_beyond(profile_file, tokens, linear_ms):
    times = file_profiles(profile_file)["m:g:2"].step_time
    assert isinstance(times, LayeredStepTime)
    assert times._linear(tokens) == pytest.approx(linear_ms / 1000)


def test_a_file_gives_its_engines_a_shape(profile_file):
    profile = load_profile("m:g:2", profile_file)
    assert profile.shape.kv_tokens == 100_000 // 16 * 16
    assert profile.shape.max_model_len <= profile.shape.kv_tokens


@pytest.mark.parametrize(
    ("name", "prefills", "decodes", "expected_ms"),
    [
        # The examples published with the tables, and 1.5 ms of host time.
        ("llama-3-8b:a100-80g:1", [Prefill(512, 0)], 0, 38.98),
        ("llama-3-8b:a100-80g:1", [], 128, 27.58),
        ("llama-3-8b:h100-80g:1", [Prefill(2048, 0)], 0, 57.85),
        ("llama-3-8b:h100-80g:1", [], 32, 10.66),
    ],
)
def test_layered_presets_give_the_times_of_their_tables(name, prefills, decodes, expected_ms):
    duration_s = load_profile(name).step_time.duration_s(prefills, decodes, 1024 * decodes)
    assert 1000 * duration_s == pytest.approx(expected_ms, rel=0.005)


def test_the_same_step_takes_the_same_time_again():
    times = load_profile("llama-3-8b:a100-80g:1").step_time
    step = ([Prefill(100, 50)], 20, 9000)
    assert times.duration_s(*step) == times.duration_s(*step)
    assert times == load_profile("llama-3-8b:a100-80g:1").step_time


@pytest.mark.parametrize("name", sorted(preset_profiles()))
def test_a_scaled_profile_is_slower_and_holds_less(name):
    profile = load_profile(name)
    slow = scaled(profile, time=1.4, kv=0.25)
    step = ([Prefill(100, 50)], 20, 9000)
    assert slow.step_time.duration_s(*step) == pytest.approx(1.4 * profile.step_time.duration_s(*step))
    assert slow.shape.kv_tokens == pytest.approx(profile.shape.kv_tokens / 4, abs=profile.shape.block_size)
    assert slow.shape.kv_tokens % profile.shape.block_size == 0
    assert slow.name != profile.name


@given(
    st.sampled_from(sorted(preset_profiles())),
    st.floats(0.1, 10),
    st.lists(st.builds(Prefill, st.integers(1, 4096), st.integers(0, 8192)), max_size=3),
    st.integers(0, 512),
    st.integers(0, 10**6),
)
def test_every_step_of_a_scaled_engine_takes_the_factor_and_its_times_stay_of_their_kind(
    name, factor, prefills, decodes, context_tokens
):
    times = preset_profiles()[name].step_time
    changed = scaled(preset_profiles()[name], time=factor).step_time
    assert type(changed) is type(times)
    plain_s = times.duration_s(prefills, decodes, context_tokens)
    assert changed.duration_s(prefills, decodes, context_tokens) == pytest.approx(factor * plain_s, rel=1e-9)


def test_terms_that_no_preset_has_are_scaled_too(profile_file):
    """The made-up engine runs on two devices, so its layers wait for each other."""
    profile = load_profile("m:g:2", profile_file)
    step = ([Prefill(4, 3)], 6, 100)
    assert scaled(profile, time=3.0).step_time.duration_s(*step) == pytest.approx(
        3 * profile.step_time.duration_s(*step)
    )


def test_step_times_of_another_kind_are_not_scaled_by_guess():
    class Constant:
        def duration_s(self, prefills, decodes, context_tokens):
            return 1.0

    profile = replace(load_profile("toy-cpu"), step_time=Constant())
    with pytest.raises(ConfigError, match="Constant cannot be scaled"):
        scaled(profile, time=2.0)


def test_a_cache_is_not_scaled_below_the_longest_request():
    profile = load_profile("llama-3-8b:a100-80g:1")
    assert scaled(profile, kv=1e-6).shape.kv_tokens == profile.shape.max_model_len


@pytest.mark.parametrize("factors", [{"time": 0}, {"time": math.inf}, {"kv": -1}, {"kv": math.nan}])
def test_impossible_factors_are_refused(factors):
    with pytest.raises(ConfigError, match="above 0"):
        scaled(load_profile("toy-cpu"), **factors)


def test_presets_remain_beside_a_file(profile_file):
    assert load_profile("toy-cpu", profile_file).name == "toy-cpu"


def test_an_unknown_name_lists_those_that_exist(profile_file):
    with pytest.raises(ConfigError, match=r"'llama'.*llama-3-8b:a100-80g:1, llama-3-8b:h100-80g:1, m:g:2, toy-cpu"):
        load_profile("llama", profile_file)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        json.dumps({**CONTENT, "version": 2}),
        json.dumps({**CONTENT, "profiles": [{**ENTRY, "lm_head": {}}]}),
        json.dumps({**CONTENT, "profiles": [{**ENTRY, "lm_head": {"fixed_ms": -1, "ms_per_row": 0}}]}),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, content):
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"odd\.json"):
        file_profiles(path)


def changed(key, value):
    """The content with one field of the profile replaced, or removed by None; key: such as lin_layer.ms."""
    content = json.loads(json.dumps(CONTENT))
    *path, last = key.split(".")
    found = content["profiles"][0]
    for part in path:
        found = found[part]
    found[last] = value
    if value is None:
        del found[last]
    return content


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("lin_layer.ms", [1.0, 1.9], "lin_layer: 3 tokens and 2 ms"),
        ("lin_layer", {"tokens": [], "ms": [], "source": "s"}, "lin_layer: 0 tokens and 0 ms"),
        ("lin_layer.tokens", [1, 20, 10], "lin_layer.tokens: 10 comes after 20; they must go up"),
        ("lin_layer.tokens", [1, 10, 10], "lin_layer.tokens: 10 comes after 10"),
        ("lin_layer.tokens", [0, 10, 20], "lin_layer.tokens: 0 is not a whole number of at least 1"),
        ("lin_layer.ms", [1.0, math.nan, 3.9], "lin_layer.ms: nan is not a finite number"),
        ("lin_layer.ms", 3, "lin_layer.ms: expected a list, got 3"),
        ("layers", 0, "layers: 0 is not a whole number of at least 1"),
        ("layers", 1.5, "layers: 1.5 is not a whole number"),
        ("kv_capacity_tokens", 0, "kv_capacity_tokens: 0 is not a whole number of at least 16"),
        ("kv_capacity_tokens", -5, "kv_capacity_tokens: -5 is not"),
        ("kv_capacity_tokens", math.nan, "kv_capacity_tokens: nan is not"),
        ("attn_decode_layer.ms_per_gb", -1, "attn_decode_layer.ms_per_gb: -1 is not a finite number"),
        ("all_reduce.per_layer", math.inf, "all_reduce.per_layer: inf is not"),
        ("lm_head.ms_per_row", "fast", "lm_head.ms_per_row: 'fast' is not"),
        ("lm_head.ms_per_row", None, "lm_head.ms_per_row: is missing"),
        ("attn_prefill_layer", None, "attn_prefill_layer.fixed_ms: is missing"),
    ],
)
def test_a_wrong_value_is_named_with_file_profile_and_field(tmp_path, key, value, problem):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(changed(key, value)))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: profile m:g:2: {problem}")):
        file_profiles(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "version: is missing"),
        ({**CONTENT, "version": 2}, "expected a step-time file of version 1 in ms; it is of version 2 in ms"),
        ({**CONTENT, "profiles": {}}, "profiles: expected a list, got {}"),
        ({**CONTENT, "profiles": [{"model": "m", "gpu": "g"}]}, "profile 1: tp: is missing"),
        ({**CONTENT, "cpu_overhead_ms_default": -1}, "cpu_overhead_ms_default: -1 is not"),
        ({**CONTENT, "profiles": [ENTRY, {**ENTRY, "layers": 11}]}, "two different profiles are called m:g:2"),
    ],
)
def test_what_is_wrong_with_a_whole_file_is_named(tmp_path, content, problem):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {problem}")):
        file_profiles(path)


def test_an_engine_whose_steps_take_no_time_is_refused(tmp_path):
    zero = dict.fromkeys(("fixed_ms", "ms_per_gb", "gb_per_ctx_token", "ms_per_chunk_x_past", "ms_per_chunk_sq"), 0)
    zero |= {"per_layer": 0, "ms_per_mb": 0, "mb_per_token": 0, "ms_per_row": 0}
    parts = dict.fromkeys(("attn_decode_layer", "attn_prefill_layer", "all_reduce", "lm_head"), zero)
    entry = {**ENTRY, **parts, "lin_layer": {"tokens": [1, 10], "ms": [0, 0], "source": "s"}}
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**CONTENT, "cpu_overhead_ms_default": 0, "profiles": [entry]}))
    with pytest.raises(ConfigError, match=r"profile m:g:2: lin_layer\.ms: .* a step of one token takes 0 s"):
        file_profiles(path)


def test_the_nearest_of_many_names_is_proposed(tmp_path):
    path = tmp_path / "many.json"
    path.write_text(json.dumps({**CONTENT, "profiles": [{**ENTRY, "model": f"m{n}"} for n in range(30)]}))
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3-8b:h100-80g:1'\? there are 33, such as") as caught:
        load_profile("llama3-8b:h100-80g:1", path)
    assert str(caught.value).count("m1") == 0
    with pytest.raises(ConfigError, match=r"there are: .*; did you mean 'toy-cpu'\?"):
        load_profile("toycpu")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        load_profile("toy-cpu", tmp_path / "nothing.json")


def test_a_profile_that_is_not_in_the_file_is_named_with_the_file(profile_file):
    with pytest.raises(ConfigError, match=rf"'m:g:3': no such .* in {re.escape(str(profile_file))}; .*m:g:2"):
        load_profile("m:g:3", profile_file)


chunks = st.builds(Prefill, st.integers(1, 4096), st.integers(0, 8192))


@given(
    st.sampled_from(sorted(preset_profiles())), st.lists(chunks, max_size=4), st.integers(0, 512), st.integers(0, 10**6)
)
def test_more_work_never_takes_less_time(name, prefills, decodes, context_tokens):
    times = preset_profiles()[name].step_time
    duration_s = times.duration_s(prefills, decodes, context_tokens)
    assert math.isfinite(duration_s)
    assert 0 < duration_s <= times.duration_s([*prefills, Prefill(1, 0)], decodes + 1, context_tokens + 10)
