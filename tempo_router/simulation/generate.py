"""Workloads out of nothing but a configuration and a seed.

The default resembles what interactive services see: streams of chat, single answers (code completion, summaries) and
programs: research runs, whose stages alternate between short notes and long texts and sometimes fan out, and a few
coding agents, whose context grows from call to call. All numbers are ours, chosen near published traces; none is a
measurement.

Arrivals and contents have separate random numbers: the same seed gives the same units in the same order under another
rate or another kind of arrivals.
"""

import bisect
import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self, assert_never

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.trace import Trace, TraceCall, Unit, UnitSlo

ArrivalKind = Literal["poisson", "gamma", "bursts", "diurnal"]
UnitKind = Literal["latency", "deadline", "program", "best_effort"]

_MAX_UNITS = 5_000_000
_DEFAULT_CV: Mapping[ArrivalKind, float] = {"poisson": 1.0, "gamma": 2.0, "bursts": 1.0, "diurnal": 1.0}
_DIURNAL_PARTS = 288
"""A period is cut into parts of constant rate: five minutes of a day."""


def _check_weights(name: str, weights: tuple[float, ...]) -> None:
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"{name}={list(weights)}: none may be below zero, and one must be above")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Lengths(_Settings):
    """Lognormal numbers of tokens, clipped."""

    median: float = Field(gt=0, description="tokens")
    sigma: float = Field(ge=0, le=5, description="standard deviation of the logarithm")
    at_least: int = Field(default=1, ge=1, description="tokens")
    at_most: int = Field(default=100_000, ge=1, description="tokens")

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        if self.at_most < self.at_least:
            raise ValueError(f"at_most={self.at_most} is below at_least={self.at_least}")
        return self

    def draw(self, rng: random.Random, scale: float = 1.0) -> int:
        """One length; `scale` multiplies the median before clipping."""
        tokens = round(self.median * scale * math.exp(rng.gauss(0.0, self.sigma)))
        return min(max(tokens, self.at_least), self.at_most)


class CallLengths(_Settings):
    """One application of single calls."""

    prompt: Lengths
    output: Lengths


class ResearchConfig(_Settings):
    """Programs of stages: plan, then search and read in turns, at the end a report.

    Plans and readings are short answers, searches and the report long ones. Only searches fan out; what follows waits
    for all of them.
    """

    stages: tuple[int, ...] = Field(default=(4, 6), min_length=1, description="possible numbers of stages, each even")
    stage_weights: tuple[float, ...] = Field(default=(0.4, 0.6), description="how likely each number of stages is")
    fan_out_weights: tuple[float, ...] = Field(
        default=(0.7, 0.2, 0.1), description="how likely a search stage has 1, 2, 3, ... calls"
    )
    gap_s: float = Field(default=0.005, ge=0, description="time between a stage and the next")
    question: Lengths = Lengths(median=410, sigma=0.15, at_most=2000)
    search: Lengths = Lengths(median=165, sigma=0.12, at_most=1000)
    documents: Lengths = Lengths(median=1300, sigma=0.7, at_least=100, at_most=6000)
    notes: Lengths = Lengths(median=55, sigma=0.6, at_least=8, at_most=200)
    text: Lengths = Lengths(median=720, sigma=0.5, at_least=64, at_most=1024)
    max_call_tokens: int = Field(default=8192, ge=2, description="prompt and output of one call; prompts are cut")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if any(stages < 2 or stages % 2 for stages in self.stages):
            raise ValueError(f"stages={list(self.stages)}: each must be even and at least 2")
        if len(self.stage_weights) != len(self.stages):
            raise ValueError(f"{len(self.stages)} stages need as many stage_weights, got {len(self.stage_weights)}")
        _check_weights("stage_weights", self.stage_weights)
        _check_weights("fan_out_weights", self.fan_out_weights)
        longest = max(self.notes.at_most, self.text.at_most)
        if longest >= self.max_call_tokens:
            raise ValueError(f"outputs of up to {longest} tokens leave no prompt in max_call_tokens")
        return self


class AgentConfig(_Settings):
    """Chains of calls whose prompt is the one before, its answer and what a tool said; all of it stays cached."""

    share: float = Field(default=0.05, ge=0, le=1, description="share of the programs that are agents")
    min_calls: int = Field(default=3, ge=1)
    max_calls: int = Field(default=8, ge=1)
    first_prompt: Lengths = Lengths(median=16600, sigma=0.03)
    tool_result: Lengths = Lengths(median=300, sigma=1.3, at_most=8000)
    output: Lengths = Lengths(median=95, sigma=0.9, at_most=2000)
    tool_gap_s: float = Field(default=4.0, ge=0, description="mean of the exponential time that a tool takes")
    max_call_tokens: int = Field(default=32768, ge=2, description="a chain ends before a call grows beyond")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_calls < self.min_calls:
            raise ValueError(f"max_calls={self.max_calls} is below min_calls={self.min_calls}")
        if self.output.at_most >= self.max_call_tokens:
            raise ValueError(f"outputs of up to {self.output.at_most} tokens leave no prompt in max_call_tokens")
        return self


