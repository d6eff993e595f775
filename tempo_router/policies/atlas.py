"""Least attained service along the longest path of the program first (Autellix)."""

from dataclasses import dataclass
from typing import ClassVar

from tempo_router.policies.base import CHUNKED, BatchRule, Context, Job, Policy, as_engine_priority
from tempo_router.policies.plas import BOUNDS_S, queue_key


@dataclass(frozen=True, slots=True)
class LeastAttainedPath(Policy):
    """As `plas`, but service is the longest chain of run times that led to the call: its program's critical path.

    Calls that ran side by side count once, so wide programs do not sink faster than deep ones. Ties, queues and
    promotion as in `plas`. Starves deep programs, up to beta; knows no targets. Source: ATLAS of Autellix (arXiv
    2502.13965); parents are taken to be all calls of the stages before.
    """

    bounds_s: tuple[float, ...] = BOUNDS_S
    beta: float = 8.0
    is_static: ClassVar[bool] = False
    is_class_blind: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    frame_s: ClassVar[float] = 0.3
    batch: BatchRule = CHUNKED

    def key(self, request: Job, context: Context) -> float:
        """Its queue, then its arrival."""
        program = context.ledger.program(request.spec)
        if program is None:
            return queue_key(request, context, 0.0, 0.0, 0.0, self.bounds_s, self.beta)
        path_s = program.path_s.get(request.spec.stage, 0.0)
        return queue_key(request, context, path_s, program.waited_s, program.attained_s, self.bounds_s, self.beta)

    def engine_priority(self, request: Job, context: Context) -> int:
        """Milliseconds of the key."""
        return as_engine_priority(self.key(request, context), 1e3)
