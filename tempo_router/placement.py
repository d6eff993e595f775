"""Which replica: filter, then score, then pick. And how much room a call needs."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from tempo_router.replicas import Replica
from tempo_router.waiting import WaitingRequest


def kv_needed(request: WaitingRequest, kv_sizes: Sequence[int]) -> int | None:
    """Tokens of KV cache to set aside: the context, one token, and a reserve for the expected answer.

    kv_sizes: ascending, of the replicas that take work. The reserve never makes a request larger than the smallest
    replica that can hold its context, so what fits an empty replica is not blocked for ever. None: none can.
    """
    spec = request.spec
    least = spec.context_tokens + 1
    index = bisect_left(kv_sizes, least)
    if index == len(kv_sizes):
        return None
    expected = round(request.lengths.mean_left(spec.generated_tokens, spec.max_output_tokens))
    return min(spec.context_tokens + max(expected, 1), kv_sizes[index])


AFFINITY_S = 2.0
"""A replica that has the prefix cached is preferred while it is at most this much work behind. Guessed."""


def choose(
    candidates: Iterable[Replica], needed_kv: int, home: Replica | None = None, affinity_s: float = AFFINITY_S
) -> Replica | None:
    """Of the replicas with room the one with the least outstanding predicted work; ties by order of attaching.

    home: has the request's prefix cached, which counts as affinity_s of work.
    """
    best: Replica | None = None
    best_score = (0.0, 0)
    for replica in candidates:
        if needed_kv > replica.free_kv:
            continue
        score = (replica.outstanding_s() - (affinity_s if replica is home else 0.0), replica.number)
        if best is None or score < best_score:
            best, best_score = replica, score
    return best
