"""The formulas, checked against values worked out by hand and against a count from delivery times alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.metrics import (
    DeliveryTracker,
    decayed,
    percentile,
    refused_outcome,
    stream_gain,
    summarise,
    tbt_s,
    token_due_s,
    tpot_s,
    whole_gain,
)
from tempo_router.request import Latency
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL

PROMPT_READER = Latency(ttft_s=1.0, tbt_s=0.1)


def test_a_late_token_is_lost_and_the_stream_can_catch_up():
    """Tokens are due at 1.0, 1.1, 1.2, ...: the second comes late, the later ones are in time again."""
    tracker = DeliveryTracker(PROMPT_READER, arrival_s=0.0)
    tracker.delivered(0.9, 1)
    tracker.delivered(1.15, 1)
    tracker.delivered(1.2, 2)

    outcome = tracker.finish(1.2, completed=True)

    assert (outcome.output_tokens, outcome.good_tokens, outcome.late_tokens) == (4, 3, 1)
    assert outcome.is_met is False
    assert outcome.ttft_s == pytest.approx(0.9)
    assert outcome.ttlt_s == pytest.approx(1.2)
    assert outcome.max_tbt_s == pytest.approx(0.25)


def test_stream_that_did_not_complete_keeps_its_good_tokens_but_missed():
    tracker = DeliveryTracker(PROMPT_READER, arrival_s=0.0)
    tracker.delivered(0.5, 10)
    outcome = tracker.finish(0.6, completed=False)
    assert (outcome.good_tokens, outcome.is_met) == (10, False)


@pytest.mark.parametrize(("last_s", "good"), [(20.0, 5), (20.1, 0)])
def test_deadline_request_counts_whole_or_not_at_all(last_s: float, good: int):
    tracker = DeliveryTracker(TOOL, arrival_s=0.0)
    tracker.delivered(1.0, 4)
    tracker.delivered(last_s, 1)
    outcome = tracker.finish(last_s + 5, completed=True)
    assert (outcome.good_tokens, outcome.late_tokens) == (good, 5 - good)
    assert outcome.is_met is (good > 0)


def test_best_effort_has_nothing_to_meet():
    tracker = DeliveryTracker(BACKGROUND, arrival_s=0.0)
    tracker.delivered(1000.0, 3)
    outcome = tracker.finish(1000.0, completed=True)
    assert (outcome.output_tokens, outcome.good_tokens, outcome.is_met) == (3, 0, None)


def test_answer_without_tokens_has_no_latencies():
    outcome = DeliveryTracker(CHAT, arrival_s=3.0).finish(4.0, completed=True)
    assert (outcome.ttft_s, outcome.ttlt_s, outcome.max_tbt_s) == (None, None, None)
    assert outcome.is_met is True


@given(
    ttft_s=st.floats(0.001, 10),
    tbt_s_=st.floats(1e-4, 1),
    arrival_s=st.floats(-1e5, 1e5),
    deliveries=st.lists(st.tuples(st.floats(0, 2), st.integers(0, 30)), max_size=30),
)
def test_good_tokens_equal_a_count_from_the_delivery_times_alone(ttft_s, tbt_s_, arrival_s, deliveries):
    slo = Latency(ttft_s, tbt_s_)
    tracker = DeliveryTracker(slo, arrival_s)
    now_s, times = arrival_s, []
    for gap_s, tokens in deliveries:
        now_s += gap_s
        tracker.delivered(now_s, tokens)
        times += [now_s] * tokens
    good = sum(at_s <= token_due_s(slo, arrival_s, token) for token, at_s in enumerate(times))
    assert tracker.finish(now_s, completed=True).good_tokens == good


def test_token_exactly_on_its_due_time_is_good():
    """0.1 cannot be written in binary: the due time is what the formula says, not what division recovers."""
    tracker = DeliveryTracker(PROMPT_READER, arrival_s=0.0)
    for token in range(50):
        tracker.delivered(token_due_s(PROMPT_READER, 0.0, token), 1)
    assert tracker.finish(9.0, completed=True).late_tokens == 0


def test_late_tokens_of_a_frame_are_counted_by_the_due_times_and_not_by_a_division():
    """Each frame holds a token that is late and one that is exactly on its due time."""
    for arrival_s in (0.0, 0.1, 12345.678):
        for token in range(1, 300):
            tracker = DeliveryTracker(PROMPT_READER, arrival_s)
            tracker.delivered(arrival_s, token)
            tracker.delivered(token_due_s(PROMPT_READER, arrival_s, token + 1), 2)
            assert tracker.finish(arrival_s, completed=True).late_tokens == 1, f"token {token} at {arrival_s}"


def test_tpot_is_the_mean_gap_and_undefined_for_one_token():
    assert tpot_s(1.0, 3.0, 5) == pytest.approx(0.5)
    assert tpot_s(1.0, 1.0, 1) is None
    assert tbt_s([1.0, 1.5, 3.0]) == [0.5, 1.5]


def test_gain_decays_with_lateness_by_alpha():
    assert decayed(2.0, 100) == 1.0
    assert decayed(0.5, 1) == 0.5
    assert whole_gain(100, 10, target_s=20, latency_s=10, alpha=1) == 180
    assert whole_gain(100, 10, target_s=20, latency_s=40, alpha=1) == 90
    assert whole_gain(100, 10, target_s=20, latency_s=21, alpha=100) < 180 * 0.01


def test_stream_gain_is_full_on_time_and_partial_behind():
    """On time: 100 for the prompt and 8 per token. At 4 s thirty tokens are wanted and two are there: 8 x 2/30."""
    assert stream_gain(PROMPT_READER, 0.0, 100, [0.5, 0.55], alpha=1) == pytest.approx(116)
    assert stream_gain(PROMPT_READER, 0.0, 100, [1.0, 4.0], alpha=1) == pytest.approx(108 + 8 * 2 / 30)
    assert stream_gain(PROMPT_READER, 0.0, 100, [], alpha=1) == 0.0


def test_summary_counts_refused_requests_as_missed_and_names_the_worst_class():
    chat = DeliveryTracker(CHAT, 0.0)
    chat.delivered(1.0, 10)
    tool = DeliveryTracker(TOOL, 0.0)
    tool.delivered(1.0, 20)
    outcomes = [
        chat.finish(1.0, completed=True),
        tool.finish(1.0, completed=True),
        refused_outcome(TOOL),
        refused_outcome(BACKGROUND),
    ]

    goodput = summarise(outcomes, window_s=10.0)

    assert goodput.attainment == {"latency": 1.0, "deadline": 0.5}
    assert goodput.worst_class == "deadline"
    assert goodput.overall_attainment == pytest.approx(2 / 3)
    assert (goodput.requests_per_s, goodput.tokens_per_s) == (pytest.approx(0.2), pytest.approx(3.0))
    assert refused_outcome(AGENT).is_met is False


def test_summary_of_nothing_has_no_attainment():
    goodput = summarise([], window_s=1.0)
    assert (goodput.worst_class, goodput.overall_attainment, goodput.requests) == (None, None, 0)


def test_percentile_is_a_value_that_was_measured():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.99) == 2.0
    assert percentile([5.0], 0.0) == 5.0
    assert percentile([], 0.5) is None
