"""Worth, cost and the point of no return, on figures that can be checked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.prediction import Lengths
from tempo_router.request import Deadline, Latency
from tempo_router.step_time import Pace
from tempo_router.value import PREFILL_WALL_RATIO, cost_s, expected_good, hopeless_at_s
from tests.builders import BACKGROUND, request

PACE = Pace(prefill_token_s=1e-3, share_s=0.01, decode_s=0.01, context_token_s=0.0, tau_s=0.1, alone_s=0.05)
ALWAYS_100 = Lengths((100.0,) * 20)
STREAM = request(slo=Latency(ttft_s=2.0, tbt_s=0.3), prompt_tokens=1000, max_output_tokens=1000)
WHOLE = request(slo=Deadline(20.0), prompt_tokens=1000, max_output_tokens=1000)


def test_cost_is_the_prefill_and_the_rest_of_the_answer():
    """1000 tokens of prefill at 1 ms, 100 tokens at 20 ms."""
    assert cost_s(STREAM, ALWAYS_100, PACE) == pytest.approx(1.0 + 2.0)
    resumed = request(slo=STREAM.slo, prompt_tokens=1000, max_output_tokens=1000, generated_tokens=60)
    assert cost_s(resumed, ALWAYS_100, PACE) == pytest.approx(1.06 + 0.8)


def test_cost_counts_the_context_that_every_token_reads():
    pace = Pace(1e-3, 0.01, 0.01, 1e-5, 0.1, 0.05)
    assert cost_s(STREAM, ALWAYS_100, pace) == pytest.approx(1.0 + 100 * (0.02 + 1e-5 * 1050))


def test_stream_in_time_saves_every_token():
    """Prefill takes 1.3 s of wall time and a step 0.1 s: a start at 0.6 s is just in time."""
    assert expected_good(STREAM, ALWAYS_100, PACE, 0.6) == (100.0, 1.0)


def test_late_stream_loses_the_first_token_and_as_many_as_it_takes_to_catch_up():
    """2 s late, catching up 0.2 s with each token: ten tokens and the first one."""
    tokens, probability = expected_good(STREAM, ALWAYS_100, PACE, 2.6)
    assert (tokens, probability) == (pytest.approx(89.0), 0.0)


def test_deadline_counts_the_answers_that_fit():
    """At 8.7 s there is room for 100 tokens after the prefill, at 8.8 s for 99."""
    assert expected_good(WHOLE, ALWAYS_100, PACE, 8.69) == (pytest.approx(100.0), 1.0)
    assert expected_good(WHOLE, ALWAYS_100, PACE, 8.8)[0] == 0.0
    tens = Lengths(tuple(float(10 * n) for n in range(1, 21)))
    tokens, probability = expected_good(WHOLE, tens, PACE, 8.69)
    assert (tokens, probability) == (pytest.approx(550 / 20), pytest.approx(0.5, abs=0.01))


def test_best_effort_has_no_target_to_meet_and_none_to_miss():
    spec = request(slo=BACKGROUND)
    assert expected_good(spec, ALWAYS_100, PACE, 0.0) == (0.0, 0.0)
    assert hopeless_at_s(spec, ALWAYS_100, PACE) == float("inf")


def test_whole_answer_is_beyond_help_when_even_alone_the_shortest_is_late():
    assert hopeless_at_s(WHOLE, ALWAYS_100, PACE) == pytest.approx(20 - 1.0 - 100 * 0.05)


@given(
    ttft_s=st.floats(0.01, 10),
    tbt_s=st.floats(0.001, 1),
    prompt=st.integers(1, 5000),
    limit=st.integers(1, 5000),
    generated=st.integers(0, 3000),
    values=st.lists(st.floats(1, 3000), min_size=20, max_size=20),
    before=st.floats(0.001, 50),
)
def test_stream_has_worth_until_it_is_beyond_help(ttft_s, tbt_s, prompt, limit, generated, values, before):
    spec = request(
        slo=Latency(ttft_s, tbt_s), prompt_tokens=prompt, max_output_tokens=limit, generated_tokens=generated
    )
    lengths = Lengths(tuple(sorted(values)))
    end_s = hopeless_at_s(spec, lengths, PACE)
    if generated:
        after, _ = expected_good(spec, lengths, PACE, end_s + 1e-3)
        assert after == pytest.approx(0.0, abs=1e-6)
    if generated < limit:
        assert expected_good(spec, lengths, PACE, end_s - before)[0] > 0.0


def test_stream_that_has_not_begun_is_beyond_help_a_quarter_of_its_target_after_its_latest_start():
    spec = request(slo=Latency(2.0, 0.5), prompt_tokens=100, max_output_tokens=500)
    latest_s = 2.0 - PREFILL_WALL_RATIO * PACE.prefill_s(100) - PACE.tau_s
    assert hopeless_at_s(spec, ALWAYS_100, PACE) == pytest.approx(latest_s + 0.5)


@given(now_s=st.floats(0, 100), later_s=st.floats(0, 100), slo=st.sampled_from([STREAM, WHOLE]))
def test_worth_does_not_rise_with_lateness(now_s, later_s, slo):
    now = expected_good(slo, ALWAYS_100, PACE, now_s)
    later = expected_good(slo, ALWAYS_100, PACE, now_s + later_s)
    assert later[0] <= now[0] + 1e-9
    assert later[1] <= now[1] + 1e-9
