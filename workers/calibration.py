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
from typing import Any, NamedTuple

import structlog

from tempo_router.errors import EngineStartError
from tempo_router.step_time import Coefficients, implausible
from workers.call_facts import News
from workers.engine import Engine, EngineCall, EngineFacts

log = structlog.get_logger()

_POLL_S = 0.01
_LIMIT_S = 120.0
_ABORTED_WITHIN_S = 30.0
"""A step that is under way ends before an engine aborts what is in it."""
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
        """What is kept; None if there is nothing, or nothing that can be believed: then it is measured anew."""
        try:
            content = self.path.read_text(encoding="utf-8")
        except OSError:
            return None
        try:
            return _calibration_from(json.loads(content))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as problem:
            log.warning("calibration_unusable", path=str(self.path), problem=repr(problem), effect="measured anew")
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


def _calibration_from(values: Any) -> Calibration:
    """Raises one of many errors for what no fit gives: ValueError, KeyError, TypeError, OverflowError."""
    coefficients = Coefficients(**{name: float(value) for name, value in dict(values["coefficients"]).items()})
    found = Calibration(
        coefficients, float(values["upper_ratio"]), float(values["relative_error"]), int(values["steps"])
    )
    doubtful = implausible(coefficients)
    if not 0.0 <= found.upper_ratio < math.inf:
        doubtful.append(f"upper_ratio={found.upper_ratio!r}")
    if not 0.0 <= found.relative_error <= 1.0:
        doubtful.append(f"relative_error={found.relative_error!r}")
    if doubtful:
        raise ValueError(f"no machine has {', '.join(doubtful)}")
    return found


Encode = Callable[[str, int, int], tuple[bytes, ...]]
"""(request id, prompt tokens, answer tokens) -> a request in the engine's codec; no two prompts begin alike."""


@dataclass(frozen=True, slots=True)
class Swept:
    """How far a sweep came: points that were measured, of those that were planned; none where no request fits."""

    points: int
    planned: int


class _Point(NamedTuple):
    """Requests that run together, and what each of them is."""

    requests: int
    prompt_tokens: int
    answer_tokens: int


async def measure(engine: Engine, encode: Encode, death: Callable[[], str | None] = lambda: None) -> Swept:
    """Run the sweep; returns when the engine is empty again. Nobody else may use it meanwhile.

    A slow engine does not come to the end of it: what it measured until then counts, if one prompt of every length is
    among it. However it ends, nothing of it is left in the engine. death: why the engine died, if it did.
    Raises TimeoutError if less was measured, and EngineStartError if the engine died.
    """
    points = _sweep(engine.facts)
    measured = 0
    engine.tell(News((), _LONG_CAP_S))
    try:
        async with asyncio.timeout(_LIMIT_S):
            numbers = itertools.count()
            for point in points:
                _submit(engine, encode, point, numbers)
                await _until_empty(engine, death)
                measured += 1
    except TimeoutError:
        log.debug("calibration_stopped", points=measured, limit_s=_LIMIT_S)
    finally:
        # After its death an engine may not be called.
        if death() is None:
            engine.abort(engine.live_requests())
            engine.tell(News((), None))
    async with asyncio.timeout(_ABORTED_WITHIN_S):
        await _until_empty(engine, death)
    least = sum(point.requests == 1 for point in points)
    if measured < least:
        raise TimeoutError(f"{measured} of {len(points)} points were measured in {_LIMIT_S} s, {least} are needed")
    return Swept(measured, len(points))


def _submit(engine: Engine, encode: Encode, point: _Point, numbers: Iterator[int]) -> None:
    for _ in range(point.requests):
        name = f"calibration-{next(numbers)}"
        payload = encode(name, point.prompt_tokens, point.answer_tokens)
        engine.submit(EngineCall(name, "calibration", 0, payload, point.prompt_tokens, point.answer_tokens))


async def _until_empty(engine: Engine, death: Callable[[], str | None]) -> None:
    # An engine tells of its steps, not of being empty.
    while engine.live_requests():
        reason = death()
        if reason is not None:
            raise EngineStartError(f"the engine died while its steps were measured: {reason}")
        await asyncio.sleep(_POLL_S)


def _sweep(facts: EngineFacts) -> list[_Point]:
    """What fits into the engine: each prompt alone, then together, the fewest tokens first, as time may be short."""
    room = min(facts.max_model_len, facts.kv_tokens)
    points = set()
    for requests in (1, max(1, facts.max_running // 4), facts.max_running):
        for wanted in (8, 64, facts.max_step_tokens // 2, 2 * facts.max_step_tokens):
            prompt_tokens = max(1, min(wanted, room - _ANSWER_TOKENS))
            answer_tokens = min(_ANSWER_TOKENS, room - prompt_tokens)
            if answer_tokens > 0:
                together = min(requests, facts.kv_tokens // (prompt_tokens + answer_tokens))
                points.add(_Point(together, prompt_tokens, answer_tokens))
    return sorted(points, key=lambda point: (point.requests > 1, point.requests * point.prompt_tokens, point))
