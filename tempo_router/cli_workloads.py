"""`tempo-router generate`, `convert` and `trace`: make, turn and look at workloads."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tempo_router.errors import ConfigError
from tempo_router.option_values import above_zero, whole
from tempo_router.simulation.convert import CONVERTERS, LabelClass, Labels, from_vllm_bench
from tempo_router.simulation.generate import GeneratorConfig, generate, generator_config
from tempo_router.simulation.trace import Trace
from tempo_router.simulation.trace_file import read_trace, write_trace
from tempo_router.simulation.trace_statistics import TraceStatistics, trace_statistics


def say(text: str) -> None:
    """One line of what was asked for."""
    sys.stdout.write(f"{text}\n")


def settings(pairs: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value that is JSON is read as such, any other is text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{pair!r}: expected KEY=VALUE, such as rate_per_s=2")
        if key in settings:
            raise ConfigError(f"{key}: given twice")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


# ---- generate


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="such as rate_per_s=2 or agent.share=0.1")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--out", type=Path, help="file.csv or file.csv.gz")
    parser.add_argument("--list", action="store_true", help="print all settings with their defaults and end")
    parser.set_defaults(command=_generate)


def _generate(options: argparse.Namespace) -> int:
    if options.list:
        for line in _setting_lines(GeneratorConfig(), ""):
            say(line)
        return 0
    if options.out is None:
        raise ConfigError("--out: name the file to write, such as --out trace.csv.gz")
    trace = generated(options.settings, options.seed)
    write_trace(trace, options.out)
    say(f"{options.out}: {len(trace.units)} units, {trace.calls} calls")
    return 0


def generated(pairs: Iterable[str], seed: int) -> Trace:
    """A workload by KEY=VALUE pairs of its configuration. Raises ConfigError."""
    trace = generate(generator_config(settings(pairs)), seed)
    if not trace.units:
        raise ConfigError("nothing arrives: raise rate_per_s or duration_s")
    return trace


def _setting_lines(config: Any, prefix: str) -> Iterable[str]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if hasattr(value, "model_fields_set"):
            yield from _setting_lines(value, f"{prefix}{name}.")
            continue
        shown = json.dumps(value)
        yield f"{prefix}{name}={shown}" + (f"  # {field.description}" if field.description else "")


# ---- convert


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Options of `convert`."""
    parser.add_argument("source", type=Path)
    parser.add_argument("--from", dest="format", required=True, choices=tuple(CONVERTERS))
    parser.add_argument("--out", type=Path, required=True, help="file.csv or file.csv.gz")
    parser.add_argument("--app", help="application of all requests")
    parser.add_argument("--class", dest="row_class", choices=get_args(LabelClass), help="class of all requests")
    parser.add_argument("--tenant", help="tenant of all requests")
    parser.add_argument(
        "--rate", type=above_zero, help="vllm-bench: Poisson arrivals per second, for files without times"
    )
    parser.add_argument("--seed", type=whole, default=0, help="of these arrivals")
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> int:
    check_outputs([options.out], [options.source])
    labels = Labels(options.app, options.row_class, options.tenant)
    if options.format == "vllm-bench":
        converted = from_vllm_bench(options.source, labels, rate_per_s=options.rate, seed=options.seed)
    elif options.rate is not None:
        raise ConfigError(f"--rate: {options.format} files have times; change the load with simulate --load")
    else:
        converted = CONVERTERS[options.format](options.source, labels)
    write_trace(converted.trace, options.out)
    left_out = f", {converted.left_out} without an answer left out" if converted.left_out else ""
    say(f"{options.out}: {len(converted.trace.units)} requests{left_out}")
    return 0


def check_outputs(outputs: Sequence[Path | None], inputs: Sequence[Path | None]) -> None:
    """Raises ConfigError for an output that would overwrite what is read, or another output."""
    read = {path.resolve() for path in inputs if path is not None}
    written: set[Path] = set()
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in read:
            raise ConfigError(f"{path}: it is read and would be overwritten; name another file for the output")
        if path.resolve() in written:
            raise ConfigError(f"{path}: two outputs cannot be one file")
        written.add(path.resolve())


# ---- trace


def add_trace(parser: argparse.ArgumentParser) -> None:
    """Options of `trace`."""
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object per file and line")
    parser.set_defaults(command=_trace)


def _trace(options: argparse.Namespace) -> int:
    for number, path in enumerate(options.files):
        statistics = trace_statistics(read_trace(path))
        if options.json:
            say(json.dumps(asdict(statistics)))
        else:
            say(("\n" if number else "") + _statistics_text(statistics))
    return 0


def _statistics_text(found: TraceStatistics) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def counts(values: dict[Any, int], total: int) -> str:
        return ", ".join(f"{name or '(none)'} {count} ({count / total:.1%})" for name, count in values.items())

    def quantiles(values: tuple[float, ...]) -> str:
        return " / ".join(f"{value:.0f}" for value in values)

    lines = (
        ("rows (calls)", f"{found.calls}"),
        ("units", f"{found.units}"),
        ("units by class", counts(found.units_by_class, found.units)),
        ("calls by app", counts(found.calls_by_app, found.calls)),
        ("tenants", f"{found.tenants}"),
        ("span", f"{found.span_s:.1f} s"),
        ("arrivals", f"{number(found.arrivals_per_s, '.3f')}/s, CV of gaps {number(found.gap_cv, '.2f')}"),
        ("busiest minute", f"{number(found.peak_over_mean, '.2f')} x the mean"),
        ("prompt tokens", f"{quantiles(found.prompt_tokens)} (P50 / P90 / P99)"),
        ("output tokens", f"{quantiles(found.output_tokens)} (P50 / P90 / P99)"),
        ("largest call", f"{found.max_call_tokens} tokens, prompt and output"),
        ("prefix share", f"{found.prefix_share:.3f} of all prompt tokens"),
        (
            "programs",
            f"{found.programs}, median {number(found.stages_p50, '.0f')} stages, at most {found.longest_program} calls",
        ),
    )
    return "\n".join([found.name, *(f"  {name:<15} {text}" for name, text in lines)])
