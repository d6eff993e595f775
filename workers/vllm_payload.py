"""A text request as vLLM's front end would hand it to its engine core."""

import time
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder


def encoded(message: Any, encoder: MsgpackEncoder) -> tuple[bytes, ...]:
    """A message in the codec of vLLM's core; the encoder may be used again, by one thread."""
    return tuple(bytes(buffer) for buffer in encoder.encode(message))


def encoded_request(
    request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, lora: LoRARequest | None = None
) -> tuple[bytes, ...]:
    """A request that came now, without images or salt. lora: the adapter that it names."""
    request = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=lora,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return encoded(request, MsgpackEncoder())
