"""What runs the core: the router that it is part of fails for one cause."""

from cluster.core_runner import CoreRunner
from cluster.open_requests import OpenRequests
from cluster.peers import Peers
from tempo_router.config import SchedulingConfig
from tempo_router.errors import LeaseLostError
from tempo_router.explain import DecisionLog
from tempo_router.router import RouterCore


def test_the_first_failure_is_the_cause():
    open_requests = OpenRequests()
    runner = CoreRunner(RouterCore(SchedulingConfig()), Peers(open_requests), open_requests, DecisionLog(10))
    assert runner.failure is None
    first = LeaseLostError("a peer has seen epoch 2")
    runner.fail(first)
    runner.fail(KeyError("what followed"))
    assert runner.failure is first
