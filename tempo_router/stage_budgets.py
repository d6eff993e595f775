"""How a program's time is split over its stages, anew whenever one ends early or late."""

from collections.abc import Sequence
from itertools import pairwise


def stage_budgets(ended_s: Sequence[float], ahead_s: Sequence[float], now_s: float, deadline_s: float) -> list[float]:
    """Seconds of each stage, in order: those that ended, then the current one and those to come.

    ended_s: when each past stage ended, in seconds since the program's start. ahead_s: what the current stage still
    takes, then what each later one is expected to take; only their proportions count. now_s and deadline_s are on the
    same scale. The budgets add up to the deadline, whatever happened: they are the pieces into which the ends of the
    stages cut it. A stage that ended early leaves its time to those ahead, one that ended late takes it from them.
    """
    if deadline_s <= 0.0:
        raise ValueError(f"a deadline of {deadline_s} s cannot be split")
    if not ended_s and not ahead_s:
        return []
    cuts = [0.0]
    for end_s in ended_s:
        cuts.append(min(max(end_s, cuts[-1]), deadline_s))
    from_s = min(max(now_s, cuts[-1]), deadline_s)
    shares = [max(share, 0.0) for share in ahead_s]
    whole = sum(shares)
    passed = 0.0
    for number, share in enumerate(shares, start=1):
        passed += share
        part = passed / whole if whole > 0.0 else number / len(shares)
        cuts.append(from_s + (deadline_s - from_s) * part)
    cuts[-1] = deadline_s
    return [later - earlier for earlier, later in pairwise(cuts)]
