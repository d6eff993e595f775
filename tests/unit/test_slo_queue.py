"""The queue gives out the best request, whatever was cancelled, aged or re-scored, and stays small."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_router.errors import InvalidEventError
from tempo_router.policies import Context
from tempo_router.policies.fcfs import FirstCome
from tempo_router.slo_queue import SloQueue
from tempo_router.waiting import WaitingRequest
from tests.builders import context, request, waiting


@dataclass
class Sinking:
    """Keys that rise with time at each request's own rate, and that a test may change."""

    start: dict[str, float] = field(default_factory=dict)
    rate: dict[str, float] = field(default_factory=dict)
    is_static: bool = False
    looks: int = 0

    def key(self, request: WaitingRequest, context: Context) -> float:
        self.looks += 1
        name = request.spec.request_id
        return self.start[name] + self.rate[name] * context.now_s

    def engine_priority(self, request: WaitingRequest, context: Context) -> int:
        return 0


def test_pushing_twice_is_refused():
    queue, one = SloQueue(FirstCome()), waiting(request())
    queue.push(one, context())
    with pytest.raises(InvalidEventError, match="already in the queue"):
        queue.push(one, context())


def test_empty_queue_gives_nothing():
    queue = SloQueue(FirstCome())
    assert queue.pop(context()) is None
    assert queue.oldest() is None


def test_request_that_was_put_back_keeps_its_place():
    queue = SloQueue(FirstCome())
    for ticket, name in enumerate("abc", start=1):
        queue.push(waiting(request(name), ticket), context())
    first = queue.pop(context())
    queue.push_back(first, context())
    assert [queue.pop(context()).spec.request_id for _ in range(3)] == ["a", "b", "c"]


def test_key_that_rose_goes_behind_the_ones_that_did_not():
    policy = Sinking({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 0.0})
    queue = SloQueue(policy)
    queue.push(waiting(request("a"), 1), context(0.0))
    queue.push(waiting(request("b"), 2), context(0.0))
    assert queue.pop(context(10.0)).spec.request_id == "b"


def test_key_that_fell_is_found_in_rotation():
    policy = Sinking({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 0.0})
    queue = SloQueue(policy)
    for ticket, name in enumerate("ab", start=1):
        queue.push(waiting(request(name), ticket), context())
    policy.start["b"] = -1.0
    queue.refresh(1, context())
    queue.refresh(1, context())
    assert queue.pop(context()).spec.request_id == "b"
    assert queue.pop(context()).spec.request_id == "a"
    assert queue.pop(context()) is None


def test_work_of_one_pop_is_bounded():
    """A thousand keys rise past each other at once: one pop looks at a few of them, not at all."""
    names = [f"r{n}" for n in range(1000)]
    policy = Sinking(
        {name: float(n) for n, name in enumerate(names)}, {name: 1000.0 - n for n, name in enumerate(names)}
    )
    queue = SloQueue(policy)
    for ticket, name in enumerate(names):
        queue.push(waiting(request(name), ticket), context(0.0))
    policy.looks = 0
    assert queue.pop(context(1000.0)) is not None
    assert policy.looks <= 64


def test_oldest_is_by_age_whatever_the_keys():
    queue = SloQueue(FirstCome())
    young_but_first = waiting(request("b", arrival_s=0.0), 2)
    queue.push(waiting(request("a", arrival_s=5.0), 1), context())
    queue.push(young_but_first, context())
    assert queue.oldest().spec.request_id == "a"
    queue.forget(queue.oldest())
    assert queue.oldest() is young_but_first


def test_memory_follows_the_number_of_waiting_requests():
    queue = SloQueue(FirstCome())
    everyone = [waiting(request(f"r{n}"), n) for n in range(10_000)]
    for one in everyone:
        queue.push(one, context())
    for one in everyone[:-10]:
        queue.forget(one)
    queue.audit()
    assert len(queue._heap) <= 100
    assert len(queue._by_age) <= 100
    assert len(queue) == 10


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(0, 5), st.integers(0, 3)),
            st.tuples(
                st.sampled_from(["pop", "pop and put back", "forget", "refresh", "pass"]),
                st.integers(0, 99),
                st.just(0),
            ),
        ),
        max_size=80,
    )
)
def test_pop_gives_the_lowest_key_and_ticket_of_keys_that_rise(steps):
    """The reference sorts everything at every pop. Fewer than 64 requests: no look is saved."""
    policy, now_s, waiting_now, tickets = Sinking(), 0.0, [], 0
    queue = SloQueue(policy)
    for what, number, rate in steps:
        at = context(now_s)
        if what == "push":
            tickets += 1
            name = f"r{tickets}"
            policy.start[name], policy.rate[name] = float(number), float(rate)
            waiting_now.append(waiting(request(name), tickets))
            queue.push(waiting_now[-1], at)
        elif what in ("pop", "pop and put back"):
            best = min(waiting_now, key=lambda one: (policy.key(one, at), one.ticket), default=None)
            assert queue.pop(at) is best
            if best is not None and what == "pop":
                queue.forget(best)
                waiting_now.remove(best)
            elif best is not None:
                queue.push_back(best, at)
        elif what == "forget" and waiting_now:
            queue.forget(waiting_now.pop(number % len(waiting_now)))
        elif what == "refresh":
            queue.refresh(number, at)
        else:
            now_s += number / 10
        assert len(queue) == len(waiting_now)
        queue.audit()


@pytest.mark.parametrize("moved", [3, 150], ids=["few", "most"])
def test_new_keys_of_many_at_once_are_those_that_it_gives_out_by(moved: int):
    """Few are pushed one by one; for most of them the heap is made anew."""
    names = [f"r{number}" for number in range(200)]
    policy = Sinking({name: float(place) for place, name in enumerate(names)}, dict.fromkeys(names, 0.0))
    queue, now = SloQueue(policy), context(1.0)
    requests = [waiting(request(name), ticket) for ticket, name in enumerate(names)]
    for one in requests:
        queue.push(one, now)
    queue.forget(requests[5])
    queue.take(requests[7])
    for place, name in enumerate(names[:moved]):
        policy.start[name] = 1000.0 - place if place % 2 else -1000.0 + place
    queue.rekey_many(requests[:moved], [policy.start[name] for name in names[:moved]])
    queue.audit()
    queue.push_back(requests[7], now)
    queue.audit()

    given = [queue.pop(now) for _ in range(199)]

    expected = sorted((one for one in requests if one is not requests[5]), key=lambda one: policy.key(one, now))
    assert [one and one.spec.request_id for one in given] == [one.spec.request_id for one in expected]
    assert queue.pop(now) is None
