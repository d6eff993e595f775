"""What is still to come of a program: learnt from programs of the same application, stage by stage.

A program unfolds at run time, and under overload the long ones are the first to be given up; counting only finished
programs would make programs look short. So two things are learnt apart: what a stage looks like, from every stage that
was seen, and how likely another stage follows, from every stage that ended and was followed, or was the last.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from tempo_router.known_stages import KnownStage
from tempo_router.ledger import Program
from tempo_router.prediction import LengthHistograms, Lengths
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
SPREAD = 0.25
"""Standard deviation of what is expected of a program, as a share of it."""

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


class _KnownGraph:
    """What is known of one program, and what it foretells: (stage of the program, changes before, stages to come)."""

    __slots__ = ("foretold", "stages")

    def __init__(self, stages: tuple[KnownStage, ...]) -> None:
        self.stages = stages
        self.foretold: tuple[int, int, list[Forecast], Forecast] | None = None


class ProgramHistory:
    """Stage statistics by (application, deadline in half octaves), backed by those of the application alone.

    A program of which more is known (`outlined`) is foretold by that instead. lengths: what is known of answers, for
    its stages that nobody has seen yet.
    """

    def __init__(self) -> None:
        self.lengths = LengthHistograms()
        self._known_graphs: dict[ProgramId, _KnownGraph] = {}
        self._stages: dict[tuple[str, int | None], list[_Stage]] = {}
        self._seen: dict[ProgramId, _Seen] = {}
        self._forecasts: dict[_Outline, tuple[int, Forecast]] = {}
        self._observed = 0
        self._wait_s = 0.0
        self._waited_at_s = 0.0

    def outlined(self, program_id: ProgramId, stages: tuple[KnownStage, ...]) -> None:
        """These are all stages that the program will have, ascending; () where nothing is known, or any more."""
        if stages:
            self._known_graphs[program_id] = _KnownGraph(stages)
        else:
            self._known_graphs.pop(program_id, None)

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

    def program_ended(self, program: Program, now_s: float, *, is_complete: bool) -> None:  # noqa: ARG002  # no age
        """No further call will come. is_complete False: it was given up, and nobody knows what would have come."""
        seen = self._seen.pop(program.program_id, None)
        if seen is not None and seen.calls and is_complete:
            self._close(program, seen, is_last=True)

    def forecast(self, program: Program) -> Forecast:
        """What comes after the program's current stage."""
        known = self._known_graphs.get(program.program_id)
        if known is not None:
            return self._foretold(program, known)[1]
        return self._forecast((program.app, program.bucket, program.stage))

    def forecasts(self, programs: Sequence[Program | None]) -> tuple[list[Forecast], list[int]]:
        """`forecast` of many, NOTHING for None: (different ones, which of them each program has)."""
        number_of: dict[_Outline | Program | None, int] = {}
        numbered = number_of.setdefault
        known = self._known_graphs
        numbers = [
            numbered(
                one if one is None or one.program_id in known else (one.app, one.bucket, one.stage), len(number_of)
            )
            for one in programs
        ]
        return [self._forecast_of(one) for one in number_of], numbers

    def stages_ahead(self, program: Program) -> list[Forecast]:
        """Each of the stages that are expected to come, in order; as many as are likelier than not."""
        known = self._known_graphs.get(program.program_id)
        if known is not None:
            return self._foretold(program, known)[0]
        own, general = self._of(program.app, program.bucket)
        ahead: list[Forecast] = []
        reached = 1.0
        for number in range(program.stage, min(len(general), _MAX_STAGES)):
            stage = _trusted(own, general, number)
            if number > program.stage:
                ahead.append(
                    Forecast(
                        chain_tokens=stage.chain_tokens.value, chain_prompt_tokens=stage.chain_prompt.value,
                        gaps_s=stage.gap_s.value, stages=1.0,
                    )
                )  # fmt: skip
            reached *= stage.follows.value
            if reached < _LIKELY:
                break
        return ahead

    def least_chain_tokens(self, program: Program, share: float) -> float:
        """Longest answers of later stages, summed, that are exceeded with probability 1 - share; 0 where unknown.

        Means know no quantiles. Of a known graph the stages are certain, and each is taken at its least.
        """
        known = self._known_graphs.get(program.program_id)
        if known is None:
            return 0.0
        return sum(self._least_tokens(program, one, share) for one in known.stages if one.stage > program.stage)

    def match(self, program: Program) -> dict[str, object]:
        """How a program is foretold, for who asks."""
        known = self._known_graphs.get(program.program_id)
        if known is not None:
            stages = len(known.stages)
            return {"kind": "known graph", "app": program.app, "stage": program.stage, "stages": stages}
        return {"kind": "stage means", "app": program.app, "stage": program.stage}

    def _forecast_of(self, one: _Outline | Program | None) -> Forecast:
        if one is None:
            return NOTHING
        return self.forecast(one) if isinstance(one, Program) else self._forecast(one)

    # ---- known graphs ----

    def _foretold(self, program: Program, known: _KnownGraph) -> tuple[list[Forecast], Forecast]:
        """(each stage to come, all of them)."""
        foretold = known.foretold
        if foretold is None or foretold[0] != program.stage or self._has_moved_on(foretold[1]):
            ahead = [self._known_stage(program, one) for one in known.stages if one.stage > program.stage]
            foretold = known.foretold = (program.stage, self._observed, ahead, _total(ahead))
        return foretold[2], foretold[3]

    def _known_stage(self, program: Program, one: KnownStage) -> Forecast:
        """What was not said of it is as in this stage of the application, or as answers and prompts are otherwise."""
        own, general = self._of(program.app, program.bucket)
        like = _trusted(own, general, one.stage) if one.stage < len(general) else _Stage()
        usual = self._usual_lengths(program, one.stage)
        output = _first(one.output_tokens, like.output, usual.mean)
        longest = _first(one.output_tokens, like.chain_tokens, _longest_of(one.calls, usual))
        if one.max_tokens is not None:
            output, longest = min(output, one.max_tokens), min(longest, one.max_tokens)
        prompt = _first(one.prompt_tokens, like.chain_prompt, self._longest_prompt(program))
        return Forecast(
            calls=one.calls,
            prompt_tokens=one.calls * prompt,
            squared_prompts=one.calls * prompt * prompt,
            output_tokens=one.calls * output,
            chain_tokens=max(output, longest),
            chain_prompt_tokens=prompt,
            gaps_s=_first(one.gap_s, like.gap_s, 0.0),
            stages=1.0,
        )

    def _least_tokens(self, program: Program, one: KnownStage, share: float) -> float:
        if one.output_tokens is not None:
            least = max(0.0, one.output_tokens * (1.0 + SPREAD * NormalDist().inv_cdf(share)))
        else:
            least = self._usual_lengths(program, one.stage).quantile(share)
        return least if one.max_tokens is None else min(least, one.max_tokens)

    def _usual_lengths(self, program: Program, stage: int) -> Lengths:
        return self.lengths.of_stage(program.model, program.app, stage)

    def _longest_prompt(self, program: Program) -> float:
        """Of the calls of its present stage."""
        seen = self._seen.get(program.program_id)
        return max(seen.prompts, default=0) if seen is not None else 0

    # ---- means ----

    def _has_moved_on(self, observed: int) -> bool:
        """Whether what was foretold after so many changes is stale. The first programs teach the most."""
        return self._observed - observed >= min(16, 1 + observed // 8)

    def _forecast(self, outline: _Outline) -> Forecast:
        known = self._forecasts.get(outline)
        if known is not None and not self._has_moved_on(known[0]):
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


def _total(stages: Iterable[Forecast]) -> Forecast:
    """Of stages that certainly come."""
    sums = [0.0] * 8
    for one in stages:
        values = (
            one.calls, one.prompt_tokens, one.squared_prompts, one.output_tokens,
            one.chain_tokens, one.chain_prompt_tokens, one.gaps_s, one.stages,
        )  # fmt: skip
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    calls, prompts, squared, outputs, chain, chain_prompts, gaps, count = sums
    return Forecast(calls, prompts, squared, outputs, chain, chain_prompts, gaps, count)


def _first(said: float | None, seen: RunningMean, otherwise: float) -> float:
    """What was said, or else what was seen, if anything was."""
    if said is not None:
        return said
    return seen.value if seen.count else otherwise


def _longest_of(calls: int, lengths: Lengths) -> float:
    """About the longest of so many answers."""
    return lengths.mean if calls == 1 else max(lengths.mean, lengths.quantile(calls / (calls + 1)))


def _stage(stages: list[_Stage], number: int) -> _Stage:
    while len(stages) <= min(number, _MAX_STAGES):
        stages.append(_Stage())
    return stages[min(number, _MAX_STAGES)]


def _trusted(own: list[_Stage], general: list[_Stage], number: int) -> _Stage:
    if number < len(own) and own[number].follows.count >= _TRUSTED:
        return own[number]
    return general[number]
