"""A model of the shape of Llama-3-8B without weights, to measure engines on a GPU (`load_format: dummy`).

    python -m benchmarks.dummy_model FOLDER

The tokenizer is tempo-tiny's: prompts come as token ids, and nobody reads the answers.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workers.default_model import build_default_model

_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


def build_dummy_model(folder: Path) -> None:
    """Write configuration and tokenizer into a folder; it is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        small = Path(name)
        build_default_model(small)
        for path in small.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | _LLAMA_3_8B
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    build_dummy_model(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
