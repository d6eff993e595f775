"""When requests of which nothing is computed yet turn out to be beyond help: those that wait, here or in an engine."""

import heapq

from tempo_router.replicas import Call
from tempo_router.step_time import Pace, StepTimeModel
from tempo_router.value import hopeless_at_s
from tempo_router.waiting import WaitingRequest

_TIMERS_PER_CALL = 64
_SLACK = 64
_MIN_RECHECK_S = 0.05


def is_hopeless(request: WaitingRequest, pace: Pace, now_s: float) -> bool:
    """Whether the request can no longer meet its SLO, as estimated now."""
    return now_s >= hopeless_at_s(request.spec, request.lengths, pace)


class HopelessTimers:
    """One timer for each request that can become hopeless before its first token: of several the last one set.

    Estimates move on after a timer was set: one that fires looks again, and is set anew where there is hope.
    """

    def __init__(self) -> None:
        self._timers: list[tuple[float, int, WaitingRequest | Call]] = []
        self._last = 0

    def set(self, request: WaitingRequest) -> None:
        """A request began to wait. O(log n)."""
        self._push(request.hopeless_at_s, request)

    def set_started(self, request: WaitingRequest, call: Call, now_s: float) -> None:
        """A waiting request became a call: it may have to wait in the engine, too."""
        if not request.is_relegated:
            self._push(max(request.hopeless_at_s, now_s + _MIN_RECHECK_S), call)

    def set_again(self, call: Call, pace: Pace, now_s: float) -> None:
        """A call that waits in its engine has another deadline."""
        self._push(max(hopeless_at_s(call.spec, call.lengths, pace), now_s + _MIN_RECHECK_S), call)

    def due(self, steps: StepTimeModel, now_s: float) -> list[WaitingRequest | Call]:
        """Requests that have become hopeless, earliest first, each once. Looks at a bounded number of timers."""
        timers = self._timers
        hopeless: list[WaitingRequest | Call] = []
        for _ in range(_TIMERS_PER_CALL):
            if not timers or timers[0][0] > now_s:
                break
            _, number, request = heapq.heappop(timers)
            if not _is_timed(number, request):
                continue
            at_s = hopeless_at_s(request.spec, request.lengths, steps.pace())
            if at_s <= now_s:
                hopeless.append(request)
            else:
                self._push(max(at_s, now_s + _MIN_RECHECK_S), request)
        return hopeless

    def sweep(self, live: int) -> None:
        """Forget timers that count no more, once they outnumber the requests that wait or run, `live` of them."""
        if len(self._timers) > 2 * live + _SLACK:
            self._timers = [timer for timer in self._timers if _is_timed(timer[1], timer[2])]
            heapq.heapify(self._timers)

    def audit(self, live: int) -> None:
        """Check after a sweep that memory is bounded while so many requests wait or run. Raises AssertionError."""
        assert len(self._timers) <= 2 * live + _SLACK, f"{len(self._timers)} timers for {live} requests"

    def _push(self, at_s: float, request: WaitingRequest | Call) -> None:
        self._last += 1
        request.timer = self._last
        if at_s < float("inf"):
            heapq.heappush(self._timers, (at_s, self._last, request))


def _is_timed(number: int, request: WaitingRequest | Call) -> bool:
    if request.timer != number:
        return False
    if isinstance(request, Call):
        is_there = request.replica.calls.get(request.dispatch_id) is request
        return is_there and not (request.is_aborted or request.is_relegated or request.new_tokens)
    return request.is_in_line and not request.is_relegated
