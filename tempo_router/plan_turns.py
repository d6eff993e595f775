"""Whose turn it is to be planned, when more requests wait than one plan can look at.

A plan costs time for every request in it, and the router waits meanwhile. So beyond a few thousand a plan looks at the
newcomers, at the front, that is the densest of those planned before, and at some of the others in rotation. The
others lose little: the density of work that waits falls, so what was not among the densest seldom comes to be, and the
rotation finds it when it does.
"""

from collections import deque
from collections.abc import Collection

import numpy as np

from tempo_router.ledger import Ledger
from tempo_router.standing import Standing
from tempo_router.waiting import WaitingRequest

_NEWCOMER_PART = 4
_OTHERS_PART = 8
"""Newcomers are at most a quarter of a plan and the others in rotation an eighth; the front is the rest."""

_SLACK = 64


class PlanTurns:
    """`enter` whoever begins to wait; then in turns `next` and, when that plan is made, `settle`.

    Everybody who waits is a newcomer, or at the front, or among the others. Newcomers take turns in order of coming,
    the others in order of their last plan: if n others wait and a plan looks at m requests, within 8 n / m plans.
    Calls of one program are planned together, or its cost would be taken for that of some of them.
    """

    def __init__(self) -> None:
        self._newcomers: deque[WaitingRequest] = deque()
        self._further_calls: set[int] = set()
        self._front: list[WaitingRequest] = []
        self._others: deque[WaitingRequest] = deque()

    def enter(self, request: WaitingRequest, *, is_new: bool) -> None:
        """A request began to wait. is_new: it is not a further call of a program that is known."""
        self._newcomers.append(request)
        if not is_new:
            self._further_calls.add(request.ticket)

    def next(
        self, waiting: Collection[WaitingRequest], most: int, ledger: Ledger
    ) -> tuple[list[WaitingRequest], list[tuple[WaitingRequest, bool]]]:
        """(whom the next plan looks at, who has the first turn: as they entered, also those that left meanwhile).

        waiting: all, in order of coming. most: requests in one plan, but for the calls that go with others.
        """
        if len(waiting) <= most:
            self._others.clear()
            return list(waiting), self._first_turns(len(self._newcomers))
        newcomers = self._first_turns(most // _NEWCOMER_PART)
        turn = {request.ticket: request for request in self._front if request.is_in_line}
        for request, _ in newcomers:
            self._join(turn, request, ledger)
        left = most // _OTHERS_PART
        while self._others and left:
            request = self._others.popleft()
            if request.is_in_line and not request.is_at_front and request.ticket not in turn:
                self._join(turn, request, ledger)
                left -= 1
        return list(turn.values()), newcomers

    def settle(self, planned: list[WaitingRequest], waiting: int, most: int) -> list[WaitingRequest]:
        """A plan looked at these, of so many that wait. Returns who fell behind: the next plans count without them."""
        behind: list[WaitingRequest] = []
        room = most - most // _NEWCOMER_PART - most // _OTHERS_PART
        if waiting <= most or len(planned) <= room:
            front = planned
        else:
            # Calls of a program have one density: they stay together.
            ranks = np.array([_rank(one.standing) for one in planned])
            is_front = ranks >= np.partition(ranks, -room)[-room]
            front = [one for one, is_in in zip(planned, is_front.tolist(), strict=True) if is_in]
            behind = [one for one, is_in in zip(planned, is_front.tolist(), strict=True) if not is_in]
            if len(front) > 2 * room:
                # So many have the same, such as none at all.
                front, tied = front[:room], front[room:]
                behind += tied
        for one in front:
            one.is_at_front = True
        for one in behind:
            one.is_at_front = False
        self._front = front
        self._others.extend(behind)
        if len(self._others) > 2 * waiting + _SLACK:
            unique = {one.ticket: one for one in self._others if one.is_in_line and not one.is_at_front}
            self._others = deque(unique.values())
        return behind

    def _first_turns(self, count: int) -> list[tuple[WaitingRequest, bool]]:
        """(request, whether it is new as a unit) of so many newcomers."""
        requests = [self._newcomers.popleft() for _ in range(min(count, len(self._newcomers)))]
        told = [(request, request.ticket not in self._further_calls) for request in requests]
        self._further_calls.difference_update(request.ticket for request in requests)
        return told

    def _join(self, turn: dict[int, WaitingRequest], request: WaitingRequest, ledger: Ledger) -> None:
        if request.is_in_line:
            turn[request.ticket] = request
        program = ledger.program(request.spec)
        if program is not None:
            for call in program.live.values():
                if isinstance(call, WaitingRequest) and call.is_in_line:
                    turn[call.ticket] = call


def _rank(standing: Standing) -> float:
    """Higher is nearer to the front: admitted ones, then the others, the denser the sooner."""
    density = standing.density
    return density if standing.is_admitted else -1.0 / (density + 1e-12)
