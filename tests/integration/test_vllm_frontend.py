"""vLLM's real front end behind the HTTP edge, over an engine client that echoes prompts: no worker, no router.

The engine is not under test here, so it may be a fake; rendering, detokenising, SSE and every route are vLLM's own.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
import structlog

from deployments.http_edge import HttpEdge
from deployments.request_context import AdmissionVerdict, RequestFailure
from tempo_router.config import IngressConfig, TempoConfig
from tempo_router.errors import ConfigError, EngineVersionError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # Deprecations inside vLLM and what it imports are not ours to mend.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MODEL = "tempo-tiny"
QUEUE_FULL = AdmissionVerdict(is_admitted=False, reject_reason="queue_full", retry_after_s=2.3)
MESSAGES = [{"role": "user", "content": "hello"}]


class Front:
    """The edge, vLLM behind it, and the engine behind that."""

    def __init__(self, edge: HttpEdge, llm: Any, engine: Any) -> None:
        self.edge, self.llm, self.engine = edge, llm, engine
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(edge), base_url="http://test")

    async def post(self, path: str, fields: Any, **headers: str) -> httpx.Response:
        content = fields if isinstance(fields, bytes) else json.dumps({"model": MODEL, **fields}).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, content=content, headers={"content-type": "application/json", **named})

    def assert_nothing_is_left(self) -> None:
        processor = self.llm.output_processor
        assert self.edge.open_requests == 0
        assert self.llm.get_num_unfinished_requests() == 0
        assert (processor.external_req_ids, processor.parent_requests) == ({}, {})


@contextlib.asynccontextmanager
async def front_end(folder: Path, engine_kwargs: dict[str, Any], frontend_kwargs: dict[str, Any]) -> Any:
    from deployments import vllm_frontend
    from tests.echo_engine import EchoEngine
    from workers.default_model import ensure_default_model

    model = str(ensure_default_model(folder))
    config = vllm_frontend.build_engine_config(model, {"max_model_len": 512, **engine_kwargs}, MODEL)
    facts = SimpleNamespace(ready_response=b"", max_model_len=256, kv_blocks=64, block_size=16)
    vllm_frontend.apply_facts(config, facts)
    engine = EchoEngine()
    llm = vllm_frontend.make_async_llm(config, engine, {"disable_log_stats": True})
    app = await vllm_frontend.build_app(llm, model_name=MODEL, model_path=model, frontend_kwargs=frontend_kwargs)
    edge = HttpEdge(app, TempoConfig(ingress=IngressConfig(max_body_bytes=100_000)), not_ready_because=lambda: None)
    front = Front(edge, llm, engine)
    yield front
    await front.http.aclose()
    llm.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory) -> AsyncIterator[Front]:
    async with front_end(tmp_path_factory.mktemp("model"), {}, {}) as front:
        yield front


@pytest_asyncio.fixture(loop_scope="module")
async def front(served) -> AsyncIterator[Front]:
    served.engine.begin()
    yield served
    await until(lambda: served.llm.get_num_unfinished_requests() == 0)
    served.assert_nothing_is_left()


@pytest.fixture
def vllm_errors() -> Any:
    """What vLLM logs as an error meanwhile."""
    records: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    collector = Collector(level=logging.ERROR)
    logger = logging.getLogger("vllm")
    logger.addHandler(collector)
    yield records
    logger.removeHandler(collector)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - vLLM's own tables have no event; each turn lets its tasks run
            await asyncio.sleep(0)


def events(response: httpx.Response) -> list[str]:
    return response.text.removesuffix("\n\n").split("\n\n")


def data(event: str) -> Any:
    return json.loads(event.split("data: ", 1)[1])


async def test_a_completion_comes_back_whole_with_its_outcome(front):
    response = await front.post("/v1/completions", {"prompt": "hello world", "max_tokens": 5})
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "hello"
    assert response.json()["usage"]["completion_tokens"] == 5
    assert response.headers["x-tempo-class"] == "latency"
    assert response.headers["x-tempo-slo-met"] == "true"
    assert response.headers["x-tempo-output-tokens"] == "5"


async def test_a_chat_stream_is_vllms_own_but_for_one_comment(front):
    fields = {"messages": MESSAGES, "stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}}
    response = await front.post("/v1/chat/completions", {**fields, "slo": {"ttft_ms": 300}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-tempo-ttft-ms"] == "300"
    *chunks, comment, done = events(response)
    assert done == "data: [DONE]"
    assert json.loads(comment.removeprefix(": tempo "))["is_met"] is True
    assert data(chunks[0])["choices"][0]["delta"]["role"] == "assistant"
    assert data(chunks[-1])["usage"]["completion_tokens"] == 4
    assert all(chunk.startswith("data: ") for chunk in chunks)


async def test_openais_client_reads_the_stream(front):
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=front.http)
    stream = await client.completions.create(
        model=MODEL, prompt="hello world", max_tokens=5, stream=True, extra_body={"slo": {"tier": "interactive"}}
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello"


async def test_openais_client_sees_a_refusal_as_its_own_error(front):
    from openai import AsyncOpenAI, RateLimitError

    front.engine.verdict = QUEUE_FULL
    client = AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=front.http, max_retries=0)
    with pytest.raises(RateLimitError) as refused:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert refused.value.code == "queue_full"
    assert refused.value.response.headers["retry-after"] == "3"


async def test_siblings_are_announced_and_come_back_as_choices(front):
    response = await front.post("/v1/completions", {"prompt": "hello", "max_tokens": 3, "n": 2})
    assert [choice["text"] for choice in response.json()["choices"]] == ["hel", "hel"]
    (group,) = front.engine.groups
    assert group[1] == 2
    assert [request.request_id for request in front.engine.added] == [f"0_{group[0]}", f"1_{group[0]}"]
    assert response.headers["x-tempo-output-tokens"] == "6"


async def test_a_list_of_prompts_is_streamed(front):
    response = await front.post(
        "/v1/completions", {"prompt": ["abc", "defg"], "max_tokens": 9, "stream": True, "temperature": 0}
    )
    texts = {0: "", 1: ""}
    for event in events(response)[:-2]:
        for choice in data(event)["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "abc", 1: "defg"}
    assert json.loads(events(response)[-2].removeprefix(": tempo "))["output_tokens"] == 7


async def test_models_and_version_are_served(front):
    models = (await front.http.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == [MODEL]
    assert models["data"][0]["max_model_len"] == 256
    assert (await front.http.get("/health")).status_code == 200


async def test_service_tier_of_ours_works_and_is_echoed(front):
    chat = await front.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "service_tier": "tool"})
    assert (chat.status_code, chat.json()["service_tier"]) == (200, "tool")
    answer = await front.post("/v1/responses", {"input": "hi", "max_output_tokens": 2, "service_tier": "tool"})
    assert (answer.status_code, answer.json()["service_tier"]) == (200, "tool")
    stream = await front.post(
        "/v1/responses", {"input": "hi", "max_output_tokens": 2, "service_tier": "tool", "stream": True}
    )
    tiers = {data(event)["response"]["service_tier"] for event in events(stream)[:-1] if '"service_tier"' in event}
    assert tiers == {"tool"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"input": "hi", "max_output_tokens": 3}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}),
    ],
)
async def test_streams_without_done_end_with_the_comment(front, path, fields):
    response = await front.post(path, {**fields, "stream": True})
    assert response.status_code == 200
    assert events(response)[-1].startswith(": tempo {") or events(response)[-2].startswith(": tempo {")
    assert response.text.count(": tempo {") == 1


STREAMS = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "hello"}),
    ("/v1/completions", {"prompt": ["hello", "you"]}),
    ("/v1/completions", {"prompt": "hello", "n": 2}),
    ("/v1/responses", {"input": "hello"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}),
]


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize(("path", "fields"), STREAMS)
async def test_a_refused_request_gets_its_status_and_leaves_nothing(front, path, fields, is_streaming, vllm_errors):
    front.engine.verdict = QUEUE_FULL
    response = await front.post(path, {**fields, "stream": is_streaming})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert front.engine.added == []
    assert vllm_errors == []


@pytest.mark.parametrize(("path", "fields"), STREAMS[:1] + STREAMS[3:4])
async def test_a_client_that_leaves_while_it_waits_for_admission_leaves_nothing(front, path, fields):
    front.engine.verdict = None
    sent = await leave_when(front, path, {**fields, "stream": True})
    assert sent == []
    front.assert_nothing_is_left()


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize(("path", "fields"), STREAMS[:1] + STREAMS[3:])
async def test_a_client_that_leaves_midway_is_aborted_in_the_engine(front, path, fields, is_streaming):
    front.engine.pause_after = 2
    await leave_when(front, path, {**fields, "stream": is_streaming})
    await until(lambda: set(front.engine.aborted) >= {request.request_id for request in front.engine.added})
    assert set(front.engine.client_aborted) >= {request.request_id for request in front.engine.added}
    assert front.engine.added != []


async def leave_when(front: Front, path: str, fields: dict[str, Any]) -> list[Any]:
    """Send a request, and disconnect when the engine stands still. Returns what was sent until then."""
    sent: list[Any] = []
    body = json.dumps({"model": MODEL, **fields}).encode()
    is_body_given = False

    async def receive():
        nonlocal is_body_given
        if not is_body_given:
            is_body_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await front.engine.waiting.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("test", 1),
        "server": ("test", 80),
    }
    async with asyncio.timeout(10):
        await front.edge(scope, receive, send)
    return sent


async def test_a_stop_string_is_no_wish_of_the_client(front):
    front.engine.pause_after = 7
    response = await front.post("/v1/completions", {"prompt": "hello world", "max_tokens": 11, "stop": [" "]})
    assert response.json()["choices"][0]["text"] == "hello"
    assert len(front.engine.aborted) == 1
    assert front.engine.client_aborted == []


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_failure_says_why(front, is_streaming):
    front.engine.failure = RequestFailure("worker_lost", "the worker was lost", 503)
    response = await front.post("/v1/chat/completions", {"messages": MESSAGES, "stream": is_streaming})
    if is_streaming:
        error, comment, done = events(response)[-3:]
        assert (data(error)["error"]["code"], done) == ("worker_lost", "data: [DONE]")
        assert json.loads(comment.removeprefix(": tempo "))["is_met"] is False
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")


async def test_a_failure_in_a_stream_of_anthropics_is_told_in_its_words(front, vllm_errors):
    """vLLM's converter knows no error events: it tells the client what pydantic says of them, with a traceback."""
    front.engine.failure = RequestFailure("program_cancelled", "the program was cancelled", 409)
    response = await front.post("/v1/messages", {"messages": MESSAGES, "max_tokens": 3, "stream": True})
    error, comment = events(response)[-2:]
    assert error.startswith("event: error\n")
    assert data(error) == {"type": "error", "error": {"type": "api_error", "message": "the program was cancelled"}}
    assert json.loads(comment.removeprefix(": tempo "))["is_met"] is False
    assert [error for error in vllm_errors if "converter" in error] == []


