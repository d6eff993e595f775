"""What OpenAI's own client can do with the served application."""

import json
from typing import Any

import httpx
import openai
import pytest

from tests.served import Served

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]
MODEL = "tempo-tiny"
HELLO: list[Any] = [{"role": "user", "content": "Say something"}]


async def test_a_chat_streams_with_usage_and_meets_its_slo(client: openai.AsyncOpenAI, server: Served) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=20,
        extra_body={"slo": {"ttft_ms": 20_000, "tbt_ms": 2000}, "ignore_eos": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert chunks[-2].choices[0].finish_reason == "length"


async def test_the_stream_is_exact_sse_and_ends_with_what_became_of_the_slo(server: Served) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True, "max_tokens": 5, "service_tier": "chat"}
    async with httpx.AsyncClient(timeout=60) as http:
        response = await http.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["x-tempo-class"], response.headers["x-tempo-tier"]) == ("latency", "chat")
    assert response.headers["x-tempo-ttft-ms"] == "2000"
    events = response.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert events[-3].startswith(": tempo ")
    outcome = json.loads(events[-3].removeprefix(": tempo "))
    assert outcome["class"] == "latency"
    assert outcome["output_tokens"] <= 5
    assert outcome["is_met"] in (True, False)
    for event in events[:-3]:
        json.loads(event.removeprefix("data: "))


async def test_metrics_tell_what_became_of_requests(server: Served) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 5, "ignore_eos": True, "slo": {"ttlt_ms": 60_000}}
    ended = 'tempo_requests_total{slo_class="deadline",target="met"}'
    async with httpx.AsyncClient(timeout=60, base_url=server.url) as http:

        async def count() -> float:
            lines = (await http.get("/metrics")).text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(ended))

        before = await count()
        assert (await http.post("/v1/chat/completions", json=body)).headers["x-tempo-slo-met"] == "true"
        assert await count() == before + 1


async def test_a_forced_tool_call_has_valid_arguments(client: openai.AsyncOpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=200,
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters, "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


async def test_an_answer_follows_a_json_schema(client: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "choice", "schema": schema, "strict": True}},
    )
    document = json.loads(answer.choices[0].message.content or "")
    assert document["colour"] in ("red", "blue")
    assert isinstance(document["sure"], bool)


async def test_two_choices_with_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        n=2,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
        temperature=1,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 8
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_completions_take_a_list_of_prompts_and_stop_strings(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["One", "Two", "Three"], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    stopped = await client.completions.create(model=MODEL, prompt="x", max_tokens=500, stop=["a"], temperature=1)
    assert "a" not in stopped.choices[0].text


async def test_the_responses_api_answers_and_streams(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model=MODEL, input="Hello", max_output_tokens=10)
    assert answer.usage is not None
    assert answer.usage.output_tokens <= 10
    kinds = [event.type async for event in await client.responses.create(model=MODEL, input="Hello", stream=True)]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


async def test_a_long_prompt_is_served_through_the_fetch_path(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="word " * 600, max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 2000


async def test_models_lists_the_served_model(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]


async def test_embeddings_of_a_generating_model_are_an_honest_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        await client.embeddings.create(model=MODEL, input="Hello")
    assert raised.value.status_code in (400, 404)


@pytest.mark.parametrize(
    ("change", "headers", "status", "mentions"),
    [
        ({"slo": {"ttlt_ms": -1}}, {}, 400, "slo.ttlt_ms"),
        ({"slo": {"ttlt_ms": 0}}, {}, 400, "slo.ttlt_ms"),
        ({"slo": {"ttft_ms": 100}}, {}, 400, "slo.ttft_ms"),
        ({"slo": {"ttlt_sm": 100}}, {}, 400, "ttlt_ms"),
        ({"slo": {"tier": "platinum"}}, {}, 400, "platinum"),
        ({"service_tier": "platinum"}, {}, 400, "platinum"),
        ({"slo": {"ttlt_ms": 1e18}}, {}, 400, "slo.ttlt_ms"),
        ({"slo": {"deadline": 1}}, {}, 400, "slo.deadline"),
        ({"stream": True, "slo": {"ttlt_ms": 500}}, {"x-slo-ttft-ms": "100"}, 400, "x-slo-ttft-ms"),
        ({}, {"x-slo-ttlt-ms": "soon"}, 400, "soon"),
        ({}, {"x-slo-ttlt-ms": "nan"}, 400, "nan"),
        ({"model": "nobody"}, {}, 404, "nobody"),
        ({"prompt": "word " * 5000}, {}, 400, "4096"),
        ({"max_tokens": -3}, {}, 400, "max_tokens"),
    ],
)
async def test_bad_input_gets_an_error_in_openai_shape(
    server: Served, change: dict[str, Any], headers: dict[str, str], status: int, mentions: str
) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3, **change}
    async with httpx.AsyncClient(timeout=60) as http:
        response = await http.post(f"{server.url}/v1/completions", json=body, headers=headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert mentions in error["message"]
    assert error["type"]
    assert "code" in error
    assert "param" in error


async def test_malformed_and_oversized_bodies_are_refused(server: Served) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        broken = await http.post(f"{server.url}/v1/completions", content=b'{"model": ')
        assert broken.status_code == 400
        assert "error" in broken.json()
        huge = await http.post(f"{server.url}/v1/completions", content=b'{"prompt":"' + b"x" * 10_000_000 + b'"}')
        assert huge.status_code == 413
        assert "error" in huge.json()


async def test_a_header_cannot_be_smuggled_into_the_response(server: Served) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        response = await http.post(
            f"{server.url}/v1/completions",
            json={"model": MODEL, "prompt": "x", "max_tokens": 1},
            headers={"x-slo-tier": "chat%0d%0aset-cookie: a=b"},
        )
    assert response.status_code == 400
    assert "set-cookie" not in response.headers


async def test_a_programs_moved_deadline_reaches_the_engine_that_runs_its_call(server: Served) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        program = (await http.post("/v1/programs", json={"deadline_s": 300, "app": "moved"})).json()["id"]
        headers = {"x-tempo-program": program, "x-tempo-call": "moved"}
        async with http.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
            lines = stream.aiter_lines()
            while not (await anext(lines)).startswith("data: {"):
                pass
            extended = await http.post(f"/v1/programs/{program}/extend", json={"deadline_s": 200})
            assert extended.status_code == 200, extended.text
            [record] = (await http.get("/v1/requests/moved/explain")).json()["requests"]
        await http.post(f"/v1/programs/{program}/cancel")
    assert [one["what"] for one in record["decisions"]] == ["arrived", "queued", "dispatched", "retargeted", "redated"]
