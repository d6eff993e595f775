"""Calls as plans see them, in any state that a test wants, and plans over them."""

from dataclasses import dataclass
from typing import Any

from tempo_router.config import SchedulingConfig
from tempo_router.facts import Facts, facts_of
from tempo_router.ledger import Ledger
from tempo_router.policies.base import Context
from tempo_router.prediction import Lengths
from tempo_router.program_history import ProgramHistory
from tempo_router.request import RequestSpec
from tempo_router.standing import UNRANKED, Standing
from tempo_router.step_time import Pace
from tempo_router.tempo_plan import TempoPlan


@dataclass(slots=True)
class PlannedJob:
    """A call that waits or runs. missing_tokens: 0 when it decodes."""

    spec: RequestSpec
    lengths: Lengths
    generated_tokens: int = 0
    missing_tokens: int = 0
    ticket: int = 1
    since_s: float = 0.0
    standing: Standing = UNRANKED
    is_given_up: bool = False

    @property
    def facts(self) -> Facts:
        """Its spec in numbers."""
        return facts_of(self.spec)

    @property
    def is_relegated(self) -> bool:
        """It can no longer meet its SLO."""
        return self.standing.is_relegated


def planned(
    jobs: list[PlannedJob],
    pace: Pace,
    now_s: float,
    *,
    plan: TempoPlan | None = None,
    mean_length: float = 230.0,
    ledger: Ledger | None = None,
    **config: Any,
) -> list[Standing]:
    """The standings that a plan over these jobs gives them: a new plan of this config, or the one given."""
    own = plan if plan is not None else TempoPlan(SchedulingConfig.model_validate(config))
    book = ledger
    if book is None:
        book = Ledger()
        for job in jobs:
            book.arrived(job)
    context = Context(now_s, pace, mean_length, book)
    own.make(jobs, [], context, ProgramHistory(), replicas=1)  # type: ignore[arg-type]  # jobs of the test's own
    return [job.standing for job in jobs]
