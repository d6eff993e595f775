"""What a router was told and what it decided, as lines of text that can be played again.

The first line says how the core began: its configuration, its epoch and the lengths it knew. Every other line is one
event with the actions that followed. `replay` builds the core anew and compares: same events, same actions, to the last
digit, since the core reads no clock and draws no chance. Times are those of the recording process's clock.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from tempo_router import actions as all_actions
from tempo_router import events as all_events
from tempo_router import request as requests
from tempo_router.actions import Action
from tempo_router.config import SchedulingConfig
from tempo_router.errors import InvalidSnapshotError
from tempo_router.events import Event
from tempo_router.prediction import LengthHistograms, Lengths
from tempo_router.router import RouterCore
from tempo_router.standing import Standing

VERSION = 1

_KINDS: dict[str, Any] = {
    name: kind
    for module in (all_events, all_actions, requests)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and is_dataclass(kind)
}


@dataclass(frozen=True, slots=True)
class Beginning:
    """How the core began. lengths: a snapshot of what it knew of answer lengths, None for nothing."""

    scheduling: SchedulingConfig
    epoch: int
    lengths: Mapping[str, Any] | None = None

    def core(self) -> RouterCore:
        """Such a core, new."""
        known = LengthHistograms()
        if self.lengths is not None:
            known.restore(self.lengths)
        return RouterCore(self.scheduling, epoch=self.epoch, lengths=known)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay went another way. line: from 1, the beginning counted."""

    line: int
    event: Event
    recorded: tuple[Action, ...]
    replayed: tuple[Action, ...]


def beginning_line(beginning: Beginning) -> str:
    """The first line of a log, without its end."""
    scheduling = beginning.scheduling.model_dump(mode="json")
    return json.dumps(
        {"version": VERSION, "scheduling": scheduling, "epoch": beginning.epoch, "lengths": beginning.lengths}
    )


def event_line(event: Event, actions: Iterable[Action]) -> str:
    """One further line, without its end."""
    return json.dumps({"event": _plain(event), "actions": [_plain(action) for action in actions]})


def read_beginning(line: str) -> Beginning:
    """Read the first line. Raises InvalidSnapshotError."""
    try:
        values = json.loads(line)
        if values["version"] != VERSION:
            raise InvalidSnapshotError(f"log of events has version {values['version']!r}, this one reads {VERSION}")
        return Beginning(SchedulingConfig.model_validate(values["scheduling"]), values["epoch"], values["lengths"])
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidSnapshotError(f"this is not the first line of a log of events: {e!r}") from e


def read_event(line: str) -> tuple[Event, tuple[Action, ...]]:
    """Read a further line. Raises InvalidSnapshotError."""
    try:
        values = json.loads(line)
        return _read(values["event"]), tuple(_read(action) for action in values["actions"])
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidSnapshotError(f"this is no line of a log of events: {e!r}: {line[:80]}") from e


def replay(lines: Iterable[str]) -> Iterator[Difference]:
    """Play a whole log again; yields where another action followed than was recorded. Nothing: all were the same."""
    numbered = enumerate(lines, 1)
    _, first = next(numbered)
    core = read_beginning(first).core()
    for number, line in numbered:
        event, recorded = read_event(line)
        replayed = tuple(core.handle(event))
        if replayed != recorded:
            yield Difference(number, event, recorded, replayed)


def _plain(value: Any) -> Any:
    if isinstance(value, Lengths):
        return {"_": "Lengths", "atoms": value.atoms}
    if isinstance(value, Standing):
        return {"_": "Standing", "of": list(value)}
    if is_dataclass(value):
        return {"_": type(value).__name__} | {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(one) for one in value)
    if not isinstance(value, dict):
        return value
    kind = value.pop("_")
    if kind == "Standing":
        return Standing(*value["of"])
    if kind == "Lengths":
        return Lengths(tuple(value["atoms"]))
    return _KINDS[kind](**{name: _read(one) for name, one in value.items()})
