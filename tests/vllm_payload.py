"""Requests as the ingress would send them, in vLLM's codec. Imports vLLM: for tests marked `vllm` only."""

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from workers.default_model import EOS_ID
from workers.vllm_payload import encoded_request


def encode_request(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    ignore_eos: bool = True,
    json_schema: dict[str, Any] | None = None,
    **sampling: Any,
) -> tuple[bytes, ...]:
    structured = StructuredOutputsParams(json=json_schema) if json_schema is not None else None
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, structured_outputs=structured, **sampling)
    params.update_from_generation_config({}, EOS_ID)
    if json_schema is not None:
        params.structured_outputs._backend = "xgrammar"
    return encoded_request(request_id, prompt, params)
