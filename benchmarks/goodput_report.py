"""The file that benchmarks.goodput writes rows into, and the report that it makes of it.

The report is Markdown with pictures in a folder of its name; in a file that exists it goes between two marks, so that
what people wrote around them stays.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.goodput_comparison import AIMS, grouped
from benchmarks.goodput_tables import (
    ablation_markdown,
    aims_markdown,
    choices_markdown,
    comparison_markdown,
    low_load_markdown,
    policies_markdown,
    replicas_markdown,
    summary_csv,
)
from tempo_router.errors import ConfigError
from tempo_router.simulation.experiment import write_atomically
from tempo_router.simulation.rows import columns_markdown

_FIELDS = ("complete", "conditions", "failures", "replicas_needed", "choices", "rows")
"""Of the file; others are `further`."""
BEGIN_MARK = "<!-- benchmarks.goodput: from here to the closing mark the text is generated -->"
END_MARK = "<!-- benchmarks.goodput: end of the generated text -->"


@dataclass(slots=True)
class Results:
    """What has been measured so far, and where it is kept. Every change is written at once, whole.

    is_complete: whether all that was planned is there, as written last.
    further: what else a benchmark found, by name; no table shows it. Kept as it was written.
    """

    path: Path
    conditions: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    needs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    choices: list[Mapping[str, Any]] = field(default_factory=list)
    is_complete: bool = False
    further: dict[str, Any] = field(default_factory=dict)

    def write(self, *, is_complete: bool) -> None:
        """Replace the file."""
        self.is_complete = is_complete
        content = {
            "complete": is_complete,
            "conditions": dict(self.conditions),
            "failures": self.failures,
            "replicas_needed": self.needs,
            "choices": self.choices,
            "rows": self.rows,
            **self.further,
        }
        try:
            write_atomically(self.path, json.dumps(content, allow_nan=False, indent=None, separators=(",", ":")) + "\n")
        except OSError as e:
            raise ConfigError(f"{self.path}: cannot be written: {e.strerror or e}") from e


def read_results(path: Path) -> Results:
    """A file of an earlier run. Raises ConfigError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(
            path,
            content["conditions"],
            rows=content["rows"],
            needs=content["replicas_needed"],
            failures=content["failures"],
            choices=content["choices"],
            is_complete=content["complete"],
            further={name: found for name, found in content.items() if name not in _FIELDS},
        )
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from e
    except KeyError as e:
        raise ConfigError(
            f"{path}: not a result of benchmarks.goodput: it has no {e}; files of tempo-router simulate have rows"
            " alone, of which no report is made"
        ) from e
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{path}: not a result of benchmarks.goodput: {type(e).__name__}: {e}") from e


def report_markdown(results: Sequence[Results], pictures: Mapping[str, Sequence[str]], detail_load: float) -> str:
    """Conditions, tables and pictures. pictures: paths as a reader of the report follows them, by kind."""
    rows = [row for one in results for row in one.rows]
    needs = [need for one in results for need in one.needs]
    failures = [failure for one in results for failure in one.failures]
    parts = ["## Conditions", _conditions_markdown(results)]
    partial = [f"`{one.path.name}` ({len(one.rows)} runs)" for one in results if not one.is_complete]
    if partial:
        parts.insert(0, f"**INCOMPLETE: not all runs that were planned are here. Partial: {', '.join(partial)}.**")
    if failures:
        names = sorted({f"`{failure['policy']}` ({failure['error']})" for failure in failures})
        parts.append(f"**{len(failures)} cells failed and are missing below:** {'; '.join(names)}.")
    # What we aim at is for half an hour of simulated traffic.
    has_aims = not any("live" in one.conditions for one in results)
    comparison = comparison_markdown(rows, AIMS if has_aims else {})
    if comparison:
        parts += ["## Comparison", _COMPARISON_NOTE, comparison]
    choices = [choice for one in results for choice in one.choices]
    if choices:
        parts += ["## Settings of the policies", _CHOICES_NOTE, choices_markdown(choices)]
    aims = aims_markdown(rows) if has_aims else ""
    if aims:
        note = "Mean over seeds (least..most); the rival is named, the best of all at that place; **bold**: aim missed."
        parts += ["## Aims", note, aims]
    parts += _pictures("## Over the load", pictures.get("load", ()), _LOAD_NOTE)
    parts += ["## All policies", _POLICIES_NOTE, policies_markdown(rows, detail_load)]
    parts += _pictures(
        "## By class", pictures.get("classes", ()), "Policies by good tokens/s; italics: knows the future."
    )
    note = "Curves end below 1 where units were refused or given up. Colours as above; grey: all other policies."
    parts += _pictures("## Distributions", pictures.get("distributions", ()), note)
    low = low_load_markdown(rows)
    if low:
        parts += ["## Up to 0.9x", low]
    ablation = ablation_markdown(rows)
    if ablation:
        parts += ["## What each part is worth", ablation, *_images(pictures.get("ablation", ()))]
    if needs:
        note = (
            f"For {100 * needs[0]['wanted']:.0f} % attainment over all units at a fixed rate of arrivals, which is a"
            " multiple of the saturated throughput of one replica."
        )
        parts += ["## Replicas needed", note, replicas_markdown(needs)]
    parts += ["## Columns of the rows", columns_markdown()]
    return "\n\n".join(part for part in parts if part)


