"""What goodput_comparison finds in the rows of benchmarks.goodput, as tables in Markdown, and as CSV."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.goodput_comparison import (
    AIMS,
    AT_MOST,
    LOW_LOAD,
    LOW_LOAD_AIM,
    OURS,
    RATIOS,
    Removal,
    Row,
    Spread,
    best,
    grouped,
    is_met,
    is_rival,
    mean,
    measure,
    ours,
    ratio,
    removals,
    settings_of,
)
from tempo_router.simulation.experiment import REFERENCE_SLOTS

HEADINGS: Mapping[str, str] = {
    "jitserve": "÷ better JITServe",
    "rival": "÷ best rival",
    "bound": "of the bound",
    "attainment": "attainment",
    "attained": "attainment ÷ best rival's",
    "worst": "worst class",
    "ttft": "TTFT P95",
    "tbt": "TBT P99",
}
"""All measures, in the order of a table."""

TITLES: Mapping[tuple[str, str], str] = {
    ("token", "jitserve"): "Token objective: good tokens/s over the better of the JITServe forms",
    ("token", "rival"): "Token objective: good tokens/s over the best practical rival",
    ("token", "bound"): "Token objective: share of the clairvoyant upper bound",
    ("token", "attained"): "Token objective: attainment over that of the best practical rival",
    ("token", "ttft"): "Token objective: TTFT P95 of served streams",
    ("token", "tbt"): "Token objective: TBT P99 of streams",
    ("balanced", "rival"): "Balanced objective: good tokens/s over the best practical rival",
    ("balanced", "attainment"): "Balanced objective: attainment",
    ("balanced", "attained"): "Balanced objective: attainment over that of the best practical rival",
    ("balanced", "worst"): "Balanced objective: attainment of the worst-served class",
    ("balanced", "ttft"): "Balanced objective: TTFT P95 of served streams",
    ("balanced", "tbt"): "Balanced objective: TBT P99 of streams",
}


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left-aligned text."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join(lines)


def aims_markdown(rows: Sequence[Row]) -> str:
    """All measures that have an aim: traces down, loads across; what misses its aim is bold."""
    places = grouped(rows)
    sections: list[str] = []
    for (objective, name), aims in AIMS.items():
        loads = [load for load in aims if any(place.load == load for place in places)]
        body: list[list[str]] = []
        for engine, trace in dict.fromkeys((place.engine, place.trace) for place in places):
            cells = {
                place.load: _aim_cell(measure(lines, objective, name), aims[place.load], name)
                for place, lines in places.items()
                if (place.engine, place.trace) == (engine, trace) and place.load in aims
            }
            if any(cells.values()):
                body.append([engine, trace, *(cells.get(load, "") or "-" for load in loads)])
        if body:
            sign = "≤" if name in AT_MOST else "≥"
            body.append(["", "*aim*", *(f"*{sign} {_figure(aims[load], name)}*" for load in loads)])
            header = ["engine", "trace", *(f"{load:g}x" for load in loads)]
            sections.append(f"**{TITLES[objective, name]}**\n\n{markdown_table(header, body)}")
        elif name == "bound" and any(ours(places[place], objective) for place in places if place.load in aims):
            told = ", ".join(f"≥ {_figure(aims[load], name)} at {load:g}x" for load in loads)
            sections.append(f"**{TITLES[objective, name]}**\n\nNot computed (`--bound`, `--add-bound`); aim: {told}.")
    return "\n\n".join(sections)


def comparison_markdown(rows: Sequence[Row], all_aims: Mapping[tuple[str, str], Mapping[float, float]] = AIMS) -> str:
    """Everything that is aimed at in two tables: the aims with how often they are met, and all figures by place.

    ✓ and ✗: the aim of that load is met or missed; without a mark there is none. all_aims: as AIMS.
    """
    places = grouped(rows)
    counts: dict[tuple[str, str, float], tuple[int, int]] = {}
    body: list[list[str]] = []
    for place, lines in places.items():
        for objective in dict.fromkeys(objective for objective, _ in AIMS):
            found = {name: measure(lines, objective, name) for name in HEADINGS}
            if not any(found.values()):
                continue
            cells = []
            for name, spread in found.items():
                aim = all_aims.get((objective, name), {}).get(place.load)
                cells.append(_marked(spread, aim, name))
                if spread is not None and aim is not None:
                    met, of = counts.get((objective, name, place.load), (0, 0))
                    counts[objective, name, place.load] = met + is_met(spread, aim, name), of + 1
            body.append([place.engine, place.trace, f"{place.load:g}x", objective, *cells])
    if not body:
        return ""
    figures = markdown_table(["engine", "trace", "load", "objective", *HEADINGS.values()], body)
    return f"{_met_markdown(counts)}\n\n{figures}" if counts else figures


def _met_markdown(counts: Mapping[tuple[str, str, float], tuple[int, int]]) -> str:
    loads = sorted({load for _, _, load in counts})
    body: list[list[str]] = []
    for (objective, name), aims in AIMS.items():
        cells = [_met_cell(counts, objective, name, load, aims.get(load)) for load in loads]
        if any(cells):
            body.append([TITLES[objective, name], *cells])
    return markdown_table(["aim", *(f"{load:g}x" for load in loads)], body)


def _met_cell(
    counts: Mapping[tuple[str, str, float], tuple[int, int]], objective: str, name: str, load: float, aim: float | None
) -> str:
    if aim is None:
        return ""
    text = f"{'≤' if name in AT_MOST else '≥'} {_figure(aim, name)}"
    if (objective, name, load) in counts:
        met, of = counts[objective, name, load]
        return f"{text}, met {met} of {of}"
    # What costs minutes is left out often; what it was to show is not to be forgotten.
    is_run = any((objective, other, load) in counts for other in HEADINGS)
    return f"{text}, not computed" if name == "bound" and is_run else ""


def _marked(spread: Spread | None, aim: float | None, name: str) -> str:
    if spread is None:
        return "-"
    mark = "" if aim is None else " ✓" if is_met(spread, aim, name) else " ✗"
    against = f" `{spread.against}`" if spread.against else ""
    return f"{_figure(spread.mean, name)}{against}{mark}"


def _aim_cell(spread: Spread | None, aim: float, name: str) -> str:
    if spread is None:
        return ""
    text = _figure(spread.mean, name)
    if not is_met(spread, aim, name):
        text = f"**{text}**"
    if spread.most > spread.least:
        text += f" ({_figure(spread.least, name)}..{_figure(spread.most, name)})"
    return f"{text} `{spread.against}`" if spread.against else text


def _figure(value: float, name: str) -> str:
    if name in AT_MOST:
        return f"{1000 * value:.0f} ms"
    return f"{value:.3f}" if name in RATIOS else f"{100 * value:.1f} %"


def low_load_markdown(rows: Sequence[Row]) -> str:
    """Up to 0.9x: how far ours is from the best policy, bold if too far; the best is any that could be had."""
    body: list[list[str]] = []
    for place, lines in grouped(rows).items():
        if place.load > LOW_LOAD:
            continue
        for line in sorted(line for line in lines if line.role == "ours"):
            cells = [place.engine, place.trace, f"{place.load:g}x", line.label]
            for column in ("token_goodput", "attainment"):
                found = ratio(lines, line, best(lines, column, is_rival), column)
                if found is None:
                    cells.append("-")
                    continue
                text = f"{100 * (found.mean - 1):+.2f} %"
                cells.append(f"{text if found.mean >= LOW_LOAD_AIM else f'**{text}**'} `{found.against}`")
            body.append(cells)
    if not body:
        return ""
    header = [
        "engine",
        "trace",
        "load",
        "policy",
        "good tokens/s against the best rival",
        "attainment against the best rival",
    ]
    return markdown_table(header, body)


def policies_markdown(rows: Sequence[Row], load: float) -> str:
    """All lines at one load, best first: a table for each engine and trace, means over the seeds of a line.

    Figures of different traces or targets have no common mean, and not every policy runs on each of them.
    """
    sections: list[str] = []
    for place, lines in grouped(rows).items():
        listed = [line for line in sorted(lines) if line.role != "ablation"]
        if place.load != load or not listed:
            continue
        body = [
            [
                f"**{line.label}**"
                if line.role == "ours"
                else line.label + {"oracle": " †", "own": " ‡"}.get(line.role, ""),
                settings_of(lines[line].values()),
                str(len(lines[line])),
                *(_cell(mean(lines[line], column), kind) for column, _, kind in _POLICY_COLUMNS),
            ]
            for line in sorted(listed, key=lambda line: -(mean(lines[line], "token_goodput") or 0.0))
        ]
        header = ["policy", "slots", "seeds", *(head for _, head, _ in _POLICY_COLUMNS)]
        sections.append(f"**{place.engine}, {place.trace}, {load:g}x**\n\n{markdown_table(header, body)}")
    return "\n\n".join(sections)


_POLICY_COLUMNS = (
    ("token_goodput", "good tokens/s", "count"),
    ("request_goodput", "good units/s", "rate"),
    ("program_goodput", "good programs/s", "rate"),
    ("attainment", "attainment", "share"),
    ("worst_class_attainment", "worst class", "share"),
    ("good_tokens_1_1", "1:1 weights", "count"),
    ("good_tokens_1_8", "1:8 weights", "count"),
    ("service_gain", "service gain/s", "count"),
    ("throughput", "all tokens/s of the run", "count"),
    ("ttft_p95_s", "TTFT P95", "ms"),
    ("tbt_p99_s", "TBT P99", "ms"),
    ("jain_by_tenant", "Jain", "index"),
)


def _cell(value: float | None, kind: str) -> str:
    if value is None:
        return "-"
    match kind:
        case "count":
            return f"{value:,.0f}"
        case "rate":
            return f"{value:.3f}"
        case "share":
            return f"{100 * value:.1f} %"
        case "ms":
            return f"{1000 * value:,.0f} ms"
        case _:
            return f"{value:.3f}"


def ablation_markdown(rows: Sequence[Row]) -> str:
    """Parts down, loads across; most important part first."""
    sections: list[str] = []
    all_removals = removals(rows)
    for objective in dict.fromkeys(removal.objective for removal in all_removals):
        here = {(one.part, one.load): one for one in all_removals if one.objective == objective}
        loads = sorted({load for _, load in here})
        parts = sorted(
            {part for part, _ in here},
            key=lambda part: min(one.goodput for (name, _), one in here.items() if name == part),
        )
        body = [[part, *(_removal_cell(here.get((part, load))) for load in loads)] for part in parts]
        title = (
            f"**{objective} objective: good tokens/s, the complete policy = 100 % (attainment, worst class: points)**"
        )
        sections.append(title + "\n\n" + markdown_table(["changed", *(f"{load:g}x" for load in loads)], body))
    return "\n\n".join(sections)


def _removal_cell(removal: Removal | None) -> str:
    if removal is None:
        return "-"
    points = f"{100 * removal.attainment:+.1f}, {100 * removal.worst_class:+.1f}"
    return f"{100 * removal.goodput:.1f} % ({points})"


def replicas_markdown(needs: Sequence[Mapping[str, Any]]) -> str:
    """Replicas for 95 % attainment: ours and the rivals, by rate of arrivals."""
    body = []
    for need in needs:
        found = need["replicas"]
        body.append(
            [
                need["trace"],
                need["profile"],
                f"{need['rate']:g}",
                need["policy"] + (f" ({need['objective']})" if need["policy"] == OURS else ""),
                str(found) if found is not None else f"> {need['most']}",
                "-" if need["attainment"] is None else f"{100 * need['attainment']:.1f} %",
            ]
        )
    return markdown_table(
        ["trace", "engine", "arrivals ÷ one replica's capacity", "policy", "replicas", "attainment there"], body
    )


def choices_markdown(choices: Sequence[Mapping[str, Any]]) -> str:
    """What each policy runs with on each trace and engine, and what that is worth against the default setting."""
    body = []
    for choice in choices:
        found = {(one["slots"], one["sheds"]): one["token_goodput"] for one in choice["tried"]}
        best_, default = found[choice["slots"], choice["sheds"]], found.get((REFERENCE_SLOTS, True))
        scales = [f"{name} x {choice[key]:g}" for name, key in (("time", "time_scale"), ("KV", "kv_scale"))
                  if choice[key] != 1.0]  # fmt: skip
        body.append(
            [
                ", ".join([choice["profile"], *scales]),
                choice["trace"],
                choice["policy"] + (f" ({choice['objective']})" if choice["objective"] != "token" else ""),
                settings_of([choice]),
                f"{best_:,.0f}",
                "-" if not default else f"{100 * (best_ / default - 1):+.1f} %",
            ]
        )
    header = ["engine", "trace", "policy", "slots", "good tokens/s", f"against {REFERENCE_SLOTS} slots, dropping"]
    return markdown_table(header, body)


def summary_csv(rows: Sequence[Row], *, is_complete: bool) -> str:
    """Means over seeds of every line at every place, for spreadsheets; the first column: all planned runs are there."""
    columns = [*(column for column, _, _ in _POLICY_COLUMNS), "bound_token_goodput", "wall_s"]
    out = [",".join(["complete", "engine", "trace", "load", "line", "role", "slots", "seeds", *columns])]
    for place, lines in grouped(rows).items():
        for line in sorted(lines):
            values = [mean(lines[line], column) for column in columns]
            settings = settings_of(lines[line].values())
            seeds = str(len(lines[line]))
            complete = str(is_complete).lower()
            names = [complete, place.engine, place.trace, f"{place.load:g}", line.label, line.role, settings, seeds]
            out.append(
                ",".join(
                    [
                        *(f'"{name}"' if "," in name else name for name in names),
                        *("" if v is None else f"{v:.6g}" for v in values),
                    ]
                )
            )
    return "\n".join(out) + "\n"
