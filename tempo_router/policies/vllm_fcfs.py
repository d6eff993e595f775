"""First come, first served with whole prompts first: vLLM before chunked prefill."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import BatchRule, Context, Job, Policy, bounded_s

WHOLE_PROMPTS = BatchRule(kind="prefill_first", step_tokens=8192)
"""vLLM's first scheduler let a step hold as many prompt tokens as the model's context: 8192 for Llama 3 8B."""


@dataclass(frozen=True, slots=True)
class WholePromptsFirst(Policy):
    """Orders by arrival at the ingress; a step takes whole prompts while any waits, and decodes only otherwise.

    Ties by ticket. Starves nobody in the order, but every running stream stalls for as long as prompts keep coming,
    which is what chunked prefill was invented against. Short of KV cache, the last to arrive is evicted and computed
    again. Source: vLLM's scheduler before chunked prefill (Kwon et al., SOSP 2023). It could also swap to the host;
    recomputation was its default for single sequences.
    """

    is_static: ClassVar[bool] = True
    is_class_blind: ClassVar[bool] = True
    batch: BatchRule = WHOLE_PROMPTS

    def key(self, request: Job, context: Context) -> float:  # noqa: ARG002  # the protocol passes it
        """Its arrival."""
        return bounded_s(request.spec.arrival_s)
