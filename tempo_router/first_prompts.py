"""The first of an engine's prompts, in order, between two looks at all of them."""

from bisect import bisect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tempo_router.live_call import LiveCall

_FEW = 16


class FirstPrompts:
    """Prompts that steps take from. Behind them stand all others, unless these are all.

    Newcomers are put in their places, for O(log n) each, as long as few of the first have left; then all must be ranked
    again. calls: in order; who has left may still be among them.
    """

    def __init__(self) -> None:
        self.calls: list[LiveCall] = []
        self._keys: list[tuple[float, int]] = []
        self._is_ranked = False
        self._are_all = False
        self._gone = 0

    def choose(self, calls: list["LiveCall"]) -> None:
        """These are the first; how others compare with them is not known."""
        self.calls = calls
        self._is_ranked = False

    def rank(self, calls: list["LiveCall"], keys: Sequence[float], *, are_all: bool) -> None:
        """These are the first, by these keys and then tickets."""
        self.calls = calls
        self._keys = [(key, call.ticket) for key, call in zip(keys, calls, strict=True)]
        self._is_ranked, self._are_all, self._gone = True, are_all, 0

    def note_gone(self) -> None:
        """A prompt left, wherever it stood."""
        self._gone += 1

    def note_return(self) -> None:
        """A call became a prompt again, and may stand among the first already."""
        self._is_ranked = False

    def are_known(self, count: int) -> bool:
        """Whether the first `count` prompts, or all if there are fewer, are known but for newcomers."""
        return self._is_ranked and (self._are_all or len(self.calls) - self._gone >= count)

    def drop_gone(self, is_prompt: Callable[["LiveCall"], bool]) -> None:
        """Once several have left, look who: steps would pass over them again and again. Only while they are known."""
        if self._gone <= _FEW:
            return
        kept = [pair for pair in zip(self.calls, self._keys, strict=True) if is_prompt(pair[0])]
        self.calls, self._keys = [call for call, _ in kept], [key for _, key in kept]
        self._gone = 0

    def insert(self, call: "LiveCall", key: float) -> None:
        """A newcomer. Only while they are known."""
        place = (key, call.ticket)
        index = bisect(self._keys, place)
        if index == len(self._keys) and not self._are_all:
            return
        self._keys.insert(index, place)
        self.calls.insert(index, call)
