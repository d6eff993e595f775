import json

import pytest

from tempo_router.errors import TraceError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.convert import (
    CONVERTERS,
    Labels,
    from_azure,
    from_burstgpt,
    from_mooncake,
    from_vllm_bench,
)
from tempo_router.simulation.trace_file import read_trace, write_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.fixture
def file(tmp_path):
    def write(content, name="source.csv"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


def summary(converted):
    """(arrival, prompt, output) of each unit."""
    return [
        (unit.arrival_s, unit.calls[0].prompt_tokens, unit.calls[0].output_tokens) for unit in converted.trace.units
    ]


def test_azure_times_count_from_the_first_request(file):
    """Seven digits after the point, as the file of 2023 has, and a sort where lines are out of order."""
    content = AZURE + (
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.9799600,3180,8\n2023-11-16 18:17:04.4799600,110,27\n"
    )
    converted = from_azure(file(content, "AzureLLMInferenceTrace_code.csv"))

    assert summary(converted) == [(0, 4808, 10), (0.5, 110, 27), (2, 3180, 8)]
    assert {(unit.app, unit.slo, unit.tenant) for unit in converted.trace.units} == {("code", Deadline(20.0), "azure")}
    assert converted.trace.name == "AzureLLMInferenceTrace_code"


def test_azure_conversations_are_streams_and_zones_are_read(file):
    content = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n"
    converted = from_azure(file(content, "conv.csv"))

    assert summary(converted) == [(0, 2162, 5), (0.99007, 2399, 6)]
    assert {(unit.app, unit.slo) for unit in converted.trace.units} == {("chat", Latency(2.0, 0.1))}


def test_labels_replace_what_the_source_would_say(file):
    path = file(AZURE + "2024-05-10 00:00:00,1,5\n")
    unit = from_azure(path, Labels(app="mail", row_class="best_effort", tenant="night")).trace.units[0]

    assert (unit.app, unit.slo, unit.tenant) == ("mail", BestEffort(), "night")


def test_burstgpt_tells_conversations_from_api_calls_and_leaves_failures_out(file):
    content = BURST + (
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,230,1317,Conversation log\n"
        "118,GPT-4,417,0,417,API log\n120.5,GPT-4,417,276,693,API log\n"
    )
    converted = from_burstgpt(file(content))

    assert summary(converted) == [(0, 472, 18), (40, 1087, 230), (115.5, 417, 276)]
    assert converted.left_out == 1
    assert [(unit.app, unit.slo, unit.tenant) for unit in converted.trace.units[1:]] == [
        ("chat", Latency(2.0, 0.1), "ChatGPT"),
        ("api", Deadline(20.0), "GPT-4"),
    ]


def mooncake(*entries):
    return "".join(
        json.dumps({"timestamp": t, "input_length": n, "output_length": 7, "hash_ids": ids}) + "\n"
        for t, n, ids in entries
    )


def test_mooncake_blocks_that_came_before_are_a_prefix(file):
    converted = from_mooncake(
        file(
            mooncake(
                (0, 1100, [0, 1, 2]),
                (500, 1700, [0, 1, 2, 3]),
                (3000, 1100, [0, 4, 2]),
                (3000, 300, [9]),
                (3500, 1030, [0, 1, 2]),
            ),
            "m.jsonl",
        )
    )

    calls = [unit.calls[0] for unit in converted.trace.units]
    assert [unit.arrival_s for unit in converted.trace.units] == [0, 0.5, 3, 3, 3.5]
    # The third shares block 0 only: the block 2 behind another one is another text. The last is held as a whole.
    assert [call.prefix_tokens for call in calls] == [0, 1536, 512, 0, 1030]
    assert [call.prefix_id for call in calls] == ["b0-1", "b0-1", "b0-4", "b9", "b0-1"]


def test_blocks_of_requests_that_are_left_out_or_come_later_are_in_no_cache(file):
    """Of the second line nothing was computed; the fourth came before the third."""
    lines = [
        (0, 1536, 5, [0, 1, 2]),
        (10, 1600, 0, [0, 1, 7]),
        (40, 2048, 3, [0, 1, 7, 8]),
        (30, 2048, 3, [0, 1, 7, 8]),
    ]
    entries = [
        dict(zip(("timestamp", "input_length", "output_length", "hash_ids"), line, strict=True)) for line in lines
    ]
    converted = from_mooncake(file("".join(json.dumps(entry) + "\n" for entry in entries), "m.jsonl"))

    assert converted.left_out == 1
    assert [unit.arrival_s for unit in converted.trace.units] == [0, 0.03, 0.04]
    assert [unit.calls[0].prefix_tokens for unit in converted.trace.units] == [0, 1024, 2048]


def test_blocks_follow_the_arrivals_that_replace_those_of_the_file(file):
    converted = from_vllm_bench(file(mooncake((9, 64, [1, 2]), (1, 64, [1, 2, 3])), "t.jsonl"), rate_per_s=1.0)

    assert [unit.calls[0].prefix_tokens for unit in converted.trace.units] == [0, 32]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_may_hold_what_other_programs_take_for_line_ends(tmp_path, end):
    entry = json.dumps({"prompt": "a\u2028b\u2029c\x85d", "prompt_len": 5, "output_tokens": 6}, ensure_ascii=False)
    path = tmp_path / "c.jsonl"
    path.write_bytes(f"{entry}{end}{end}{entry}{end}".encode())
    assert len(from_vllm_bench(path, rate_per_s=2.0).trace.units) == 2

    path.write_bytes(f"{entry}{end}{end}{entry[:-1]}{end}".encode())
    with pytest.raises(TraceError, match=r"c\.jsonl:3: not JSON"):
        from_vllm_bench(path, rate_per_s=2.0)


def test_a_vllm_result_with_details_is_a_trace(file):
    result = {
        "duration": 9.0,
        "input_lens": [10, 20, 30],
        "output_lens": [5, 0, 6],
        "start_times": [100.25, 100.5, 101.25],
        "errors": ["", "Timeout", ""],
    }
    converted = from_vllm_bench(file(json.dumps(result, indent=1), "r.json"))

    assert summary(converted) == [(0, 10, 5), (1, 30, 6)]
    assert converted.left_out == 1


def test_a_vllm_timed_trace_is_in_seconds_and_blocks_of_16(file):
    converted = from_vllm_bench(file(mooncake((1, 40, [1, 2, 3]), (2.5, 40, [1, 2, 4])), "t.jsonl"))

    assert summary(converted) == [(0, 40, 7), (1.5, 40, 7)]
    assert converted.trace.units[1].calls[0].prefix_tokens == 32


def test_a_custom_file_with_lengths_gets_poisson_arrivals(file):
    lines = "".join(json.dumps({"prompt": "x", "prompt_tokens": 9, "output_tokens": i + 1}) + "\n" for i in range(2000))
    path = file(lines, "c.jsonl")
    converted = from_vllm_bench(path, rate_per_s=4.0, seed=1)

    assert converted.trace.units[-1].arrival_s == pytest.approx(500, rel=0.1)
    assert [unit.output_tokens for unit in converted.trace.units] == list(range(1, 2001))
    assert from_vllm_bench(path, rate_per_s=4.0, seed=1) == converted
    assert from_vllm_bench(path, rate_per_s=4.0, seed=2) != converted


@pytest.mark.parametrize(
    ("source", "content", "problem"),
    [
        ("azure", "TIMESTAMP,ContextTokens\n", r":1: the header lacks GeneratedTokens"),
        ("azure", AZURE, "no request with an answer"),
        ("azure", AZURE + "yesterday,1,1\n", r":2: TIMESTAMP='yesterday': not a date and time"),
        ("azure", AZURE + "2024-05-10 00:00:00,-1,1\n", r":2: ContextTokens='-1'"),
        ("azure", AZURE + "2024-05-10 00:00:00,1,1.5\n", r":2: GeneratedTokens='1.5': not a plausible"),
        ("azure", AZURE + "2024-05-10 00:00:00,1\n", r":2: 2 fields under a header of 3"),
        ("azure", AZURE + "2024-05-10 00:00:00Z,1,1\n2024-05-10 00:00:00,1,1\n", r":3: TIMESTAMP=.*time zone"),
        ("burstgpt", BURST + "nan,GPT-4,1,1,2,API log\n", r":2: Timestamp='nan'"),
        ("burstgpt", BURST + "1,GPT-4,1,1,2,Converation log\n", r":2: Log Type='Converation log': expected Conver"),
        ("burstgpt", BURST + "1,GPT-4,1,0,1,API log\n", r"no request with an answer in this file \(1 without\)"),
        ("mooncake", '{"timestamp": 1}\n', ":1: this line has no input_length; it has timestamp"),
        ("mooncake", mooncake((0, 5, [1])) + "oops\n", ":2: not JSON"),
        ("mooncake", mooncake((0, 5, "ab"), (0, 5, [1])), ":1: hash_ids='ab': expected a list"),
        ("mooncake", mooncake((True, 5, [1])), ":1: timestamp=True: not a number"),
        ("mooncake", "3\n", ":1: expected a JSON object per line"),
        ("mooncake", "", "empty"),
        ("vllm-bench", '[{"conversations": []}]', "texts without token counts"),
        ("vllm-bench", '{"prompt": "x", "output_tokens": 3}', ":1: no lengths"),
        ("vllm-bench", '{"prompt_len": 4, "output_tokens": 3}', r":1: this file has no times .*--rate"),
        ("vllm-bench", '{"duration": 3, "completed": 4}', "--save-detailed"),
        ("vllm-bench", '{"input_lens": [1], "output_lens": [1]}', "--rate"),
        ("vllm-bench", '{"input_lens": [1], "output_lens": [1], "start_times": []}', "differ in length: 1, 1, 0"),
        ("vllm-bench", '{"input_lens": [1]}\n{"input_lens": [1]}', ":2: several results"),
        ("vllm-bench", '{"input_lens": [null], "output_lens": [1], "start_times": [0]}', r"input_lens\[0\]"),
    ],
)
def test_a_source_that_is_not_what_it_should_be_is_named(file, source, content, problem):
    with pytest.raises(TraceError, match=problem):
        CONVERTERS[source](file(content), None)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_makes_no_sense_is_refused(file, rate):
    with pytest.raises(TraceError, match="rate"):
        from_vllm_bench(file('{"prompt_len": 4, "output_tokens": 3}'), rate_per_s=rate)


def test_what_was_converted_can_be_written_and_read(file, tmp_path):
    converted = from_mooncake(file(mooncake((0, 1100, [0, 1, 2]), (500, 1700, [0, 1, 2, 3])), "m.jsonl"))
    write_trace(converted.trace, tmp_path / "m.csv.gz")

    assert read_trace(tmp_path / "m.csv.gz") == converted.trace
