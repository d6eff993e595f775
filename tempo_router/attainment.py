"""Goodput and attainment of the last minute, by class: what a dashboard shows."""

from collections import deque
from typing import Any, get_args

from tempo_router.metrics import Outcome
from tempo_router.request import SloClass

WINDOW_S = 60.0
_MOST = 100_000


class Attainment:
    """Outcomes of the last `window_s` seconds."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._outcomes: deque[tuple[float, Outcome]] = deque(maxlen=_MOST)
        self._began_s: float | None = None

    def add(self, outcome: Outcome, at_s: float) -> None:
        """A request ended."""
        if self._began_s is None:
            self._began_s = at_s
        self._outcomes.append((at_s, outcome))
        self._forget(at_s)

    def shown(self, now_s: float) -> dict[str, Any]:
        """By class: requests, share that met its target (None without any), good tokens and all tokens per second."""
        self._forget(now_s)
        since_s = self._window_s if self._began_s is None else max(1.0, min(self._window_s, now_s - self._began_s))
        classes: dict[str, Any] = {}
        for name in get_args(SloClass):
            outcomes = [outcome for _, outcome in self._outcomes if outcome.slo_class == name]
            judged = [outcome.is_met for outcome in outcomes if outcome.is_met is not None]
            classes[name] = {
                "requests": len(outcomes),
                "attainment": sum(judged) / len(judged) if judged else None,
                "good_tokens_per_s": sum(outcome.good_tokens for outcome in outcomes) / since_s,
                "tokens_per_s": sum(outcome.output_tokens for outcome in outcomes) / since_s,
            }
        return {"window_s": since_s, "classes": classes}

    def _forget(self, now_s: float) -> None:
        while self._outcomes and self._outcomes[0][0] < now_s - self._window_s:
            self._outcomes.popleft()
