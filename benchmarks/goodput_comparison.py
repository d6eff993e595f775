"""What the rows of benchmarks.goodput say: who is compared with whom, by what, and what we want to reach.

Means are over seeds. A ratio is taken seed by seed, since two policies see the same arrivals; its spread is
least..most. Rivals are chosen by their mean over the seeds, afresh for each trace, engine and load: the best one there.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tempo_router.errors import ConfigError
from tempo_router.simulation.experiment import REFERENCE_SLOTS

Row = Mapping[str, Any]
Role = Literal["ours", "own", "rival", "oracle", "ablation"]

OURS = "tempo"
OWN = frozenset({"density"})
"""What ours falls back to: shown, but no rival."""
LOW_LOAD = 0.9
"""Up to this load all policies should be equal."""
LOW_LOAD_AIM = 0.995
"""Up to LOW_LOAD: ours over the best policy, good tokens and attainment."""

_LOADS = (0.75, 0.9, 1.0, 1.25, 1.5, 2.0)
_AT_LOW_LOAD = dict.fromkeys((load for load in _LOADS if load <= LOW_LOAD), LOW_LOAD_AIM)

AIMS: Mapping[tuple[str, str], Mapping[float, float]] = {
    ("token", "jitserve"): {1.0: 1.05, 1.25: 1.25, 1.5: 1.5, 2.0: 1.85},
    ("token", "rival"): {**_AT_LOW_LOAD, 1.0: 1.03, 1.25: 1.25, 1.5: 1.3, 2.0: 1.45},
    ("token", "bound"): {1.0: 0.96, 1.25: 0.93, 1.5: 0.90, 2.0: 0.88},
    ("token", "attained"): _AT_LOW_LOAD,
    ("token", "ttft"): dict.fromkeys(_LOADS, 0.3),
    ("token", "tbt"): dict.fromkeys(_LOADS, 0.05),
    ("balanced", "rival"): {**_AT_LOW_LOAD, 1.0: 1.03, 1.25: 1.2, 1.5: 1.2, 2.0: 1.3},
    ("balanced", "attainment"): {1.0: 0.985, 1.25: 0.94, 1.5: 0.90, 2.0: 0.86},
    ("balanced", "attained"): _AT_LOW_LOAD,
    ("balanced", "worst"): {1.0: 0.98, 1.25: 0.90, 1.5: 0.78, 2.0: 0.30},
    ("balanced", "ttft"): dict.fromkeys(_LOADS, 0.3),
    ("balanced", "tbt"): dict.fromkeys(_LOADS, 0.05),
}
"""What we want to reach, by objective, measure and load."""
AT_MOST = frozenset({"ttft", "tbt"})
"""Measures, in seconds, of which less is better."""
RATIOS = frozenset({"jitserve", "rival", "attained"})
"""Measures that say what ours has over another policy."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where policies are compared: arrivals and engines are equal, policies and their settings are not."""

    profile: str
    trace: str
    load: float
    time_scale: float
    kv_scale: float

    @property
    def engine(self) -> str:
        """The engine and how it was changed."""
        scales = [f"{name} x {scale:g}" for name, scale in (("time", self.time_scale), ("KV", self.kv_scale))
                  if scale != 1.0]  # fmt: skip
        return ", ".join([self.profile, *scales])


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """A policy with its settings: what becomes one line of a picture. switches: as JSON.

    tuned: with the slots and the shedding that were best for it, which differ between traces and engines; `sheds` and
    `slots` then say nothing, and settings_of tells.
    """

    policy: str
    objective: str
    sheds: bool
    knowledge: str
    switches: str
    slots: int
    tuned: bool

    @property
    def role(self) -> Role:
        """Ours; our own fallback; a practical rival; one that knows the future; ours with a part changed."""
        if self.policy == OURS:
            if self.knowledge == "learned" and self.switches == "{}":
                return "ours"
            return "ablation"
        if self.knowledge == "true":
            return "oracle"
        if self.policy in OWN:
            return "own"
        return "rival"

    @property
    def label(self) -> str:
        """Short and unlike the other lines' labels."""
        parts = [self.policy]
        if self.policy == OURS or self.objective != "token":
            parts.append(f"({self.objective})")
        if not self.sheds:
            parts.append("no shedding")
        if self.slots != REFERENCE_SLOTS:
            parts.append(f"{self.slots} slots")
        if self.knowledge != "learned":
            parts.append({"true": "clairvoyant", "none": "no predictor", "regressor": "forest"}[self.knowledge])
        parts += [f"{name}={value}" for name, value in json.loads(self.switches).items()]
        return " ".join(parts)


