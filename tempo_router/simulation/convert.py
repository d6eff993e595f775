"""Published traces and benchmark files as traces of this project.

Lengths and times are taken as they are. What a source does not say (class, application, tenant) comes from the
`Labels` of the caller or from the defaults of the source. Requests without an answer (failed ones, as a rule) have
no place in a trace: they are left out and counted.
"""

import csv
import io
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, assert_never

from tempo_router.errors import TraceError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.trace import Trace, TraceCall, Unit, UnitSlo
from tempo_router.simulation.trace_file import DEFAULT_TBT_S, DEFAULT_TTFT_S, DEFAULT_TTLT_S, read_text, unpacked_name

LabelClass = Literal["latency", "throughput", "best_effort"]

MOONCAKE_BLOCK_TOKENS = 512
VLLM_BLOCK_TOKENS = 16
"""What `vllm bench serve` takes a hash of a timed trace to stand for, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What the source does not say; None keeps the default of the source."""

    app: str | None = None
    row_class: LabelClass | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """A trace, and how many requests of the source had no answer and were left out."""

    trace: Trace
    left_out: int


@dataclass(frozen=True, slots=True)
class _Request:
    """One request of a source, on the clock of the source."""

    line: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    app: str = ""
    row_class: LabelClass = "latency"
    tenant: str = ""
    blocks: tuple[int | str, ...] = ()
    block_tokens: int = 0

    @property
    def is_answered(self) -> bool:
        """Others have failed, as a rule, and have no place in a trace."""
        return self.output_tokens > 0 and self.prompt_tokens > 0


