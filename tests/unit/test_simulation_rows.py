"""Rows of the goodput benchmark: each formula on a run that fits on a page."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest

from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation import rows
from tempo_router.simulation.report import Report, UnitOutcome
from tempo_router.simulation.rows import (
    COLUMNS,
    IDENTITY,
    LATENESS_GRID,
    MEASURES,
    TTFT_GRID_S,
    columns_markdown,
    measures,
)
from tempo_router.simulation.trace import Trace, TraceCall, Unit


def outcome(unit_id, slo_class, status="finished", **values):
    """What became of a unit; what is not said did not happen."""
    nothing = {field.name: None for field in fields(UnitOutcome) if field.name in ("ttft_s", "ttlt_s", "max_tbt_s")}
    zeros = dict.fromkeys(
        ("prompt_tokens", "output_tokens", "good_tokens", "good_prompt_tokens", "service_gain", "arrival_s"), 0
    )
    common = {"app": "", "tenant": "", "calls": 1, "is_met": True}
    return UnitOutcome(**{**nothing, **zeros, **common, **values}, unit_id=unit_id, slo_class=slo_class, status=status)


def report(units, stream_gaps_s=(), duration_s=20.0, arrival_span_s=10.0):
    return Report(
        units,
        np.asarray(stream_gaps_s, dtype=np.float64),
        duration_s,
        arrival_span_s,
        steps=7,
        preemptions=1,
        recomputed_tokens=64,
        produced_tokens=0,
        prefix_hit_tokens=32,
    )


def unit(unit_id, slo, output_tokens=100, tenant="a", is_program=False):
    return Unit(unit_id, 0.0, slo, (TraceCall(unit_id, 10, output_tokens),), tenant=tenant, is_program=is_program)


STREAM, ANSWER = Latency(ttft_s=1.0, tbt_s=0.1), Deadline(ttlt_s=10.0)
TRACE = Trace(
    "small",
    (
        unit("s1", STREAM, 100, "a"),
        unit("s2", STREAM, 100, "b"),
        unit("s3", STREAM, 200, "b"),
        unit("d1", ANSWER, 50, "a"),
        unit("d2", ANSWER, 50, "a"),
        unit("p1", Deadline(40.0), 500, "b", is_program=True),
        unit("b1", BestEffort(), 1000, "c"),
    ),
)
REPORT = report(
    [
        outcome("s1", "latency", output_tokens=100, good_tokens=100, good_prompt_tokens=10, service_gain=810.0,
                    ttft_s=0.2, ttlt_s=5.0),
        outcome("s2", "latency", is_met=False, output_tokens=100, good_tokens=60, good_prompt_tokens=10,
                    service_gain=600.0, ttft_s=0.8, ttlt_s=15.0),
        outcome("s3", "latency", "refused", is_met=False),
        outcome("d1", "deadline", output_tokens=50, good_tokens=50, good_prompt_tokens=10, service_gain=410.0,
                    ttft_s=3.0, ttlt_s=5.0),
        outcome("d2", "deadline", is_met=False, output_tokens=50, service_gain=200.0, ttft_s=3.0, ttlt_s=15.0),
        outcome("p1", "program", "expired", is_met=False, output_tokens=300, ttft_s=1.0, ttlt_s=None),
        outcome("b1", "best_effort", is_met=None, output_tokens=1000, service_gain=9.0, ttft_s=1.0, ttlt_s=19.0),
    ],
    stream_gaps_s=[0.01] * 98 + [0.05, 0.5],
)  # fmt: skip


@pytest.fixture(scope="module")
def row():
    return measures(REPORT, TRACE)


def test_goodput_is_counted_per_second_of_the_arrivals(row):
    assert row["token_goodput"] == pytest.approx((100 + 60 + 50) / 10)
    assert row["request_goodput"] == pytest.approx(2 / 10)
    assert row["program_goodput"] == 0
    assert row["token_goodput_by_class"] == {"latency": 16.0, "deadline": 5.0, "program": 0.0}
    assert row["offered_tokens_per_s"] == pytest.approx(2000 / 10)


def test_prompt_tokens_count_with_their_weights(row):
    assert row["good_tokens_1_1"] == pytest.approx((30 + 210) / 10)
    assert row["good_tokens_1_8"] == pytest.approx((30 + 8 * 210) / 10)


def test_throughput_counts_late_and_best_effort_tokens_over_the_whole_run(row):
    assert row["throughput"] == pytest.approx(1600 / 20)


def test_best_effort_gains_nothing(row):
    assert row["service_gain"] == pytest.approx((810 + 600 + 410 + 200) / 10)


def test_attainment_is_over_all_units_with_a_target_refused_ones_included(row):
    assert row["attainment"] == pytest.approx(2 / 6)
    assert row["attainment_by_class"] == {"latency": pytest.approx(1 / 3), "deadline": 0.5, "program": 0.0}
    assert (row["worst_class"], row["worst_class_attainment"]) == ("program", 0.0)


def test_first_token_times_are_those_of_served_streams(row):
    assert (row["ttft_p50_s"], row["ttft_p95_s"], row["ttft_p99_s"]) == (0.2, 0.8, 0.8)


def test_gap_percentiles_are_over_all_gaps(row):
    assert row["tbt_p50_s"] == pytest.approx(0.01)
    assert row["tbt_p99_s"] == pytest.approx(0.05)


def test_time_to_last_token_is_that_of_finished_answers_and_programs(row):
    assert row["ttlt_p95_s"] == 15.0


def test_jain_index_compares_what_tenants_got_of_what_they_offered(row):
    shares = {"a": 150 / 200, "b": 60 / 800}
    assert row["jain_by_tenant"] == pytest.approx(sum(shares.values()) ** 2 / (2 * sum(x * x for x in shares.values())))


@pytest.mark.parametrize(
    ("shares", "index"), [({"a": 0.5, "b": 0.5}, 1.0), ({"a": 1.0, "b": 0.0}, 0.5), ({"a": 0.0}, None), ({}, None)]
)
def test_jain_index_runs_from_one_of_n_to_one_and_is_undefined_for_nothing(shares, index):
    assert rows.jain(shares) == index


def test_ends_are_counted_by_class(row):
    assert row["status_by_class"] == {
        "latency": {"finished": 2, "refused": 1},
        "deadline": {"finished": 2},
        "program": {"expired": 1},
        "best_effort": {"finished": 1},
    }


def test_distributions_are_shares_of_all_so_the_unserved_keep_them_below_one(row):
    at = dict(zip(TTFT_GRID_S, row["ttft_cdf"], strict=True))
    assert at[0.01] == 0
    assert at[0.1995] == 0
    assert at[1.0] == pytest.approx(2 / 3, abs=1e-5)
    late = dict(zip(LATENESS_GRID, row["lateness_cdf"]["deadline"], strict=True))
    assert [late[x] for x in (0.48, 0.5, 1.0, 1.48, 1.5, 2.0)] == [0, 0.5, 0.5, 0.5, 1, 1]
    assert set(row["lateness_cdf"]["program"]) == {0.0}


def test_what_has_no_values_is_none_and_not_zero():
    trace = Trace("lone", (unit("s1", STREAM),))
    row = measures(report([outcome("s1", "latency", "refused", is_met=False)]), trace)
    for name in ("ttft_p50_s", "ttft_p99_s", "tbt_p50_s", "tbt_p99_s", "ttlt_p95_s", "jain_by_tenant"):
        assert row[name] is None, name
    only_best_effort = measures(
        report([outcome("b", "best_effort", is_met=None)]), Trace("b", (unit("b", BestEffort()),))
    )
    for name in ("attainment", "worst_class", "worst_class_attainment", "ttft_cdf"):
        assert only_best_effort[name] is None, name


def test_rates_of_a_backlog_are_over_its_duration():
    trace = Trace("lone", (unit("d", ANSWER, 80),))
    done = outcome("d", "deadline", output_tokens=80, good_tokens=80, ttlt_s=4.0)
    assert measures(report([done], arrival_span_s=0.0, duration_s=4.0), trace)["token_goodput"] == 20


def test_a_row_is_plain_json_without_nan(row):
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert all(not isinstance(value, float) or math.isfinite(value) for value in row.values())


def test_every_column_is_documented_and_every_documented_column_exists(row):
    assert set(row) == {column.name for column in MEASURES} - {"bound_token_goodput", "wall_s"}
    names = [column.name for column in COLUMNS]
    assert len(names) == len(set(names)) == len(IDENTITY) + len(MEASURES)
    assert all(f"| `{name}` |" in columns_markdown() for name in names)


def test_a_report_of_another_trace_is_refused():
    with pytest.raises(ValueError, match="7 units does not belong to a trace of 0"):
        measures(REPORT, Trace("empty", ()))
