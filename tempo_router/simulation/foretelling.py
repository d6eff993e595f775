"""The forest of answer lengths inside a simulation: what the service does in a process of its own, in virtual time.

The same window, forest and calibration as in the service, and the same conditions for a fit. What differs: a fit takes
no time, and a prediction always comes after FORETOLD_S; neither is ever dropped.
"""

from collections.abc import Iterable

from tempo_router.calibration import Calibration
from tempo_router.length_regressor import MIN_ENDED, MIN_FRESH, LengthRegressor, TrainingWindow
from tempo_router.prediction import Lengths, LengthSample
from tempo_router.request import RequestId, RequestSpec

FORETOLD_S = 0.005
"""From an arrival to the forest's estimate of it; the service needs some milliseconds."""


class Foretelling:
    """Learns from ended answers, fits a forest now and then, and judges it beside the histograms.

    training_s, window: as in SchedulingConfig. seed: of the forests; equal calls and seed give equal predictions.
    """

    def __init__(self, *, training_s: float, window: int, seed: int) -> None:
        self._training_s = training_s
        self._seed = seed
        self._window = TrainingWindow(window)
        self._calibration = Calibration()
        self._forest: LengthRegressor | None = None
        self._told: dict[RequestId, tuple[Lengths, Lengths | None]] = {}
        self._fresh = 0
        self._next_fit_s = 0.0
        self.fits = 0

    def foretell(self, spec: RequestSpec, histogram: Lengths) -> Lengths | None:
        """A request came, with this estimate. The forest's, if there is one and it does better for this app."""
        (own,) = self._forest.predict_many([spec]) if self._forest is not None else (None,)
        self._told[spec.request_id] = (histogram, own)
        return own if self._calibration.used(spec.app) == "regressor" else None

    def forget(self, request_id: RequestId) -> None:
        """A request will never be answered."""
        self._told.pop(request_id, None)

    def learn(self, samples: Iterable[LengthSample], now_s: float) -> None:
        """Answers ended. Fits a new forest when enough of them are new and the last fit is training_s ago."""
        for sample in samples:
            self._window.add(sample)
            self._fresh += 1
            told = self._told.pop(sample.spec.request_id, None)
            if told is not None:
                histogram, own = told
                self._calibration.score(
                    sample.spec.app,
                    sample.tokens,
                    is_complete=sample.is_complete,
                    histogram=histogram,
                    regressor=own,
                )
        if self._fresh >= MIN_FRESH and self._window.ended >= MIN_ENDED and now_s >= self._next_fit_s:
            self._forest = LengthRegressor.fit(self._window.rows(), seed=self._seed)
            self._fresh = 0
            self._next_fit_s = now_s + self._training_s
            self.fits += 1
