"""Which waiting request goes to which replica, now."""

from tempo_router.actions import Action, Dispatch, Expire, Relegate
from tempo_router.commitment import is_gamble
from tempo_router.config import SchedulingConfig
from tempo_router.fleet import Fleet
from tempo_router.groups import GroupBook
from tempo_router.hopeless import HopelessTimers, is_hopeless
from tempo_router.ledger import Ledger
from tempo_router.placement import AFFINITY_S, choose, kv_needed
from tempo_router.policies.base import Context, Policy, goes_last
from tempo_router.prefixes import PrefixMemory
from tempo_router.replicas import Replica
from tempo_router.request import ProgramCall, RequestSpec
from tempo_router.waiting import WaitingRequest
from tempo_router.waiting_line import WaitingLine

_LOOK_AHEAD = 16
_LOOK_AHEAD_FOR_EMPTY = 256
"""Requests that may be passed over in one go because there is no room for them; bounds the work per event.
More of them while a replica stands empty: with replicas of several sizes it may take only small requests."""

_HOLD_AFTER_S = 1.0
"""How long smaller requests may overtake one that lacks KV cache, before a replica is kept free for it. Guessed."""

_TRICKLE = 16
"""One dispatch in so many may go to the oldest starving request."""

_OVERCOMMIT = 1.5
"""Live calls of a replica with a step planner, at most, over its slots."""

_DISPLACED_PER_FRAME = 8
_TIGHTEST_TBT_S = 0.1
"""Time between tokens that is assumed of streams until a plan has seen some."""

_FILLERS = 4
"""Fillers that are looked at in one go, of those that an idle replica could take."""

_IDLE = 0.8
"""A replica whose mean step is below this share of the cap could do more."""


