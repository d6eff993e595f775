"""Requests as the ingress would send them, in vLLM's codec. Imports vLLM: for tests marked `vllm` only."""

import time
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from workers.default_model import EOS_ID


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
    request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return tuple(bytes(buffer) for buffer in MsgpackEncoder().encode(request))
