"""What is changed in vLLM before an engine starts on a CPU: how a model is looked at, and kernels of LoRA."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.lora.ops.torch_ops import lora_ops  # noqa: E402
from vllm.lora.punica_wrapper import punica_cpu  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402

from workers.cpu_lora import mask_missing_adapters  # noqa: E402
from workers.default_model import ensure_default_model  # noqa: E402
from workers.vllm_start import inspect_models_here  # noqa: E402


def test_a_model_that_was_never_seen_is_inspected_in_this_process(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(registry.subprocess, "run", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr(registry, "_run_in_subprocess", registry._run_in_subprocess)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    registry._try_inspect_model_cls.cache_clear()
    inspect_models_here()
    config = EngineArgs(model=str(ensure_default_model(tmp_path)), enforce_eager=True).create_engine_config()

    assert config.model_config.architecture == "LlamaForCausalLM"
    assert started == []


def test_kernels_that_cannot_be_masked_are_named(monkeypatch):
    assert mask_missing_adapters() == []
    monkeypatch.delattr(punica_cpu, "bgmv_shrink")
    monkeypatch.setattr(lora_ops, "bgmv_expand", lambda inputs, output, weights, places: None)
    assert mask_missing_adapters() == [
        "vllm.lora.ops.torch_ops.lora_ops.bgmv_expand",
        "vllm.lora.punica_wrapper.punica_cpu.bgmv_shrink",
    ]