def place_of(row: Row) -> Place:
    """Where a row was measured."""
    return Place(row["profile"], row["trace"], row["load"], row["time_scale"], row["kv_scale"])


def line_of(row: Row) -> Line:
    """The line that a row belongs to."""
    switches = json.dumps(row["switches"], sort_keys=True)
    sheds, slots = (True, REFERENCE_SLOTS) if row["tuned"] else (row["sheds"], row["slots"])
    return Line(row["policy"], row["objective"], sheds, row["knowledge"], switches, slots, row["tuned"])


Lines = Mapping[Line, Mapping[int, Row]]
"""By line and seed, at one place."""


def grouped(rows: Iterable[Row]) -> dict[Place, dict[Line, dict[int, Row]]]:
    """Rows by place, line and seed, places in order; of two rows of the same cell the later one counts.

    Raises ConfigError where rows of one place are of two traces: their arrivals or targets are not the same.
    """
    places: dict[Place, dict[Line, dict[int, Row]]] = {}
    digests: dict[Place, str] = {}
    for row in rows:
        place, digest = place_of(row), row["trace_digest"]
        if digests.setdefault(place, digest) != digest:
            raise ConfigError(
                f"two different traces are called {place.trace!r} (digests {digests[place]} and {digest}); their rows"
                " cannot be compared: render them in separate reports"
            )
        places.setdefault(place, {}).setdefault(line_of(row), {})[row["seed"]] = row
    return {place: places[place] for place in sorted(places)}


def mean(seeds: Mapping[int, Row], column: str) -> float | None:
    """Over the seeds that have a value."""
    values = [row[column] for row in seeds.values() if row[column] is not None]
    return statistics.fmean(values) if values else None


def best(lines: Lines, column: str, is_candidate: Callable[[Line], bool]) -> Line | None:
    """The candidate with the highest mean; of equals the first by name."""
    means = {
        line: value for line in sorted(lines) if is_candidate(line) and (value := mean(lines[line], column)) is not None
    }
    return max(means, key=lambda line: means[line]) if means else None


def is_rival(line: Line) -> bool:
    """A policy that could be used in practice and is not ours."""
    return line.role == "rival"


def is_jitserve(line: Line) -> bool:
    """One of the forms of JITServe."""
    return line.role == "rival" and line.policy.startswith("jitserve")


def ours(lines: Lines, objective: str) -> Line | None:
    """Our policy, complete, under that objective.

    With several settings one that drops hopeless work, of those the tuned one, else the one of most slots.
    """
    found = [line for line in lines if line.role == "ours" and line.objective == objective]
    return max(found, key=lambda line: (line.sheds, line.tuned, line.slots), default=None)


