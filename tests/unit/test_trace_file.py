import gzip
import pickle

import pytest

from tempo_router.errors import TempoError, TraceError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.trace import Trace, TraceCall, Unit
from tempo_router.simulation.trace_file import read_trace, write_trace

HEADER = (
    "request_id,arrival_s,app,class,prompt_tokens,output_tokens,program_id,stage,parents,gap_s,"
    "prefix_id,prefix_tokens,tenant,slo_ttft_s,slo_tbt_s,slo_ttlt_s"
)
SMALL = "request_id,arrival_s,class,prompt_tokens,output_tokens"


@pytest.fixture
def trace_of(tmp_path):
    """Reads a trace from these lines."""

    def read(*lines):
        path = tmp_path / "t.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_trace(path)

    return read


def error_of(trace_of, *lines) -> TraceError:
    with pytest.raises(TraceError) as caught:
        trace_of(*lines)
    return caught.value


def test_a_request_alone_is_a_unit_with_the_targets_of_its_class(trace_of):
    trace = trace_of(
        HEADER,
        "0,1.5,chat,latency,10,20,,,,,,,t0,1.0,0.05,",
        "1,2.5,code,throughput,30,4,,,,,,,t1,,,9.0",
        "2,3.5,batch,best_effort,50,6,,,,,,,t1,,,",
    )

    assert trace.name == "t"
    assert trace.units == (
        Unit("0", 1.5, Latency(1.0, 0.05), (TraceCall("0", 10, 20),), "chat", "t0"),
        Unit("1", 2.5, Deadline(9.0), (TraceCall("1", 30, 4),), "code", "t1"),
        Unit("2", 3.5, BestEffort(), (TraceCall("2", 50, 6),), "batch", "t1"),
    )


def test_calls_of_a_program_are_one_unit_with_one_deadline(trace_of):
    trace = trace_of(
        HEADER,
        "7,4.0,research,collective,100,10,p,0,,,,,t,,,60.0",
        "8,,research,collective,200,20,p,1,7,0.5,p,90,t,,,60.0",
        "9,,research,collective,300,30,p,2,7 8,0.25,,,t,,,60.0",
    )

    assert trace.units == (
        Unit(
            "p",
            4.0,
            Deadline(60.0),
            (
                TraceCall("7", 100, 10),
                TraceCall("8", 200, 20, 1, (0,), 0.5, "p", 90),
                TraceCall("9", 300, 30, 2, (0, 1), 0.25),
            ),
            "research",
            "t",
            is_program=True,
        ),
    )
    assert trace.calls == 3


def test_targets_that_the_file_leaves_out_have_defaults(trace_of):
    """A program gets 20 s per stage; two calls of one stage do not count twice."""
    trace = trace_of(
        SMALL + ",program_id,parents",
        "0,0,latency,1,1,,",
        "1,1,throughput,1,1,,",
        "2,2,collective,1,1,p,",
        "3,,collective,1,1,p,2",
        "4,,collective,1,1,p,2",
        "5,,collective,1,1,p,3 4",
    )

    assert [unit.slo for unit in trace.units] == [Latency(2.0, 0.1), Deadline(20.0), Deadline(60.0)]
    assert [call.stage for call in trace.units[2].calls] == [0, 1, 1, 2]


def test_units_are_in_order_of_arrival_and_ties_in_order_of_the_file(trace_of):
    trace = trace_of(SMALL, "a,5,latency,1,1", "b,2,latency,1,1", "c,5,latency,1,1", "d,2,latency,1,1")

    assert [unit.unit_id for unit in trace.units] == ["b", "d", "a", "c"]
    assert trace.span_s == 5


def test_parents_come_before_their_children_wherever_they_stand_in_the_file(trace_of):
    trace = trace_of(
        SMALL + ",program_id,parents",
        "end,,collective,1,1,p,left right",
        "left,,collective,1,1,p,start",
        "start,1,collective,1,1,p,",
        "right,,collective,1,1,p,start",
    )

    calls = trace.units[0].calls
    assert [call.request_id for call in calls] == ["start", "left", "right", "end"]
    assert calls[3].parents == (1, 2)