_LOAD_NOTE = (
    "Lines are means over seeds, named where they end; bars at our points: least and most. In colour: our policy and"
    " the rivals that lead by tokens, attainment or worst class, or are the better JITServe; grey: all others; dotted:"
    " knows the future; dashed: upper bound."
)
_POLICIES_NOTE = (
    "Means over seeds, for each engine and trace by itself: all policies that ran there.\n\n"
    "† knows true lengths: no rival in practice. ‡ our own fallback: no rival either. slots: of a replica; *kept*:"
    " hopeless work went on as best effort, else it was dropped. 1:1 and 1:8: weights of prompt and output tokens."
    " What is good is per second of arrivals, all tokens are per second of the whole run, which ends later: the one may"
    " exceed the other, and is no share of it."
)
_COMPARISON_NOTE = (
    "Means over seeds. Rivals are those that could be used in practice, the best at that place by the measure itself,"
    " and named. ✓ and ✗: aim met or missed; unmarked: no aim at that load. Below: how often each aim is met, then all"
    " figures."
)
_CHOICES_NOTE = (
    "Chosen by good tokens/s, on another order of the trace's units and not on the runs that are compared. *kept*:"
    " hopeless work goes on as best effort, else it is dropped. Policies that are not listed run with the default."
)


def _conditions_markdown(results: Sequence[Results]) -> str:
    lines = [line for one in results for line in _conditions_of(one)]
    saturated = {
        (row["trace"], place.engine): row["saturated_tokens_per_s"]
        for place, seeds_by_line in grouped(row for one in results for row in one.rows).items()
        for seeds in seeds_by_line.values()
        for row in seeds.values()
    }
    listed = ", ".join(f"{trace} on {engine} {rate:,.0f}" for (trace, engine), rate in saturated.items())
    return "\n".join([*lines, f"- 1.0x, in output tokens/s: {listed}."])


def _conditions_of(results: Results) -> list[str]:
    told = results.conditions
    rows = results.rows
    versions = f"tempo {told['tempo']}, Python {told['python']}, numpy {told['numpy']}"
    scales = ("time_scale", "kv_scale", "slo_scale")
    settings = [f"{name.replace('_', ' ')} {told[name]:g}" for name in scales if told[name] != 1.0]
    if told["window_s"] is not None:
        settings.append(f"first {told['window_s']:g} s of each trace")
    if told["slo_unloaded"]:
        factors = " and ".join(f"{factor:g}x" for factor in told["slo_unloaded"])
        settings.append(f"targets {factors} of what each unit takes alone on an idle replica")
    if told["tuned"] is not None:
        part = f"seed {told['tuned']['seed']} at {told['tuned']['load']:g}x"
        if told["tuned"]["window_s"] is not None:
            part += f", first {told['tuned']['window_s']:g} s"
        also = f" and {', '.join(told['tuned']['also'])}" if told["tuned"]["also"] else ""
        slots = "/".join(str(count) for count in told["tuned"]["slots"])
        settings.append(f"rivals{also} with the best of {slots} slots, dropping or keeping hopeless work ({part})")
    kind, live = "Simulated", told.get("live")
    if live is not None:
        kind = "Live"
        settings.append(
            f"{live['seconds']:g} s of arrivals each, cut {live['limit_s']:g} s after the last,"
            f" lengths and deadlines x {live['scale']:g}"
        )
    conditions = ", ".join([f"shedding of hopeless work {told['sheds']}", *settings])
    engines = ", ".join(f"`{name}`" for name in told["profiles"])
    traces = "; ".join(f"`{name}` ({size})" for name, size in told["traces"].items())
    names = ("seed", "load", "objective", "policy")
    ran = "; ".join(f"{name} {_listed(row[name] for row in rows)}" for name in names)
    return [
        f"- {kind}, {told['date']}: {versions}; {len(rows)} runs: {ran}; {conditions}.",
        f"- Engines: {engines}; replicas {told['replicas']}, {told['slots']} slots each.",
        f"- Traces: {traces}.",
    ]


