"""The best setting for each policy, chosen in runs that are no part of the comparison.

Slots and what becomes of hopeless work are no policy's idea, but policies differ in what suits them: one that cannot
bound the time of a step is better off with fewer slots. So for each trace, engine and policy every setting is tried on
another order of the trace's units, at one load, and the one with the most good tokens is what the comparison runs with.
The arrivals of a load are the same for all settings.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tempo_router.simulation import transform
from tempo_router.simulation.experiment import REFERENCE_SLOTS, Cell, FigureCache, identity, run_cell
from tempo_router.simulation.trace import Trace

Choice = Mapping[str, Any]
"""What was chosen and why, as JSON: columns of the choice's key, slots and sheds, the part, and everything tried."""

_KEY = ("trace", "trace_digest", "profile", "replicas", "policy", "objective", "time_scale", "kv_scale")
_TRIED = ("slots", "sheds", "token_goodput")


@dataclass(frozen=True, slots=True)
class Part:
    """What settings are tried on. seed: not one that is compared. window_s: the first seconds of each trace only."""

    seed: int
    load: float
    window_s: float | None = None

    def of(self, trace: Trace) -> Trace:
        """What of a trace settings are tried on."""
        return trace if self.window_s is None else transform.first_s(trace, self.window_s)


@dataclass(frozen=True, slots=True)
class Tuning:
    """All that is tried for one policy on one trace and engine. key: see choice_key."""

    key: str
    columns: Mapping[str, Any]
    candidates: tuple[Cell, ...]


def choice_key(columns: Mapping[str, Any]) -> str:
    """What cells have in common that run with the same setting. columns: of a cell's identity or of a choice."""
    return json.dumps([columns[name] for name in _KEY])


def tunings_of(cells: Iterable[Cell], policies: Collection[str], slots: Sequence[int], part: Part) -> list[Tuning]:
    """One for each trace, engine, policy and objective among the cells of these policies."""
    found: dict[str, Tuning] = {}
    parts: dict[int, Trace] = {}
    for cell in cells:
        columns = identity(cell)
        key = choice_key(columns)
        if cell.policy not in policies or key in found:
            continue
        if id(cell.trace) not in parts:
            parts[id(cell.trace)] = part.of(cell.trace)
        blank = replace(cell, trace=parts[id(cell.trace)], seed=part.seed, load=part.load, knowledge=None, switches={})
        # Of equals the first is taken: the defaults.
        settings = [(count, sheds) for count in slots for sheds in (True, False)]
        settings.sort(key=lambda one: (one != (REFERENCE_SLOTS, True), not one[1]))
        candidates = tuple(replace(blank, slots=count, sheds=sheds) for count, sheds in settings)
        found[key] = Tuning(key, {name: columns[name] for name in _KEY}, candidates)
    return list(found.values())


def tried(cell: Cell, code: str) -> dict[str, Any]:
    """A candidate's good tokens/s, with the columns that identify it. Kept on disk for runs of the same code."""
    columns = identity(cell)
    key = hashlib.sha256(json.dumps([code, columns], sort_keys=True).encode()).hexdigest()[:16]
    cache = FigureCache()
    goodput = cache.get("tuning", key)
    if goodput is None:
        goodput = float(run_cell(cell)["token_goodput"])
        cache.put("tuning", key, goodput, {**columns, "code": code, "unit": "tokens/s"})
    return {**columns, "token_goodput": goodput}


def chosen(tuning: Tuning, found: Mapping[tuple[int, bool], float], code: str) -> Choice | None:
    """The best of what was measured, by slots and sheds; None when all candidates failed."""
    settings = [(cell.slots, cell.sheds is not False) for cell in tuning.candidates]
    measured = [setting for setting in settings if setting in found]
    if not measured:
        return None
    slots, sheds = max(measured, key=lambda setting: found[setting])
    part = tuning.candidates[0]
    return {
        **tuning.columns,
        "slots": slots,
        "sheds": sheds,
        "tuning_seed": part.seed,
        "tuning_load": part.load,
        "code": code,
        "tried": [dict(zip(_TRIED, (*setting, found[setting]), strict=True)) for setting in measured],
    }


def with_choice(cell: Cell, choices: Mapping[str, Choice]) -> Cell:
    """The cell with the setting that was chosen for it, if one was."""
    choice = choices.get(choice_key(identity(cell)))
    return cell if choice is None else replace(cell, slots=choice["slots"], sheds=choice["sheds"], tuned=True)
