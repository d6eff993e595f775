"""An engine's waiting requests, of which a step sees only those that its plan lets in. Knows no engine."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the queue needs of a request."""

    @property
    def request_id(self) -> str:
        """Its name."""
        ...


R = TypeVar("R", bound=Waiting)


class PlannedQueue(Generic[R]):
    """Everyone who waits, and for one step those on offer, in the order of the plan.

    Its length counts all; it is true only while someone is on offer. So whoever was evicted for a step is counted, and
    cannot come back within that step. Every operation costs O(1) per request, removal of many included: aborts come in
    bulk.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, R] = {}
        self._on_offer: deque[R] = deque()

    def offer(self, requests: Iterable[R]) -> None:
        """Let these in, in this order; whoever does not wait is passed over."""
        self._on_offer = deque(request for request in requests if request.request_id in self._waiting)

    def withdraw(self) -> None:
        """The step is over."""
        self._on_offer.clear()

    def add_request(self, request: R) -> None:
        """It waits."""
        self._waiting[request.request_id] = request

    def prepend_request(self, request: R) -> None:
        """It waits again; the plan says when its turn comes."""
        self._waiting[request.request_id] = request

    def prepend_requests(self, requests: Iterable[R]) -> None:
        """These were passed over in the step; they go on waiting."""
        for request in requests:
            self._waiting[request.request_id] = request

    def peek_request(self) -> R:
        """The first on offer. Raises IndexError when there is none."""
        return self._on_offer[0]

    def pop_request(self) -> R:
        """Take the first on offer. Raises IndexError when there is none."""
        request = self._on_offer.popleft()
        del self._waiting[request.request_id]
        return request

    def remove_request(self, request: R) -> None:
        """It waits no longer; no error if it did not."""
        if self._waiting.pop(request.request_id, None) is not None and self._on_offer:
            self._on_offer = deque(one for one in self._on_offer if one is not request)

    def remove_requests(self, requests: Iterable[R]) -> None:
        """None of these waits any longer."""
        gone = {request.request_id for request in requests if self._waiting.pop(request.request_id, None) is not None}
        if gone and self._on_offer:
            self._on_offer = deque(one for one in self._on_offer if one.request_id not in gone)

    def __contains__(self, request: object) -> bool:
        return getattr(request, "request_id", None) in self._waiting

    def __bool__(self) -> bool:
        return bool(self._on_offer)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[R]:
        return iter(list(self._waiting.values()))


class Funnel(PlannedQueue[R]):
    """A second queue of an engine whose requests belong into the first: what is put in comes out there."""

    def __init__(self, first: PlannedQueue[R]) -> None:
        super().__init__()
        self._first = first

    def add_request(self, request: R) -> None:
        """It waits in the first queue."""
        self._first.add_request(request)

    def prepend_request(self, request: R) -> None:
        """It waits in the first queue."""
        self._first.prepend_request(request)

    def prepend_requests(self, requests: Iterable[R]) -> None:
        """They wait in the first queue."""
        self._first.prepend_requests(requests)