def test_a_root_that_comes_later_than_the_first_one_waits_from_the_arrival_of_the_program(trace_of):
    trace = trace_of(SMALL + ",program_id", "0,3,collective,1,1,p", "1,5,collective,1,1,p")

    assert trace.units[0].arrival_s == 3
    assert [call.gap_s for call in trace.units[0].calls] == [0, 2]


def test_a_program_may_be_named_like_a_request(trace_of):
    trace = trace_of(SMALL + ",program_id", "1,0,latency,1,1,", "2,1,collective,1,1,1")

    assert [unit.unit_id for unit in trace.units] == ["1", "program:1"]


def test_blocks_and_reasoning_tokens_are_tolerated(trace_of):
    trace = trace_of(SMALL + ",reasoning_tokens,blocks", "1,0,latency,1,5,3,0 1 2")

    assert trace.units[0].calls == (TraceCall("1", 1, 5),)


@pytest.mark.parametrize("name", ["copy.csv", "copy.csv.gz", "copy.CSV.GZ"])
def test_what_is_written_reads_back_the_same(tmp_path, name):
    units = (
        Unit("0", 0.1, Latency(1.0, 0.05), (TraceCall("0", 10, 20),), "chat", "t0"),
        Unit(
            "p",
            1 / 3,
            Deadline(60.0),
            (
                TraceCall("r0", 1, 2),
                TraceCall("r1", 3, 4, 1, (0,), 0.125, "p", 2),
                TraceCall("r2", 3, 4, 2, (0, 1), 0, "p", 0),
            ),
            "x, y",
            'said "t"',
            is_program=True,
        ),
        Unit("b", 2.0, BestEffort(), (TraceCall("b", 10, 20),)),
        Unit("d", 2.0, Deadline(5.5), (TraceCall("d", 10, 20, 0, (), 0, "g", 7),)),
        Unit("q", 3.0, BestEffort(), (TraceCall("q", 10, 20),), is_program=True),
    )
    path = tmp_path / name
    write_trace(Trace("copy", units), path)

    assert read_trace(path) == Trace("copy", units)


def test_equal_traces_are_equal_files(tmp_path):
    trace = Trace("x", (Unit("0", 0.1, Latency(1.0, 0.05), (TraceCall("0", 10, 20),)),))
    write_trace(trace, tmp_path / "a.csv.gz")
    write_trace(trace, tmp_path / "b.csv.gz")

    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


