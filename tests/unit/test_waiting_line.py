"""Everybody who waits, in one place each."""

from tempo_router.policies.fcfs import FirstCome
from tempo_router.request import RequestId
from tempo_router.waiting import WaitingRequest
from tempo_router.waiting_line import WaitingLine
from tests.builders import BACKGROUND, context, request, waiting


def line_of(*requests: WaitingRequest) -> WaitingLine:
    line = WaitingLine(FirstCome())
    for one in requests:
        line.enter(one, context())
    return line


def test_requests_leave_from_the_queue_and_from_beside_it_and_are_no_longer_counted():
    queued = waiting(request("queued", prompt_tokens=10), 1)
    aside = waiting(request("aside", prompt_tokens=20, slo=BACKGROUND), 2)
    line = line_of(aside, queued)
    line.queue.take(aside)
    line.set_aside(aside)
    line.audit()
    assert (len(line.queue), list(line.unplaceable), line.backlog.prompt_tokens) == (1, ["aside"], 30)
    for one in (aside, queued):
        line.leave(one)
        line.audit()
    assert (line.requests, line.unplaceable, line.backlog.prompt_tokens) == ({}, {}, 0)


def test_a_request_set_aside_returns_to_its_place_when_a_replica_can_hold_it():
    first, second = waiting(request("first", prompt_tokens=900), 1), waiting(request("second"), 2)
    line = line_of(first, second)
    assert line.queue.pop(context()) is first
    line.set_aside(first)
    line.queue_what_fits([500], context())
    assert list(line.unplaceable) == [RequestId("first")]
    line.queue_what_fits([500, 1000], context())
    line.audit()
    assert [line.queue.pop(context()) for _ in range(2)] == [first, second]
