"""Who waits, in the order of a policy."""

import heapq
from collections.abc import Sequence
from itertools import islice

from tempo_router.errors import InvalidEventError
from tempo_router.policies.base import Context, Policy
from tempo_router.waiting import WaitingRequest

_SLACK = 64
_RESCORES_PER_POP = 64
_REBUILT_FROM = 4
"""A quarter of all entries: from there on a new heap is made sooner than so many are pushed."""


class SloQueue:
    """Waiting requests, lowest key first, ties by ticket. Push and pop cost O(log n).

    Discarded requests leave dead entries behind, which are skipped later and swept out when they outnumber the live
    ones. Keys of a policy that is not static are looked at again when their turn comes: a key that rose goes back.
    That is exact for keys that only rise, but for a bound on the work of one pop: after 64 requests that fell back
    the best of those looked at is taken. Keys that fell (the pace changed) are found by `refresh`.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[float, int, int, WaitingRequest]] = []
        self._by_age: list[WaitingRequest] = []
        self._oldest_at = 0
        self._refresh_at = 0
        self._live = 0
        self._in_line = 0

    def __len__(self) -> int:
        return self._live

    def push(self, request: WaitingRequest, context: Context) -> None:
        """Add a request. Its ticket must be higher than any ever pushed."""
        if request.is_in_line:
            raise InvalidEventError(f"{request.spec.request_id!r} is already in the queue")
        request.is_in_line = True
        self._in_line += 1
        self._by_age.append(request)
        self.push_back(request, context)

    def push_back(self, request: WaitingRequest, context: Context) -> None:
        """Put back a request that was taken; it keeps its ticket and its age."""
        request.is_queued = True
        self._live += 1
        self._enter(request, self._policy.key(request, context))

    def pop(self, context: Context) -> WaitingRequest | None:
        """Take the request that goes first now; None when nobody waits. Then either `push_back` or `forget` it."""
        request = self._first(context)
        if request is not None:
            self.take(request)
        return request

    def take(self, request: WaitingRequest) -> None:
        """Take a queued request, wherever it stands."""
        request.is_queued = False
        self._live -= 1

    def forget(self, request: WaitingRequest) -> None:
        """The request waits no longer, in the queue or taken from it."""
        if request.is_queued:
            self.take(request)
        request.is_in_line = False
        self._in_line -= 1
        self._sweep()

    def rekey(self, request: WaitingRequest, context: Context) -> None:
        """Something about a queued request changed: look at its key again."""
        key = self._policy.key(request, context)
        if key != request.key:
            self._enter(request, key)

    def rekey_many(self, requests: Sequence[WaitingRequest], keys: Sequence[float]) -> None:
        """Many requests have other keys now, as the policy says; those that are not queued are left alone."""
        moved = [
            (request, key)
            for request, key in zip(requests, keys, strict=True)
            if key != request.key and request.is_queued
        ]
        if _REBUILT_FROM * len(moved) < len(self._heap):
            for request, key in moved:
                self._enter(request, key)
            return
        for request, key in moved:
            request.key = key
            request.entry += 1
        self._rebuild()
        self._heap.extend((key, request.ticket, request.entry, request) for request, key in moved)
        heapq.heapify(self._heap)

    def oldest(self) -> WaitingRequest | None:
        """The queued request that has waited longest; None if none of the oldest few is queued."""
        by_age = self._by_age
        while self._oldest_at < len(by_age) and not by_age[self._oldest_at].is_in_line:
            self._oldest_at += 1
        few = islice(by_age, self._oldest_at, self._oldest_at + _SLACK)
        return next((request for request in few if request.is_queued), None)

    def refresh(self, count: int, context: Context) -> None:
        """Look again at the keys of the next `count` requests, in rotation."""
        if self._policy.is_static:
            return
        if self._refresh_at >= len(self._by_age):
            self._refresh_at = 0
        for request in islice(self._by_age, self._refresh_at, self._refresh_at + count):
            if request.is_queued:
                key = self._policy.key(request, context)
                # One that rose is found when its turn comes: an entry now would only be one more to skip.
                if key < request.key:
                    self._enter(request, key)
        self._refresh_at += count

    def audit(self) -> None:
        """Check that every live request can be found, and that memory is bounded. Raises AssertionError."""
        entries = {(ticket, entry): key for key, ticket, entry, request in self._heap if request.is_queued}
        live = [request for request in self._by_age if request.is_queued]
        assert len(live) == self._live, f"{len(live)} requests are queued by age but {self._live} are counted"
        for request in live:
            key = entries.get((request.ticket, request.entry))
            assert key == request.key, f"{request.spec.request_id!r} has key {request.key}, its entry says {key}"
        in_line = sum(request.is_in_line for request in self._by_age)
        assert in_line == self._in_line, f"{in_line} requests are in line but {self._in_line} are counted"
        bound = 2 * self._in_line + _SLACK
        assert len(self._by_age) <= bound, f"{len(self._by_age)} entries by age for {self._in_line} requests"
        assert len(self._heap) <= bound, f"{len(self._heap)} heap entries for {self._in_line} requests"

    def _first(self, context: Context) -> WaitingRequest | None:
        heap = self._heap
        looks = 0
        while heap:
            key, ticket, entry, request = heap[0]
            if not request.is_queued or request.entry != entry:
                heapq.heappop(heap)
                continue
            if self._policy.is_static or looks >= _RESCORES_PER_POP:
                heapq.heappop(heap)
                return request
            new_key = self._policy.key(request, context)
            request.key = new_key
            if new_key <= key:
                heapq.heappop(heap)
                return request
            heapq.heapreplace(heap, (new_key, ticket, entry, request))
            looks += 1
        return None

    def _enter(self, request: WaitingRequest, key: float) -> None:
        request.key = key
        request.entry += 1
        heapq.heappush(self._heap, (key, request.ticket, request.entry, request))
        self._sweep()

    def _sweep(self) -> None:
        """Drop dead entries where they outnumber the live ones: O(1) amortised per push."""
        limit = 2 * self._in_line + _SLACK
        if len(self._heap) > limit:
            self._rebuild()
            heapq.heapify(self._heap)
        if len(self._by_age) > limit:
            self._by_age = [request for request in self._by_age if request.is_in_line]
            self._oldest_at = 0
            self._refresh_at = 0

    def _rebuild(self) -> None:
        """Leave out dead entries; a heap must be made of the rest."""
        self._heap = [entry for entry in self._heap if entry[3].is_queued and entry[3].entry == entry[2]]
