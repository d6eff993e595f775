"""The history of programs by patterns: what a program looked like so far decides what is expected of it.

The same questions and answers as `ProgramHistory`, which is asked where too few outlines came as far as a program, and
where a program's graph is known.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tempo_router.ledger import Program
from tempo_router.patterns import (
    MAX_STAGES,
    REST_CALLS,
    REST_CHAIN,
    REST_STAGES,
    REST_TOKENS,
    Match,
    Outline,
    PatternBook,
    StageOutline,
)
from tempo_router.program_history import NOTHING, Forecast, ProgramHistory
from tempo_router.request import ProgramId

_MAX_LEARNT = 4096


@dataclass(frozen=True, slots=True)
class KnownPrograms:
    """What a router knows of programs when it begins.

    outlines: of those that ended, oldest first, by the router's clock. unfolding: of those in progress, what
    `PatternHistory.resume` takes.
    """

    outlines: tuple[Outline, ...] = ()
    unfolding: tuple[tuple[ProgramId, tuple[tuple[int, StageOutline], ...], float | None], ...] = ()


class _Stage:
    """A stage in progress. ended: how many of its calls were answered."""

    __slots__ = ("calls", "ended", "gap_s", "longest", "longest_prompt", "number", "output", "prompt", "squared")

    def __init__(self, number: int, gap_s: float) -> None:
        self.number = number
        self.gap_s = gap_s
        self.calls = 0
        self.prompt = 0
        self.squared = 0.0
        self.output = 0
        self.longest = 0
        self.longest_prompt = 0
        self.ended = 0

    def outline(self) -> StageOutline:
        """As it is now."""
        return StageOutline(
            self.calls, self.prompt, self.squared, self.output, self.longest, self.longest_prompt, self.gap_s
        )


class _Unfolding:
    """What was seen of one program. known: its match, until something is seen that may change it."""

    __slots__ = ("known", "last_end_s", "stages")

    def __init__(self) -> None:
        self.stages: list[_Stage] = []
        self.last_end_s: float | None = None
        self.known: tuple[Match | None] | None = None

    @property
    def is_between(self) -> bool:
        """Every call of its last stage was answered."""
        return self.stages[-1].ended >= self.stages[-1].calls

    def outlines(self) -> tuple[StageOutline, ...]:
        """Of all its stages."""
        return tuple(stage.outline() for stage in self.stages)


class PatternHistory(ProgramHistory):
    """Learns every program that ends; foretells by those that looked alike.

    most: outlines that are kept. age_s: for how long, at most.
    """

    def __init__(self, most: int = 5000, age_s: float = math.inf) -> None:
        super().__init__()
        self._book = PatternBook(most, age_s)
        self._unfolding: dict[ProgramId, _Unfolding] = {}
        self._learnt: list[Outline] = []

    def begin(self, known: KnownPrograms) -> None:
        """All that earlier lives of the router have left."""
        self.restore(known.outlines)
        for program_id, stages, last_end_s in known.unfolding:
            self.resume(program_id, stages, last_end_s)

    def restore(self, outlines: Iterable[Outline]) -> None:
        """What was learnt earlier, oldest first."""
        self._book.add_all(outlines)

    def drain_learnt(self) -> list[Outline]:
        """Outlines of programs that ended since the last question, for who stores them."""
        learnt, self._learnt = self._learnt, []
        return learnt

    def resume(
        self, program_id: ProgramId, stages: Iterable[tuple[int, StageOutline]], last_end_s: float | None
    ) -> None:
        """A program that unfolded before this router's life, by the calls that have ended. last_end_s: on this clock.

        Those that still run are told by whoever runs them.
        """
        unfolding = self._unfolding[program_id] = _Unfolding()
        unfolding.last_end_s = last_end_s
        for number, one in stages:
            stage = _Stage(number, one.gap_s)
            stage.calls, stage.prompt, stage.squared = one.calls, one.prompt_tokens, one.squared_prompts
            stage.output, stage.longest, stage.longest_prompt = (
                one.output_tokens, one.chain_tokens, one.chain_prompt_tokens,
            )  # fmt: skip
            stage.ended = one.calls
            unfolding.stages.append(stage)

    def call_came(self, program: Program, stage: int, prompt_tokens: int, now_s: float) -> None:
        """As `ProgramHistory`; and the outline grows."""
        super().call_came(program, stage, prompt_tokens, now_s)
        unfolding = self._unfolding.get(program.program_id)
        if unfolding is None:
            unfolding = self._unfolding[program.program_id] = _Unfolding()
            self._book.forget_aged(now_s)
        if not unfolding.stages or stage > unfolding.stages[-1].number:
            gap_s = 0.0 if unfolding.last_end_s is None else max(0.0, now_s - unfolding.last_end_s)
            if unfolding.stages:
                self._book.progressed(program.program_id, _outline(program, unfolding.outlines()))
            unfolding.stages.append(_Stage(stage, gap_s))
        current = unfolding.stages[-1]
        current.calls += 1
        current.prompt += prompt_tokens
        current.squared += float(prompt_tokens * prompt_tokens)
        current.longest_prompt = max(current.longest_prompt, prompt_tokens)
        unfolding.known = None

    def call_ended(self, program: Program, stage: int, output_tokens: int, now_s: float) -> None:
        """As `ProgramHistory`; and the answer counts for its stage."""
        super().call_ended(program, stage, output_tokens, now_s)
        unfolding = self._unfolding.get(program.program_id)
        if unfolding is None:
            return
        unfolding.last_end_s = now_s
        current = next((one for one in reversed(unfolding.stages) if one.number <= stage), None)
        if current is None:
            return
        current.ended += 1
        current.output += output_tokens
        current.longest = max(current.longest, output_tokens)
        unfolding.known = None

    def program_ended(self, program: Program, now_s: float, *, is_complete: bool) -> None:
        """It is learnt: with its end if it is complete, else as far as it came."""
        super().program_ended(program, now_s, is_complete=is_complete)
        self._book.forget_aged(now_s)
        unfolding = self._unfolding.pop(program.program_id, None)
        if unfolding is None or not unfolding.stages:
            return
        self._book.over(program.program_id, program.app)
        stages = unfolding.outlines()
        if not is_complete:
            # Nobody knows how its last stage would have ended.
            stages = stages if unfolding.is_between else stages[:-1]
        if stages:
            outline = replace(_outline(program, stages, is_complete=is_complete), at_s=now_s)
            self._book.add(outline)
            self._learnt.append(outline)
            del self._learnt[:-_MAX_LEARNT]

    def forecast(self, program: Program) -> Forecast:
        """What comes after the program's current stage."""
        found = self._match(program)
        return found.forecast if found is not None else super().forecast(program)

    def forecasts(self, programs: Sequence[Program | None]) -> tuple[list[Forecast], list[int]]:
        """`forecast` of many: every program has its own."""
        return [NOTHING if one is None else self.forecast(one) for one in programs], list(range(len(programs)))

    def stages_ahead(self, program: Program) -> list[Forecast]:
        """Each of the stages that are expected to come, in order."""
        found = self._match(program)
        return list(found.stages) if found is not None else super().stages_ahead(program)

    def least_chain_tokens(self, program: Program, share: float) -> float:
        """Longest answers of later stages, summed, that are exceeded with probability 1 - share; 0 where unknown."""
        found = self._match(program)
        return found.quantile(REST_CHAIN, share) if found is not None else super().least_chain_tokens(program, share)

    def match(self, program: Program) -> dict[str, object]:
        """How a program is foretold, for who asks."""
        found = self._match(program)
        if found is None:
            return super().match(program)
        return {
            "kind": "patterns",
            "app": program.app,
            "stage": program.stage,
            "outlines": found.outlines,
            "alike": round(found.alike, 1),
            "unknown": round(found.forecast.unknown, 3),
            "later_stages": [found.quantile(REST_STAGES, share) for share in (0.1, 0.5, 0.9)],
            "later_calls": [found.quantile(REST_CALLS, share) for share in (0.1, 0.5, 0.9)],
            "later_output_tokens": [found.quantile(REST_TOKENS, share) for share in (0.1, 0.5, 0.9)],
            "critical_path_tokens": [found.quantile(REST_CHAIN, share) for share in (0.1, 0.5, 0.9)],
        }

    def _match(self, program: Program) -> Match | None:
        """None where too few are alike, and where no guess is needed: its graph is known."""
        unfolding = self._unfolding.get(program.program_id)
        if unfolding is None or not unfolding.stages or program.program_id in self._known_graphs:
            return None
        if unfolding.known is None:
            span_s = program.deadline_s - program.arrival_s
            seen = unfolding.outlines()
            found = self._book.match(program.app, seen, span_s, is_between=unfolding.is_between)
            unfolding.known = (found,)
        return unfolding.known[0]


def _outline(program: Program, stages: tuple[StageOutline, ...], *, is_complete: bool = False) -> Outline:
    return Outline(program.app, program.deadline_s - program.arrival_s, stages[:MAX_STAGES], is_complete)
