"""What a router was told and what it decided, as lines of text that can be played again.

The first line says how the core began: its configuration, its epoch, the lengths and programs it knew. Every other line
is one event with the actions that followed, or a question about a program: what is foretold is worked out when somebody
asks, and kept, so what follows depends on when that was. `replay` builds the core anew and compares: same events, same
actions, to the last digit, since the core reads no clock and draws no chance. Times are those of the recording
process's clock.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from tempo_router import actions as all_actions
from tempo_router import events as all_events
from tempo_router import request as requests
from tempo_router.actions import Action
from tempo_router.config import SchedulingConfig
from tempo_router.errors import InvalidSnapshotError
from tempo_router.events import Event
from tempo_router.pattern_history import KnownPrograms, PatternHistory
from tempo_router.patterns import Outline, StageOutline
from tempo_router.prediction import LengthHistograms, Lengths
from tempo_router.program_history import ProgramHistory
from tempo_router.request import ProgramId
from tempo_router.router import RouterCore
from tempo_router.standing import Standing

VERSION = 3

_KINDS: dict[str, Any] = {
    name: kind
    for module in (all_events, all_actions, requests)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and is_dataclass(kind)
}


@dataclass(frozen=True, slots=True)
class Beginning:
    """How the core began. lengths: a snapshot of what it knew of answer lengths, None for nothing.

    most_patterns: outlines that are kept; pattern_age_s: for how long. programs: what it knew of them, where patterns
    foretell them.
    """

    scheduling: SchedulingConfig
    epoch: int
    lengths: Mapping[str, Any] | None = None
    most_patterns: int = 5000
    pattern_age_s: float = 14 * 24 * 3600.0
    programs: KnownPrograms = field(default_factory=KnownPrograms)

    def core(self) -> RouterCore:
        """Such a core, new."""
        known = LengthHistograms()
        if self.lengths is not None:
            known.restore(self.lengths)
        return RouterCore(self.scheduling, epoch=self.epoch, lengths=known, history=self._history())

    def _history(self) -> ProgramHistory:
        if self.scheduling.program_model != "patterns":
            return ProgramHistory()
        history = PatternHistory(self.most_patterns, self.pattern_age_s)
        history.begin(self.programs)
        return history


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody asked the core what is foretold of a program. what: by which of its methods."""

    what: Literal["outlook", "least_left_s"]
    program_id: ProgramId

    def again(self, core: RouterCore) -> None:
        """Ask another core the same. What it answers is nobody's concern, only what it keeps of it."""
        if self.what == "outlook":
            core.outlook(self.program_id, None)
        else:
            core.least_left_s(self.program_id)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay went another way. line: from 1, the beginning counted."""

    line: int
    event: Event
    recorded: tuple[Action, ...]
    replayed: tuple[Action, ...]


def beginning_line(beginning: Beginning) -> str:
    """The first line of a log, without its end."""
    return json.dumps(
        {
            "version": VERSION,
            "scheduling": beginning.scheduling.model_dump(mode="json"),
            "epoch": beginning.epoch,
            "lengths": beginning.lengths,
            "most_patterns": beginning.most_patterns,
            "pattern_age_s": beginning.pattern_age_s,
            "programs": asdict(beginning.programs),
        }
    )


def event_line(event: Event, actions: Iterable[Action]) -> str:
    """One further line, without its end."""
    return json.dumps({"event": _plain(event), "actions": [_plain(action) for action in actions]})


def asked_line(asked: Asked) -> str:
    """One further line, without its end."""
    return json.dumps({"asked": asked.what, "program_id": asked.program_id})


def read_beginning(line: str) -> Beginning:
    """Read the first line. Raises InvalidSnapshotError."""
    try:
        values = json.loads(line)
        if values["version"] != VERSION:
            raise InvalidSnapshotError(f"log of events has version {values['version']!r}, this one reads {VERSION}")
        return Beginning(
            SchedulingConfig.model_validate(values["scheduling"]),
            values["epoch"],
            values["lengths"],
            values["most_patterns"],
            values["pattern_age_s"],
            _read_programs(values["programs"]),
        )
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidSnapshotError(f"this is not the first line of a log of events: {e!r}") from e


def read_line(line: str) -> tuple[Event, tuple[Action, ...]] | Asked:
    """Read a further line. Raises InvalidSnapshotError."""
    try:
        values = json.loads(line)
        if "asked" in values:
            return Asked(values["asked"], values["program_id"])
        return _read(values["event"]), tuple(_read(action) for action in values["actions"])
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidSnapshotError(f"this is no line of a log of events: {e!r}: {line[:80]}") from e


def replay(lines: Iterable[str]) -> Iterator[Difference]:
    """Play a whole log again; yields where another action followed than was recorded. Nothing: all were the same."""
    numbered = enumerate(lines, 1)
    _, first = next(numbered)
    core = read_beginning(first).core()
    for number, line in numbered:
        read = read_line(line)
        if isinstance(read, Asked):
            read.again(core)
            continue
        event, recorded = read
        replayed = tuple(core.handle(event))
        if replayed != recorded:
            yield Difference(number, event, recorded, replayed)


def _read_programs(values: Mapping[str, Any]) -> KnownPrograms:
    return KnownPrograms(
        tuple(
            Outline(**one | {"stages": tuple(StageOutline(*stage) for stage in one["stages"])})
            for one in values["outlines"]
        ),
        tuple(
            (ProgramId(program_id), tuple((number, StageOutline(*one)) for number, one in stages), last_end_s)
            for program_id, stages, last_end_s in values["unfolding"]
        ),
    )


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
