"""Traces as CSV files, plain or gzip: the format that docs/workloads.md describes.

A file that was written by hand or by a script is wrong sooner or later, so every value is checked here, once, and
what is wrong is named with its file, line, column and value. The rest of the simulation trusts a `Trace`.
"""

import csv
import difflib
import gzip
import heapq
import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, assert_never, get_args

from tempo_router.errors import TraceError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.trace import Trace, TraceCall, Unit, UnitSlo

COLUMNS = (
    "request_id",
    "arrival_s",
    "app",
    "class",
    "prompt_tokens",
    "output_tokens",
    "reasoning_tokens",
    "program_id",
    "stage",
    "parents",
    "gap_s",
    "prefix_id",
    "prefix_tokens",
    "tenant",
    "slo_ttft_s",
    "slo_tbt_s",
    "slo_ttlt_s",
    "blocks",
)
REQUIRED_COLUMNS = ("request_id", "arrival_s", "class", "prompt_tokens", "output_tokens")

DEFAULT_TTFT_S = 2.0
DEFAULT_TBT_S = 0.1
DEFAULT_TTLT_S = 20.0
DEFAULT_STAGE_TTLT_S = 20.0
"""The deadline of a program without one, per stage."""

_MAX_TOKENS = 100_000_000
_MAX_SECONDS = 1e9
"""More than thirty years, and less than today's date as epoch seconds: such an arrival is a mistake, and a simulation
of it would not end."""
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)

