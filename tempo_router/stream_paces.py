"""When the next tokens of decoding streams are due, and how tight the tightest pace is."""

from collections import Counter
from collections.abc import Iterable

from tempo_router.live_call import LiveCall
from tempo_router.request import DispatchId, Latency

_NO_STREAM_TBT_S = 0.1
"""Time between tokens that is assumed without streams: what most of them ask for."""
_AMPLE_S = 10.0


class StreamPaces:
    """The streams among the decoding calls. `follow` who begins to decode, `unfollow` who parts.

    Due times are kept as they would be had no step been counted: a stream moves on by one token with each step.
    """

    def __init__(self) -> None:
        self._streams: dict[DispatchId, tuple[float, float]] = {}
        self._tbts: Counter[float] = Counter()
        self._slack_s = 0.0
        self._until_s = float("-inf")

    @property
    def tightest_s(self) -> float:
        """The least time between tokens that a stream here asks for."""
        return min(self._tbts, default=_NO_STREAM_TBT_S)

    def look_again(self) -> None:
        """What is known of slack holds no longer."""
        self._until_s = float("-inf")

    def follow(self, call: LiveCall) -> None:
        """It decodes from the next step on; nothing happens unless it is a stream."""
        slo = call.spec.slo
        if isinstance(slo, Latency):
            first = call.spec.generated_tokens + call.produced - call.joined
            self._streams[call.call_id] = (call.spec.arrival_s + slo.ttft_s + first * slo.tbt_s, slo.tbt_s)
            self._tbts[slo.tbt_s] += 1
            self.look_again()

    def unfollow(self, call: LiveCall) -> None:
        """It no longer decodes, or its target is another."""
        stream = self._streams.pop(call.call_id, None)
        if stream is not None:
            self._tbts[stream[1]] -= 1
            if not self._tbts[stream[1]]:
                del self._tbts[stream[1]]

    def least_slack_s(self, now_s: float, steps: int) -> float:
        """Time until the next due token of the streams that can still be on time. steps: as the planner's clock counts.

        Between two looks it shrinks at most by the time that passed, so nobody is looked at while that is ample.
        """
        if now_s < self._until_s:
            return self._slack_s
        least = _AMPLE_S
        for due_s, tbt_s in self._streams.values():
            slack = due_s + steps * tbt_s - now_s
            if 0.0 < slack < least:
                least = slack
        self._slack_s = least / 2
        self._until_s = now_s + least / 2
        return least

    def audit(self, decoding: Iterable[LiveCall]) -> None:
        """Check that exactly the streams among these are followed. Raises AssertionError."""
        streams = {call.call_id for call in decoding if isinstance(call.spec.slo, Latency)}
        assert set(self._streams) == streams, "who is followed as a stream is none, or a stream is not followed"
        assert self._tbts == Counter(tbt_s for _, tbt_s in self._streams.values()), "paces do not add up"
