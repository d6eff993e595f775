"""A first start does not import vLLM in one more process."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402

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
