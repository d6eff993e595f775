"""Who waits in an engine, and who is on offer."""

from dataclasses import dataclass

import pytest

from workers.planned_queue import Funnel, PlannedQueue


@dataclass(frozen=True)
class One:
    request_id: str


A, B, C, D = (One(name) for name in "abcd")


@pytest.fixture
def queue():
    one: PlannedQueue[One] = PlannedQueue()
    for request in (A, B, C):
        one.add_request(request)
    return one


def test_nobody_comes_in_who_is_not_on_offer(queue):
    assert (bool(queue), len(queue)) == (False, 3)
    queue.offer([C, D, A])
    assert (queue.pop_request(), queue.peek_request(), len(queue)) == (C, A, 2)
    queue.withdraw()
    assert (bool(queue), list(queue)) == (False, [A, B])


def test_a_victim_is_counted_and_cannot_come_back_in_its_step(queue):
    queue.offer([A])
    queue.prepend_request(D)
    assert queue.pop_request() == A
    assert (bool(queue), len(queue)) == (False, 3)


def test_who_was_passed_over_waits_on(queue):
    queue.offer([A, B])
    passed_over = [queue.pop_request()]
    queue.prepend_requests(passed_over)
    assert (queue.peek_request(), len(queue)) == (B, 3)


def test_the_aborted_are_on_offer_no_longer(queue):
    queue.offer([A, B, C])
    queue.remove_requests([A, D])
    queue.remove_request(C)
    queue.remove_request(D)
    assert (queue.pop_request(), len(queue), bool(queue)) == (B, 0, False)


def test_what_goes_into_a_funnel_comes_out_of_the_queue(queue):
    funnel: Funnel[One] = Funnel(queue)
    funnel.add_request(D)
    funnel.prepend_requests([A])
    assert (len(funnel), bool(funnel), list(funnel), len(queue)) == (0, False, [], 4)
    funnel.remove_requests([D])
    assert D in queue