def from_azure(path: Path, labels: Labels | None = None) -> Converted:
    """The Azure LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens.

    The files do not say what they hold; by default a name with "code" in it is app code of class throughput, any
    other is chat of class latency, like the two files of 2023.
    """
    is_code = "code" in path.name.lower()
    app = "code" if is_code else "chat"
    row_class: LabelClass = "throughput" if is_code else "latency"
    requests = []
    has_zone: bool | None = None
    for line, fields in _csv(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        at = _timestamp(fields["TIMESTAMP"], path, line)
        if has_zone is not None and (at.tzinfo is not None) != has_zone:
            raise TraceError(
                "some timestamps have a time zone and some not", str(path), line, "TIMESTAMP", fields["TIMESTAMP"]
            )
        has_zone = at.tzinfo is not None
        requests.append(
            _Request(
                line,
                (at - datetime(1970, 1, 1, tzinfo=at.tzinfo)).total_seconds(),
                _tokens(fields["ContextTokens"], path, line, "ContextTokens"),
                _tokens(fields["GeneratedTokens"], path, line, "GeneratedTokens"),
                app,
                row_class,
                "azure",
            )
        )
    return _converted(path, requests, labels)


def from_burstgpt(path: Path, labels: Labels | None = None) -> Converted:
    """BurstGPT: Timestamp (seconds), Model, Request tokens, Response tokens, Total tokens, Log Type.

    By default the log type is the app: conversations are of class latency, API calls of class throughput. The model
    is the tenant. A request whose response has no tokens has failed.
    """
    requests = []
    columns = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")
    for line, fields in _csv(path, columns):
        log_type = fields["Log Type"].strip()
        if log_type.lower() not in {"conversation log", "api log"}:
            raise TraceError("expected Conversation log or API log", str(path), line, "Log Type", log_type)
        is_chat = log_type.lower() == "conversation log"
        requests.append(
            _Request(
                line,
                _seconds(fields["Timestamp"], path, line, "Timestamp"),
                _tokens(fields["Request tokens"], path, line, "Request tokens"),
                _tokens(fields["Response tokens"], path, line, "Response tokens"),
                "chat" if is_chat else "api",
                "latency" if is_chat else "throughput",
                fields["Model"].strip(),
            )
        )
    return _converted(path, requests, labels)


def from_mooncake(
    path: Path, labels: Labels | None = None, *, unit_s: float = 0.001, block_tokens: int = MOONCAKE_BLOCK_TOKENS
) -> Converted:
    """Mooncake's JSON lines: timestamp, input_length, output_length, hash_ids (optional).

    unit_s: what one unit of `timestamp` is. block_tokens: prompt tokens that a hash id stands for; an equal leading
    run of ids is a reusable prefix. prefix_tokens: the leading blocks of requests that came before and are not left
    out. Requests whose first two blocks are the same share a cache group: the first alone is, as a rule, a system
    prompt for all.
    """
    return _converted(path, list(_timed_lines(path, unit_s, block_tokens, "chat-longctx", "mooncake")), labels)


def from_vllm_bench(
    path: Path, labels: Labels | None = None, *, rate_per_s: float | None = None, seed: int = 0
) -> Converted:
    """What `vllm bench serve` writes, or reads and carries lengths.

    * A result with `--save-result --save-detailed`: input_lens, output_lens, start_times.
    * A timed trace in JSON lines (`--dataset-name timed_trace`): timestamp in seconds, input_length, output_length,
      and hash_ids of 16 tokens.
    * JSON lines (`--dataset-name custom`) with output_tokens and a prompt length as prompt_tokens, prompt_len or
      input_length, which the benchmark itself does not need, next to the prompt.

    rate_per_s: Poisson arrivals by `seed`, for files without times; it also replaces the times that a file has.
    Texts alone (ShareGPT, custom files without lengths) are refused: their length depends on a tokenizer.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        raise TraceError(
            "a JSON list, as of ShareGPT, holds texts without token counts; run it once with "
            "`vllm bench serve --save-result --save-detailed` and convert that result",
            str(path),
        )
    objects = list(_json_lines(text, path))
    if len(objects) == 1 and ("input_lens" in objects[0][1] or "duration" in objects[0][1]):
        requests = list(_vllm_result(path, objects[0][1], rate_per_s))
    elif any("input_lens" in entry for _, entry in objects):
        line = objects[1][0] if len(objects) > 1 else 1
        raise TraceError("several results in one file (--append-result); convert them one by one", str(path), line)
    elif objects and "timestamp" in objects[0][1]:
        requests = list(_timed_lines(path, 1.0, VLLM_BLOCK_TOKENS, "bench", ""))
    else:
        requests = [_vllm_custom(path, line, entry, rate_per_s) for line, entry in objects]
    if rate_per_s is not None:
        requests = _with_poisson_arrivals(requests, rate_per_s, seed, path)
    return _converted(path, requests, labels)


CONVERTERS: Mapping[str, Callable[[Path, Labels | None], Converted]] = {
    "azure": from_azure,
    "burstgpt": from_burstgpt,
    "mooncake": from_mooncake,
    "vllm-bench": from_vllm_bench,
}


def _converted(path: Path, requests: list[_Request], labels: Labels | None) -> Converted:
    """Units with the first arrival at 0 and ids in order of arrival."""
    answered = sorted((r for r in requests if r.is_answered), key=lambda r: r.at_s)
    if not answered:
        raise TraceError(f"no request with an answer in this file ({len(requests)} without)", str(path))
    start_s = answered[0].at_s
    # A cache holds what came before in time and was run: not what stands above in the file, nor what is left out.
    seen: dict[tuple[int, int | str], int] = {}
    units = tuple(
        _unit(
            str(number),
            replace(request, at_s=request.at_s - start_s),
            _held_blocks(request.blocks, seen) * request.block_tokens,
            labels or Labels(),
        )
        for number, request in enumerate(answered)
    )
    name = unpacked_name(path).rpartition(".")[0] or path.name
    return Converted(Trace(name, units), len(requests) - len(answered))


def _unit(unit_id: str, request: _Request, held_tokens: int, labels: Labels) -> Unit:
    call = TraceCall(
        unit_id,
        request.prompt_tokens,
        request.output_tokens,
        prefix_id=f"b{'-'.join(str(block) for block in request.blocks[:2])}" if request.blocks else "",
        prefix_tokens=min(held_tokens, request.prompt_tokens),
    )
    return Unit(
        unit_id,
        # Microseconds are finer than any source; what is below is noise of the subtraction.
        round(request.at_s, 6),
        _default_slo(labels.row_class or request.row_class),
        (call,),
        request.app if labels.app is None else labels.app,
        request.tenant if labels.tenant is None else labels.tenant,
    )


def _default_slo(row_class: LabelClass) -> UnitSlo:
    match row_class:
        case "latency":
            return Latency(DEFAULT_TTFT_S, DEFAULT_TBT_S)
        case "throughput":
            return Deadline(DEFAULT_TTLT_S)
        case "best_effort":
            return BestEffort()
        case _:
            assert_never(row_class)


def _csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines and fields of a CSV file that has at least these columns."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in columns if name not in header]
        if missing:
            raise TraceError(
                f"the header lacks {', '.join(missing)}; files of this format have {', '.join(columns)}", str(path), 1
            )
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise TraceError(f"{len(fields)} fields under a header of {len(header)}", str(path), reader.line_num)
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as e:
        raise TraceError(f"not CSV: {e}", str(path), reader.line_num) from e


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; a single object may span lines."""
    stripped = text.strip()
    if not stripped:
        raise TraceError("empty", str(path))
    try:
        whole = json.loads(stripped)
    except (ValueError, RecursionError):
        pass  # more than one line, or wrong: the lines tell which
    else:
        yield 1, _object(whole, path, 1)
        return
    # Not splitlines: texts in these lines may hold U+2028 or U+0085, which JSON leaves as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise TraceError(f"not JSON: {e}", str(path), number) from e
        yield number, _object(entry, path, number)


def _object(entry: object, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise TraceError(f"expected a JSON object per line, got {type(entry).__name__}", str(path), line)
    return entry


def _timed_lines(path: Path, unit_s: float, block_tokens: int, app: str, tenant: str) -> Iterator[_Request]:
    for line, entry in _json_lines(read_text(path), path):
        yield _Request(
            line,
            _seconds(_field(entry, path, line, "timestamp"), path, line, "timestamp") * unit_s,
            _tokens(_field(entry, path, line, "input_length"), path, line, "input_length"),
            _tokens(_field(entry, path, line, "output_length"), path, line, "output_length"),
            app=app,
            tenant=tenant,
            blocks=_blocks(entry, path, line),
            block_tokens=block_tokens,
        )


def _blocks(entry: dict[str, Any], path: Path, line: int) -> tuple[int | str, ...]:
    blocks = entry.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(isinstance(block, int | str) for block in blocks):
        raise TraceError("expected a list of block ids", str(path), line, "hash_ids", blocks)
    return tuple(blocks)


def _held_blocks(blocks: tuple[int | str, ...], seen: dict[tuple[int, int | str], int]) -> int:
    """How many leading blocks came before, in this order; remembers all. seen: (node, block) -> next node, a trie."""
    held = 0
    node = 0
    for block in blocks:
        known = seen.get((node, block))
        if known is None:
            known = len(seen) + 1
            seen[node, block] = known
        else:
            held += 1
        node = known
    return held


def _vllm_result(path: Path, result: dict[str, Any], rate_per_s: float | None) -> Iterator[_Request]:
    missing = [name for name in ("input_lens", "output_lens") if not isinstance(result.get(name), list)]
    if missing:
        raise TraceError(
            f"a result without {', '.join(missing)}; run `vllm bench serve` with --save-result --save-detailed",
            str(path),
        )
    prompts, outputs = result["input_lens"], result["output_lens"]
    starts = result.get("start_times")
    if starts is None:
        _check_rate_given(path, None, "start_times", rate_per_s)
        starts = [0.0] * len(prompts)
    if not len(prompts) == len(outputs) == len(starts):
        raise TraceError(
            f"input_lens, output_lens and start_times differ in length: {len(prompts)}, {len(outputs)}, {len(starts)}",
            str(path),
        )
    for number, (prompt, output, start) in enumerate(zip(prompts, outputs, starts, strict=True)):
        yield _Request(
            1,
            _seconds(start, path, 1, f"start_times[{number}]"),
            _tokens(prompt, path, 1, f"input_lens[{number}]"),
            _tokens(output, path, 1, f"output_lens[{number}]"),
            app="bench",
        )


def _vllm_custom(path: Path, line: int, entry: dict[str, Any], rate_per_s: float | None) -> _Request:
    column = next((name for name in ("prompt_tokens", "prompt_len", "input_length") if name in entry), None)
    if column is None or "output_tokens" not in entry:
        raise TraceError(
            "no lengths: a line needs prompt_tokens (or prompt_len, input_length) and output_tokens, a result "
            "input_lens and output_lens (--save-detailed). The length of a text depends on a tokenizer",
            str(path),
            line,
        )
    _check_rate_given(path, line, "timestamp", rate_per_s)
    return _Request(
        line,
        0.0,
        _tokens(entry[column], path, line, column),
        _tokens(entry["output_tokens"], path, line, "output_tokens"),
        app="bench",
    )


def _check_rate_given(path: Path, line: int | None, column: str, rate_per_s: float | None) -> None:
    if rate_per_s is None:
        raise TraceError(f"this file has no times ({column}); give a rate of arrivals (--rate)", str(path), line)


def _with_poisson_arrivals(requests: list[_Request], rate_per_s: float, seed: int, path: Path) -> list[_Request]:
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise TraceError("the rate of arrivals must be above zero", str(path), None, "rate", rate_per_s)
    rng = random.Random(seed)
    at_s = 0.0
    timed = []
    for request in requests:
        at_s += rng.expovariate(rate_per_s)
        timed.append(replace(request, at_s=at_s))
    return timed


def _field(entry: dict[str, Any], path: Path, line: int, name: str) -> Any:
    if name not in entry:
        raise TraceError(f"this line has no {name}; it has {', '.join(sorted(entry)) or 'nothing'}", str(path), line)
    return entry[name]


def _timestamp(text: str, path: Path, line: int) -> datetime:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError as e:
        raise TraceError("not a date and time", str(path), line, "TIMESTAMP", text) from e


def _tokens(value: object, path: Path, line: int, column: str) -> int:
    """A count of tokens, from text or from JSON. Zero is possible here: a request without an answer."""
    number = _seconds(value, path, line, column)
    if number != int(number) or number > 100_000_000:
        raise TraceError("not a plausible number of tokens", str(path), line, column, value)
    return int(number)


def _seconds(value: object, path: Path, line: int, column: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError  # noqa: TRY004, TRY301  # told apart from other wrong values by nobody
        number = float(value)
    except (ValueError, OverflowError) as e:
        raise TraceError("not a number", str(path), line, column, value) from e
    if not math.isfinite(number) or number < 0:
        raise TraceError("must be a finite number, not below zero", str(path), line, column, value)
    return number
