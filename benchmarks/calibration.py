"""How right are the estimates of answer lengths, and what do they cost?

    python -m benchmarks.calibration [--json out.json] [--traces a.csv.gz b.csv.gz] [--censored 0 0.3]

Calls are taken in order of their arrival: first every model says how long the answer will be, then, when it ends, they
learn from it. A call is released when its parents have ended and its gap has passed; an answer is taken to need half a
second and 30 ms a token. The forest is fitted again as in production: after `--training-s` seconds of the trace, if
there are 50 new answers. With `--censored` clients leave at random moments (exponential, whatever the answer's length)
that cut so many answers; models learn from what was seen, and are judged by the true lengths.

Models: `global`, one histogram for all; `no stages`, histograms by app and prompt; `histograms`, those of the router;
`forest`, of the router too; `auto`, what the router uses: the forest for those apps where it was the better one lately.
Calls before the first fit count for none. Loss is the mean pinball loss over the quantiles 0.025, 0.075, ... 0.975.
Without --traces a workload is generated.
"""

import argparse
import heapq
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.figures_file import add_json_option, write_figures
from tempo_router.calibration import QUANTILES, Calibration, RunningCalibration
from tempo_router.errors import TempoError
from tempo_router.length_regressor import MIN_ENDED, MIN_FRESH, LengthRegressor, TrainingWindow
from tempo_router.option_values import above_zero
from tempo_router.prediction import LengthHistograms, Lengths, LengthSample
from tempo_router.request import Deadline, GroupId, ProgramCall, ProgramId, RequestId, RequestSpec, Slo
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.trace import Trace, TraceCall, Unit
from tempo_router.simulation.trace_file import read_trace