@pytest.mark.parametrize(
    ("path", "fields", "status", "words"),
    [
        ("/v1/chat/completions", b"{", 400, "not valid"),
        ("/v1/chat/completions", b'{"model": "tempo-tiny", "messages": "\xff"}', 400, "not valid"),
        ("/v1/chat/completions", {"messages": []}, 400, "empty conversation"),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "nope"}, 404, "nope"),
        ("/v1/chat/completions", {"messages": MESSAGES, "service_tier": "gold"}, 400, "service_tier='gold'"),
        ("/v1/chat/completions", {"messages": MESSAGES, "slo": {"ttft_ms": 300}}, 400, "slo.ttft_ms=300"),
        ("/v1/chat/completions", {"messages": MESSAGES, "slo": {"ttlt_ms": -1}}, 400, "slo.ttlt_ms=-1"),
        ("/v1/chat/completions", {"messages": MESSAGES, "slo": {"tltt_ms": 1}}, 400, "did you mean 'ttlt_ms'"),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x" * 300}, 400, "256"),
        ("/v1/completions", {"prompt": [1000000]}, 400, "1000000"),
        ("/v1/completions", {"prompt": [[]]}, 400, "empty"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0, "stream": True}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "slo": {"deadline": 5}}, 400, "slo.deadline=5"),
        ("/v1/completions", {"prompt": "x" * 100_000}, 413, "100000 bytes"),
        ("/v1/responses", {"input": "x", "slo": {"ttft_ms": 1, "ttlt_ms": 1}, "stream": True}, 400, "slo.ttft_ms"),
    ],
)
@pytest.mark.parametrize("is_streaming", [True, False])
async def test_bad_input_gets_4xx_in_openais_shape_and_never_reaches_the_engine(
    front, path, fields, status, words, is_streaming
):
    if isinstance(fields, dict) and "ttft_ms" not in str(fields):
        fields = {"stream": is_streaming, **fields}
    response = await front.post(path, fields)
    assert response.status_code == status
    assert {"message", "type", "param", "code"} <= set(response.json()["error"])
    assert words in response.json()["error"]["message"]
    assert front.engine.added == []


