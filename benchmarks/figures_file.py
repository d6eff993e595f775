"""`--json FILE`, which every benchmark has: its figures for programs, beside the table for people."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Let the user name the file; `options.json` is then its path, or None."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as well")


def write_figures(path: Path | None, figures: Any) -> None:
    """Write what JSON can hold, and make the folder: figures that took an hour must not be lost for want of it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1), encoding="utf-8")