class GeneratorConfig(_Settings):
    """What to generate. Weights need not sum to 1."""

    duration_s: float = Field(default=1800.0, gt=0, description="units arrive from 0 to here")
    rate_per_s: float = Field(default=1.0, gt=0, description="mean number of units per second over duration_s")
    arrivals: ArrivalKind = Field(
        default="poisson",
        description="poisson; gamma: gaps of another variation; bursts: a calm and a busy state in turns, both of "
        "exponential length; diurnal: a rate that follows a sine, lowest at the start",
    )
    cv: float | None = Field(
        default=None,
        gt=0,
        le=20,
        description="coefficient of variation of gaps, at the rate of the moment; default 2 for gamma, else 1",
    )
    burst_ratio: float = Field(default=5.0, ge=1, description="bursts: rate of the busy state over the calm one's")
    burst_share: float = Field(default=0.2, gt=0, lt=1, description="bursts: share of time in the busy state")
    burst_s: float = Field(default=30.0, gt=0, description="bursts: mean length of a busy state")
    diurnal_period_s: float = Field(default=86400.0, gt=0)
    diurnal_depth: float = Field(default=0.8, ge=0, le=1, description="diurnal: 1 means that the night is silent")

    latency_weight: float = Field(default=1.0, ge=0, description="chat streams")
    deadline_weight: float = Field(default=1.0, ge=0, description="single answers with a deadline")
    program_weight: float = Field(default=1.0, ge=0)
    best_effort_weight: float = Field(default=0.0, ge=0, description="single answers without a target")
    code_share: float = Field(
        default=0.5, ge=0, le=1, description="share of single answers that are code; else summaries"
    )

    chat: CallLengths = CallLengths(
        prompt=Lengths(median=900, sigma=1.0, at_most=4800), output=Lengths(median=150, sigma=0.85, at_most=1024)
    )
    code: CallLengths = CallLengths(
        prompt=Lengths(median=1450, sigma=1.2, at_most=7400), output=Lengths(median=14, sigma=0.8, at_most=300)
    )
    summarize: CallLengths = CallLengths(
        prompt=Lengths(median=2700, sigma=0.35, at_most=4000), output=Lengths(median=175, sigma=0.6, at_most=3000)
    )
    research: ResearchConfig = ResearchConfig()
    agent: AgentConfig = AgentConfig()

    ttft_s: float = Field(default=2.0, gt=0)
    tbt_s: float = Field(default=0.1, gt=0)
    ttlt_s: float = Field(default=20.0, gt=0)
    stage_ttlt_s: float = Field(default=20.0, gt=0, description="the deadline of a program, per stage")
    slo_factor: float = Field(default=1.0, gt=0, description="multiplies every target; below 1 is tighter")

    tenants: int = Field(default=4, ge=1, le=100_000)
    tenant_skew: float = Field(
        default=0.0, ge=0, le=10, description="tenant i (from 1) has weight i to the power of minus this"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        _check_weights(
            "class weights",
            (self.latency_weight, self.deadline_weight, self.program_weight, self.best_effort_weight),
        )
        if self.arrivals == "poisson" and self.cv not in {None, 1.0}:
            raise ValueError(f"cv={self.cv}: Poisson arrivals have 1; set arrivals=gamma")
        if self.rate_per_s * self.duration_s > _MAX_UNITS:
            raise ValueError(f"rate_per_s x duration_s is more than {_MAX_UNITS} units")
        return self


def generator_config(settings: Mapping[str, object]) -> GeneratorConfig:
    """A configuration from names and values; "agent.share" names a part of a part, values may be text.

    Raises ConfigError naming the setting, its value and, for an unknown one, the nearest that exists.
    """
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, leaf = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{name}: {group} is set as a whole and in part; do one")
        if leaf in place:
            raise ConfigError(f"{name}: set as a whole and in part; do one")
        place[leaf] = value
    try:
        return GeneratorConfig.model_validate(_over_defaults(GeneratorConfig(), tree))
    except ValidationError as e:
        raise ConfigError("; ".join(_problem(error) for error in e.errors())) from e


def generate(config: GeneratorConfig, seed: int) -> Trace:
    """The trace of this configuration and seed; may be empty if hardly anything arrives."""
    arrivals = _arrivals(config, random.Random(f"{seed}:arrivals"))
    request_ids = itertools.count()
    units = tuple(
        _Content(config, random.Random(f"{seed}:{number}"), request_ids).unit(number, at_s)
        for number, at_s in enumerate(arrivals)
    )
    return Trace(f"generated-{config.arrivals}-{seed}", units)


def _over_defaults(defaults: BaseModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is set, over what is not, so that one number of a group can be set alone."""
    merged = {name: getattr(defaults, name) for name in type(defaults).model_fields}
    for name, value in settings.items():
        default = merged.get(name)
        merged[name] = (
            _over_defaults(default, value) if isinstance(default, BaseModel) and isinstance(value, Mapping) else value
        )
    return merged


def _problem(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        names = _setting_names(GeneratorConfig())
        # A part of a name (rate, chat.prompt) is no close match of the whole.
        near = difflib.get_close_matches(name, names, n=1) or [known for known in names if name in known][:3]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"{name}: no such setting; {hint}tempo-router generate --list prints all {len(names)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message}" if name and not isinstance(error["input"], dict) else message


def _setting_names(defaults: BaseModel, prefix: str = "") -> list[str]:
    names = []
    for name in type(defaults).model_fields:
        value = getattr(defaults, name)
        names += _setting_names(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [prefix + name]
    return names


def _arrivals(config: GeneratorConfig, rng: random.Random) -> list[float]:
    """A renewal process with gaps of mean 1, on a clock that runs as fast as the rate of the moment."""
    cv = _DEFAULT_CV[config.arrivals] if config.cv is None else config.cv
    shape = 1 / cv**2
    ends_s, ends, rates = [0.0], [0.0], []
    parts = list(_rates(config, rng))
    # A short window sees more or less of the busy time than its share; the mean is what was asked for.
    scale = config.rate_per_s * config.duration_s / sum(length_s * rate for length_s, rate in parts)
    for length_s, shape_of_rate in parts:
        rate = shape_of_rate * scale
        ends_s.append(ends_s[-1] + length_s)
        ends.append(ends[-1] + length_s * rate)
        rates.append(rate)
    arrivals: list[float] = []
    at = 0.0
    while True:
        at += rng.expovariate(1.0) if cv == 1 else rng.gammavariate(shape, 1 / shape)
        part = bisect.bisect_right(ends, at) - 1
        if part >= len(rates):
            return arrivals
        arrivals.append(min(ends_s[part] + (at - ends[part]) / rates[part], config.duration_s))


def _rates(config: GeneratorConfig, rng: random.Random) -> Iterator[tuple[float, float]]:
    """Parts of constant rate until the end: length in seconds, rate in any unit."""
    match config.arrivals:
        case "poisson" | "gamma":
            yield config.duration_s, 1.0
        case "bursts":
            yield from _burst_rates(config, rng)
        case "diurnal":
            yield from _diurnal_rates(config)
        case _:
            assert_never(config.arrivals)


def _burst_rates(config: GeneratorConfig, rng: random.Random) -> Iterator[tuple[float, float]]:
    share, ratio = config.burst_share, config.burst_ratio
    calm_s = config.burst_s * (1 - share) / share
    left_s = config.duration_s
    is_busy = rng.random() < share
    while left_s > 0:
        length_s = min(rng.expovariate(1 / (config.burst_s if is_busy else calm_s)), left_s)
        yield length_s, ratio if is_busy else 1.0
        left_s -= length_s
        is_busy = not is_busy


def _diurnal_rates(config: GeneratorConfig) -> Iterator[tuple[float, float]]:
    part_s = config.diurnal_period_s / _DIURNAL_PARTS
    for part in itertools.count():
        length_s = min(part_s, config.duration_s - part * part_s)
        if length_s <= 0:
            return
        phase = 2 * math.pi * (part + 0.5) / _DIURNAL_PARTS
        # A part without any arrivals would stop the clock of the process.
        rate = max(1 - config.diurnal_depth * math.cos(phase), 1e-6)
        yield length_s, rate


class _Content:
    """What one unit consists of."""

    def __init__(self, config: GeneratorConfig, rng: random.Random, request_ids: Iterator[int]) -> None:
        self._config = config
        self._rng = rng
        self._request_ids = request_ids

    def unit(self, number: int, arrival_s: float) -> Unit:
        config, rng = self._config, self._rng
        kinds: dict[UnitKind, float] = {
            "latency": config.latency_weight,
            "deadline": config.deadline_weight,
            "program": config.program_weight,
            "best_effort": config.best_effort_weight,
        }
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        tenant = self._tenant()
        match kind:
            case "latency":
                slo = Latency(config.ttft_s * config.slo_factor, config.tbt_s * config.slo_factor)
                return self._single(arrival_s, slo, tenant, "chat")
            case "deadline":
                return self._single(arrival_s, Deadline(config.ttlt_s * config.slo_factor), tenant, self._answer_app())
            case "best_effort":
                return self._single(arrival_s, BestEffort(), tenant, self._answer_app())
            case "program":
                return self._program(f"p{number}", arrival_s, tenant)
            case _:
                assert_never(kind)

    def _tenant(self) -> str:
        weights = [tenant**-self._config.tenant_skew for tenant in range(1, self._config.tenants + 1)]
        (tenant,) = self._rng.choices(range(len(weights)), weights)
        return f"t{tenant}"

    def _answer_app(self) -> Literal["code", "summarize"]:
        return "code" if self._rng.random() < self._config.code_share else "summarize"

    def _single(self, arrival_s: float, slo: UnitSlo, tenant: str, app: Literal["chat", "code", "summarize"]) -> Unit:
        lengths: CallLengths = getattr(self._config, app)
        call = self._call(lengths.prompt.draw(self._rng), lengths.output.draw(self._rng))
        return Unit(call.request_id, arrival_s, slo, (call,), app, tenant)

    def _program(self, unit_id: str, arrival_s: float, tenant: str) -> Unit:
        is_agent = self._rng.random() < self._config.agent.share
        calls = self._agent(unit_id) if is_agent else self._research()
        stages = calls[-1].stage + 1
        return Unit(
            unit_id,
            arrival_s,
            Deadline(self._config.stage_ttlt_s * stages * self._config.slo_factor),
            tuple(calls),
            "agent" if is_agent else "deep-research",
            tenant,
            is_program=True,
        )

    def _call(self, prompt_tokens: int, output_tokens: int, **more: Any) -> TraceCall:
        return TraceCall(str(next(self._request_ids)), prompt_tokens, output_tokens, **more)

    def _research(self) -> list[TraceCall]:
        config, rng = self._config.research, self._rng
        (stages,) = rng.choices(config.stages, config.stage_weights)
        calls: list[TraceCall] = []
        previous: tuple[int, ...] = ()
        for stage in range(stages):
            is_search = stage % 2 == 1 and stage < stages - 1
            width = 1
            if is_search:
                (width,) = rng.choices(range(1, len(config.fan_out_weights) + 1), config.fan_out_weights)
            first = len(calls)
            for _ in range(width):
                prompt = self._research_prompt(stage, stages, [calls[parent] for parent in previous])
                output = (config.text if stage % 2 else config.notes).draw(rng)
                calls.append(
                    self._call(
                        min(prompt, config.max_call_tokens - output),
                        output,
                        stage=stage,
                        parents=previous,
                        gap_s=config.gap_s if previous else 0.0,
                    )
                )
            previous = tuple(range(first, len(calls)))
        return calls

    def _research_prompt(self, stage: int, stages: int, parents: list[TraceCall]) -> int:
        """Readings and the report see the question, what was searched and documents; each turn adds more of these."""
        config, rng = self._config.research, self._rng
        if stage == 0:
            return config.question.draw(rng)
        if stage == stages - 1:
            # The report has the same documents before it as the reading that it follows.
            return parents[0].prompt_tokens + parents[0].output_tokens
        if stage % 2:
            return config.search.draw(rng)
        return sum(call.output_tokens for call in parents) + config.documents.draw(rng, scale=stage / 2)

    def _agent(self, unit_id: str) -> list[TraceCall]:
        config, rng = self._config.agent, self._rng
        calls: list[TraceCall] = []
        held = 0
        prompt = config.first_prompt.draw(rng)
        for stage in range(rng.randint(config.min_calls, config.max_calls)):
            output = config.output.draw(rng)
            if prompt + output > config.max_call_tokens:
                if calls:
                    break
                prompt = config.max_call_tokens - output
            calls.append(
                self._call(
                    prompt,
                    output,
                    stage=stage,
                    parents=(stage - 1,) if stage else (),
                    gap_s=rng.expovariate(1 / config.tool_gap_s) if stage and config.tool_gap_s else 0.0,
                    prefix_id=unit_id,
                    prefix_tokens=held,
                )
            )
            held = prompt + output
            prompt = held + config.tool_result.draw(rng)
        return calls