async def test_unknown_arguments_are_refused_with_the_nearest_one(front):
    from deployments import vllm_frontend

    with pytest.raises(ConfigError, match=r"max_modle_len.*did you mean 'max_model_len'"):
        vllm_frontend.build_engine_config("x", {"max_modle_len": 5}, MODEL)
    with pytest.raises(ConfigError, match="set 'served_model_name'"):
        vllm_frontend.build_engine_config("x", {"served_model_name": "y"}, MODEL)
    with pytest.raises(ConfigError, match="no-such-model"):
        vllm_frontend.build_engine_config("/no-such-model", {}, MODEL)
    for kwargs, words in (
        ({"chat_tempalte": "x"}, "did you mean 'chat_template'"),
        ({"port": 80}, "Ray Serve owns"),
        ({"enable_auto_tool_choice": True}, "tool-call-parser"),
        ({"response_role": ["x"]}, "response_role"),
    ):
        with pytest.raises(ConfigError, match=words):
            await vllm_frontend.build_app(front.llm, model_name=MODEL, model_path="x", frontend_kwargs=kwargs)


async def test_another_version_of_vllm_in_which_all_names_fit_is_used_aloud():
    from deployments import vllm_frontend

    with structlog.testing.capture_logs() as logs:
        vllm_frontend.check_vllm()
        vllm_frontend.check_vllm("0.32.0+cpu")
        assert logs == []
        vllm_frontend.check_vllm("0.33.0")
    assert [(entry["log_level"], entry["event"], entry["vllm"]) for entry in logs] == [
        ("warning", "vllm_untested", "0.33.0")
    ]