def test_ids_that_could_not_be_read_back_are_not_written(tmp_path):
    call = TraceCall("same", 1, 1)
    trace = Trace("x", (Unit("a", 0, BestEffort(), (call,)), Unit("b", 0, BestEffort(), (call,))))

    with pytest.raises(TraceError, match=r"request_id='same'.*unique"):
        write_trace(trace, tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()


WRONG_VALUES = [
    ("arrival_s", "-1", "must not be negative"),
    ("arrival_s", "nan", "finite"),
    ("arrival_s", "inf", "finite"),
    ("arrival_s", "1e999", "finite"),
    ("arrival_s", "1764000000", "must be at most 1000000000 s; count from the start of the window, not from 1970"),
    ("gap_s", "1e300", "must be at most 1000000000 s"),
    ("slo_ttft_s", "1e10", "must be at most 1000000000 s"),
    ("arrival_s", "soon", "not a number of seconds"),
    ("arrival_s", "1_0", "not a number of seconds"),
    ("arrival_s", "", "needs the time of its arrival"),
    ("class", "fast", "latency, throughput, collective, best_effort"),
    ("class", "", "no such class"),
    ("class", "latncy", "no such class; did you mean latency? there are: latency, throughput"),
    ("class", "Collective", "did you mean collective?"),
    ("class", "x", "no such class; there are: latency, throughput"),
    ("request_id", "a\0", "a NUL byte is no text"),
    ("tenant", "\0", "a NUL byte is no text"),
    ("prompt_tokens", "", "not a whole number"),
    ("prompt_tokens", "0", "at least 1"),
    ("prompt_tokens", "-3", "at least 1"),
    ("prompt_tokens", "1.5", "not a whole number"),
    ("prompt_tokens", "nan", "not a whole number"),
    ("prompt_tokens", "9" * 5000, "at most 100000000"),
    ("output_tokens", "0", "at least 1"),
    ("output_tokens", "\u0661", "not a whole number"),
    ("gap_s", "-0.5", "must not be negative"),
    ("stage", "-1", "at least 0"),
    ("prefix_tokens", "11", "more than the 10 prompt tokens"),
    ("prefix_tokens", "5", "prefix_id"),
    ("slo_ttft_s", "0", "above zero"),
    ("slo_tbt_s", "-1", "negative"),
    ("slo_ttlt_s", "inf", "finite"),
    ("slo_ttlt_s", "0", "above zero"),
    ("request_id", "", "an id"),
    ("request_id", "a b", "without spaces"),
]


@pytest.mark.parametrize(("column", "value", "problem"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_file_line_and_column(trace_of, column, value, problem):
    good = {"request_id": "2", "arrival_s": "3", "app": "chat", "class": "latency", "prompt_tokens": "10"}
    good |= {"output_tokens": "10"}
    line = ",".join((good | {column: value}).get(name, "") for name in HEADER.split(","))

    error = error_of(trace_of, HEADER, "1,1,chat,latency,1,1" + "," * 10, line)

    assert (error.line, error.column, error.value) == (3, column, value)
    assert problem in str(error)
    assert "t.csv:3: " in str(error)
    assert f"{column}={repr(value)[:70]}" in str(error)
    assert len(str(error)) < 400
    assert isinstance(error, TempoError)


PROGRAM = SMALL + ",program_id,stage,parents,slo_ttlt_s,app"


@pytest.mark.parametrize(
    ("lines", "place", "problem"),
    [
        (["1,0,collective,1,1,p,,,,", "2,,collective,1,1,p,,9,,"], (3, "parents", "9"), "no request has this id"),
        (
            ["1,0,collective,1,1,p,,,,", "2,,collective,1,1,q,,1,,"],
            (3, "parents", "1"),
            "line 2 is of program 'p', this one of 'q'",
        ),
        (["1,0,latency,1,1,,,,,", "2,,latency,1,1,,,1,,"], (3, "parents", "1"), "needs a program_id"),
        (["1,0,latency,1,1,,,,,", "1,1,latency,1,1,,,,,"], (3, "request_id", "1"), "already used in line 2"),
        (["1,0,collective,1,1,p,,,,", "2,1,collective,1,1,p,,1,,"], (3, "arrival_s", 1.0), "use gap_s"),
        (["1,,collective,1,1,p,,1,,"], (2, "parents", "1"), "circle: 1 <- 1"),
        (
            [
                "0,0,collective,1,1,p,,,,",
                "1,,collective,1,1,p,,0 3,,",
                "2,,collective,1,1,p,,1,,",
                "3,,collective,1,1,p,,2,,",
                "4,,collective,1,1,p,,3,,",
            ],
            (3, "parents", "0 3"),
            "circle: 1 <- 3 <- 2 <- 1",
        ),
        (["1,0,collective,1,1,p,,,,", "2,,collective,1,1,p,,1 1,,"], (3, "parents", "1 1"), "twice"),
        (
            ["1,0,collective,1,1,p,3,,,", "2,,collective,1,1,p,3,1,,"],
            (3, "stage", 3),
            "above stage 3 of its parent '1'",
        ),
        (["1,0,collective,1,1,p,,,40,", "2,,collective,1,1,p,,1,50,"], (3, "slo_ttlt_s", 50.0), "line 2"),
        (["1,0,collective,1,1,p,,,,a", "2,,collective,1,1,p,,1,,b"], (3, "app", "b"), "line 2"),
        (["1,0,collective,1,1,p,,,,", "2,,best_effort,1,1,p,,1,,"], (3, "class", "best_effort"), "line 2"),
        (["1,0,latency,1,1,p,,,,"], (2, "class", "latency"), "calls of a program are collective"),
    ],
)
def test_lines_that_contradict_each_other_are_named(trace_of, lines, place, problem):
    error = error_of(trace_of, PROGRAM, *lines)

    assert (error.line, error.column, error.value) == place
    assert problem in str(error)


def test_a_long_chain_and_a_long_circle_need_no_recursion(trace_of):
    chain = ["0,0,collective,1,1,p,"] + [f"{i},,collective,1,1,p,{i - 1}" for i in range(1, 5000)]
    assert trace_of(SMALL + ",program_id,parents", *chain).calls == 5000

    circle = [f"{i},,collective,1,1,p,{(i - 1) % 5000}" for i in range(5000)]
    error = error_of(trace_of, SMALL + ",program_id,parents", *circle)
    assert "..." in str(error)
    assert len(str(error)) < 500


def test_the_first_call_of_a_unit_has_no_gap(trace_of):
    error = error_of(trace_of, SMALL + ",gap_s", "1,0,latency,1,1,2")

    assert str(error).endswith("t.csv:2: gap_s=2.0: a call without parents has no gap; add it to arrival_s")


@pytest.mark.parametrize(
    ("lines", "line", "problem"),
    [
        ([SMALL.replace(",class", "")], 1, "the header lacks class"),
        ([SMALL.replace(",", ";")], 1, "; separate the columns by commas"),
        ([SMALL + ",slo_tfft_s"], 1, "did you mean slo_ttft_s?"),
        ([SMALL + ",colour"], 1, "unknown column; remove it"),
        ([SMALL + ",class"], 1, "this column comes 2 times"),
        ([SMALL], None, "no requests in this file"),
        ([SMALL, "1,0,latency,1"], 2, "4 fields under a header of 5"),
        ([SMALL, '1,0,"latency"x,1,1'], 2, "not CSV"),
        ([SMALL, '1,0,"latency,1,1'], 2, "not CSV"),
    ],
)
def test_a_file_of_another_shape_is_refused(trace_of, lines, line, problem):
    error = error_of(trace_of, *lines)

    assert error.line == line
    assert problem in str(error)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"", "empty"),
        ("a.csv.gz", b"request_id\n", "not a gzip file"),
        ("a.csv.gz", b"", "empty"),
        ("a.csv.gz", gzip.compress(b"request_id" * 999)[:-9], "cut off or damaged"),
        ("a.csv.gz", gzip.compress(b"request_id" * 999)[:15] + b"\xff\xff\xff\xff" * 9, "cut off or damaged"),
        ("a.csv", gzip.compress(b"request_id"), "end its name in .gz"),
        ("a.csv", f"{SMALL}\n1,0,lat\x00ency,1,1\n".encode(), "class"),
        ("a.csv", SMALL.encode() + b"\n\n1,0,latenc\xff,1,1\n", "a.csv:3: byte 0xff is not UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"nowhere\.csv: cannot be read: No such file"):
        read_trace(tmp_path / "nowhere.csv")
    with pytest.raises(TraceError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


def test_an_error_keeps_its_place_on_the_way_to_another_process():
    error = TraceError("too small", "t.csv", 3, "stage", "-1")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes

    assert str(copy) == str(error) == "t.csv:3: stage='-1': too small"
    assert (copy.path, copy.line, copy.column, copy.value) == ("t.csv", 3, "stage", "-1")