_RowClass = Literal["latency", "throughput", "collective", "best_effort"]


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the file, its values checked one by one but not yet against other lines."""

    line: int
    request_id: str
    arrival_s: float | None
    app: str
    row_class: _RowClass
    prompt_tokens: int
    output_tokens: int
    program_id: str
    stage: int | None
    parents: tuple[str, ...]
    gap_s: float
    prefix_id: str
    prefix_tokens: int
    tenant: str
    ttft_s: float | None
    tbt_s: float | None
    ttlt_s: float | None


def read_trace(path: Path) -> Trace:
    """The trace in that file, units in order of arrival (ties in order of the file).

    A name that ends in .gz is read as gzip. Raises TraceError naming file, line, column and value.
    """
    rows = list(_rows(read_text(path), str(path)))
    if not rows:
        raise TraceError("no requests in this file; a trace needs a header row and at least one more", str(path))
    units = _Units(rows, str(path)).build()
    name = re.sub(r"\.csv$", "", unpacked_name(path), flags=re.IGNORECASE)
    return Trace(name, tuple(sorted(units, key=lambda unit: unit.arrival_s)))


def write_trace(trace: Trace, path: Path) -> None:
    """Writes the trace so that read_trace gives the same units; gzip if the name ends in .gz.

    The ids of calls are written as they are and must be unique in the trace. The same trace gives the same bytes.
    Raises TraceError if the file cannot be written or an id could not be read back.
    """
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    seen: set[str] = set()
    for unit in trace.units:
        for row in _unit_rows(unit):
            request_id = row["request_id"]
            if request_id in seen or not request_id or any(c.isspace() or c == "\0" for c in request_id):
                raise TraceError(
                    "ids of calls must be unique in a trace, not empty and without spaces",
                    str(path),
                    column="request_id",
                    value=request_id,
                )
            seen.add(request_id)
            writer.writerow(row)
    content = buffer.getvalue().encode()
    if _is_gzip(path):
        # No time and no name in the header: equal traces are equal files.
        content = gzip.compress(content, mtime=0)
    try:
        path.write_bytes(content)
    except OSError as e:
        raise TraceError(f"cannot be written: {e.strerror or e}", str(path)) from e


def read_text(path: Path) -> str:
    """A UTF-8 file as text, unpacked if its name ends in .gz. Raises TraceError saying what it is not."""
    try:
        content = path.read_bytes()
        if _is_gzip(path):
            content = gzip.decompress(content)
    except gzip.BadGzipFile as e:
        raise TraceError("not a gzip file; remove .gz from its name if it is plain text", str(path)) from e
    except (EOFError, zlib.error) as e:
        raise TraceError("the gzip data is cut off or damaged; copy the file again", str(path)) from e
    except OSError as e:
        raise TraceError(f"cannot be read: {e.strerror or e}", str(path)) from e
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        hint = "; it looks like gzip: end its name in .gz" if content.startswith(b"\x1f\x8b") else ""
        raise TraceError(f"byte 0x{content[e.start]:02x} is not UTF-8{hint}", str(path), line) from e


def unpacked_name(path: Path) -> str:
    """The name of the file without .gz."""
    return path.stem if _is_gzip(path) else path.name


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _rows(text: str, path: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise TraceError(f"empty; a trace begins with a header row: {','.join(COLUMNS)}", path)
        columns = _checked_header([name.strip() for name in header], path)
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(columns):
                raise TraceError(f"{len(fields)} fields under a header of {len(columns)}", path, reader.line_num)
            yield _Parser(dict(zip(columns, fields, strict=True)), path, reader.line_num).row()
    except csv.Error as e:
        raise TraceError(f"not CSV: {e}", path, reader.line_num) from e


def _checked_header(columns: Sequence[str], path: str) -> Sequence[str]:
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        # As spreadsheets export it in half of the world.
        hint = "; separate the columns by commas" if len(columns) == 1 else ""
        raise TraceError(
            f"the header lacks {', '.join(missing)}; every trace needs {', '.join(REQUIRED_COLUMNS)}{hint}", path, 1
        )
    for name, times in Counter(columns).items():
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"remove it; known are {', '.join(COLUMNS)}"
            raise TraceError(f"unknown column; {hint}", path, 1, "header", name)
        if times > 1:
            raise TraceError(f"this column comes {times} times", path, 1, "header", name)
    return columns


class _Parser:
    """Takes one line apart."""

    def __init__(self, fields: dict[str, str], path: str, line: int) -> None:
        self._fields = fields
        self._path = path
        self._line = line

    def row(self) -> _Row:
        for column, text in self._fields.items():
            if "\0" in text:
                self._fail(column, "a NUL byte is no text")
        prompt_tokens = self._tokens("prompt_tokens", at_least=1)
        output_tokens = self._tokens("output_tokens", at_least=1)
        if self._text("reasoning_tokens") and self._tokens("reasoning_tokens") > output_tokens:
            self._fail("reasoning_tokens", f"more than the {output_tokens} output tokens that they are part of")
        prefix_tokens = self._tokens("prefix_tokens") if self._text("prefix_tokens") else 0
        if prefix_tokens > prompt_tokens:
            self._fail("prefix_tokens", f"more than the {prompt_tokens} prompt tokens")
        if prefix_tokens and not self._text("prefix_id"):
            self._fail("prefix_tokens", "cached tokens need the prefix_id of the group that shares them")
        gap_s = self._seconds("gap_s")
        return _Row(
            line=self._line,
            request_id=self._request_id(),
            arrival_s=self._seconds("arrival_s"),
            app=self._text("app"),
            row_class=self._class(),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            program_id=self._text("program_id"),
            stage=self._integer("stage", at_least=0) if self._text("stage") else None,
            parents=self._parents(),
            gap_s=0.0 if gap_s is None else gap_s,
            prefix_id=self._text("prefix_id"),
            prefix_tokens=prefix_tokens,
            tenant=self._text("tenant"),
            ttft_s=self._target("slo_ttft_s"),
            tbt_s=self._target("slo_tbt_s"),
            ttlt_s=self._target("slo_ttlt_s"),
        )

    def _text(self, column: str) -> str:
        return self._fields.get(column, "").strip()

    def _error(self, column: str, problem: str) -> TraceError:
        return TraceError(problem, self._path, self._line, column, self._text(column))

    def _fail(self, column: str, problem: str) -> NoReturn:
        raise self._error(column, problem)

    def _request_id(self) -> str:
        request_id = self._text("request_id")
        if not request_id or any(c.isspace() for c in request_id):
            self._fail("request_id", "give every row an id without spaces")
        return request_id

    def _class(self) -> _RowClass:
        match self._text("class"):
            case "latency" | "throughput" | "collective" | "best_effort" as known:
                return known
        near = difflib.get_close_matches(self._text("class").lower(), get_args(_RowClass), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise self._error("class", f"no such class; {hint}there are: {', '.join(get_args(_RowClass))}")

    def _parents(self) -> tuple[str, ...]:
        parents = tuple(self._text("parents").split())
        if len(set(parents)) < len(parents):
            self._fail("parents", "the same parent twice")
        return parents

    def _tokens(self, column: str, at_least: int = 0) -> int:
        return self._integer(column, at_least)

    def _integer(self, column: str, at_least: int) -> int:
        text = self._text(column)
        if not _INTEGER.fullmatch(text):
            self._fail(column, "not a whole number")
        # Twenty digits are more than enough to see that it is too large, and cheap to convert.
        number = int(text[:20])
        if number < at_least:
            self._fail(column, f"must be at least {at_least}")
        if number > _MAX_TOKENS or len(text) > 20:
            self._fail(column, f"must be at most {_MAX_TOKENS}")
        return number

    def _seconds(self, column: str) -> float | None:
        text = self._text(column)
        if not text:
            return None
        if not _NUMBER.fullmatch(text):
            self._fail(column, "not a number of seconds")
        number = float(text)
        if not math.isfinite(number):
            self._fail(column, "not a finite number of seconds")
        if number < 0:
            self._fail(column, "must not be negative")
        if number > _MAX_SECONDS:
            hint = "; count from the start of the window, not from 1970" if column == "arrival_s" else ""
            self._fail(column, f"must be at most {_MAX_SECONDS:.0f} s{hint}")
        return number

    def _target(self, column: str) -> float | None:
        seconds = self._seconds(column)
        if seconds is not None and seconds <= 0:
            self._fail(column, "a target must be above zero; leave it empty for the default")
        return seconds


class _Units:
    """Puts checked lines together to units and checks what lines say about each other."""

    def __init__(self, rows: Sequence[_Row], path: str) -> None:
        self._path = path
        self._rows: dict[str, _Row] = {}
        for row in rows:
            if row.request_id in self._rows:
                first = self._rows[row.request_id].line
                self._fail(row, "request_id", row.request_id, f"already used in line {first}")
            self._rows[row.request_id] = row

    def build(self) -> list[Unit]:
        programs: dict[str, list[_Row]] = {}
        groups: list[tuple[str, list[_Row]]] = []
        for row in self._rows.values():
            self._check_parents(row)
            if not row.program_id:
                groups.append((row.request_id, [row]))
            elif row.program_id in programs:
                programs[row.program_id].append(row)
            else:
                programs[row.program_id] = [row]
                groups.append((self._program_unit_id(row.program_id), programs[row.program_id]))
        return [self._unit(unit_id, rows) for unit_id, rows in groups]

    def _program_unit_id(self, program_id: str) -> str:
        """The program's own id, unless a request outside of any program has it."""
        unit_id = program_id
        while unit_id in self._rows and not self._rows[unit_id].program_id:
            unit_id = f"program:{unit_id}"
        return unit_id

    def _fail(self, row: _Row, column: str, value: object, problem: str) -> NoReturn:
        raise TraceError(problem, self._path, row.line, column, value)

    def _check_parents(self, row: _Row) -> None:
        if row.parents and row.arrival_s is not None:
            self._fail(row, "arrival_s", row.arrival_s, "must be empty for a call that waits for parents; use gap_s")
        if not row.parents and row.arrival_s is None:
            self._fail(row, "arrival_s", "", "a call without parents needs the time of its arrival")
        if not row.parents and row.gap_s > 0:
            self._fail(row, "gap_s", row.gap_s, "a call without parents has no gap; add it to arrival_s")
        for parent_id in row.parents:
            parent = self._rows.get(parent_id)
            if parent is None:
                self._fail(row, "parents", parent_id, "no request has this id")
            if not row.program_id:
                self._fail(row, "parents", parent_id, "a call with parents needs a program_id, the same as theirs")
            if parent.program_id != row.program_id:
                self._fail(
                    row,
                    "parents",
                    parent_id,
                    f"line {parent.line} is of program {parent.program_id!r}, this one of {row.program_id!r}",
                )
            if row.stage is not None and parent.stage is not None and parent.stage >= row.stage:
                self._fail(row, "stage", row.stage, f"must be above stage {parent.stage} of its parent {parent_id!r}")

    def _unit(self, unit_id: str, rows: list[_Row]) -> Unit:
        first = rows[0]
        self._check_agreement(rows)
        if first.program_id and first.row_class in {"latency", "throughput"}:
            self._fail(first, "class", first.row_class, "calls of a program are collective (or best_effort)")
        rows = self._in_order(rows)
        positions = {row.request_id: position for position, row in enumerate(rows)}
        arrival_s = min(row.arrival_s for row in rows if row.arrival_s is not None)
        stages = _stages(rows, positions)
        calls = tuple(
            TraceCall(
                request_id=row.request_id,
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
                stage=stage,
                parents=tuple(positions[parent_id] for parent_id in row.parents),
                gap_s=row.gap_s if row.arrival_s is None else row.arrival_s - arrival_s,
                prefix_id=row.prefix_id,
                prefix_tokens=row.prefix_tokens,
            )
            for row, stage in zip(rows, stages, strict=True)
        )
        return Unit(
            unit_id=unit_id,
            arrival_s=arrival_s,
            slo=_slo(rows, len(set(stages))),
            calls=calls,
            app=first.app,
            tenant=first.tenant,
            is_program=bool(first.program_id) or first.row_class == "collective",
        )

    def _check_agreement(self, rows: list[_Row]) -> None:
        first = rows[0]
        deadline: _Row | None = None
        for row in rows:
            for column, value, expected in (
                ("class", row.row_class, first.row_class),
                ("app", row.app, first.app),
                ("tenant", row.tenant, first.tenant),
            ):
                if value != expected:
                    self._fail(row, column, value, f"line {first.line} of program {row.program_id!r} has {expected!r}")
            if row.ttlt_s is None:
                continue
            if deadline is not None and row.ttlt_s != deadline.ttlt_s:
                self._fail(
                    row,
                    "slo_ttlt_s",
                    row.ttlt_s,
                    f"line {deadline.line} of program {row.program_id!r} has {deadline.ttlt_s}; "
                    "it is the deadline of the whole program",
                )
            deadline = row

    def _in_order(self, rows: list[_Row]) -> list[_Row]:
        """Parents before their children, otherwise in the order of the file."""
        places = {row.request_id: place for place, row in enumerate(rows)}
        children: list[list[int]] = [[] for _ in rows]
        missing = [len(row.parents) for row in rows]
        for place, row in enumerate(rows):
            for parent_id in row.parents:
                children[places[parent_id]].append(place)
        ready = [place for place, row in enumerate(rows) if not row.parents]
        ordered: list[_Row] = []
        while ready:
            place = heapq.heappop(ready)
            ordered.append(rows[place])
            for child in children[place]:
                missing[child] -= 1
                if not missing[child]:
                    heapq.heappush(ready, child)
        if len(ordered) < len(rows):
            self._fail_cycle(rows, {row.request_id for row in ordered})
        return ordered

    def _fail_cycle(self, rows: list[_Row], done: set[str]) -> NoReturn:
        """Walks back from any call that never becomes ready; all its ways lead into a cycle."""
        row = next(row for row in rows if row.request_id not in done)
        walk: dict[str, None] = {}
        while row.request_id not in walk:
            walk[row.request_id] = None
            row = next(self._rows[parent_id] for parent_id in row.parents if parent_id not in done)
        ids = list(walk)
        cycle = [*ids[ids.index(row.request_id) :], row.request_id]
        shown = " <- ".join(cycle if len(cycle) <= 8 else [*cycle[:7], "..."])
        self._fail(row, "parents", " ".join(row.parents), f"these calls wait for each other in a circle: {shown}")


