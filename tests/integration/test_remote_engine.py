"""vLLM's engine client over streams that are played: what it keeps of a request, and when it gives one up."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason

from cluster import wire_pb2 as wire
from cluster.ingress_link import Verdict
from deployments.own_metrics import RequestMetrics
from deployments.remote_engine import MAX_FRUITLESS_ATTEMPTS, RemoteEngine
from deployments.request_context import AdmissionRejected, RequestContext, bound_request
from tempo_router.errors import RouterUnavailableError
from tempo_router.metrics import Outcome, refused_outcome
from tempo_router.request import BestEffort, Deadline, ProgramCall, ProgramId, RequestId, RequestSpec

pytestmark = pytest.mark.vllm


class PlayedLink:
    """The streams of an ingress, as far as the engine client uses them. verdict: the answer to each submission."""

    def __init__(self) -> None:
        self.verdict: Verdict | Exception = Verdict(is_admitted=True)
        self.submitted: list[RequestSpec] = []
        self.resubmitted: list[RequestSpec] = []
        self.closed: list[RequestId] = []
        self.outcomes: dict[RequestId, Outcome] = {}

    async def submit(self, spec: RequestSpec, _payload: Any) -> Verdict:
        self.submitted.append(spec)
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict

    def resubmit(self, spec: RequestSpec, _payload: Any) -> None:
        self.resubmitted.append(spec)

    def cancel(self, request_id: RequestId, *, is_complete: bool = False) -> None:
        self.closed.append(request_id)

    def finish(self, request_id: RequestId) -> None:
        self.closed.append(request_id)

    def report_outcome(self, request_id: RequestId, outcome: Outcome) -> None:
        self.outcomes[request_id] = outcome

    def claim(self, _worker_id: str, attempt_id: str) -> RequestId:
        return RequestId(attempt_id.partition("@")[0])


@pytest.fixture
def link() -> PlayedLink:
    return PlayedLink()


@pytest.fixture
async def engine(link: PlayedLink) -> RemoteEngine:
    engine = RemoteEngine(model_name="m", max_model_len=100, default_slo=BestEffort())
    engine.attach(link, wire.EngineFacts(max_model_len=100))  # type: ignore[arg-type]
    return engine


def request(request_id: str, prompt_tokens: int = 3, adapter: int = 0) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(range(1, prompt_tokens + 1)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=20),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=LoRARequest(f"adapter-{adapter}", adapter, "/nowhere") if adapter else None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def context() -> RequestContext:
    return RequestContext(slo=BestEffort(), tier="", app="", tenant="", arrival_s=0.0, is_streaming=True)


def token(attempt_id: str) -> wire.WorkerToIngress:
    return wire.WorkerToIngress(deltas=[wire.TokenDelta(request_id=attempt_id, token_ids=[9])])


async def test_siblings_form_a_group_that_is_forgotten_when_the_last_has_come(
    engine: RemoteEngine, link: PlayedLink
) -> None:
    engine.note_group("p", 2)
    for sibling in ("0_p", "1_p"):
        await engine.add_request_async(request(sibling))
    assert [(spec.group_id, spec.group_size) for spec in link.submitted] == [("p", 2), ("p", 2)]
    assert not engine._group_sizes


@pytest.mark.parametrize(
    "verdict", [Verdict(is_admitted=False, reject_reason="queue_full"), RouterUnavailableError("none")]
)
async def test_a_refused_group_leaves_nothing(
    engine: RemoteEngine, link: PlayedLink, verdict: Verdict | Exception
) -> None:
    """The siblings that were to follow never come."""
    link.verdict = verdict
    engine.note_group("p", 3)
    with pytest.raises(AdmissionRejected):
        await engine.add_request_async(request("0_p"))
    assert not engine._group_sizes
    assert engine.open_calls == 0


@pytest.mark.parametrize("reason", ["deadline_impossible", "program_cancelled"])
async def test_a_refused_request_has_missed_its_target_once_here_and_for_the_router(
    link: PlayedLink, reason: str
) -> None:
    """The router's attainment and its log of misses know of no outcome but what they are told."""
    registry = CollectorRegistry()
    engine = RemoteEngine(model_name="m", max_model_len=100, default_slo=BestEffort(), metrics=RequestMetrics(registry))
    engine.attach(link, wire.EngineFacts(max_model_len=100))  # type: ignore[arg-type]
    link.verdict = Verdict(is_admitted=False, reject_reason=reason)
    with bound_request(replace(context(), slo=Deadline(0.001))), pytest.raises(AdmissionRejected):
        await engine.add_request_async(request("r"))
    assert link.outcomes == {"r": refused_outcome(Deadline(0.001))}
    missed = {"slo_class": "deadline", "target": "missed"}
    assert registry.get_sample_value("tempo_requests_total", missed) == 1
    refused = {"slo_class": "deadline", "reason": reason}
    assert registry.get_sample_value("tempo_refused_requests_total", refused) == 1


