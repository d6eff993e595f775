"""Pictures of benchmarks.goodput: lines are named where they end, our policy stands out, weak rivals are grey.

A policy has the same colour in every picture of one result file. Files are PNG of few colours, small enough for a
repository, without dates: equal rows give equal files.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from benchmarks.goodput_comparison import (
    Line,
    Lines,
    Row,
    best,
    grouped,
    is_jitserve,
    is_rival,
    mean,
    ours,
    place_of,
    removals,
)
from tempo_router.simulation.rows import CLASSES_WITH_TARGET, LATENESS_GRID, TTFT_GRID_S

OUR_COLOURS: Mapping[str, str] = {"token": "#0b5cad", "balanced": "#0a8f6b", "request": "#5b7f00", "gain": "#00828a"}
OWN_COLOURS: Mapping[str, str] = {"token": "#6f9fd0", "balanced": "#6cbfa3"}
RIVAL_COLOURS = ("#c2410c", "#7e22ce", "#be185d", "#a16207", "#b91c1c", "#4d4d9e")
GREY = "#c4c4c4"
GREY_TEXT = "#8a8a8a"
INK = "#222222"
CLASS_COLOURS: Mapping[str, str] = {"latency": "#3b82c4", "deadline": "#e0a030", "program": "#6b4fa0"}
CLASS_TITLES: Mapping[str, str] = {"latency": "streams", "deadline": "deadline answers", "program": "programs"}

_DPI = 110
_COLOURS = 96

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}


def slug(*names: str) -> str:
    """A file name out of names."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(names).lower()).strip("-")