MODELS = ("global", "no stages", "histograms", "forest", "auto")
ALL_APPS = "all"
FIRST_TOKEN_S = 0.5
TOKEN_S = 0.03
ENDLESS = 1e12
"""A window, in answers, in which nothing is forgotten."""
LONGEST_ANSWER = 16_384
"""The bound that clients set, where a trace has none: it must tell nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model on one app of a trace. pinball, mae: tokens. mae: mean absolute difference from the median."""

    trace: str
    censored: float
    app: str
    calls: int
    model: str
    coverage: tuple[float, ...]
    pinball: float
    mae: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What the forest cost on a trace."""

    trace: str
    censored: float
    fits: int
    answers: int
    fit_mean_s: float
    fit_max_s: float
    predict_us: float


@dataclass(slots=True)
class Replay:
    """All models on one trace."""

    training_s: float
    histograms: dict[str, LengthHistograms] = field(
        default_factory=lambda: {name: LengthHistograms() for name in ("global", "no stages", "histograms")}
    )
    window: TrainingWindow = field(default_factory=TrainingWindow)
    forest: LengthRegressor | None = None
    scores: dict[tuple[str, str], RunningCalibration] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    online: Calibration = field(default_factory=Calibration)
    fit_s: list[float] = field(default_factory=list)
    predict_s: float = 0.0
    fresh: int = 0
    next_fit_s: float = 0.0

    def foretell(self, spec: RequestSpec, tokens: int) -> dict[str, Lengths]:
        """What every model says of a call, judged at once by its true length; nothing before the first fit."""
        told = {name: one.lookup(_as_seen_by(name, spec)) for name, one in self.histograms.items()}
        if self.forest is not None:
            started_s = time.perf_counter()
            (told["forest"],) = self.forest.predict_many([spec])
            self.predict_s += time.perf_counter() - started_s
            told["auto"] = told["forest" if self.online.used(spec.app) == "regressor" else "histograms"]
            for app in (spec.app, ALL_APPS):
                self.calls[app] = self.calls.get(app, 0) + 1
                for model, lengths in told.items():
                    self.scores.setdefault((app, model), RunningCalibration(ENDLESS)).add(lengths, tokens)
        return told

    def learn(self, sample: LengthSample, told: dict[str, Lengths], now_s: float) -> None:
        """An answer ended or was cut off."""
        for name, one in self.histograms.items():
            one.observe(_as_seen_by(name, sample.spec), sample.tokens, is_complete=sample.is_complete)
        self.window.add(sample)
        self.online.score(
            sample.spec.app,
            sample.tokens,
            is_complete=sample.is_complete,
            histogram=told["histograms"],
            regressor=told.get("forest"),
        )
        self.fresh += 1
        if now_s >= self.next_fit_s and self.fresh >= MIN_FRESH and self.window.ended >= MIN_ENDED:
            started_s = time.perf_counter()
            self.forest = LengthRegressor.fit(self.window.rows())
            self.fit_s.append(time.perf_counter() - started_s)
            self.fresh = 0
            self.next_fit_s = now_s + self.training_s


def _as_seen_by(model: str, spec: RequestSpec) -> RequestSpec:
    if model == "global":
        return replace(spec, app="", stage=0, prompt_tokens=1)
    return replace(spec, stage=0) if model == "no stages" else spec


def releases(trace: Trace) -> Iterator[tuple[float, RequestSpec, int]]:
    """(time, call, true length) of every call, in order of its release."""
    calls = [one for unit in trace.units for one in _of_unit(unit)]
    yield from sorted(calls, key=lambda one: (one[0], one[1].request_id))


def _of_unit(unit: Unit) -> Iterator[tuple[float, RequestSpec, int]]:
    ends_s: list[float] = []
    for call in unit.calls:
        ready_s = max((ends_s[parent] for parent in call.parents), default=unit.arrival_s)
        release_s = ready_s + call.gap_s
        ends_s.append(release_s + service_s(call.output_tokens))
        yield release_s, _spec(unit, call, release_s), call.output_tokens


def _spec(unit: Unit, call: TraceCall, release_s: float) -> RequestSpec:
    slo: Slo = unit.slo
    if unit.is_program and isinstance(slo, Deadline):
        slo = ProgramCall(ProgramId(unit.unit_id), unit.arrival_s + slo.ttlt_s - release_s)
    return RequestSpec(
        request_id=RequestId(call.request_id),
        arrival_s=release_s,
        slo=slo,
        prompt_tokens=call.prompt_tokens,
        max_output_tokens=LONGEST_ANSWER,
        group_id=GroupId(call.request_id),
        model="model",
        app=unit.app,
        tenant=unit.tenant,
        stage=call.stage,
        prefix_id=call.prefix_id,
        prefix_tokens=call.prefix_tokens,
    )


def service_s(tokens: int) -> float:
    """Nominal time of an answer."""
    return FIRST_TOKEN_S + TOKEN_S * tokens


def patience_mean(lengths: Sequence[int], censored: float) -> float:
    """Mean of the exponential number of tokens after which a client leaves, so that this share of answers is cut."""
    low, high = 1e-3, 1e9
    for _ in range(100):
        mean = (low * high) ** 0.5
        rng = random.Random(0)
        if sum(rng.expovariate(1 / mean) < tokens for tokens in lengths) > censored * len(lengths):
            low = mean
        else:
            high = mean
    return high


def replay(trace: Trace, censored: float, training_s: float) -> tuple[list[Row], Cost]:
    """Run all models over a trace."""
    calls = list(releases(trace))
    mean = patience_mean([tokens for _, _, tokens in calls], censored) if censored else None
    rng = random.Random(0)
    models = Replay(training_s)
    running: list[tuple[float, int, LengthSample, dict[str, Lengths]]] = []
    for number, (release_s, spec, tokens) in enumerate(calls):
        while running and running[0][0] <= release_s:
            end_s, _, sample, told = heapq.heappop(running)
            models.learn(sample, told, end_s)
        told = models.foretell(spec, tokens)
        leaves = rng.expovariate(1 / mean) if mean is not None else float("inf")
        is_complete = leaves >= tokens
        seen = tokens if is_complete else int(leaves)
        heapq.heappush(running, (release_s + service_s(seen), number, LengthSample(spec, seen, is_complete), told))
    rows = [
        Row(trace.name, censored, app, models.calls[app], model, report.coverage, report.pinball, report.error)
        for (app, model), score in models.scores.items()
        if (report := score.report()) is not None
    ]
    foretold = models.calls.get(ALL_APPS, 0)
    cost = Cost(
        trace.name,
        censored,
        len(models.fit_s),
        len(models.window),
        sum(models.fit_s) / max(1, len(models.fit_s)),
        max(models.fit_s, default=0.0),
        1e6 * models.predict_s / max(1, foretold),
    )
    return sorted(rows, key=lambda row: (row.app == ALL_APPS, -row.calls, row.app, MODELS.index(row.model))), cost


def show(rows: Sequence[Row], cost: Cost) -> None:
    """Print one trace."""
    print(f"\n{cost.trace}, {cost.censored:.0%} of the answers cut off")
    shares = "".join(f"{f'<q{share:g}':>8}" for share in QUANTILES)
    print(f"{'app':<18}{'calls':>7}  {'model':<12}{shares}{'loss':>9}{'MAE':>9}")
    for row in rows:
        covered = "".join(f"{share:>8.3f}" for share in row.coverage)
        print(f"{row.app:<18}{row.calls:>7}  {row.model:<12}{covered}{row.pinball:>9.2f}{row.mae:>9.1f}")
    print(
        f"{cost.fits} fits of up to {cost.answers} answers, {cost.fit_mean_s:.2f} s each, at most {cost.fit_max_s:.2f};"
        f" {cost.predict_us:.0f} us for one prediction alone",
        flush=True,
    )


def main() -> None:
    """Replay every trace and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--traces", type=Path, nargs="+", default=[], help="CSV files as in docs/workloads.md")
    parser.add_argument("--censored", type=float, nargs="+", default=[0.0, 0.3], help="shares of answers to cut off")
    parser.add_argument("--training-s", type=above_zero, default=30.0, help="least time between two fits")
    options = parser.parse_args()
    if not all(0 <= share < 1 for share in options.censored):
        parser.error(f"--censored {options.censored}: shares are at least 0 and below 1")
    try:
        traces = [read_trace(path) for path in options.traces] or [generate(GeneratorConfig(), seed=0)]
    except TempoError as e:
        parser.error(str(e))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    results = []
    for trace in traces:
        for censored in options.censored:
            rows, cost = replay(trace, censored, options.training_s)
            show(rows, cost)
            results.append({"cost": asdict(cost), "rows": [asdict(row) for row in rows]})
    write_figures(options.json, results)


if __name__ == "__main__":
    main()
