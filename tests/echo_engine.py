"""An engine client for vLLM's front end that gives a request its own prompt back, a token at a time.

Imports vLLM (about 20 s), so tests import it where they need it.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient

from deployments.request_context import AdmissionRejected, AdmissionVerdict, RequestFailure, current_request
from tempo_router.metrics import Outcome
from workers.default_model import VOCAB_SIZE

ADMITTED = AdmissionVerdict(is_admitted=True, expected_wait_s=0.25, success_probability=0.9)
SPECIAL_IDS = range(256, VOCAB_SIZE)


class EchoEngine(EngineCoreClient):
    """Admits as told, then answers each request with its own prompt."""

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()
        self.answering: dict[str, asyncio.Task[None]] = {}
        self.loras: list[Any] = []
        self.begin()

    def begin(self) -> None:
        """Forget what earlier tests did."""
        self.verdict: AdmissionVerdict | None = ADMITTED
        self.failure: RequestFailure | None = None
        self.pause_after: int | None = None
        self.added: list[Any] = []
        self.waiting = asyncio.Event()
        self.aborted: list[str] = []
        self.client_aborted: list[str] = []
        self.groups: list[tuple[str, int]] = []

    async def add_lora_async(self, lora_request):
        self.loras.append(lora_request)
        return True

    async def get_supported_tasks_async(self):
        return ("generate",)

    async def get_output_async(self):
        return await self.outputs.get()

    async def add_request_async(self, request):
        context = current_request()
        assert context is not None
        if self.verdict is None:
            self.waiting.set()
            await asyncio.Event().wait()
        context.report_verdict(self.verdict)
        if not self.verdict.is_admitted:
            raise AdmissionRejected(self.verdict)
        self.added.append(request)
        self.answering[request.request_id] = asyncio.create_task(self.answer(request, context))

    async def answer(self, request, context):
        text = [token for token in request.prompt_token_ids if token not in SPECIAL_IDS]
        tokens = text[: request.sampling_params.max_tokens]
        for position, token in enumerate(tokens):
            if position == self.pause_after:
                self.waiting.set()
                await asyncio.Event().wait()
            is_last = position == len(tokens) - 1
            reason = FinishReason.LENGTH if is_last else None
            if self.failure is not None and position == 1:
                context.report_failure(self.failure)
                is_last, reason = True, FinishReason.ERROR
            if is_last:
                context.report_outcome(Outcome("latency", 0.1, 0.4, position + 1, position + 1, 0, 0.1, is_met=True))
            self.put(request.request_id, [token], reason)
            if is_last:
                break
            await asyncio.sleep(0)

    def put(self, request_id, token_ids, reason):
        self.outputs.put_nowait(
            EngineCoreOutputs(outputs=[EngineCoreOutput(request_id, token_ids, finish_reason=reason)])
        )

    async def abort_requests_async(self, request_ids):
        self.aborted += request_ids
        for request_id in request_ids:
            task = self.answering.get(request_id)
            if task is not None:
                task.cancel()

    def note_client_abort(self, request_ids):
        self.client_aborted += request_ids

    def note_group(self, parent_id, size):
        self.groups.append((parent_id, size))

    def shutdown(self, timeout=None):
        for task in self.answering.values():
            task.cancel()
