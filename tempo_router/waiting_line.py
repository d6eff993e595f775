"""All requests that wait: those in the queue, and those that no attached replica could hold."""

from collections import Counter
from collections.abc import Sequence

from tempo_router.backlog import Backlog
from tempo_router.placement import kv_needed
from tempo_router.policies.base import Context, Policy
from tempo_router.request import RequestId, slo_class
from tempo_router.slo_queue import SloQueue
from tempo_router.waiting import WaitingRequest


class WaitingLine:
    """Who waits. Everybody in `requests` is in the queue, taken from it for the moment, or unplaceable.

    backlog: sums over all of them. Only this class adds to and removes from the three.
    """

    __slots__ = ("backlog", "queue", "requests", "unplaceable")

    def __init__(self, policy: Policy) -> None:
        self.requests: dict[RequestId, WaitingRequest] = {}
        self.queue = SloQueue(policy)
        self.unplaceable: dict[RequestId, WaitingRequest] = {}
        self.backlog = Backlog()

    def enter(self, request: WaitingRequest, context: Context) -> None:
        """A request begins to wait, in the queue."""
        self.requests[request.spec.request_id] = request
        self.backlog.add(request)
        self.queue.push(request, context)

    def leave(self, request: WaitingRequest) -> None:
        """A request waits no longer, wherever among the waiting ones it is."""
        del self.requests[request.spec.request_id]
        self.backlog.remove(request)
        self.queue.forget(request)
        self.unplaceable.pop(request.spec.request_id, None)

    def set_aside(self, request: WaitingRequest) -> None:
        """A request taken from the queue fits no replica that takes work: it waits until one comes."""
        self.unplaceable[request.spec.request_id] = request

    def queue_what_fits(self, kv_sizes: Sequence[int], context: Context) -> None:
        """The replicas that take work are others now: what one of them could hold goes back into the queue."""
        for request in list(self.unplaceable.values()):
            if kv_needed(request, kv_sizes) is not None:
                del self.unplaceable[request.spec.request_id]
                self.queue.push_back(request, context)

    def audit(self) -> None:
        """Check that everybody is in one place, and the sums. Between two events. Raises AssertionError."""
        self.queue.audit()
        queued = sum(request.is_queued for request in self.requests.values())
        assert queued == len(self.queue), f"{queued} waiting requests are queued, the queue holds {len(self.queue)}"
        for request_id, request in self.requests.items():
            assert request.is_queued != (request_id in self.unplaceable), f"{request_id!r} is in no place or in two"
        assert not self.unplaceable.keys() - self.requests.keys(), "an unplaceable request does not wait"
        counted = Counter(slo_class(request.spec.slo) for request in self.requests.values())
        backlog = {name: count for name, count in self.backlog.requests.items() if count}
        assert backlog == dict(counted), f"backlog says {backlog}, {dict(counted)} wait"
        tokens = sum(request.spec.prompt_tokens for request in self.requests.values())
        assert tokens == self.backlog.prompt_tokens, f"backlog says {self.backlog.prompt_tokens} tokens, not {tokens}"