def settings_of(rows: Iterable[Row]) -> str:
    """With how many slots rows were measured, and whether hopeless work was dropped or kept as best effort."""
    slots: dict[bool, set[int]] = {True: set(), False: set()}
    for row in rows:
        slots[row["sheds"]].add(row["slots"])
    named = {sheds: "/".join(str(count) for count in sorted(counts)) for sheds, counts in slots.items() if counts}
    return ", ".join(text + ("" if sheds else " kept") for sheds, text in named.items())


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds with the least and the most; against: the rival of a ratio."""

    mean: float
    least: float
    most: float
    against: str = ""

    @staticmethod
    def of(values: Sequence[float], against: str = "") -> "Spread | None":
        """None for no values."""
        return Spread(statistics.fmean(values), min(values), max(values), against) if values else None


def ratio(lines: Lines, line: Line | None, rival: Line | None, column: str = "token_goodput") -> Spread | None:
    """line over rival, seed by seed; None without a common seed, or where the rival has nothing."""
    if line is None or rival is None:
        return None
    values = [
        lines[line][seed][column] / row[column]
        for seed, row in lines[rival].items()
        if seed in lines[line] and row[column] and lines[line][seed][column] is not None
    ]
    return Spread.of(values, rival.label)


def measure(lines: Lines, objective: str, name: str) -> Spread | None:
    """One of the measures that have an aim; None where its rows are missing."""
    line = ours(lines, objective)
    if line is None:
        return None
    rows = list(lines[line].values())
    match name:
        case "jitserve":
            return ratio(lines, line, best(lines, "token_goodput", is_jitserve))
        case "rival":
            return ratio(lines, line, best(lines, "token_goodput", is_rival))
        case "bound":
            bounded = [row for row in rows if row["bound_token_goodput"]]
            return Spread.of([row["token_goodput"] / row["bound_token_goodput"] for row in bounded])
        case "attainment":
            return Spread.of([row["attainment"] for row in rows if row["attainment"] is not None])
        case "attained":
            return ratio(lines, line, best(lines, "attainment", is_rival), "attainment")
        case "worst":
            return Spread.of(
                [row["worst_class_attainment"] for row in rows if row["worst_class_attainment"] is not None]
            )
        case "ttft":
            return Spread.of([row["ttft_p95_s"] for row in rows if row["ttft_p95_s"] is not None])
        case "tbt":
            return Spread.of([row["tbt_p99_s"] for row in rows if row["tbt_p99_s"] is not None])
        case _:
            raise ValueError(f"no such measure: {name!r}")


def is_met(spread: Spread, aim: float, name: str) -> bool:
    """Whether the mean reaches an aim."""
    return spread.mean <= aim if name in AT_MOST else spread.mean >= aim


@dataclass(frozen=True, slots=True)
class Removal:
    """What our policy lost or won with a part changed. goodput, attainment: ratio and difference; means over all."""

    part: str
    objective: str
    load: float
    goodput: float
    attainment: float
    worst_class: float


def part_of(line: Line) -> str:
    """What is different in an ablation line, in words."""
    if line.knowledge == "none":
        return "no predictor"
    if line.knowledge == "true":
        return "clairvoyant"
    changes = json.loads(line.switches)
    return ", ".join(
        f"without {name}" if value is False else f"with {name}" if value is True else f"{name}={value}"
        for name, value in changes.items()
    )


def removals(rows: Sequence[Row]) -> list[Removal]:
    """Each ablation line against the complete policy, averaged over traces, engines and common seeds."""
    found: dict[tuple[str, str, float], list[tuple[float, float, float]]] = {}
    for place, lines in grouped(rows).items():
        for line in sorted(lines):
            whole = ours(lines, line.objective)
            if line.role != "ablation" or whole is None:
                continue
            for seed, row in lines[line].items():
                full = lines[whole].get(seed)
                if full is not None and full["token_goodput"] and full["attainment"] is not None:
                    found.setdefault((part_of(line), line.objective, place.load), []).append(
                        (
                            row["token_goodput"] / full["token_goodput"],
                            row["attainment"] - full["attainment"],
                            row["worst_class_attainment"] - full["worst_class_attainment"],
                        )
                    )
    return [
        Removal(*key, *(statistics.fmean(column) for column in zip(*values, strict=True)))
        for key, values in found.items()
    ]
