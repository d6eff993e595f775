"""Greedy answers of three LoRA adapters and of the base model, in an engine with room for two: those of stock vLLM.

The adapters are random, made here. Holds, lost caches, chunks, cached prefixes and grammars are as in
test_same_tokens.py. Prompts begin alike under different adapters, so a prefix cached under one would spoil another.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
pytest.importorskip("vllm")

import torch  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import StructuredOutputsParams  # noqa: E402
from vllm.v1.engine import EngineCoreOutputs  # noqa: E402
from vllm.v1.serial_utils import MsgpackDecoder  # noqa: E402

from tempo_router.config import SchedulingConfig  # noqa: E402
from tests.conformance.test_same_tokens import (  # noqa: E402
    NOTHING,
    SCHEMA,
    Mischief,
    answers,
    assert_only_they_are_cut_short,
    engine,
    scheduler_of,
    some_long_ones,
    what_is_left,
)
from tests.contract.test_engine import Listener  # noqa: E402
from workers.cpu_lora import mask_missing_adapters  # noqa: E402
from workers.default_model import ensure_default_model  # noqa: E402
from workers.engine import EngineCall  # noqa: E402
from workers.lora_places import LoraPlaces  # noqa: E402
from workers.vllm_engine import start_vllm_engine  # noqa: E402
from workers.vllm_payload import encoded_request  # noqa: E402

ADAPTERS = 3
ENGINE_KWARGS = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": ADAPTERS, "max_lora_rank": 8}
RANK = 4
CHANGED = ("q_proj", "v_proj", "o_proj", "down_proj")
REQUESTS = 48


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        # Two that wait for one another on a busy machine take twenty times as long for matrices this small.
        torch.set_num_threads(1)
        mask_missing_adapters()
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return ensure_default_model(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> dict[str, LoRARequest]:
    """The adapter of each request that has one, by name of the request."""
    folder = tmp_path_factory.mktemp("adapters")
    made = [make_adapter(folder / str(number), model, number) for number in range(1, ADAPTERS + 1)]
    loras = [LoRARequest(f"adapter-{number}", number, str(path)) for number, path in enumerate(made, start=1)]
    # One of four of each prompt has none.
    return {f"r{number}": loras[number % 4 - 1] for number in range(REQUESTS) if number % 4}


def make_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A random adapter as PEFT saves it."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(CHANGED):
            rows, columns = weight.shape
            key = f"base_model.model.{module}"
            weights[f"{key}.lora_A.weight"] = random_matrix(rng, RANK, columns)
            weights[f"{key}.lora_B.weight"] = random_matrix(rng, rows, RANK)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": CHANGED, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> Any:
    return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)


def requests() -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """(name, prompt, sampling). Four at a time have one prompt, each under another adapter or none."""
    rng = random.Random(11)
    shared = [rng.randrange(97, 123) for _ in range(70)]
    for group in range(REQUESTS // 4):
        prompt = [rng.randrange(97, 123) for _ in range(rng.choice((5, 40, 64, 150)))]
        if rng.random() < 0.4:
            prompt = shared + prompt
        sampling: dict[str, Any] = {"max_tokens": rng.choice((8, 40, 90)), "ignore_eos": True}
        if group % 5 == 3:
            sampling = {"max_tokens": 120, "structured_outputs": StructuredOutputsParams(json=SCHEMA)}
        for number in range(4 * group, 4 * group + 4):
            yield f"r{number}", prompt, sampling


@pytest.fixture(scope="module")
def right(model, adapters) -> dict[str, list[tuple[int, ...]]]:
    stock = engine(model, kind="stock", **ENGINE_KWARGS)
    found = answers(stock, asked=requests(), adapters=adapters)
    stock.engine_core.shutdown()
    assert len(found) == REQUESTS
    return found


@pytest.mark.parametrize("is_async", [False, True])
def test_every_answer_is_that_of_stock_vllm(model, adapters, right, monkeypatch, is_async):
    waited = []
    enter = LoraPlaces.enter

    def watched(self: Any, request_id: str, *rest: Any) -> bool:
        is_in = enter(self, request_id, *rest)
        waited.extend([] if is_in else [request_id])
        return is_in

    monkeypatch.setattr(LoraPlaces, "enter", watched)
    Mischief.rng, Mischief.held, Mischief.taken = random.Random(5), 0, 0
    planned = engine(model, kind="planned", is_async=is_async, **ENGINE_KWARGS)
    found = answers(planned, asked=requests(), adapters=adapters)
    differing = [name for name in right if found.get(name) != right[name]]
    left = what_is_left(scheduler_of(planned))
    planned.engine_core.shutdown()

    assert differing == []
    assert left == NOTHING
    assert Mischief.held > 30, "hardly anybody was held: this tests nothing"
    assert Mischief.taken > 10, "hardly anybody lost the cache: this tests nothing"
    assert len(waited) > 5, "hardly anybody waited for a place: this tests nothing"


@pytest.mark.parametrize("is_async", [False, True])
def test_who_stays_is_not_disturbed_by_who_leaves(model, adapters, right, is_async):
    """And the places of those who left are free again."""
    aborts = some_long_ones(requests())
    assert len({adapters[name].lora_int_id if name in adapters else 0 for name in aborts}) == ADAPTERS + 1
    Mischief.rng = random.Random(6)
    planned = engine(model, kind="planned", is_async=is_async, **ENGINE_KWARGS)
    found = answers(planned, aborts, asked=requests(), adapters=adapters)
    left = what_is_left(scheduler_of(planned))
    held_places = dict(scheduler_of(planned)._loras._calls)
    planned.engine_core.shutdown()

    assert_only_they_are_cut_short(found, right, aborts)
    assert left == NOTHING
    assert held_places == {}


def test_each_adapter_gives_another_answer(right):
    unforced = [
        [right[f"r{4 * group + one}"][0] for one in range(4)] for group in range(REQUESTS // 4) if group % 5 != 3
    ]
    assert all(len(set(of_one_prompt)) == 4 for of_one_prompt in unforced)


def test_who_names_no_adapter_gets_the_base_models_answer(model, adapters, right):
    """Also on a CPU, next to requests with adapters (workers/cpu_lora.py)."""
    base = engine(model, kind="stock")
    found = answers(base, asked=[one for one in requests() if one[0] not in adapters])
    base.engine_core.shutdown()
    assert found == {name: right[name] for name in right if name not in adapters}


async def test_a_workers_engine_uses_the_adapter_that_the_payload_names(model, adapters, right):
    listener = Listener()
    engine_kwargs = {**ENGINE_KWARGS, "max_model_len": 1024, "max_num_seqs": 8, "block_size": 32, "dtype": "float32"}
    served = await start_vllm_engine(
        str(model),
        engine_kwargs,
        on_step=listener.on_step,
        on_death=listener.on_death,
        scheduling=SchedulingConfig(policy="tempo"),
    )
    asked = list(requests())[:4]
    for name, prompt, sampling in asked:
        payload = encoded_request(name, prompt, SamplingParams(temperature=0.0, **sampling), adapters.get(name))
        served.submit(EngineCall(name, "client", 0, payload, len(prompt), sampling["max_tokens"]))
    await listener.until(lambda: len(listener.finished()) == len(asked) or bool(listener.deaths))
    await served.shutdown()

    decoder = MsgpackDecoder(EngineCoreOutputs)
    got: dict[str, list[int]] = {name: [] for name, _, _ in asked}
    for group in listener.outputs()["client"]:
        for output in decoder.decode(list(group.buffers)).outputs:
            got[output.request_id] += output.new_token_ids
    assert listener.deaths == []
    assert {name: [tuple(tokens)] for name, tokens in got.items()} == {name: right[name] for name in got}