async def test_a_request_whose_attempts_all_end_without_a_token_is_given_up(
    engine: RemoteEngine, link: PlayedLink
) -> None:
    """It may be what ends the engines: tried for ever, it would end them all, again and again."""
    with bound_request(context()) as http:
        await engine.add_request_async(request("r"))
    for _ in range(MAX_FRUITLESS_ATTEMPTS):
        engine.attempt_lost(RequestId("r"))
    assert [spec.attempt for spec in link.resubmitted] == list(range(1, MAX_FRUITLESS_ATTEMPTS))
    assert http.failure is not None
    assert http.failure.code == "worker_lost"
    async with asyncio.timeout(5):
        outputs = await engine.get_output_async()
    assert [output.finish_reason for output in outputs.outputs] == [FinishReason.ERROR]
    assert engine.open_calls == 0
    assert "r" in link.closed
    assert link.outcomes[RequestId("r")].output_tokens == 0


async def test_a_request_that_makes_progress_outlives_any_number_of_workers(
    engine: RemoteEngine, link: PlayedLink
) -> None:
    await engine.add_request_async(request("r"))
    for attempt in range(3 * MAX_FRUITLESS_ATTEMPTS):
        engine.frame_received("w", token("r" if attempt == 0 else f"r@{attempt}"))
        engine.attempt_lost(RequestId("r"))
    assert [spec.generated_tokens for spec in link.resubmitted] == list(range(1, 3 * MAX_FRUITLESS_ATTEMPTS + 1))
    assert engine.open_calls == 1


async def test_a_request_that_is_given_up_and_forgiven_counts_once_each_time(link: PlayedLink) -> None:
    """What a router tells twice is counted once; the answer is judged by the deadline that it was told last."""
    registry = CollectorRegistry()
    engine = RemoteEngine(model_name="m", max_model_len=100, default_slo=BestEffort(), metrics=RequestMetrics(registry))
    engine.attach(link, wire.EngineFacts(max_model_len=100))  # type: ignore[arg-type]
    name, late, moved = RequestId("r"), ProgramCall(ProgramId("p"), -1.0), ProgramCall(ProgramId("p"), 1e9)
    with bound_request(replace(context(), slo=late)) as http:
        await engine.add_request_async(request(name))
    relegated = {"slo_class": "program"}
    for is_known in (False, True):
        engine.relegated(name)
        assert registry.get_sample_value("tempo_relegated_requests_total", relegated) == 1, f"told twice: {is_known}"
    assert http.is_relegated
    engine.redated(name, moved)
    assert not http.is_relegated
    assert http.slo == moved
    engine.relegated(name)
    assert registry.get_sample_value("tempo_relegated_requests_total", relegated) == 2
    engine.redated(name, moved)
    last = wire.TokenDelta(request_id=name, token_ids=[9], finish_reason="stop")
    engine.frame_received("w", wire.WorkerToIngress(deltas=[last]))
    assert registry.get_sample_value("tempo_requests_total", {"slo_class": "program", "target": "met"}) == 1


async def test_a_prompt_shares_its_beginning_only_with_prompts_of_the_same_adapter(
    engine: RemoteEngine, link: PlayedLink
) -> None:
    engine.attach(link, wire.EngineFacts(engine="vllm", max_model_len=100))  # type: ignore[arg-type]
    for number, adapter in enumerate((0, 1, 2, 1, 0)):
        await engine.add_request_async(request(f"r{number}", 64, adapter))
    base, first, second, first_again, base_again = link.submitted
    assert len({base.prefix_id, first.prefix_id, second.prefix_id}) == 3
    assert (first_again.prefix_id, base_again.prefix_id) == (first.prefix_id, base.prefix_id)
    assert [spec.prefix_tokens for spec in link.submitted] == [0, 0, 0, 64, 64]
