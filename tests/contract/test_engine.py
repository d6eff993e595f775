"""What every engine promises. One suite, run on both: what holds for the simulated one holds for vLLM."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio

from tempo_router.config import EngineConfig, SchedulingConfig
from tempo_router.errors import ConfigError, EngineStartError, EngineVersionError, TempoError
from tempo_router.request import Deadline, DispatchId, GroupId, RequestId, RequestSpec
from tempo_router.standing import Standing
from workers.call_facts import CallFacts
from workers.default_model import EOS_ID, ensure_default_model
from workers.engine import ClientOutputs, Engine, EngineCall, EngineStep
from workers.simulated_engine import start_simulated_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_RUNNING = 4
MAX_STEP_TOKENS = 64
# Room for less than two of the longest sequences, so that four running ones drive each other out.
ENGINE_KWARGS = {
    "max_num_seqs": MAX_RUNNING,
    "max_num_batched_tokens": MAX_STEP_TOKENS,
    "max_model_len": 1024,
    "block_size": 32,
    "num_gpu_blocks_override": 49,
}

# vLLM and torch warn about themselves at import and in use; nothing there is ours to mend.
VLLM, PLANNED = (
    pytest.param(kind, marks=[pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]) for kind in ("vllm", "planned")
)
only_vllm = pytest.mark.parametrize("shared_rig", [VLLM, PLANNED], indirect=True, scope="module")


class Listener:
    """Keeps the steps and lets a test wait for what it expects of them."""

    def __init__(self) -> None:
        self.steps: list[EngineStep] = []
        self.deaths: list[str] = []
        self._changed = asyncio.Event()

    def on_step(self, step: EngineStep) -> None:
        self.steps.append(step)
        self._changed.set()

    def on_death(self, reason: str) -> None:
        self.deaths.append(reason)
        self._changed.set()

    async def until(self, holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def tokens(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for step in self.steps:
            for request_id, tokens in step.tokens:
                counts[request_id] += tokens
        return counts

    def finished(self) -> list[tuple[str, str]]:
        return [(end.request_id, end.reason) for step in self.steps for end in step.finished]

    def outputs(self) -> dict[str, list[ClientOutputs]]:
        by_client: defaultdict[str, list[ClientOutputs]] = defaultdict(list)
        for step in self.steps:
            for client, outputs in step.outputs.items():
                by_client[client].append(outputs)
        return by_client


class Rig:
    """One engine and what differs between the kinds: simulated, vLLM, and vLLM whose steps Tempo plans."""

    def __init__(self, kind: str, engine: Engine, listener: Listener) -> None:
        self.kind = kind
        self.engine = engine
        self.listener = listener
        self._numbers = itertools.count()
        self._keys = itertools.count(1)
        self._rng = random.Random(5)

    def new_id(self) -> str:
        return f"request-{next(self._numbers)}"

    def call(
        self,
        max_tokens: int,
        *,
        request_id: str | None = None,
        client: str = "ingress-a",
        priority: int = 0,
        prompt_tokens: int = 20,
        **sampling: Any,
    ) -> EngineCall:
        """By default an answer of exactly max_tokens."""
        request_id = request_id or self.new_id()
        prompt = [self._rng.randrange(97, 123) for _ in range(prompt_tokens)]
        sampling = {"ignore_eos": True, **sampling}
        if self.kind == "simulated":
            payload = (msgspec.msgpack.encode([request_id, prompt, None, sampling, None]),)
        else:
            from tests.vllm_payload import encode_request

            payload = encode_request(request_id, prompt, max_tokens=max_tokens, **sampling)
        facts = self.facts(request_id, priority, prompt_tokens, max_tokens) if self.kind == "planned" else None
        return EngineCall(request_id, client, priority, payload, prompt_tokens, max_tokens, facts)

    def facts(self, request_id: str, priority: int, prompt_tokens: int, max_tokens: int) -> CallFacts:
        """What a planner orders by in place of the priority: the lower it is, the nearer is the deadline."""
        spec = RequestSpec(
            request_id=RequestId(request_id),
            arrival_s=time.monotonic(),
            slo=Deadline(1000.0 + 10 * priority),
            prompt_tokens=prompt_tokens,
            max_output_tokens=max_tokens,
            group_id=GroupId(request_id),
        )
        return CallFacts(DispatchId(next(self._keys)), spec, standing=Standing(1.0, is_admitted=True))

    def submit(self, max_tokens: int, **options: Any) -> str:
        call = self.call(max_tokens, **options)
        self.engine.submit(call)
        return call.request_id

    def read(self, outputs: Iterable[ClientOutputs]) -> list[tuple[str, list[int], str | None]]:
        """(request, token ids, finish reason) of everything in these."""
        if self.kind == "simulated":
            return [
                (delta.request_id, list(delta.token_ids), delta.finish_reason)
                for each in outputs
                for delta in each.deltas
            ]
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder

        decoder = MsgpackDecoder(EngineCoreOutputs)
        decoded = [decoder.decode(list(each.buffers)).outputs for each in outputs]
        return [
            (output.request_id, output.new_token_ids, str(output.finish_reason) if output.finished else None)
            for output in itertools.chain.from_iterable(decoded)
        ]

    async def until_empty(self) -> None:
        """No request, no slot, no block in use, and the engine has said so."""
        facts = self.engine.facts
        await self.listener.until(lambda: not self.engine.live_requests())

        def is_free() -> bool:
            load = self.listener.steps[-1].load
            return (load.running, load.waiting, load.free_kv_tokens) == (0, 0, facts.kv_tokens)

        await self.listener.until(is_free)


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["simulated", VLLM, PLANNED])
async def shared_rig(request, tmp_path_factory) -> AsyncIterator[Rig]:
    listener = Listener()
    engine: Engine
    if request.param == "simulated":
        config = EngineConfig(kind="simulated", profile="toy-cpu", time_scale=0.2, engine_kwargs=ENGINE_KWARGS)
        engine = await start_simulated_engine(config, on_step=listener.on_step, on_death=listener.on_death)
    else:
        from workers.vllm_engine import start_vllm_engine

        model = ensure_default_model(tmp_path_factory.mktemp("data"))
        engine = await start_vllm_engine(
            str(model),
            ENGINE_KWARGS,
            on_step=listener.on_step,
            on_death=listener.on_death,
            scheduling=SchedulingConfig(policy="edf_preemptive") if request.param == "planned" else None,
        )
    yield Rig(request.param, engine, listener)
    await engine.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared_rig: Rig) -> AsyncIterator[Rig]:
    """The shared engine, with its past forgotten."""
    assert shared_rig.engine.live_requests() == ()
    # A step may still run for requests that the test before aborted; it has ended when this one has.
    shared_rig.submit(1)
    await shared_rig.until_empty()
    shared_rig.listener.steps.clear()
    yield shared_rig
    assert shared_rig.listener.deaths == []


async def test_facts_say_what_the_engine_was_started_with(rig):
    facts = rig.engine.facts
    assert facts.engine == ("simulated" if rig.kind == "simulated" else "vllm")
    assert facts.has_step_planner == (rig.kind == "planned")
    assert (facts.max_running, facts.max_step_tokens, facts.max_model_len) == (MAX_RUNNING, MAX_STEP_TOKENS, 1024)
    assert facts.block_size == 32
    assert 1024 <= facts.kv_tokens <= facts.kv_blocks * facts.block_size
    assert "generate" in facts.supported_tasks
    assert bool(facts.ready_response) == (rig.kind != "simulated")


async def test_every_request_gets_exactly_the_tokens_it_may_have(rig):
    """And the counts, the finishes and the outputs tell the same story."""
    wanted = {rig.submit(max_tokens): max_tokens for max_tokens in (1, 2, 7, 30, 64, 5)}
    await rig.until_empty()

    assert rig.listener.tokens() == wanted
    assert sorted(rig.listener.finished()) == sorted((request_id, "completed") for request_id in wanted)
    outputs = rig.read(rig.listener.outputs()["ingress-a"])
    assert (
        Counter({request_id: sum(len(ids) for r, ids, _ in outputs if r == request_id) for request_id in wanted})
        == wanted
    )
    assert Counter((r, reason) for r, _, reason in outputs if reason) == Counter((r, "length") for r in wanted)


async def test_answers_end_by_themselves_too(rig):
    """Lengths vary around the 150 tokens that the default model and the simulated engine were made for."""
    wanted = [rig.submit(900, ignore_eos=False, temperature=1.0) for _ in range(32)]
    await rig.until_empty()

    lengths = rig.listener.tokens()
    assert 70 <= sum(lengths.values()) / len(wanted) <= 260
    assert len(set(lengths.values())) > 16
    outputs = rig.read(rig.listener.outputs()["ingress-a"])
    ends = {r: (ids[-1], reason) for r, ids, reason in outputs if reason}
    assert sum(reason == "stop" for _, reason in ends.values()) >= 28
    assert all(token == EOS_ID for token, reason in ends.values() if reason == "stop")


async def test_answers_are_text_that_people_can_read(rig):
    rig.submit(300)
    await rig.until_empty()
    ids = [
        token for _, tokens, _ in rig.read(rig.listener.outputs()["ingress-a"]) for token in tokens if token != EOS_ID
    ]
    text = bytes(ids).decode("ascii")
    assert text.isprintable() or set(text) - set("\n") <= {c for c in text if c.isprintable()}


async def test_outputs_go_to_the_client_that_asked(rig):
    clients = {rig.submit(10, client=client): client for client in ("ingress-a", "ingress-b", "ingress-a", "ingress-c")}
    await rig.until_empty()

    by_client = rig.listener.outputs()
    assert set(by_client) == {"ingress-a", "ingress-b", "ingress-c"}
    for client, outputs in by_client.items():
        assert {request_id for request_id, _, _ in rig.read(outputs)} == {r for r, c in clients.items() if c == client}
    together = [step for step in rig.listener.steps if len(step.outputs) == 3]
    assert together, "requests of several clients share steps"


async def test_an_aborted_request_is_reported_once_and_leaves_nothing(rig):
    aborted, other = rig.submit(900), rig.submit(40)
    await rig.listener.until(lambda: rig.listener.tokens()[aborted] >= 3)
    rig.engine.abort([aborted])
    rig.engine.abort([aborted])
    await rig.until_empty()

    assert sorted(rig.listener.finished()) == sorted([(aborted, "cancelled"), (other, "completed")])
    assert rig.listener.tokens()[aborted] < 900
    assert rig.listener.tokens()[other] == 40


async def test_the_client_of_an_aborted_request_gets_no_output_for_it(rig):
    """Whoever aborts knows; a late output could hit what the client did next."""
    aborted = rig.submit(900)
    await rig.listener.until(lambda: rig.listener.tokens()[aborted] >= 1)
    rig.engine.abort([aborted])
    await rig.until_empty()
    assert all(reason is None for _, _, reason in rig.read(rig.listener.outputs()["ingress-a"]))


async def test_a_request_may_be_aborted_before_it_runs(rig):
    """Right behind its submission, and while it waits for a slot."""
    running = [rig.submit(900) for _ in range(MAX_RUNNING)]
    waiting = rig.submit(900)
    await rig.listener.until(lambda: all(rig.listener.tokens()[r] for r in running))
    fresh = rig.submit(900)
    rig.engine.abort([waiting, fresh])
    await rig.listener.until(lambda: len(rig.listener.finished()) == 2)
    assert sorted(rig.listener.finished()) == sorted([(waiting, "cancelled"), (fresh, "cancelled")])
    assert not {waiting, fresh} & set(rig.listener.tokens())

    rig.engine.abort(running)
    await rig.until_empty()
    assert sorted(rig.listener.finished()) == sorted((r, "cancelled") for r in (*running, waiting, fresh))


async def test_unknown_and_finished_ids_may_be_aborted(rig):
    done = rig.submit(2)
    await rig.until_empty()
    rig.engine.abort(["nobody", done])
    later = rig.submit(2)
    await rig.until_empty()
    assert rig.listener.finished() == [(done, "completed"), (later, "completed")]


async def test_a_second_request_with_a_live_id_is_an_error_of_that_one_alone(rig):
    first = rig.submit(40, client="ingress-a")
    rig.submit(40, client="ingress-b", request_id=first)
    await rig.listener.until(lambda: rig.listener.finished() == [(first, "error")])
    assert rig.engine.live_requests() == (first,)
    await rig.until_empty()

    assert rig.listener.finished() == [(first, "error"), (first, "completed")]
    assert rig.listener.tokens() == {first: 40}
    outputs = rig.listener.outputs()
    assert rig.read(outputs["ingress-b"]) == [(first, [], "error")]
    assert [reason for _, _, reason in rig.read(outputs["ingress-a"]) if reason] == ["length"]


async def test_an_unreadable_request_is_an_error_of_that_one_alone(rig):
    good = rig.submit(20)
    bad = EngineCall(rig.new_id(), "ingress-b", 0, (b"\xc1 no msgpack",), 5, 5)
    mixed_up = rig.call(5, client="ingress-b")
    rig.engine.submit(bad)
    rig.engine.submit(EngineCall("somebody-else", "ingress-b", 0, mixed_up.payload, 20, 5))
    await rig.until_empty()

    expected = [(good, "completed"), (bad.request_id, "error"), ("somebody-else", "error")]
    assert sorted(rig.listener.finished()) == sorted(expected)
    assert {r: reason for r, _, reason in rig.read(rig.listener.outputs()["ingress-b"])} == {
        bad.request_id: "error",
        "somebody-else": "error",
    }


async def test_lower_priority_numbers_run_first(rig):
    """All slots are taken; one is given up, and those who wait pass through it one by one."""
    blockers = [rig.submit(900, priority=-10) for _ in range(MAX_RUNNING)]
    await rig.listener.until(lambda: all(rig.listener.tokens()[r] for r in blockers))
    waiting = {priority: rig.submit(4, priority=priority) for priority in (5, 3, 9, 1, 7)}
    await rig.listener.until(lambda: rig.listener.steps[-1].load.waiting == len(waiting))
    rig.engine.abort(blockers[:1])
    await rig.listener.until(lambda: all((r, "completed") in rig.listener.finished() for r in waiting.values()))
    rig.engine.abort(blockers)
    await rig.until_empty()

    ended = [r for r, reason in rig.listener.finished() if reason == "completed"]
    assert ended == [waiting[priority] for priority in sorted(waiting)]


async def test_step_reports_add_up(rig):
    """Every prompt token is computed once, every token but the first of each answer is a decode."""
    prompts = [3, 50, 200, 31]
    answers = [12, 5, 9, 1]
    for prompt_tokens, max_tokens in zip(prompts, answers, strict=True):
        rig.submit(max_tokens, prompt_tokens=prompt_tokens)
    await rig.until_empty()

    reports = [step.step for step in rig.listener.steps if step.step is not None]
    assert sum(report.prefill_tokens for report in reports) == sum(prompts)
    assert sum(report.decodes for report in reports) == sum(answers) - len(answers)
    assert all(report.prefill_tokens + report.decodes <= MAX_STEP_TOKENS for report in reports)
    assert all(0 < report.duration_s < 5 for report in reports)
    # The decode that yields token i + 1 of an answer has prompt + i tokens in its context.
    contexts = sum(p + i for p, n in zip(prompts, answers, strict=True) for i in range(1, n))
    assert sum(report.context_tokens for report in reports) == contexts
    # However a prompt is cut, its pieces attend to half its square.
    assert sum(report.attention_tokens for report in reports) == sum(p * p / 2 for p in prompts)


async def test_load_says_who_runs_and_who_waits(rig):
    requests = [rig.submit(900) for _ in range(MAX_RUNNING + 2)]
    await rig.listener.until(lambda: len(rig.listener.tokens()) == MAX_RUNNING)
    load = rig.listener.steps[-1].load
    assert (load.running, load.waiting) == (MAX_RUNNING, 2)
    assert load.free_kv_tokens < rig.engine.facts.kv_tokens
    assert sorted(rig.engine.live_requests()) == sorted(requests)
    rig.engine.abort(requests)
    await rig.until_empty()


async def test_when_the_cache_is_full_someone_yields_and_nobody_loses_a_token(rig):
    requests = [rig.submit(600, priority=n) for n in range(MAX_RUNNING)]
    await rig.until_empty()

    assert rig.listener.steps[-1].load.preemptions > 0
    preempted = [request_id for step in rig.listener.steps for request_id in step.preempted]
    assert len(preempted) == rig.listener.steps[-1].load.preemptions
    assert set(preempted) <= set(requests[1:])
    assert rig.listener.tokens() == dict.fromkeys(requests, 600)
    first_to_end = rig.listener.finished()[0][0]
    assert first_to_end == requests[0], "the best priority is never the one that yields"


async def test_administrative_calls_are_answered_in_the_codec_of_vllm(rig):
    (answer,) = await rig.engine.call_utility(msgspec.msgpack.encode(("reset_prefix_cache", [])))
    _, failure, (_, result) = msgspec.msgpack.decode(answer)
    assert (failure, result) == (None, True)


@pytest.mark.parametrize("call", [b"\xc1", msgspec.msgpack.encode(("no_such_method", [])), msgspec.msgpack.encode(7)])
async def test_a_failing_administrative_call_fails_alone(rig, call):
    with pytest.raises(TempoError):
        await rig.engine.call_utility(call)
    done = rig.submit(2)
    await rig.until_empty()
    assert rig.listener.finished() == [(done, "completed")]


async def test_a_name_with_an_underscore_is_not_an_administrative_call(rig):
    with pytest.raises(TempoError, match="_handle_shutdown"):
        await rig.engine.call_utility(msgspec.msgpack.encode(("_handle_shutdown", [])))


@only_vllm
async def test_a_json_schema_is_kept(rig):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    # Seeded: what the grammar leaves open (white space) could otherwise fill the budget once in many runs.
    requests = [
        rig.submit(800, ignore_eos=False, json_schema=schema, temperature=1.0, seed=number) for number in range(8)
    ]
    await rig.until_empty()
    outputs = rig.read(rig.listener.outputs()["ingress-a"])
    for request_id in requests:
        text = bytes(t for r, ids, _ in outputs if r == request_id for t in ids if t != EOS_ID).decode()
        assert set(json.loads(text)) == {"city", "days"}


@only_vllm
async def test_a_seeded_answer_to_a_long_prompt_is_the_same_twice(rig):
    """Its prompt takes several steps, after each of which vLLM sets the random state back."""
    answers = []
    for _ in range(2):
        rig._rng = random.Random(7)
        request_id = rig.submit(12, prompt_tokens=200, seed=3, temperature=1.0)
        await rig.until_empty()
        outputs = rig.read(rig.listener.outputs()["ingress-a"])
        answers.append([token for name, ids, _ in outputs if name == request_id for token in ids])
    assert len(answers[0]) == 12
    assert answers[0] == answers[1]


@only_vllm
async def test_a_repeated_prompt_hits_the_prefix_cache(rig):
    loads = []
    for _ in range(2):
        # The same text for both: prompts are drawn from the rig's generator.
        rig._rng = random.Random(99)
        rig.submit(2, prompt_tokens=200)
        await rig.until_empty()
        loads.append(rig.listener.steps[-1].load)
    before, after = loads
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == 192
    assert after.prefix_query_tokens - before.prefix_query_tokens == 200


@only_vllm
async def test_the_codec_is_understood_without_vllm_too(rig):
    from tests.vllm_payload import encode_request
    from workers.simulated_engine import _Request

    payload = encode_request("x", range(50), max_tokens=9, ignore_eos=True, min_tokens=4)
    request = msgspec.msgpack.decode(payload[0], type=_Request)
    assert request.request_id == "x"
    assert (request.sampling_params.ignore_eos, request.sampling_params.min_tokens) == (True, 4)


async def test_an_engine_that_cannot_start_says_why(rig, tmp_path):
    listener = Listener()
    if rig.kind == "simulated":
        config = EngineConfig(kind="simulated", profile="toy-cpo")
        with pytest.raises(ConfigError, match="toy-cpu"):
            await start_simulated_engine(config, on_step=listener.on_step, on_death=listener.on_death)
        too_long = EngineConfig(kind="simulated", engine_kwargs={"max_model_len": 4096, "num_gpu_blocks_override": 3})
        with pytest.raises(EngineStartError, match="max_model_len=4096"):
            await start_simulated_engine(too_long, on_step=listener.on_step, on_death=listener.on_death)
    else:
        from workers.vllm_engine import start_vllm_engine

        with pytest.raises(ConfigError, match="max_num_seqs"):
            await start_vllm_engine("m", {"max_nums_seqs": 3}, on_step=listener.on_step, on_death=listener.on_death)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(EngineStartError, match=str(tmp_path)):
            await start_vllm_engine(str(tmp_path), {}, on_step=listener.on_step, on_death=listener.on_death)
    assert (listener.steps, listener.deaths) == ([], [])


@only_vllm
async def test_a_vllm_in_which_serving_lacks_something_is_refused_by_name(rig, monkeypatch):
    from workers import vllm_check, vllm_core

    vllm_core.check_vllm()
    vllm_check._names_set_by.cache_clear()
    monkeypatch.delattr(vllm_core.CacheConfig, "kv_cache_size_tokens")
    monkeypatch.delitem(vllm_core.CacheConfig.__annotations__, "kv_cache_size_tokens")
    monkeypatch.setattr(vllm_core.vllm, "__version__", "0.33.0+cpu")
    monkeypatch.delattr(vllm_core.EngineCore, "preprocess_add_request")
    monkeypatch.setattr(vllm_core.EngineCore, "add_request", lambda self, everything: None)
    monkeypatch.delattr(vllm_core.BlockPool, "get_num_free_blocks")
    monkeypatch.delattr(vllm_core.Request, "num_tokens")
    with pytest.raises(EngineVersionError) as caught:
        vllm_core.check_vllm()
    vllm_check._names_set_by.cache_clear()
    problem = str(caught.value)
    assert "0.33.0+cpu" in problem
    assert "EngineCore.preprocess_add_request does not exist" in problem
    assert "EngineCore.add_request takes (self, everything), not (self, request, request_wave)" in problem
    assert "BlockPool.get_num_free_blocks does not exist" in problem
    assert "Request has no num_tokens" in problem
    assert "CacheConfig has no kv_cache_size_tokens" in problem


async def test_shutdown_cancels_what_runs_and_leaves_no_process(rig):
    """Last in this file: it ends the shared engine."""
    running, waiting = [rig.submit(900) for _ in range(MAX_RUNNING)], [rig.submit(900)]
    await rig.listener.until(lambda: all(rig.listener.tokens()[r] for r in running))
    await asyncio.gather(rig.engine.shutdown(), rig.engine.shutdown())
    await rig.engine.shutdown()

    await rig.listener.until(lambda: not rig.engine.live_requests())
    assert sorted(rig.listener.finished()) == sorted((r, "cancelled") for r in (*running, *waiting))
    assert psutil.Process().children(recursive=True) == []
    with pytest.raises(TempoError, match="stopped"):
        await rig.engine.call_utility(msgspec.msgpack.encode(("reset_prefix_cache", [])))