def draw_all(rows: Sequence[Row], folder: Path, detail_load: float = 1.5) -> dict[str, list[Path]]:
    """Every picture that the rows suffice for, by kind.

    Classes and distributions are drawn for the first trace of each engine, at detail_load or else the highest load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[Path]] = {"load": [], "classes": [], "distributions": [], "ablation": []}
    places = grouped(rows)
    colours = line_colours(rows)
    detailed: set[str] = set()
    for engine, trace in dict.fromkeys((place_of(row).engine, row["trace"]) for row in rows):
        by_load = {
            place.load: lines for place, lines in places.items() if (place.engine, place.trace) == (engine, trace)
        }
        name = slug(trace, engine)
        if len(by_load) > 1:
            drawn["load"].append(
                _save(load_figure(f"{trace}, {engine}", by_load, colours), folder / f"{name}-load.png")
            )
        if engine in detailed:
            continue
        detailed.add(engine)
        load = detail_load if detail_load in by_load else max(by_load)
        title = f"{trace}, {engine}, {load:g}x"
        drawn["classes"].append(_save(class_figure(title, by_load[load]), folder / f"{name}-classes.png"))
        figure = distribution_figure(title, by_load[load], colours)
        drawn["distributions"].append(_save(figure, folder / f"{name}-distributions.png"))
    for objective in dict.fromkeys(removal.objective for removal in removals(rows)):
        figure = ablation_figure(rows, objective)
        drawn["ablation"].append(_save(figure, folder / f"ablation-{slug(objective)}.png"))
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=_DPI)
    image = Image.open(buffer).convert("RGB")
    # Few hues and their blends with white: with a palette the file has a third of the size and looks the same.
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def highlighted(lines: Lines) -> list[Line]:
    """The rivals worth a colour at one place: best by tokens, attainment, worst class, and the better JITServe."""
    found = [
        best(lines, "token_goodput", is_rival),
        best(lines, "token_goodput", is_jitserve),
        best(lines, "attainment", is_rival),
        best(lines, "worst_class_attainment", is_rival),
    ]
    return list(dict.fromkeys(line for line in found if line is not None))


def line_colours(rows: Sequence[Row]) -> dict[Line, str]:
    """Colours of our lines and of the rivals that lead most often in overload; all others are grey."""
    places = grouped(rows)
    leads: dict[Line, int] = {}
    ours_: dict[Line, str] = {}
    loaded = {place: lines for place, lines in places.items() if place.load > 1.0} or places
    for lines in loaded.values():
        for line in highlighted(lines):
            leads[line] = leads.get(line, 0) + 1
    for lines in places.values():
        for line in lines:
            if line.role == "ours":
                ours_[line] = OUR_COLOURS.get(line.objective, INK)
            elif line.role == "own":
                ours_[line] = OWN_COLOURS.get(line.objective, GREY_TEXT)
    ranked = sorted(leads, key=lambda line: (-leads[line], line))
    return {**ours_, **dict(zip(ranked, RIVAL_COLOURS, strict=False))}


# ---- goodput and attainment against load


def load_figure(title: str, by_load: Mapping[float, Lines], colours: Mapping[Line, str]) -> Figure:
    """Good tokens/s, attainment and worst class over the load; bars at our points: least and most of the seeds."""
    panels = (
        ("token_goodput", "good tokens/s", 1.0),
        ("attainment", "attainment, %", 100.0),
        ("worst_class_attainment", "worst class, %", 100.0),
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12.4, 4.2), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=INK)
        for axes, (column, name, scale) in zip(figure.subplots(1, 3), panels, strict=True):
            _load_panel(axes, column, scale, by_load, colours)
            axes.set_title(name)
            axes.set_xlabel("load, as a multiple of the saturated throughput")
            if scale == 100.0:
                axes.set_ylim(-2, 103)
            else:
                axes.set_ylim(bottom=0)
        for axes in figure.axes:
            _place_labels(axes)
    return figure


def _load_panel(
    axes: Axes, column: str, scale: float, by_load: Mapping[float, Lines], colours: Mapping[Line, str]
) -> None:
    loads = sorted(by_load)
    names = sorted({line for lines in by_load.values() for line in lines if line.role != "ablation"})
    for line in sorted(names, key=lambda line: (line in colours, line.role == "ours")):
        points = [
            (load, scale * value)
            for load in loads
            if line in by_load[load] and (value := mean(by_load[load][line], column)) is not None
        ]
        if not points:
            continue
        colour = colours.get(line, GREY)
        is_ours = line.role == "ours"
        is_oracle = line.role == "oracle"
        xs, ys = zip(*points, strict=True)
        axes.plot(
            xs,
            ys,
            color="#999999" if is_oracle else colour,
            linewidth=2.6 if is_ours else 1.5 if line in colours else 0.9,
            linestyle=":" if is_oracle else "-",
            marker="o" if is_ours else None,
            markersize=4,
            zorder=5 if is_ours else 3 if line in colours else 1,
        )
        if is_ours:
            for load, _ in points:
                values = [scale * row[column] for row in by_load[load][line].values() if row[column] is not None]
                axes.vlines(load, min(values), max(values), color=colour, linewidth=1.2, zorder=5)
        if line in colours or is_oracle:
            _name(axes, xs[-1], ys[-1], line.label, colours.get(line, GREY_TEXT), is_bold=is_ours)
    if column == "token_goodput":
        _draw_bound(axes, by_load)
    # A load that is near another one has no number of its own.
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.set_xlim(loads[0] - 0.03, loads[-1] + 0.02 * (loads[-1] - loads[0]))


def _draw_bound(axes: Axes, by_load: Mapping[float, Lines]) -> None:
    points = [
        (load, value)
        for load, lines in sorted(by_load.items())
        if (line := ours(lines, "token")) is not None
        and (value := mean(lines[line], "bound_token_goodput")) is not None
    ]
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=INK, linewidth=1.1, linestyle="--", zorder=2)
        _name(axes, xs[-1], ys[-1], "upper bound", INK)


def _name(axes: Axes, x: float, y: float, text: str, colour: str, *, is_bold: bool = False) -> None:
    """Remember a label for the end of a line; _place_labels puts it where no other is."""
    marked: list[Any] = getattr(axes, "tempo_labels", [])
    marked.append((x, y, text, colour, is_bold))
    axes.tempo_labels = marked  # type: ignore[attr-defined]


def _place_labels(axes: Axes, line_height: float = 0.062) -> None:
    """Labels to the right of the axes at their lines' heights, pushed apart, joined by a thin line."""
    marked = sorted(getattr(axes, "tempo_labels", []), key=lambda label: label[1])
    if not marked:
        return
    low, high = axes.get_ylim()
    heights = spread_apart([(y - low) / (high - low) for _, y, *_ in marked], line_height)
    left, right = axes.get_xlim()
    for (x, y, text, colour, is_bold), height in zip(marked, heights, strict=True):
        start = ((x - left) / (right - left), (y - low) / (high - low))
        axes.annotate(
            text,
            xy=start,
            xytext=(1.045, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            fontweight="bold" if is_bold else "normal",
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0.0, 0.5),
            },
        )


