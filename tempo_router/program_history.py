"""What is still to come of a program: learnt from programs of the same application, stage by stage.

A program unfolds at run time, and under overload the long ones are the first to be given up; counting only finished
programs would make programs look short. So two things are learnt apart: what a stage looks like, from every stage that
was seen, and how likely another stage follows, from every stage that ended and was followed, or was the last.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tempo_router.ledger import Program
from tempo_router.request import ProgramId
from tempo_router.running_mean import RunningMean

_MAX_STAGES = 64
_MAX_KEYS = 1024
_SMOOTHING = 0.02
_WAIT_SMOOTHING = 0.01
_WAIT_NEWS_S, _WAIT_MEMORY_S = 10.0, 60.0
"""Without news for so long the wait that is expected begins to fall, by a factor e in so much time: a plan that expects
long waits admits nobody, and then nobody would ever tell that they have become short."""

_TRUSTED = 8
"""So many programs of an application and deadline make its own statistics better than the application's; and so many
that ended a stage tell what follows it."""

_LIKELY = 0.5
ATOMS = 8

Call = tuple[int, int, float]
"""(missing prompt tokens, output tokens, gap before it in seconds)"""

_Outline = tuple[str, int, int]
"""(application, deadline in half octaves, current stage): programs alike in these are expected to go on alike."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected after the current stage, in means.

    calls; prompt_tokens, output_tokens: of all of them; squared_prompts: sum of prompt², for attention.
    chain_tokens: output of the longest call of each stage, summed; chain_prompt_tokens: its prompts; gaps_s: tools.
    stages: how many. unknown: probability that the program goes on to where too few went before to tell.
    chain_atoms: ATOMS equally likely values of chain_tokens, where more than the mean is known; else empty.
    """

    calls: float = 0.0
    prompt_tokens: float = 0.0
    squared_prompts: float = 0.0
    output_tokens: float = 0.0
    chain_tokens: float = 0.0
    chain_prompt_tokens: float = 0.0
    gaps_s: float = 0.0
    stages: float = 0.0
    unknown: float = 0.0
    chain_atoms: tuple[float, ...] = ()


NOTHING = Forecast()


class _Stage:
    """One stage of an application. follows: 1 where another stage came, 0 where it was the last."""

    __slots__ = ("calls", "chain_prompt", "chain_tokens", "follows", "gap_s", "output", "prompt", "squared")

    def __init__(self) -> None:
        self.calls = RunningMean(_SMOOTHING)
        self.prompt = RunningMean(_SMOOTHING)
        self.squared = RunningMean(_SMOOTHING)
        self.output = RunningMean(_SMOOTHING)
        self.chain_tokens = RunningMean(_SMOOTHING)
        self.chain_prompt = RunningMean(_SMOOTHING)
        self.gap_s = RunningMean(_SMOOTHING)
        self.follows = RunningMean(_SMOOTHING)


class _Seen:
    """A program in progress: calls that came and ended in its current stage."""

    __slots__ = ("calls", "ended", "gap_s", "last_end_s", "longest", "prompts", "stage")

    def __init__(self) -> None:
        self.stage = 0
        self.calls = 0
        self.ended = 0
        self.longest = 0
        self.prompts: list[int] = []
        self.gap_s = 0.0
        self.last_end_s: float | None = None


class ProgramHistory:
    """Stage statistics by (application, deadline in half octaves), backed by those of the application alone."""

    def __init__(self) -> None:
        self._stages: dict[tuple[str, int | None], list[_Stage]] = {}
        self._seen: dict[ProgramId, _Seen] = {}
        self._forecasts: dict[_Outline, tuple[int, Forecast]] = {}
        self._observed = 0
        self._wait_s = 0.0
        self._waited_at_s = 0.0

    def call_started(self, wait_s: float, now_s: float) -> None:
        """A call that was not given up got its first token so long after its release; later stages will, too."""
        expected_s = self.wait_s(now_s)
        self._wait_s = expected_s + _WAIT_SMOOTHING * (wait_s - expected_s)
        self._waited_at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Running mean of the time from a call's release to its first token, of calls that were not given up."""
        silent_s = max(0.0, now_s - self._waited_at_s - _WAIT_NEWS_S)
        return self._wait_s * math.exp(-silent_s / _WAIT_MEMORY_S)

    def call_came(self, program: Program, stage: int, prompt_tokens: int, now_s: float) -> None:
        """A call of the program was released. A higher stage than before closes the one before it."""
        seen = self._seen.get(program.program_id)
        if seen is None:
            seen = self._seen[program.program_id] = _Seen()
        if stage > seen.stage and seen.calls:
            self._close(program, seen, is_last=False)
            gap_s = max(0.0, now_s - seen.last_end_s) if seen.last_end_s is not None else 0.0
            seen.stage, seen.calls, seen.ended, seen.longest, seen.prompts = stage, 0, 0, 0, []
            seen.gap_s = gap_s
        seen.calls += 1
        seen.prompts.append(prompt_tokens)

    def call_ended(self, program: Program, stage: int, output_tokens: int, now_s: float) -> None:
        """A call was answered in full."""
        seen = self._seen.get(program.program_id)
        if seen is None or stage != seen.stage:
            return
        seen.ended += 1
        seen.longest = max(seen.longest, output_tokens)
        seen.last_end_s = now_s
        for stages in self._of(program.app, program.bucket):
            _stage(stages, stage).output.add(output_tokens)

    def program_ended(self, program: Program, *, is_complete: bool) -> None:
        """No further call will come. is_complete False: it was given up, and nobody knows what would have come."""
        seen = self._seen.pop(program.program_id, None)
        if seen is not None and seen.calls and is_complete:
            self._close(program, seen, is_last=True)

    def forecast(self, program: Program) -> Forecast:
        """What comes after the program's current stage."""
        return self._forecast((program.app, program.bucket, program.stage))

    def forecasts(self, programs: Sequence[Program | None]) -> tuple[list[Forecast], list[int]]:
        """`forecast` of many, NOTHING for None: (different ones, which of them each program has)."""
        number_of: dict[_Outline | None, int] = {}
        numbered = number_of.setdefault
        numbers = [
            numbered(None if one is None else (one.app, one.bucket, one.stage), len(number_of)) for one in programs
        ]
        return [NOTHING if outline is None else self._forecast(outline) for outline in number_of], numbers

    def shares_ahead(self, program: Program) -> list[float]:
        """How the stages that are expected to come share their time, in order; as many as are likelier than not."""
        own, general = self._of(program.app, program.bucket)
        shares: list[float] = []
        reached = 1.0
        for number in range(program.stage, min(len(general), _MAX_STAGES)):
            stage = _trusted(own, general, number)
            if number > program.stage:
                shares.append(max(stage.chain_tokens.value, 1.0))
            reached *= stage.follows.value
            if reached < _LIKELY:
                break
        return shares

    def least_chain_tokens(self, program: Program, share: float) -> float:  # noqa: ARG002  # means know no quantiles
        """Longest answers of later stages, summed, that are exceeded with probability 1 - share; 0 where unknown."""
        return 0.0

    def match(self, program: Program) -> dict[str, object]:
        """How a program is foretold, for who asks."""
        return {"kind": "stage means", "app": program.app, "stage": program.stage}

    def _forecast(self, outline: _Outline) -> Forecast:
        known = self._forecasts.get(outline)
        # The first programs teach the most.
        if known is not None and self._observed - known[0] < min(16, 1 + known[0] // 8):
            return known[1]
        forecast = self._sum_up(outline)
        if len(self._forecasts) > _MAX_KEYS:
            self._forecasts.clear()
        self._forecasts[outline] = (self._observed, forecast)
        return forecast

    def _close(self, program: Program, seen: _Seen, *, is_last: bool) -> None:
        self._observed += 1
        for stages in self._of(program.app, program.bucket):
            stage = _stage(stages, seen.stage)
            stage.follows.add(0.0 if is_last else 1.0)
            stage.calls.add(seen.calls)
            stage.prompt.add(sum(seen.prompts))
            stage.squared.add(float(sum(prompt * prompt for prompt in seen.prompts)))
            stage.chain_prompt.add(max(seen.prompts))
            stage.gap_s.add(seen.gap_s)
            stage.chain_tokens.add(seen.longest)

    def _of(self, app: str, bucket: int) -> tuple[list[_Stage], list[_Stage]]:
        own = self._stages.setdefault((app, bucket), [])
        general = self._stages.setdefault((app, None), [])
        if len(self._stages) > _MAX_KEYS:
            self._stages.pop(next(iter(self._stages)))
        return own, general

    def _sum_up(self, outline: _Outline) -> Forecast:
        app, bucket, current = outline
        own, general = self._of(app, bucket)
        total = [0.0] * 8
        reached, unknown = 1.0, 0.0
        for number in range(current, _MAX_STAGES):
            if number >= len(general):
                unknown += reached
                break
            stage = _trusted(own, general, number)
            if number > current:
                outputs = stage.calls.value * stage.output.value
                values = (
                    stage.calls.value, stage.prompt.value, stage.squared.value, outputs,
                    stage.chain_tokens.value, stage.chain_prompt.value, stage.gap_s.value, 1.0,
                )  # fmt: skip
                total = [sum_ + reached * value for sum_, value in zip(total, values, strict=True)]
            known = min(1.0, stage.follows.count / _TRUSTED)
            unknown += reached * (1.0 - known)
            reached *= known * stage.follows.value
            if reached < 1e-3:
                break
        calls, prompts, squared, outputs, chain, chain_prompts, gaps, stages = total
        return Forecast(calls, prompts, squared, outputs, chain, chain_prompts, gaps, stages, unknown)


class KnownGraphs(ProgramHistory):
    """A clairvoyant's history: the true stages of each program."""

    def __init__(self, programs: Mapping[ProgramId, Sequence[Sequence[Call]]]) -> None:
        super().__init__()
        self._known = {
            program_id: [_true_forecast(stages[number + 1 :]) for number in range(len(stages))]
            for program_id, stages in programs.items()
        }

    def forecast(self, program: Program) -> Forecast:
        """What will come."""
        stages = self._known[program.program_id]
        return stages[min(program.stage, len(stages) - 1)]

    def forecasts(self, programs: Sequence[Program | None]) -> tuple[list[Forecast], list[int]]:
        """What will come, of many: every program has its own."""
        return [NOTHING if one is None else self.forecast(one) for one in programs], list(range(len(programs)))


def _true_forecast(stages: Sequence[Sequence[Call]]) -> Forecast:
    calls = [call for stage in stages for call in stage]
    longest = [max(stage, key=lambda call: call[1]) for stage in stages if stage]
    return Forecast(
        calls=len(calls),
        prompt_tokens=sum(prompt for prompt, _, _ in calls),
        squared_prompts=float(sum(prompt * prompt for prompt, _, _ in calls)),
        output_tokens=sum(output for _, output, _ in calls),
        chain_tokens=sum(output for _, output, _ in longest),
        chain_prompt_tokens=sum(prompt for prompt, _, _ in longest),
        gaps_s=sum(max(gap for _, _, gap in stage) for stage in stages if stage),
        stages=len(longest),
    )


def _stage(stages: list[_Stage], number: int) -> _Stage:
    while len(stages) <= min(number, _MAX_STAGES):
        stages.append(_Stage())
    return stages[min(number, _MAX_STAGES)]


def _trusted(own: list[_Stage], general: list[_Stage], number: int) -> _Stage:
    if number < len(own) and own[number].follows.count >= _TRUSTED:
        return own[number]
    return general[number]
