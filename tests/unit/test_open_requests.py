"""Whose the open requests are: nothing of a request stays behind once it has ended."""

import asyncio

from cluster import wire_pb2 as wire
from cluster.open_requests import OpenRequests
from tempo_router.request import (
    BestEffort,
    DispatchId,
    GroupId,
    ProgramCall,
    ProgramId,
    ReplicaId,
    RequestId,
    RequestSpec,
)


def spec_of(name: str, program: str = "") -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        arrival_s=0.0,
        slo=ProgramCall(ProgramId(program), 9.0) if program else BestEffort(),
        prompt_tokens=10,
        max_output_tokens=10,
        group_id=GroupId(name),
        model="m",
        app="a",
        program_id=program,
    )


def test_a_request_is_found_by_its_ingress_its_program_and_its_dispatch_until_it_ends() -> None:
    table = OpenRequests()
    for name, ingress, program in (("a", "in1", "p"), ("b", "in2", "p"), ("c", "in1", "")):
        table.own(spec_of(name, program), ingress)
    table.keep_payload(RequestId("a"), wire.Payload(buffers=[b"k"]))
    table.dispatched(DispatchId(1), RequestId("a"), ReplicaId("w1"))
    table.dispatched(DispatchId(2), RequestId("b"), ReplicaId("w1"))
    assert table.of_ingress("in1") == ["a", "c"]
    assert sorted(table.of_program("p")) == ["a", "b"]
    assert table.dispatches_between("in1", ReplicaId("w1")) == [1]

    table.forget(RequestId("a"))
    assert table.owner(RequestId("a")) is None
    assert table.of_program("p") == ["b"]
    assert table.take_payload(RequestId("a")) is None, "the payload went with it"
    assert table.dispatched_as(DispatchId(1)) == "a", "its worker has not said that it is over"
    table.end_dispatches(ReplicaId("w1"))
    table.forget(RequestId("b"))
    table.forget(RequestId("c"))
    table.forget(RequestId("c"))
    assert table.counts() == {"open_requests": 0, "payloads": 0, "dispatched": 0}
    assert table.of_program("p") == []


def test_a_payload_is_taken_once() -> None:
    table = OpenRequests()
    table.keep_payload(RequestId("a"), wire.Payload(buffers=[b"k"]))
    assert table.take_payload(RequestId("a")) is not None
    assert table.take_payload(RequestId("a")) is None


async def test_the_drain_waits_for_the_last_request() -> None:
    table = OpenRequests()
    table.own(spec_of("a"), "in1")
    table.own(spec_of("b"), "in1")
    waiting = asyncio.create_task(table.until_empty())
    await asyncio.sleep(0)
    table.forget(RequestId("a"))
    await asyncio.sleep(0)
    assert not waiting.done()
    table.forget(RequestId("b"))
    await asyncio.wait_for(waiting, 1.0)
    await asyncio.wait_for(table.until_empty(), 1.0)