def spread_apart(wanted: Sequence[float], distance: float, low: float = 0.0, high: float = 0.97) -> list[float]:
    """Ascending heights near the ascending `wanted` ones, at least `distance` apart, within low..high if they fit."""
    # Groups of labels that touch: (sum of wanted heights of their first label, count, height of the first).
    groups: list[list[float]] = []
    for value in wanted:
        groups.append([value, 1])
        while len(groups) > 1:
            (before, count), (after, more) = groups[-2:]
            if _first(before, count, distance, low, high) + count * distance <= _first(
                after, more, distance, low, high
            ):
                break
            groups[-2:] = [[(before * count + (after - count * distance) * more) / (count + more), count + more]]
    heights: list[float] = []
    for start, count in groups:
        first = _first(start, count, distance, low, high)
        heights.extend(first + index * distance for index in range(int(count)))
    return heights


def _first(start: float, count: float, distance: float, low: float, high: float) -> float:
    return max(low, min(start, high - (count - 1) * distance))


# ---- classes


def class_figure(title: str, lines: Lines, most: int = 16) -> Figure:
    """Policies down, best first: good tokens/s stacked by class, then the attainment of each class."""
    ranked = sorted(
        (line for line in lines if line.role != "ablation"),
        key=lambda line: -(mean(lines[line], "token_goodput") or 0.0),
    )
    # Our policies are shown wherever they stand.
    shown = [line for rank, line in enumerate(ranked) if rank < most or line.role == "ours"]
    classes = [
        name
        for name in CLASSES_WITH_TARGET
        if any(_of_class(lines[line], "attainment_by_class", name) is not None for line in shown)
    ]
    with mpl.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(12.4, 1.2 + 0.24 * len(shown)), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=INK)
        widths = [2.2, *(1.0 for _ in classes)]
        # Where all work is best effort there is one panel, which a figure would hand over bare.
        panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]
        ys = np.arange(len(shown))
        left = np.zeros(len(shown))
        for name in classes:
            tokens = np.array([_of_class(lines[line], "token_goodput_by_class", name) or 0.0 for line in shown])
            panels[0].barh(ys, tokens, left=left, color=CLASS_COLOURS[name], height=0.72)
            left += tokens
        for y, total in zip(ys, left, strict=True):
            panels[0].text(total, y, f" {total:,.0f}", va="center", fontsize=7.5, color=INK)
        panels[0].set_title("good tokens/s, stacked by class")
        panels[0].set_xlim(0, 1.1 * max(left.max(), 1.0))
        panels[0].set_yticks(ys, [line.label for line in shown])
        panels[0].invert_yaxis()
        for tick, line in zip(panels[0].get_yticklabels(), shown, strict=True):
            tick.set_color(OUR_COLOURS.get(line.objective, INK) if line.role == "ours" else INK)
            tick.set_fontweight("bold" if line.role == "ours" else "normal")
            tick.set_fontstyle("italic" if line.role == "oracle" else "normal")
        for axes, name in zip(panels[1:], classes, strict=True):
            shares = [100 * (_of_class(lines[line], "attainment_by_class", name) or 0.0) for line in shown]
            axes.barh(ys, shares, color=CLASS_COLOURS[name], height=0.72)
            for y, share in zip(ys, shares, strict=True):
                axes.text(share, y, f" {share:.0f}", va="center", fontsize=7.5, color=INK)
            axes.set_xlim(0, 118)
            axes.set_xticks([0, 50, 100])
            axes.set_title(f"{CLASS_TITLES[name]} met, %", color=CLASS_COLOURS[name])
        for axes in panels:
            axes.tick_params(axis="y", length=0)
    return figure


def _of_class(seeds: Mapping[int, Row], column: str, name: str) -> float | None:
    values = [row[column][name] for row in seeds.values() if name in row[column]]
    return sum(values) / len(values) if values else None


# ---- distributions


