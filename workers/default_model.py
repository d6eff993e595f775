"""The model that Tempo serves when none is named: "tempo-tiny", built locally in a moment, without a download.

It is a real Llama checkpoint (two layers, 128 wide, seeded random weights) with a byte-level tokenizer, so vLLM
loads, batches, caches prefixes, samples and streams as with any other. Random weights alone would answer with
random bytes: invalid UTF-8, which a detokenizer holds back, and which never ends. So part of the model is written by
hand. A few residual dimensions hold the kind of the last token (vowel, consonant, blank, ...), no layer writes to
them, and the output head turns each into the distribution of what follows. The rest is random and sees the whole
context through attention. Sampled answers are made-up words in sentences and end after a full stop, on average
after 140 tokens at temperature 1.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tempo_router.errors import ModelError

DEFAULT_MODEL = "tempo-tiny"

_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_BYTES = 256
BOS_ID, EOS_ID, PAD_ID = _BYTES, _BYTES + 1, _BYTES + 2
VOCAB_SIZE = _BYTES + len(_SPECIAL_TOKENS)
MAX_POSITION = 16384

_HIDDEN = 128
_LAYERS = 2
_HEADS = 4
_KV_HEADS = 2
_HEAD_DIM = 32
_INTERMEDIATE = 256
_SEED = 20260

# What a token tells about the next one. Order matters: it is the order of the reserved residual dimensions.
_KINDS = ("vowel", "consonant", "blank", "stop", "other")
_NEVER = -18.0  # log-probability of bytes that would not be text: about one in 500,000 tokens, all of them together
_KIND_LEVEL = 16.0  # large beside the random dimensions, so that normalisation hardly moves it
_NOISE_STD = 1.4  # spread of the logits that comes from the context, in nats

Floats = npt.NDArray[np.float32]


def ensure_default_model(data_dir: Path) -> Path:
    """Build tempo-tiny under `data_dir` unless it is there, and return its folder.

    Takes well under a second, writes about 2 MB. The result depends on this file alone; its hash is part of the path,
    so a changed recipe builds anew beside the old one. Several processes may call it at once: each builds into a
    folder of its own, the first rename wins, and the others use that result. Raises ModelError when `data_dir` cannot
    be written.
    """
    stamp = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    target = data_dir / "models" / stamp / DEFAULT_MODEL
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{DEFAULT_MODEL}-", dir=target.parent))
        try:
            build_default_model(building)
            _publish(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as e:
        raise ModelError(f"the default model cannot be built under {data_dir}: {e}") from e
    return target


def resolve_model(model: str, data_dir: Path) -> str:
    """The path or hub id to load for a model as a user named it.

    "tempo-tiny" is built on first use. A hub id ("name" or "owner/name") is returned as it is: only the engine can say
    whether it exists. Raises ModelError for what can only be a path when nothing is there.
    """
    if model == DEFAULT_MODEL:
        return str(ensure_default_model(data_dir))
    if not model.strip():
        raise ModelError(f"model {model!r}: expected {DEFAULT_MODEL!r}, a folder or a hub id such as 'owner/name'")
    path = Path(model).expanduser()
    if path.exists():
        return str(path)
    if model.startswith((".", "~", "/")) or model.count("/") > 1:
        raise ModelError(f"model {model!r}: no such folder ({path.absolute()}), and a hub id is 'name' or 'owner/name'")
    return model


def build_default_model(folder: Path) -> None:
    """Write the checkpoint, tokenizer and templates into an existing empty folder."""
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in _json_files().items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _publish(building: Path, target: Path) -> None:
    building.chmod(0o755)  # mkdtemp makes it private; replicas may run as another user
    try:
        building.rename(target)
    except OSError:
        # A folder that is not empty is not replaced: another process was first, and built the same.
        if not target.is_dir():
            raise


# ---- weights ----


@dataclass(frozen=True, slots=True)
class _Follow:
    """How likely each kind follows; what is missing to 1 falls to the rest of printable ASCII and to rounding."""

    vowel: float
    consonant: float
    blank: float
    stop: float
    quote: float
    eos: float = 1e-6


_FOLLOWS = {
    "vowel": _Follow(vowel=0.06, consonant=0.60, blank=0.27, stop=0.06, quote=0.02),
    "consonant": _Follow(vowel=0.68, consonant=0.13, blank=0.15, stop=0.025, quote=0.005),
    "blank": _Follow(vowel=0.36, consonant=0.60, blank=0.0002, stop=0.0002, quote=0.002),
    "stop": _Follow(vowel=0.01, consonant=0.01, blank=0.48, stop=0.002, quote=0.01, eos=0.45),
    "other": _Follow(vowel=0.25, consonant=0.35, blank=0.10, stop=0.02, quote=0.04),
}
"""Blanks after blanks are rare, and closing brackets are not, so that JSON forced by a grammar comes to an end."""

# Relative frequencies within a kind.
_SHARES = {
    "vowel": {"e": 12.7, "a": 8.2, "o": 7.5, "i": 7.0, "u": 2.8},
    "consonant": {
        "t": 9.1, "n": 6.7, "s": 6.3, "h": 6.1, "r": 6.0, "d": 4.3, "l": 4.0, "c": 2.8, "m": 2.4, "w": 2.4, "f": 2.2,
        "g": 2.0, "y": 2.0, "p": 1.9, "b": 1.5, "v": 1.0, "k": 0.8, "j": 0.2, "x": 0.2, "q": 0.1, "z": 0.1,
    },
    "blank": {" ": 97.0, "\n": 3.0},
    "stop": {".": 60.0, ",": 25.0, "!": 6.0, "?": 9.0},
}  # fmt: skip
_CLOSERS = "}]:"  # what ends a JSON value beside the comma; likelier than other signs


def _kind_of(token_id: int) -> str:
    for kind, shares in _SHARES.items():
        if token_id < _BYTES and chr(token_id) in shares:
            return kind
    return "other"


def _log_follow(kind: str) -> Floats:
    """Log-probability of each token after one of this kind, before the context has its say. Shape (VOCAB_SIZE,)."""
    follow = _FOLLOWS[kind]
    logs = np.full(VOCAB_SIZE, _NEVER, dtype=np.float64)
    logs[0x20:0x7F] = np.log(1e-4)
    logs[[ord(c) for c in "0123456789"]] = np.log(1e-3)
    logs[[ord(c) for c in _CLOSERS]] = np.log(2e-2 if kind == "other" else 1e-3)
    logs[ord('"')] = np.log(follow.quote)
    logs[ord("\\")] = np.log(1e-6)
    logs[EOS_ID] = np.log(follow.eos)
    for name, shares in _SHARES.items():
        total = sum(shares.values())
        for character, share in shares.items():
            logs[ord(character)] = np.log(getattr(follow, name) * share / total)
    return logs.astype(np.float32)


def _weights() -> dict[str, Floats]:
    rng = np.random.Generator(np.random.PCG64(_SEED))
    kinds = len(_KINDS)
    free = _HIDDEN - kinds

    def random(rows: int, columns: int, std: float) -> Floats:
        return (rng.standard_normal((rows, columns)) * std).astype(np.float32)

    def reading(rows: int) -> Floats:
        """Reads the normalised stream, except the reserved dimensions: they would drown the rest."""
        weight = random(rows, _HIDDEN, 2.0 / np.sqrt(free))
        weight[:, :kinds] = 0.0
        return weight

    def writing(columns: int, std: float) -> Floats:
        """Adds to the stream, except to the reserved dimensions."""
        weight = random(_HIDDEN, columns, std)
        weight[:kinds, :] = 0.0
        return weight

    ones = np.ones(_HIDDEN, dtype=np.float32)
    embedding = random(VOCAB_SIZE, _HIDDEN, 0.3)
    embedding[:, :kinds] = 0.0
    for token_id in range(VOCAB_SIZE):
        embedding[token_id, _KINDS.index(_kind_of(token_id))] = _KIND_LEVEL
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": ones,
            f"{prefix}.post_attention_layernorm.weight": ones,
            f"{prefix}.self_attn.q_proj.weight": reading(_HEADS * _HEAD_DIM),
            f"{prefix}.self_attn.k_proj.weight": reading(_KV_HEADS * _HEAD_DIM),
            f"{prefix}.self_attn.v_proj.weight": reading(_KV_HEADS * _HEAD_DIM),
            f"{prefix}.self_attn.o_proj.weight": writing(_HEADS * _HEAD_DIM, 0.12),
            f"{prefix}.mlp.gate_proj.weight": reading(_INTERMEDIATE),
            f"{prefix}.mlp.up_proj.weight": reading(_INTERMEDIATE),
            f"{prefix}.mlp.down_proj.weight": writing(_INTERMEDIATE, 0.12),
        }
    weights["lm_head.weight"] = _head(rng)
    return weights


def _head(rng: np.random.Generator) -> Floats:
    """Turns the kind into log-probabilities, the random ones into a spread of _NOISE_STD. (VOCAB_SIZE, _HIDDEN)."""
    kinds = len(_KINDS)
    free = _HIDDEN - kinds
    # Root mean square of the stream at the end; the random dimensions carry about 1.3 each there (measured).
    free_level = 1.3
    rms = np.sqrt((_KIND_LEVEL**2 + free * free_level**2) / _HIDDEN)
    noise = rng.standard_normal((VOCAB_SIZE, _HIDDEN)) * (_NOISE_STD * rms / (free_level * np.sqrt(free)))
    head: Floats = noise.astype(np.float32)
    head[EOS_ID] = 0.0  # the length of answers should not depend on what is said
    for index, kind in enumerate(_KINDS):
        head[:, index] = _log_follow(kind) * np.float32(rms / _KIND_LEVEL)
    return head


# ---- tokenizer, templates, configuration ----


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (the table of GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(_BYTES) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown} | {byte: chr(_BYTES + n) for n, byte in enumerate(hidden)}
    return [characters[byte] for byte in range(_BYTES)]


def _tokenizer() -> dict[str, Any]:
    alphabet = _byte_alphabet()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = _SPECIAL_TOKENS[0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": _BYTES + n, "content": text, **flags} for n, text in enumerate(_SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [BOS_ID], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(alphabet)}
            | {text: _BYTES + n for n, text in enumerate(_SPECIAL_TOKENS)},
            "merges": [],
        },
    }


def _json_files() -> dict[str, dict[str, Any]]:
    bos, eos, pad, *roles = _SPECIAL_TOKENS
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _KV_HEADS,
            "head_dim": _HEAD_DIM,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": MAX_POSITION,
            "vocab_size": VOCAB_SIZE,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
        },
        "generation_config.json": {
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "do_sample": True,
            "temperature": 1.0,
        },
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "additional_special_tokens": roles,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITION,
        },
        "special_tokens_map.json": {
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "additional_special_tokens": roles,
        },
    }


CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- "<|system|>\\nYou may call these functions, each call written as " }}
    {{- "<tool_call>{\\"name\\": ..., \\"arguments\\": ...}</tool_call>.\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\\n" }}
    {%- endfor %}
    {{- eos_token }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "developer" %}
        {%- set role = "system" %}
    {%- else %}
        {%- set role = message.role %}
    {%- endif %}
    {%- if role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("unknown role " ~ message.role) }}
    {%- endif %}
    {{- "<|" ~ role ~ "|>\\n" }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content %}
        {%- for part in message.content if part.type == "text" %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- "<tool_call>{\\"name\\": " ~ (call.function.name | tojson) ~ ", \\"arguments\\": " }}
        {%- if call.function.arguments is string %}
            {{- call.function.arguments }}
        {%- else %}
            {{- call.function.arguments | tojson }}
        {%- endif %}
        {{- "}</tool_call>" }}
    {%- endfor %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|assistant|>\\n" }}
{%- endif %}
"""