class Dispatcher:
    """Matches the line of waiting requests with the room of the fleet, and remembers why the last look found none.

    Line, fleet, groups, ledger, prefixes and timers are shared with the router, which tells of what it changes:
    requests come and go through `enter`, `withdraw` and `give_up`, and `replicas_changed` follows any change of who
    takes work.

    step_cap_s: how long a step may be, by the last plan, in seconds.
    has_plan: a plan says which requests are admitted; its standing decides beside the policy's key.
    """

    def __init__(
        self,
        config: SchedulingConfig,
        policy: Policy,
        line: WaitingLine,
        fleet: Fleet,
        groups: GroupBook,
        ledger: Ledger,
        prefixes: PrefixMemory,
        timers: HopelessTimers,
        *,
        has_plan: bool,
    ) -> None:
        self._config = config
        self._policy = policy
        self._line = line
        self._queue = line.queue
        self._fleet = fleet
        self._groups = groups
        self._ledger = ledger
        self._prefixes = prefixes
        self._timers = timers
        self._has_plan = has_plan
        self._is_committed = has_plan and config.switches.commitment
        self.step_cap_s = _TIGHTEST_TBT_S * config.step_cap_share
        self._displace_at_s = float("-inf")
        self._since_trickle = 0
        self._hold: tuple[WaitingRequest, Replica] | None = None
        self._blocked_kv: int | None = None
        self._was_all_blocked = False

    # ---- what the router tells ----

    def enter(self, request: WaitingRequest, context: Context) -> None:
        """A request begins to wait."""
        self._line.enter(request, context)
        needed = kv_needed(request, self._fleet.kv_sizes)
        if self._blocked_kv is not None and needed is not None and needed < self._blocked_kv:
            self._blocked_kv = None

    def withdraw(self, request: WaitingRequest) -> None:
        """A request waits no longer. No replica is kept free for it from now on."""
        self._line.leave(request)
        if self._hold is not None and self._hold[0] is request:
            self._hold = None
            self._blocked_kv = None

    def give_up(self, request: WaitingRequest, context: Context, actions: list[Action]) -> None:
        """A waiting request can no longer meet its SLO: it leaves, or waits on as best effort."""
        spec = request.spec
        # An answer that has begun is not broken off, whatever the setting: its client already reads it.
        if self._config.hopeless == "refuse" and not spec.generated_tokens:
            self.withdraw(request)
            self._groups.left(spec, was_running=False)
            self._ledger.left(spec)
            actions.append(Expire(spec.request_id))
            return
        request.is_given_up = True
        request.standing = request.standing._replace(is_relegated=True)
        actions.append(Relegate(spec.request_id))
        if request.is_queued:
            self._queue.rekey(request, context)

    def replicas_changed(self, context: Context) -> None:
        """The set of replicas that take work, or their capacities, changed."""
        self._blocked_kv = None
        self._hold = None
        self._line.queue_what_fits(self._fleet.kv_sizes, context)

    def hurried_step_s(self, replica: Replica, duration_s: float) -> float:
        """How long such a step of a replica counts, at most, for what a step takes while somebody is in a hurry.

        Where nobody with a target runs, its step planner makes steps longer than the cap.
        """
        if not self._has_plan or duration_s <= self.step_cap_s or not replica.capacity.has_step_planner:
            return float("inf")
        return self.step_cap_s if all(goes_last(call) for call in replica.calls.values()) else float("inf")

    def look_again(self) -> None:
        """Time passed: forget that the last look found no room."""
        self._blocked_kv = None

    # ---- dispatch ----

    def may_dispatch(self, now_s: float) -> bool:
        """Whether `dispatch` could do anything; cheap, for the many events after which it cannot."""
        if not self._line.requests:
            return False
        policy = self._policy
        if self._hold is not None or policy.binds_early or self._has_plan:
            return True
        return (policy.preempts and now_s >= self._displace_at_s) or self._is_worth_looking()

    def dispatch(self, context: Context, actions: list[Action]) -> None:
        """Start what can start now."""
        self._serve_hold(context, actions)
        if self._policy.binds_early:
            self._bind_all(context, actions)
            return
        if self._has_plan:
            self._start_admitted(context, actions)
        if self._is_worth_looking():
            self._fill(context, actions)
        if self._policy.preempts and not self._has_plan and context.now_s >= self._displace_at_s:
            self._displace_at_s = context.now_s + self._policy.frame_s
            self._displace(context, actions)

    def _bind_all(self, context: Context, actions: list[Action]) -> None:
        """Everything goes to a replica at once, to the one with the least work."""
        takers = self._fleet.takers
        while takers:
            request = self._queue.pop(context)
            if request is None:
                return
            if self._turns_out_hopeless(request, context, actions):
                continue
            if kv_needed(request, self._fleet.kv_sizes) is None:
                self._line.set_aside(request)
                continue
            fitting = [one for one in takers if one.capacity.kv_tokens > request.spec.context_tokens]
            self._start(request, min(fitting, key=lambda one: (one.outstanding_s(), one.number)), context, actions)

    def _start_admitted(self, context: Context, actions: list[Action]) -> None:
        """What the plan has admitted goes to a replica at once, beyond its slots if need be.

        The step planner there holds what is less urgent.
        """
        takers = [one for one in self._fleet.takers if one.capacity.has_step_planner]
        passed_over: list[WaitingRequest] = []
        while takers and len(passed_over) < _LOOK_AHEAD:
            request = self._queue.pop(context)
            if request is None:
                break
            if not request.standing.is_admitted or request.standing.density <= 0.0 or request.is_relegated:
                passed_over.append(request)
                break
            if self._turns_out_hopeless(request, context, actions):
                continue
            needed = kv_needed(request, self._fleet.kv_sizes)
            if needed is None:
                self._line.set_aside(request)
                continue
            room = [one for one in takers if len(one.calls) < _OVERCOMMIT * one.capacity.max_running]
            replica = choose(
                self._allowed(request, needed, room), needed, self._home(request), _affinity_s(request, context)
            )
            if replica is None:
                passed_over.append(request)
                continue
            self._start(request, replica, context, actions)
        for request in passed_over:
            self._queue.push_back(request, context)

    def _displace(self, context: Context, actions: list[Action]) -> None:
        """Send what outranks the worst live call of a full replica there: its step planner holds that one."""
        for _ in range(_DISPLACED_PER_FRAME):
            full = [
                one
                for one in self._fleet.takers
                if one.capacity.has_step_planner
                and one.capacity.max_running <= len(one.calls) < _OVERCOMMIT * one.capacity.max_running
            ]
            request = self._queue.pop(context) if full else None
            if request is None:
                return
            key = self._policy.key(request, context)
            needed = kv_needed(request, self._fleet.kv_sizes)
            target = None
            if needed is not None:
                large = (one for one in full if one.free_kv >= needed)
                target = max(large, key=lambda one: (self._rank_of_last(one, context), -one.number), default=None)
            if target is None or self._rank_of_last(target, context) <= key:
                self._queue.push_back(request, context)
                return
            self._start(request, target, context, actions)

    def _rank_of_last(self, replica: Replica, context: Context) -> float:
        """Key of the call that would be the last of so many as the replica has slots."""
        keys = sorted(self._policy.key(call, context) for call in replica.calls.values() if not call.is_aborted)
        slots = replica.capacity.max_running
        return keys[slots - 1] if len(keys) >= slots else float("inf")

    def _home(self, request: WaitingRequest) -> Replica | None:
        """The replica that has the request's prefix, as far as is known."""
        if not self._config.switches.affinity:
            return None
        home = self._prefixes.home(request.spec)
        return self._fleet.replicas.get(home) if home is not None else None

    def _fill(self, context: Context, actions: list[Action]) -> None:
        """Give requests to replicas, best first, until no slot or no request is left, or nothing seen has room."""
        passed_over: list[WaitingRequest] = []
        lacking: list[int] = []
        may_trickle = self._since_trickle >= _TRICKLE - 1
        has_seen_all = has_seen_enough = False
        fillers = 0
        while candidates := self._open_replicas():
            has_seen_enough = len(lacking) >= _look_ahead(candidates)
            if has_seen_enough:
                break
            starving = self._starving(context.now_s) if may_trickle else None
            may_trickle = False
            request = starving or self._queue.pop(context)
            if request is None:
                has_seen_all = True
                break
            if self._turns_out_hopeless(request, context, actions):
                continue
            needed = kv_needed(request, self._fleet.kv_sizes)
            if needed is None:
                self._line.set_aside(request)
                continue
            room = candidates
            is_filler = starving is None and self._is_committed and self._is_filler(request)
            if is_filler:
                # Fillers are at the end of the queue: behind the first there is nothing else.
                room = [one for one in candidates if self._has_time_for(one, request)]
                fillers += 1
            replica = choose(
                self._allowed(request, needed, room), needed, self._home(request), _affinity_s(request, context)
            )
            if replica is not None:
                self._start(request, replica, context, actions)
                if starving is not None:
                    self._since_trickle = 0
                continue
            passed_over.append(request)
            if is_filler and not (room and goes_last(request)):
                has_seen_all = fillers >= _FILLERS or all(one.unstarted for one in candidates)
                if has_seen_all:
                    break
                continue
            lacking.append(needed)
            self._note_blocked(request, needed, context.now_s, is_urgent=starving is not None)
        for request in passed_over:
            self._queue.push_back(request, context)
        self._blocked_kv = min(lacking) if lacking and (has_seen_all or has_seen_enough) else None
        self._was_all_blocked = has_seen_all

    def _is_filler(self, request: WaitingRequest) -> bool:
        """It is a gamble, or best effort: only for time that nothing else has a use for."""
        return goes_last(request) or is_gamble(request, self._ledger)

    def _has_time_for(self, replica: Replica, filler: WaitingRequest) -> bool:
        """Nothing that the plan wants would have to wait for it.

        No prompt waits there and, unless it is a single answer that may be in time, steps are well below their cap.
        Where all that runs is best effort, more of it is in nobody's way.
        """
        is_last = goes_last(filler)
        is_long = is_last or isinstance(filler.spec.slo, ProgramCall)
        if not replica.unstarted and (not is_long or replica.steps.tau_s < _IDLE * self.step_cap_s):
            return True
        return is_last and all(goes_last(call) for call in replica.calls.values())

    def _is_worth_looking(self) -> bool:
        """Some replica takes a call and, where the last look found too little KV cache, has as much as was lacking."""
        candidates = self._open_replicas()
        if not candidates:
            return False
        if self._blocked_kv is None:
            return True
        if not self._was_all_blocked and not all(replica.calls for replica in candidates):
            return True
        return any(replica.free_kv >= self._blocked_kv for replica in candidates)

    def _open_replicas(self) -> list[Replica]:
        """Replicas that take a call now, in order of attaching; not the one that is kept for a held request."""
        candidates = self._fleet.open_replicas()
        return candidates if self._hold is None else [one for one in candidates if one is not self._hold[1]]

    def _starving(self, now_s: float) -> WaitingRequest | None:
        """The oldest request, taken from the queue, if it has waited too long."""
        request = self._queue.oldest()
        if request is None or now_s - request.since_s < self._config.starvation_s:
            return None
        self._queue.take(request)
        return request

    def _turns_out_hopeless(self, request: WaitingRequest, context: Context, actions: list[Action]) -> bool:
        if request.is_relegated or not is_hopeless(request, context.pace, context.now_s):
            return False
        self.give_up(request, context, actions)
        if request.is_in_line:
            self._queue.push_back(request, context)
        return True

    def _allowed(self, request: WaitingRequest, needed_kv: int, candidates: list[Replica]) -> list[Replica]:
        """The candidates, or the one of them that the request's siblings went to."""
        replica = self._replica_of_siblings(request.spec, needed_kv)
        if replica is None:
            return candidates
        return [replica] if replica in candidates else []

    def _replica_of_siblings(self, spec: RequestSpec, needed_kv: int) -> Replica | None:
        group = self._groups.find(spec)
        if group is None or group.replica_id is None:
            return None
        replica = self._fleet.replicas.get(group.replica_id)
        if replica is None or replica.is_draining or replica.capacity.kv_tokens < needed_kv:
            return None
        return replica

    def _start(self, request: WaitingRequest, replica: Replica, context: Context, actions: list[Action]) -> None:
        spec = request.spec
        priority = self._policy.engine_priority(request, context)
        self.withdraw(request)
        call = self._fleet.start(request, replica, context.now_s)
        self._timers.set_started(request, call, context.now_s)
        self._groups.started(spec, replica.replica_id)
        self._ledger.started(call, replica.replica_id, context.now_s - request.since_s)
        self._since_trickle += 1
        actions.append(
            Dispatch(call.dispatch_id, spec.request_id, spec.attempt, replica.replica_id, priority, request.standing)
        )

    # ---- keeping a replica free for what is too large to find room by chance ----

    def _note_blocked(self, request: WaitingRequest, needed_kv: int, now_s: float, *, is_urgent: bool) -> None:
        if request.blocked_since_s is None:
            request.blocked_since_s = now_s
        has_waited = now_s - request.blocked_since_s >= _HOLD_AFTER_S
        if self._hold is not None or not (is_urgent or has_waited):
            return
        replica = self._replica_of_siblings(request.spec, needed_kv)
        if replica is None:
            large = [one for one in self._fleet.takers if one.capacity.kv_tokens >= needed_kv]
            replica = max(large, key=lambda one: (one.free_kv, -one.number))
        self._hold = (request, replica)

    def _serve_hold(self, context: Context, actions: list[Action]) -> None:
        if self._hold is None:
            return
        request, replica = self._hold
        needed = kv_needed(request, self._fleet.kv_sizes)
        is_room = needed is not None and needed <= replica.free_kv
        if is_room and replica.is_open(self._config.replica_queue_depth):
            self._start(request, replica, context, actions)

    # ---- self-check ----

    def audit(self) -> None:
        """Check that a replica is kept free only for a request that waits and needs it. Raises AssertionError."""
        if self._hold is None:
            return
        request, replica = self._hold
        assert self._line.requests.get(request.spec.request_id) is request, "a replica is held for nobody"
        assert self._fleet.replicas.get(replica.replica_id) is replica, "a lost replica is held"
        assert replica.calls, f"{replica.replica_id} is empty and still held for {request.spec.request_id!r}"


def _affinity_s(request: WaitingRequest, context: Context) -> float:
    """What having the prefix is worth: to a program's call as long as its stage takes, so as not to lose one to it."""
    if not isinstance(request.spec.slo, ProgramCall):
        return AFFINITY_S
    rest = request.lengths.mean_left(request.generated_tokens, request.spec.max_output_tokens)
    return context.pace.prefill_s(request.spec.context_tokens) + rest * context.pace.tau_s


def _look_ahead(candidates: list[Replica]) -> int:
    return _LOOK_AHEAD if all(replica.calls for replica in candidates) else _LOOK_AHEAD_FOR_EMPTY