def _stages(rows: Sequence[_Row], positions: dict[str, int]) -> list[int]:
    """As the file says or, where it says nothing, one more than the latest parent's. Rows: parents first."""
    stages: list[int] = []
    for row in rows:
        after_parents = 1 + max((stages[positions[parent_id]] for parent_id in row.parents), default=-1)
        stages.append(after_parents if row.stage is None else row.stage)
    return stages


def _slo(rows: Sequence[_Row], stages: int) -> UnitSlo:
    first = rows[0]
    ttlt_s = next((row.ttlt_s for row in rows if row.ttlt_s is not None), None)
    match first.row_class:
        case "latency":
            return Latency(
                DEFAULT_TTFT_S if first.ttft_s is None else first.ttft_s,
                DEFAULT_TBT_S if first.tbt_s is None else first.tbt_s,
            )
        case "throughput":
            return Deadline(DEFAULT_TTLT_S if ttlt_s is None else ttlt_s)
        case "collective":
            return Deadline(DEFAULT_STAGE_TTLT_S * stages if ttlt_s is None else ttlt_s)
        case "best_effort":
            return BestEffort()
        case _:
            assert_never(first.row_class)


def _unit_rows(unit: Unit) -> Iterator[dict[str, str]]:
    shared = {"app": unit.app, "tenant": unit.tenant, "class": _row_class(unit)}
    if unit.is_program:
        shared["program_id"] = unit.unit_id
    match unit.slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            shared |= {"slo_ttft_s": _number(ttft_s), "slo_tbt_s": _number(tbt_s)}
        case Deadline(ttlt_s=ttlt_s):
            shared["slo_ttlt_s"] = _number(ttlt_s)
        case BestEffort():
            pass
        case _:
            assert_never(unit.slo)
    for call in unit.calls:
        row = shared | {
            "request_id": call.request_id,
            "prompt_tokens": str(call.prompt_tokens),
            "output_tokens": str(call.output_tokens),
        }
        if call.parents:
            row["parents"] = " ".join(unit.calls[parent].request_id for parent in call.parents)
            row["gap_s"] = _number(call.gap_s)
        else:
            row["arrival_s"] = _number(unit.arrival_s + call.gap_s)
        if unit.is_program:
            row["stage"] = str(call.stage)
        if call.prefix_id:
            row |= {"prefix_id": call.prefix_id, "prefix_tokens": str(call.prefix_tokens)}
        yield row


def _row_class(unit: Unit) -> _RowClass:
    match unit.slo:
        case Latency():
            return "latency"
        case Deadline():
            return "collective" if unit.is_program else "throughput"
        case BestEffort():
            return "best_effort"
        case _:
            assert_never(unit.slo)


def _number(seconds: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(float(seconds))
