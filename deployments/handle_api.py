"""Types of the Python handle: what a caller sends to the ingress and gets back. Light to import: no vLLM, no Ray.

handle = serve.get_app_handle("tempo")
answer = await handle.generate.remote(GenerateRequest(prompt="Hi", slo=Deadline(ttlt_s=5)))
async for part in handle.options(stream=True).stream.remote(GenerateRequest(messages=[...], slo=Latency(1, 0.1))):
    print(part.text, end="")
await handle.cancel.remote(request_id)
"""

from dataclasses import dataclass, field
from typing import Any

from tempo_router.metrics import Outcome
from tempo_router.request import Slo


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One call of the model. Give `prompt` (text or token ids) or `messages` (a chat), not both.

    slo: targets; or name a tier of the configuration; neither: the default tier.
    sampling: fields of vLLM's SamplingParams, such as max_tokens and temperature.
    request_id: your own name for it, for `cancel`; "" lets the ingress choose one.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    slo: Slo | None = None
    tier: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""
    app: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class GenerationPart:
    """New text and tokens of a stream. finish_reason and outcome are set on the last part alone."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. outcome: the times as the ingress measured them, and whether the SLO was met."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    outcome: Outcome