async def test_a_private_name_that_is_gone_is_named(monkeypatch):
    from deployments import vllm_frontend

    monkeypatch.delattr(vllm_frontend.AsyncLLM, "_add_request")
    monkeypatch.setattr(vllm_frontend.AsyncMPClient, "abort_requests_async", lambda self, names: None)
    with pytest.raises(EngineVersionError, match=r"AsyncLLM\._add_request.*AsyncMPClient\.abort_requests_async"):
        vllm_frontend.check_vllm()


async def test_a_method_that_only_newer_versions_have_may_be_missing_but_not_differ(monkeypatch):
    from deployments import vllm_frontend

    client = vllm_frontend.AsyncMPClient
    monkeypatch.setattr(client, "call_utility_all_async", lambda self: None, raising=False)
    with pytest.raises(EngineVersionError, match=r"AsyncMPClient\.call_utility_all_async"):
        vllm_frontend.check_vllm()
    monkeypatch.delattr(client, "call_utility_all_async")
    vllm_frontend.check_vllm()


async def test_the_facts_of_a_real_engine_are_copied(served):
    import msgspec
    from vllm.config import CacheConfig
    from vllm.v1.engine import EngineCoreReadyResponse

    from deployments import vllm_frontend

    ready = EngineCoreReadyResponse(
        **dict.fromkeys(("world_size", "data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"), 1),
        **dict.fromkeys(("decode_context_parallel_size", "max_num_seqs", "max_num_batched_tokens", "max_loras"), 1),
        max_model_len=128,
        num_gpu_blocks=7,
        block_size=32,
        dp_stats_address=None,
        dtype="float32",
        vllm_version=vllm_frontend.VLLM_VERSION,
        data_parallel_rank=0,
        instance_id="x",
        supports_lora=False,
        kv_cache_size_tokens=224,
    )
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=256), cache_config=CacheConfig())
    facts = SimpleNamespace(ready_response=msgspec.msgpack.encode(ready), max_model_len=128, kv_blocks=7, block_size=32)
    vllm_frontend.apply_facts(config, facts)
    cache = config.cache_config
    assert (config.model_config.max_model_len, cache.num_gpu_blocks, cache.block_size) == (128, 7, 32)
    assert cache.kv_cache_size_tokens == 224


async def test_the_name_of_a_lora_adapter_as_model_reaches_the_engine(tmp_path):
    modules = [{"name": f"tuned-{number}", "path": f"/adapters/{number}"} for number in (1, 2)]
    async with front_end(tmp_path, {"enable_lora": True}, {"lora_modules": modules}) as front:
        listed = await front.http.get("/v1/models")
        for model in ("tuned-2", MODEL):
            response = await front.post("/v1/completions", {"model": model, "prompt": "hello", "max_tokens": 3})
            assert (response.status_code, response.json()["model"]) == (200, model)
        tuned, plain = (request.lora_request for request in front.engine.added)
    assert [one["id"] for one in listed.json()["data"]] == [MODEL, "tuned-1", "tuned-2"]
    assert [one.lora_name for one in front.engine.loras] == ["tuned-1", "tuned-2"]
    assert (tuned.lora_name, tuned.lora_int_id, tuned.lora_path) == ("tuned-2", 2, "/adapters/2")
    assert plain is None


async def test_keys_are_those_that_vllm_asks_for(tmp_path, monkeypatch):
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

    from deployments import vllm_frontend
    from deployments.api_keys import GUARDED_PREFIXES

    assert set(GUARDED_PREFIX) <= set(GUARDED_PREFIXES)
    assert vllm_frontend.api_keys({}) == ()
    monkeypatch.setenv("VLLM_API_KEY", "environment")
    assert vllm_frontend.api_keys({}) == ("environment",)
    assert vllm_frontend.api_keys({"api_key": ["one", "two"]}) == ("one", "two")
    async with front_end(tmp_path, {}, {"api_key": ["one", "two"]}) as front:
        for headers, status in (({}, 401), ({"authorization": "Bearer two"}, 200)):
            response = await front.post("/v1/completions", {"prompt": "hello", "max_tokens": 3}, **headers)
            assert response.status_code == status
