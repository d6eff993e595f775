"""What waits for a busy stream: merged, in order, and never too large for one message."""

from cluster import wire_pb2 as wire
from cluster.outbox import MERGED_BYTES, Outbox


def abort(*attempt_ids: str) -> wire.IngressToWorker:
    return wire.IngressToWorker(aborts=attempt_ids)


async def test_small_messages_that_wait_become_one() -> None:
    outbox: Outbox[wire.IngressToWorker] = Outbox()
    for name in ("a", "b", "c"):
        outbox.merge(abort(name))
    assert list((await outbox.take()).aborts) == ["a", "b", "c"]
    assert len(outbox) == 0


async def test_merged_messages_stay_far_below_the_limit_of_one_message() -> None:
    """Payloads of several megabytes that were asked for at once would break the stream as one message."""
    outbox: Outbox[wire.IngressToWorker] = Outbox()
    for number in range(7):
        outbox.merge(abort(str(number) * (MERGED_BYTES // 3)))
    taken = []
    while len(outbox):
        message = await outbox.take()
        assert message.ByteSize() <= MERGED_BYTES
        taken += [text[0] for text in message.aborts]
    assert taken == list("0123456")


async def test_a_message_put_by_itself_stays_alone() -> None:
    outbox: Outbox[wire.IngressToWorker] = Outbox()
    outbox.put(abort("first"))
    outbox.merge(abort("a"))
    outbox.merge(abort("b"))
    assert [list((await outbox.take()).aborts) for _ in range(2)] == [["first"], ["a", "b"]]