def distribution_figure(title: str, lines: Lines, colours: Mapping[Line, str]) -> Figure:
    """Cumulative shares of all units: first tokens of streams; ends of the rest, as multiples of their targets."""
    panels: list[tuple[str, str, Sequence[float], str | None]] = [
        ("first tokens of streams, share of all", "after arrival", TTFT_GRID_S, None)
    ]
    panels += [
        (f"ended {CLASS_TITLES[name]}, share of all", "multiple of the target", LATENESS_GRID, name)
        for name in CLASSES_WITH_TARGET
        if name != "latency"
    ]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12.4, 3.9), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=INK)
        for axes, (name, unit, grid, slo_class) in zip(figure.subplots(1, 3), panels, strict=True):
            for line in sorted(lines, key=lambda line: (line in colours, line.role == "ours")):
                curve = _mean_curve(lines[line], slo_class)
                if curve is None or line.role == "ablation":
                    continue
                is_ours = line.role == "ours"
                axes.plot(
                    grid,
                    curve,
                    color="#999999" if line.role == "oracle" else colours.get(line, GREY),
                    linewidth=2.4 if is_ours else 1.4 if line in colours else 0.8,
                    linestyle=":" if line.role == "oracle" else "-",
                    zorder=5 if is_ours else 3 if line in colours else 1,
                )
                if line in colours or line.role == "oracle":
                    _name(axes, grid[-1], curve[-1], line.label, colours.get(line, GREY_TEXT), is_bold=is_ours)
            axes.set_title(name)
            axes.set_xlabel(unit)
            axes.set_ylim(-0.02, 1.03)
            axes.set_xlim(grid[0], grid[-1])
            if slo_class is None:
                # Only their fraction of the axis matters for labels, and that is 1 at the right end of either scale.
                axes.set_xscale("log")
                axes.set_xticks([0.01, 0.1, 1, 10, 100], ["10 ms", "0.1 s", "1 s", "10 s", "100 s"])
                axes.minorticks_off()
            else:
                axes.axvline(1.0, color="#999999", linewidth=0.8, zorder=0)
                axes.text(1.0, 1.005, " target", color=GREY_TEXT, fontsize=7.5, va="bottom")
        for axes in figure.axes:
            _place_labels(axes)
    return figure


def _mean_curve(seeds: Mapping[int, Row], slo_class: str | None) -> list[float] | None:
    curves = [row["ttft_cdf"] if slo_class is None else row["lateness_cdf"].get(slo_class) for row in seeds.values()]
    curves = [curve for curve in curves if curve]
    return [float(value) for value in np.mean(curves, axis=0)] if curves else None


# ---- ablation


def ablation_figure(rows: Sequence[Row], objective: str) -> Figure:
    """Parts down, loads across: good tokens/s relative to the complete policy; at the side, points of worst class."""
    found = [removal for removal in removals(rows) if removal.objective == objective]
    # Below saturation no part matters; the table has all loads.
    all_loads = sorted({removal.load for removal in found})
    loads = [load for load in all_loads if load >= 1.0] or all_loads
    by_part: dict[str, dict[float, Any]] = {}
    for removal in found:
        by_part.setdefault(removal.part, {})[removal.load] = removal
    parts = sorted(by_part, key=lambda part: min(removal.goodput for removal in by_part[part].values()))
    with mpl.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(2.4 + 2.6 * max(len(loads), 2), 1.3 + 0.26 * len(parts)), layout="constrained")
        figure.suptitle(
            f"{objective} objective, one part changed: good tokens/s, complete policy = 100 %  (worst class, points)",
            x=0.01,
            ha="left",
            fontsize=10,
            color=INK,
        )
        values = [100 * removal.goodput for removal in found]
        least, most = min(90.0, *values), max(102.0, *values)
        pad = 0.45 * (most - least)
        panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
        for axes, load in zip(panels, loads, strict=True):
            for y, part in enumerate(parts):
                one = by_part[part].get(load)
                if one is None:
                    continue
                share = 100 * one.goodput
                colour = OUR_COLOURS["token"] if share <= 100 else OUR_COLOURS["balanced"]
                axes.barh(y, share - 100, left=100, color=colour, height=0.7)
                axes.text(
                    most + 0.03 * (most - least),
                    y,
                    f"{share:.1f}  ({100 * one.worst_class:+.0f})",
                    va="center",
                    fontsize=7.5,
                )
            axes.axvline(100, color=INK, linewidth=0.9)
            axes.set_xlim(least - 0.02 * (most - least), most + pad)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.set_title(f"{load:g}x")
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(parts)), parts)
        panels[0].invert_yaxis()
    return figure
