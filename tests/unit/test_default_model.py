import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tempo_router.errors import ModelError
from workers.default_model import (
    BOS_ID,
    CHAT_TEMPLATE,
    EOS_ID,
    MAX_POSITION,
    VOCAB_SIZE,
    build_default_model,
    ensure_default_model,
    resolve_model,
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return ensure_default_model(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def render(messages, **options) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(problem: str) -> None:
        raise jinja2.TemplateError(problem)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(CHAT_TEMPLATE).render(
        messages=messages, bos_token="<|bos|>", eos_token="<|eos|>", **options
    )


def test_it_is_built_the_same_every_time(model, tmp_path):
    build_default_model(tmp_path)
    assert hashes(tmp_path) == hashes(model)


def test_it_is_small_and_built_once(model):
    assert sum(path.stat().st_size for path in model.iterdir()) < 4_000_000
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    assert ensure_default_model(model.parents[2]) == model
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_several_builders_at_once_end_with_one_whole_model(model, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: ensure_default_model(tmp_path), range(8)))
    (path,) = paths
    assert hashes(path) == hashes(model)
    assert [child.name for child in path.parent.iterdir()] == ["tempo-tiny"], "no half-built folder is left"


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file"):
        ensure_default_model(tmp_path / "file")


def test_weights_fit_the_configuration(model):
    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    assert weights["lm_head.weight"].shape == (VOCAB_SIZE, config["hidden_size"])
    assert config["vocab_size"] == VOCAB_SIZE
    assert config["max_position_embeddings"] == MAX_POSITION >= 8192
    assert config["head_dim"] in (32, 64)
    assert all(np.isfinite(weight).all() for weight in weights.values())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_as_it_went(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if "<|" not in text:
        assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_prompt_begins_with_bos(tokenizer):
    assert tokenizer.encode("hé").ids == [BOS_ID, *"hé".encode()]
    assert tokenizer.token_to_id("<|eos|>") == EOS_ID
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


def test_a_conversation_with_tools_is_rendered():
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    text = render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
        ],
        tools=[TOOL],
        add_generation_prompt=True,
    )
    assert text.startswith("<|bos|><|system|>\n")
    assert '"name": "weather"' in text
    assert "<|system|>\nBe brief.<|eos|><|user|>\nRain?<|eos|>" in text
    assert '<|assistant|>\n<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|eos|>' in text
    assert text.endswith("<|tool|>\nsunny<|eos|><|assistant|>\n")


def test_a_conversation_without_tools_is_only_its_messages():
    text = render([{"role": "developer", "content": "d"}, {"role": "assistant", "content": "a"}])
    assert text == "<|bos|><|system|>\nd<|eos|><|assistant|>\na<|eos|>"


def test_arguments_as_text_are_kept_as_they_are():
    text = render([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":1}'}}]}])
    assert '"arguments": {"a":1}}</tool_call>' in text


def test_an_unknown_role_is_refused():
    with pytest.raises(jinja2.TemplateError, match="wizard"):
        render([{"role": "wizard", "content": ""}])


def test_names_are_resolved(model, tmp_path):
    data_dir = model.parents[2]
    assert resolve_model("tempo-tiny", data_dir) == str(model)
    assert resolve_model(str(tmp_path), data_dir) == str(tmp_path)
    assert resolve_model("owner/name", data_dir) == "owner/name"
    assert resolve_model("gpt2", data_dir) == "gpt2"


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "../nothing", "~/no-such-model", "a/b/c", "", " "])
def test_a_path_with_nothing_there_is_refused(tmp_path, path):
    with pytest.raises(ModelError, match=r"expected|no such folder"):
        resolve_model(path, tmp_path)