def _listed(values: Iterable[Any]) -> str:
    """What occurs in rows, with how many rows have it, where they differ: not every policy runs with every seed."""
    counts = Counter(values)
    is_even = len(set(counts.values())) <= 1
    named = (f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(counts))
    return ", ".join(name if is_even else f"{name} ({count})"
                     for name, (_, count) in zip(named, sorted(counts.items()), strict=True)) or "none"  # fmt: skip


def _pictures(title: str, paths: Sequence[str], note: str) -> list[str]:
    return [title, note, *_images(paths)] if paths else []


def _images(paths: Iterable[str]) -> list[str]:
    return [f"![{Path(path).stem.replace('-', ' ')}]({path})" for path in paths]


def write_report(path: Path, results: Sequence[Results], detail_load: float = 1.5) -> None:
    """Tables and pictures into the Markdown file (between its marks, if it has them) and the folder of its name."""
    # Only who draws needs it, and it takes a second.
    from benchmarks.goodput_plots import draw_all

    rows = [row for one in results for row in one.rows]
    if not rows:
        raise ConfigError("there are no rows to report")
    loads = {row["load"] for row in rows}
    detail_load = detail_load if detail_load in loads else max(loads)
    _between_marks(path, "")
    folder = path.with_suffix("")
    try:
        drawn = draw_all(rows, folder, detail_load)
        write_atomically(folder / "summary.csv", summary_csv(rows, is_complete=all(one.is_complete for one in results)))
        pictures = {kind: [f"{folder.name}/{picture.name}" for picture in paths] for kind, paths in drawn.items()}
        generated = f"{BEGIN_MARK}\n\n{report_markdown(results, pictures, detail_load)}\n\n{END_MARK}"
        write_atomically(path, _between_marks(path, generated))
    except OSError as e:
        raise ConfigError(f"{path}: the report cannot be written: {e.filename or path}: {e.strerror or e}") from e


def check_report(path: Path, others: Iterable[Path] = ()) -> None:
    """Raises ConfigError for a report that could not be written, before anything is run for it.

    others: files that are read or written besides.
    """
    folder = path.with_suffix("")
    taken = {path.resolve(), folder.resolve()} & {other.resolve() for other in others}
    if taken:
        raise ConfigError(f"--report {path}: {min(taken)} is read or written already; name another file")
    if path.is_dir() or folder == path:
        raise ConfigError(f"--report {path}: name a Markdown file, such as {folder / 'goodput.md'}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for written in (path.parent, folder):
            with tempfile.TemporaryFile(dir=written):
                pass
    except OSError as e:
        raise ConfigError(f"--report {path}: cannot be written: {e.filename or path}: {e.strerror or e}") from e
    _between_marks(path, "")


def _between_marks(path: Path, generated: str) -> str:
    if not path.exists():
        return f"# Results\n\n{generated}\n"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}; name another --report") from e
    begin, end = text.find(BEGIN_MARK), text.find(END_MARK)
    if begin < 0 or end < begin:
        raise ConfigError(f"{path}: has no marks between which to write; add the lines {BEGIN_MARK!r} and {END_MARK!r}")
    return text[:begin] + generated + text[end + len(END_MARK) :]
