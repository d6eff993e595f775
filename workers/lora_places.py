"""Which LoRA adapters take part in an engine's steps, and who waits until theirs may. Knows no engine."""

from collections import Counter
from typing import Generic, TypeVar

R = TypeVar("R")


class LoraPlaces(Generic[R]):
    """At most `places` adapters at once. An adapter keeps its place while any call of it takes part.

    vLLM ends with an error when a step's running requests have more adapters than `max_loras`. Who is held, or whose
    prompt sits a step out, may run in any later one, and so counts as well.
    A place that falls free goes to whoever waits longest. A call whose adapter has a place need not wait; but after
    `most_passed` that came later than one who waits, newcomers wait too, so that the places do fall free.
    Every operation costs O(1), `admit` O(waiting) when a place has fallen free or the first of the line has gone.
    """

    def __init__(self, places: int, most_passed: int) -> None:
        self._places = places
        self._most_passed = most_passed
        self._passed = 0
        self._is_settled = True
        self._calls: Counter[int] = Counter()
        self._adapter_of: dict[str, int] = {}
        self._waiting: dict[str, tuple[int, R]] = {}

    @property
    def waiting(self) -> list[str]:
        """Names of those that wait, longest first."""
        return list(self._waiting)

    def enter(self, request_id: str, adapter: int, request: R) -> bool:
        """A call came. False: it waits, and `admit` returns it when its turn comes."""
        if self._waiting:
            if adapter not in self._calls or self._passed >= self._most_passed:
                self._waiting[request_id] = (adapter, request)
                return False
            self._passed += 1
        elif not self._has_place(adapter):
            self._passed = 0
            self._waiting[request_id] = (adapter, request)
            return False
        self._seat(request_id, adapter)
        return True

    def leave(self, request_id: str) -> None:
        """A call ended, whether it took part or waited; no error for one without an adapter."""
        if next(iter(self._waiting), None) == request_id:
            self._is_settled = False
        self._waiting.pop(request_id, None)
        adapter = self._adapter_of.pop(request_id, None)
        if adapter is None:
            return
        self._calls[adapter] -= 1
        if not self._calls[adapter]:
            del self._calls[adapter]
            self._is_settled = False

    def admit(self) -> list[R]:
        """Those that waited and take part from now on, longest wait first."""
        if self._is_settled:
            return []
        self._is_settled = True
        self._passed = 0
        ready = []
        for request_id, (adapter, request) in list(self._waiting.items()):
            if self._has_place(adapter):
                del self._waiting[request_id]
                self._seat(request_id, adapter)
                ready.append(request)
        return ready

    def _has_place(self, adapter: int) -> bool:
        return adapter in self._calls or len(self._calls) < self._places

    def _seat(self, request_id: str, adapter: int) -> None:
        self._adapter_of[request_id] = adapter
        self._calls[adapter] += 1

    def audit(self) -> None:
        """Check the counts. Raises AssertionError."""
        assert len(self._calls) <= self._places, f"{len(self._calls)} adapters for {self._places} places"
        assert self._calls == Counter(self._adapter_of.values()), "calls of adapters do not add up"
        assert not self._waiting.keys() & self._adapter_of.keys(), "someone waits and takes part"
