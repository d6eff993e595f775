"""What an engine's steps cost, measured before it serves and kept for its next start.

Without it the planner begins with a guess and learns from the first requests, who pay for it. `measure` runs a short
sweep of made-up requests, from one short prompt to full steps; the online fit sees each of these steps as any other.
The coefficients are kept by model, device and engine arguments, with the quantile of what they miss, and are only the
beginning of the next fit.
"""

import asyncio
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_router.step_time import Coefficients
from workers.call_facts import News
from workers.engine import Engine, EngineCall

_POLL_S = 0.01
_LIMIT_S = 120.0
_ANSWER_TOKENS = 24
_LONG_CAP_S = 30.0
"""During the sweep prompts may fill a step: short caps are what its results are for."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """upper_ratio, relative_error: of the fit at the end of its sweep (StepTimeModel). steps: how many it saw."""

    coefficients: Coefficients
    upper_ratio: float
    relative_error: float
    steps: int


class CalibrationFile:
    """The calibration of one model on one device with one set of engine arguments."""

    def __init__(self, folder: Path, *, model: str, device: str, arguments: Mapping[str, Any]) -> None:
        about = json.dumps([model, device, arguments], sort_keys=True, default=str)
        self.path = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
        self._about = {"model": model, "device": device, "arguments": json.loads(json.dumps(arguments, default=str))}

    def load(self) -> Calibration | None:
        """What is kept; None if there is nothing, or nothing that can be read: then it is measured anew."""
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            coefficients = Coefficients(**values["coefficients"])
            upper_ratio = float(values["upper_ratio"])
            if not all(math.isfinite(value) and value >= 0 for value in (*coefficients, upper_ratio)):
                return None
            return Calibration(coefficients, upper_ratio, float(values["relative_error"]), int(values["steps"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, calibration: Calibration) -> None:
        """Replace what is kept, all at once. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            **self._about,
            "coefficients": calibration.coefficients._asdict(),
            "upper_ratio": calibration.upper_ratio,
            "relative_error": calibration.relative_error,
            "steps": calibration.steps,
        }
        handle, name = tempfile.mkstemp(dir=self.path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        Path(name).replace(self.path)


Encode = Callable[[str, int, int], tuple[bytes, ...]]
"""(request id, prompt tokens, answer tokens) -> a request in the engine's codec; no two prompts begin alike."""


async def measure(engine: Engine, encode: Encode) -> None:
    """Run the sweep; returns when the engine is empty again. Nobody else may use it meanwhile. Raises TimeoutError."""
    engine.tell(News((), _LONG_CAP_S))
    numbers = itertools.count()
    async with asyncio.timeout(_LIMIT_S):
        for count, prompt_tokens in _sweep(engine):
            for _ in range(count):
                name = f"calibration-{next(numbers)}"
                payload = encode(name, prompt_tokens, _ANSWER_TOKENS)
                engine.submit(EngineCall(name, "calibration", 0, payload, prompt_tokens, _ANSWER_TOKENS))
            # An engine tells of its steps, not of being empty.
            while engine.live_requests():  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
    engine.tell(News((), None))


def _sweep(engine: Engine) -> Iterator[tuple[int, int]]:
    """(requests together, prompt tokens of each), within what the engine holds."""
    facts = engine.facts
    longest = min(facts.max_model_len, facts.kv_tokens) - _ANSWER_TOKENS
    for count in sorted({1, max(1, facts.max_running // 4), facts.max_running}):
        for prompt_tokens in (8, 64, facts.max_step_tokens // 2, 2 * facts.max_step_tokens):
            fitting = min(prompt_tokens, longest)
            yield min(count, max(1, facts.kv_tokens // (fitting + _ANSWER_TOKENS))), fitting
