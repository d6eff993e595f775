"""What one engine computes in its next step: who decodes, which prompts go on, who is held, who loses its KV cache.

The same planner runs inside the simulator and inside a worker's engine. It decides and counts; it computes nothing and
reads no clock. Nearly every step all decoding calls run; then a step costs O(prompts in it), not O(live calls): tokens
of decoding calls are counted by the number of steps, and the order is looked at only where there is a choice.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from tempo_router.columns import DECODING, HELD, PREFILLING, Floats, Ints, LiveTable
from tempo_router.events import StepReport
from tempo_router.eviction import is_worth, may_lose
from tempo_router.first_prompts import FirstPrompts
from tempo_router.kv_blocks import KvBlocks
from tempo_router.ledger import Ledger
from tempo_router.live_call import LiveCall, StepClock, StepPlan
from tempo_router.policies.base import ColumnPolicy, Context, Policy, goes_last
from tempo_router.prediction import Lengths
from tempo_router.request import DispatchId, RequestSpec, Slo
from tempo_router.standing import Standing
from tempo_router.step_time import StepTimeModel
from tempo_router.stream_paces import StreamPaces

_ONE_BY_ONE = 16
"""So few keys cost less one by one than in arrays, whose operations take a microsecond each however few the calls."""

_MOST_PLACED = 2
"""Prompts that a step may come to between two looks, over the slots; a router seldom sends so many. Without a bound a
step would sort all that wait whenever one comes: 2 ms for 5,000."""

_UNHURRIED_WASTE, _UNHURRIED_S = 0.1, 0.1
"""While nobody has a target that can be met, a step is so long that what every step costs is a tenth of it, but at most
0.1 s: whoever comes waits for the one or two steps that are under way."""

LEAST_CHUNK = 64
"""Prompt tokens that a capped step takes at least, so that prompts come in whatever the cap (docs/scheduling.md)."""


class StepPlanner:
    """Plans the steps of one engine. `add`, then in turns `plan` and `stepped`; `remove` what has ended.

    slots: sequences in one step. max_step_tokens: tokens in one step, whatever the rule. kv: the engine's blocks.
    steps: step-time model of this engine, fed through `measured`. step_cap_s: longest step of a capped rule while
    anybody has a target that can be met; None: the rule's own.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        slots: int,
        max_step_tokens: int,
        kv: KvBlocks,
        steps: StepTimeModel,
        ledger: Ledger | None = None,
        mean_length: float = 230.0,
    ) -> None:
        self._policy = policy
        self._by_columns = policy if isinstance(policy, ColumnPolicy) else None
        self._slots = slots
        self._max_step_tokens = max_step_tokens
        self._kv = kv
        self._steps = steps
        self._ledger = ledger if ledger is not None else Ledger()
        self._mean_length = mean_length
        self._clock = StepClock()
        self._tickets = 0
        self._live: dict[DispatchId, LiveCall] = {}
        self._table = LiveTable()
        self._prefilling: dict[DispatchId, LiveCall] = {}
        self._decoding: dict[DispatchId, LiveCall] = {}
        self._held: dict[DispatchId, LiveCall] = {}
        self._hurried: set[DispatchId] = set()
        self._paces = StreamPaces()
        self._context_tokens = 0
        self._crossings = [0] * kv.block_size
        self._first = FirstPrompts()
        self._newcomers: list[LiveCall] = []
        self._is_placed = False
        self._resumed: list[LiveCall] = []
        self._evicted: list[LiveCall] = []
        self._order: list[LiveCall] | None = None
        self._is_dirty = True
        self._arrange_at_s = 0.0
        self._now_s = 0.0
        self._full_until_s = -1.0
        self.step_cap_s: float | None = None
        self.evictions = 0
        self.holds = 0
        self.recomputed_tokens = 0
        self.prefix_hit_tokens = 0

    # ---- who is here ----

    def __len__(self) -> int:
        return len(self._live)

    @property
    def live(self) -> Iterable[LiveCall]:
        """Everything that was added and not removed, in order of coming."""
        return self._live.values()

    @property
    def decoding(self) -> Iterable[LiveCall]:
        """Calls that produce a token in every step."""
        return self._decoding.values()

    @property
    def decodes(self) -> int:
        """How many those are."""
        return len(self._decoding)

    @property
    def held_calls(self) -> Iterable[LiveCall]:
        """Calls that could decode and were told to wait."""
        return self._held.values()

    @property
    def waiting(self) -> int:
        """Calls of which nothing is computed yet."""
        return sum(call.computed == 0 for call in self._prefilling.values())

    @property
    def held(self) -> int:
        """Calls that could decode and were told to wait."""
        return len(self._held)

    @property
    def steps_done(self) -> int:
        """Steps in which calls decoded."""
        return self._clock.steps

    def find(self, call_id: DispatchId) -> LiveCall | None:
        """A live call."""
        return self._live.get(call_id)

    def add(
        self, call_id: DispatchId, spec: RequestSpec, lengths: Lengths, standing: Standing, now_s: float
    ) -> LiveCall:
        """A call entered the engine."""
        self._tickets += 1
        call = LiveCall(call_id, spec, lengths, standing, self._tickets, now_s, self._clock)
        self._live[call_id] = call
        self._prefilling[call_id] = call
        self._newcomers.append(call)
        self._note_target(call)
        self._table.add(call)
        self._is_dirty = True
        return call

    def remove(self, call: LiveCall) -> None:
        """A call left the engine; its blocks are free, its prefix may stay cached."""
        context = call.cached_tokens
        self._withdraw(call)
        self._release(call)
        if call.spec.prefix_id:
            self._kv.keep(call.spec.prefix_id, context)
        del self._live[call.call_id]
        self._hurried.discard(call.call_id)
        self._table.remove(call)
        self._is_dirty = True
        if not self._live:
            # An engine without calls plans no more steps: nothing is kept of the last one.
            self._evicted.clear()
            self._resumed.clear()
            self._order = None

    def retune(self, call_id: DispatchId, standing: Standing) -> None:
        """How a call stands has changed. If it is whether it goes last, the next step knows, else the next look."""
        call = self._live.get(call_id)
        if call is None or standing == call.standing:
            return
        if standing.is_relegated != call.standing.is_relegated:
            self._look_again()
        call.standing = standing
        self._note_target(call)
        self._table.retune(call)

    def retarget(self, call_id: DispatchId, slo: Slo) -> None:
        """Its target changed: a program's deadline moved, or a client chose another tier. The next step knows."""
        call = self._live.get(call_id)
        if call is None or slo == call.spec.slo:
            return
        call.spec = replace(call.spec, slo=slo)
        self._note_target(call)
        self._table.retarget(call)
        self._paces.unfollow(call)
        if call.is_decoding:
            self._paces.follow(call)
        self._paces.look_again()
        self._look_again()

    def _look_again(self) -> None:
        """The next plan looks at the whole order."""
        self._arrange_at_s = -1.0
        self._is_dirty = True

    def _note_target(self, call: LiveCall) -> None:
        """It is in a hurry while it has a target that can be met."""
        if goes_last(call):
            self._hurried.discard(call.call_id)
        else:
            self._hurried.add(call.call_id)

    # ---- what an engine did that was not planned ----

    def found(self, call: LiveCall, computed: int, to_compute: int) -> None:
        """The engine holds so much of a prompt, and wants so much: a cache had more of it, or a step took less."""
        call.computed, call.to_compute = computed, to_compute
        self._table.note_missing(call)

    def lost(self, call: LiveCall) -> None:
        """The engine took a call's KV cache by itself."""
        if call.blocks or call.is_decoding:
            self._evict(call)

    def went_on(self, call: LiveCall) -> None:
        """The engine does not hold a call any longer, whatever was planned. The next plan looks at the whole order."""
        if call.call_id in self._held:
            self._resume(call)
            self._look_again()

    @property
    def crossings(self) -> int:
        """Blocks that the decoding calls need for their next tokens, one each at most."""
        return self._crossings[-self._clock.steps % self._kv.block_size]

    def ordered(self) -> list[LiveCall]:
        """All live calls in the order of the last plan's moment."""
        return self._sorted(self._live.values(), self._now_s)

    @property
    def evicted(self) -> Sequence[LiveCall]:
        """Calls that lost their KV cache for the step that was planned last, in order."""
        return self._evicted

    @property
    def resumed(self) -> Sequence[LiveCall]:
        """Calls that were held and decode again in the step that was planned last, in order."""
        return self._resumed

    # ---- a step ----

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step; None when nothing can run."""
        self._evicted.clear()
        self._resumed.clear()
        self._order = None
        if not self._live:
            return None
        if now_s < self._now_s:
            # A clock that was set back: what was put off must not wait until it has caught up.
            self._arrange_at_s = self._full_until_s = now_s
            self._paces.look_again()
        self._now_s = now_s
        self._arrange(now_s)
        rule = self._policy.batch
        if rule.kind == "prefill_first":
            prefills = self._whole_prompts(rule.step_tokens)
            if prefills:
                return StepPlan(tuple(prefills), 0, 0)
        self._make_room_for_decodes()
        if rule.kind == "prefill_first":
            budget = 0
        elif rule.kind == "chunked":
            budget = min(rule.step_tokens, self._max_step_tokens) - len(self._decoding)
        else:
            budget = self._capped_budget(now_s)
        prefills = self._prefills(budget)
        if not prefills and not self._decoding:
            # Nothing fits: what is held must give way, or go on.
            prefills = self._unblock()
            if not prefills and not self._decoding:
                return None
        return StepPlan(tuple(prefills), len(self._decoding), self._context_tokens + len(self._decoding))

    def measured(self, report: StepReport) -> None:
        """How long a step took, for the costs and the budget of later ones."""
        self._steps.observe(report, tau_at_most_s=math.inf if self._hurried else self._usual_cap_s())

    def stepped(self, plan: StepPlan, missed: Sequence[LiveCall] = ()) -> list[LiveCall]:
        """The step was computed. Returns the calls whose prompt it completed: each made one token.

        missed: decoding calls that the engine left out.
        """
        for call in missed:
            self._part(call)
        if plan.decodes:
            decodes = len(self._decoding)
            self._kv.take(self.crossings)
            self._clock.steps += 1
            self._context_tokens += decodes
        completed: list[LiveCall] = []
        for call, tokens in plan.prefills:
            call.computed += tokens
            self._table.note_missing(call)
            if call.computed >= call.to_compute:
                completed.append(call)
        for call in completed:
            call.produced += 1
            del self._prefilling[call.call_id]
            self._first.note_gone()
            self._join(call)
        for call in missed:
            self._join(call)
        if completed:
            self._is_dirty = True
        return completed

    # ---- order ----

    def context(self, now_s: float) -> Context:
        """What the policy is told."""
        pace = self._steps.pace()
        return Context(
            now_s,
            pace,
            self._mean_length,
            self._ledger,
            self._slots,
            max(1.0, self._steps.mean_decodes / max(pace.tau_s, 1e-6)),
        )

    def _arrange(self, now_s: float) -> None:
        """Look at the order again where there is a choice, and hold or resume what it says."""
        is_crowded = len(self._live) > self._slots
        if not is_crowded and self._held:
            self._resume_all()
        has_choice = is_crowded or len(self._prefilling) > 1
        if not has_choice:
            self._newcomers.clear()
            self._first.choose(list(self._prefilling.values()))
            self._is_placed = False
            return
        if now_s < self._arrange_at_s:
            if not self._is_dirty:
                return
            if is_crowded and self._policy.preempts:
                self._patch(now_s)
                return
        self._is_dirty = False
        self._newcomers.clear()
        self._arrange_at_s = now_s + self._policy.frame_s
        if is_crowded and self._policy.preempts:
            self._choose(now_s)
        else:
            ranked = self._ranked(self._rows(self._prefilling.values()), now_s, is_kept=True)
            self._first.choose(self._table.calls(ranked))
            self._is_placed = False

    def _choose(self, now_s: float) -> None:
        """The best of all live calls get the slots: others are held, those of them that were held go on."""
        table = self._table
        rows = table.rows() if self._by_columns is not None else self._rows(self._live.values())
        ranked = self._ranked(rows, now_s, is_kept=True)
        chosen, others = ranked[: self._slots], ranked[self._slots :]
        for call in table.calls(table.in_phase(DECODING, others)):
            self._hold(call)
        for call in table.calls(table.in_phase(HELD, chosen)):
            self._resume(call)
        prompts = table.in_phase(PREFILLING, chosen)
        self._first.choose(table.calls(prompts))
        self._place(prompts)

    def _place(self, prompts: Ints) -> None:
        """These prompts stand in the order; of a policy that arranges sets, others are newcomers to it."""
        if self._by_columns is None:
            self._table.place(prompts)
            self._is_placed = True

    def _patch(self, now_s: float) -> None:
        """Between two looks at the whole order: newcomers take their place in it, free slots go to the best held."""
        self._is_dirty = False
        if not self._insert_newcomers(now_s):
            self._rank_prompts(now_s)
        self._newcomers.clear()
        if not self._held:
            return
        table = self._table
        spare = self._slots - len(self._decoding) - sum(call.computed > 0 for call in self._ordered_prompts())
        if spare > 0:
            for call in table.calls(table.ranked(table.in_phase(HELD))[:spare]):
                self._resume(call)

    def _insert_newcomers(self, now_s: float) -> bool:
        """Put each in its place among the first prompts. False: all must be ranked."""
        if self._by_columns is None or len(self._newcomers) > _ONE_BY_ONE or not self._first.are_known(self._slots):
            return False
        self._first.drop_gone(self._is_prompt)
        context = self.context(now_s)
        for call in self._newcomers:
            if self._is_prompt(call):
                key = self._policy.key(call, context)
                self._table.store_key(call, key)
                self._first.insert(call, key)
        return True

    def _rank_prompts(self, now_s: float) -> None:
        """The first of all prompts, by the keys of the last look and, who came later, by those of now."""
        table = self._table
        prompts = table.in_phase(PREFILLING)
        # A key that depends on its own call alone stands until the next look; others are those of a set.
        if self._by_columns is not None:
            newcomers = table.without_key(prompts)
        else:
            if not self._is_placed:
                table.place(self._rows(self._ordered_prompts()))
            newcomers = table.unplaced(prompts)
        if newcomers.size:
            table.store_keys(newcomers, self._keys(newcomers, now_s, is_alone=True))
        first = table.ranked(prompts, most=_MOST_PLACED * self._slots)
        self._first.rank(table.calls(first), table.keys(first), are_all=first.size == prompts.size)
        self._place(first)

    def _ordered_prompts(self) -> list[LiveCall]:
        """The prompts that steps take from, in order."""
        return [call for call in self._first.calls if self._is_prompt(call)]

    def _is_prompt(self, call: LiveCall) -> bool:
        """It is still here, and its prompt is not computed. An id may have been given anew."""
        return self._prefilling.get(call.call_id) is call

    def _sorted(self, calls: Iterable[LiveCall], now_s: float) -> list[LiveCall]:
        """These calls in the order of now."""
        return self._table.calls(self._ranked(self._rows(calls), now_s))

    def _ranked(self, rows: Ints, now_s: float, *, is_kept: bool = False) -> Ints:
        """These rows in the order of now. is_kept: until the next look newcomers are placed by these keys."""
        keys = self._keys(rows, now_s)
        if is_kept:
            self._table.store_keys(rows, keys)
        return self._table.ranked(rows, keys)

    def _keys(self, rows: Ints, now_s: float, *, is_alone: bool = False) -> Floats:
        """The policy's keys of these rows. is_alone: each for itself, not as a set that the policy arranges."""
        context = self.context(now_s)
        if self._by_columns is not None and not (is_alone and rows.size <= _ONE_BY_ONE):
            return self._by_columns.arrange_columns(self._table.columns(rows, self._clock.steps), context)
        policy, calls = self._policy, self._table.calls(rows)
        return np.array([policy.key(call, context) for call in calls] if is_alone else policy.arrange(calls, context))

    def _rows(self, calls: Iterable[LiveCall]) -> Ints:
        return np.array([call.row for call in calls], dtype=np.int64)

    # ---- room ----

    def _prefills(self, budget: int) -> list[tuple[LiveCall, int]]:
        prefills: list[tuple[LiveCall, int]] = []
        rows = self._slots - len(self._decoding)
        for call in self._first.calls:
            if budget <= 0 or rows <= len(prefills):
                break
            if not self._is_prompt(call) or not self._begin(call, prefills):
                continue
            tokens = min(budget, call.missing_tokens)
            prefills.append((call, tokens))
            budget -= tokens
        return prefills

    def _whole_prompts(self, step_tokens: int) -> list[tuple[LiveCall, int]]:
        prefills: list[tuple[LiveCall, int]] = []
        budget = step_tokens
        for call in self._first.calls:
            if len(self._decoding) + len(prefills) >= self._slots:
                break
            if not self._is_prompt(call) or (prefills and call.missing_tokens > budget):
                continue
            if not self._begin(call, prefills):
                break
            prefills.append((call, call.missing_tokens))
            budget -= call.missing_tokens
        return prefills

    def _begin(self, call: LiveCall, planned: Sequence[tuple[LiveCall, int]] = ()) -> bool:
        """Give a call room for its whole context and one token, at the cost of those behind it. False: no room.

        planned: prompts that are in this step already; they keep theirs.
        """
        if call.blocks:
            return True
        needed = self._kv.blocks_for(call.to_compute + 1)
        shared = self._kv.shared(call.spec.prefix_id) if needed > self._room() else 0
        if needed - shared > self._room() and not self._evict_for(call, needed - shared, planned):
            return False
        # The last token of a prompt is always computed: it gives the first token of the answer.
        cached = min(self._kv.use(call.spec.prefix_id, call.spec.prefix_tokens), call.to_compute - 1)
        if not self._kv.take(needed):
            return False
        self._kv.share(shared)
        call.blocks = needed
        call.computed = max(cached, 0)
        self._table.note_missing(call)
        self.prefix_hit_tokens += call.computed
        return True

    def _room(self) -> int:
        """Free blocks that the decoding calls of this step do not need."""
        return self._kv.free - self.crossings

    def _evict_for(self, call: LiveCall, needed: int, planned: Sequence[tuple[LiveCall, int]]) -> bool:
        """Free blocks from the end of the order; never a call that is ahead of the one that asks, or in this step.

        The order is that of now; the step is filled by the last one that was looked at, which may differ.
        """
        if not self._policy.preempts or not call.standing.is_admitted or self._now_s < self._full_until_s:
            return False
        in_step = {other.call_id for other, _ in planned}
        behind = takewhile(lambda other: other is not call, reversed(self._order_with(call)))
        can_lose = (other for other in behind if other.blocks and other.call_id not in in_step)
        victims = self._victims(call, needed - self._room(), can_lose)
        if not victims:
            self._full_until_s = self._now_s + self._policy.frame_s
            return False
        for victim in victims:
            if needed > self._room():
                victim.times_taken += 1
                self._give_way(victim)
        return True

    def _give_way(self, victim: LiveCall) -> None:
        """It loses its blocks to another call; those that others hold, too, do not fall free."""
        self._evict(victim)
        self._kv.share(-self._kv.shared(victim.spec.prefix_id))

    def _order_with(self, asker: LiveCall | None = None) -> list[LiveCall]:
        """All live calls in the order of this plan's moment, as far as it matters: who lost its cache may stand wrong.

        It is sorted once in a plan: meanwhile keys change only of calls that lose their cache or come into the step,
        which can lose nothing more. So it is sorted again only if one that lost its cache asks; but at every question
        where a policy arranges all calls as a set, since then any key may change.
        """
        if self._order is None or self._by_columns is None or (asker is not None and asker in self._evicted):
            self._order = self.ordered()
        return self._order

    def _holders_last_first(self) -> Iterator[LiveCall]:
        """Who has blocks, if each gives way that is told."""
        if self._by_columns is not None:
            yield from (call for call in reversed(self._order_with()) if call.blocks)
            return
        while holders := self._sorted((call for call in self._live.values() if call.blocks), self._now_s):
            yield holders[-1]

    def _victims(self, call: LiveCall, lacking: int, behind: Iterable[LiveCall]) -> list[LiveCall]:
        """Who gives way so that `lacking` more blocks are free; nobody if that cannot or shall not be.

        behind: who can, the last first.
        """
        spares = self._policy.spares
        victims: list[LiveCall] = []
        for other in behind:
            if spares and not may_lose(other, other.times_taken):
                continue
            victims.append(other)
            lacking -= self._blocks_of(other) - self._kv.shared(other.spec.prefix_id)
            if lacking <= 0:
                break
        if lacking > 0:
            return []
        if spares and not is_worth(call, [(one, one.cached_tokens) for one in victims], self._steps.pace()):
            return []
        return victims

    def _make_room_for_decodes(self) -> None:
        """Every decoding call gets its next block; the last in the order gives way."""
        holders = self._holders_last_first()
        # Of shared blocks none may fall free; then it ends when nobody is left.
        while self.crossings > self._kv.free and (last := next(holders, None)) is not None:
            self._give_way(last)

    def _unblock(self) -> list[tuple[LiveCall, int]]:
        """Nothing runs: resume what is held; or go on with a prompt that has its blocks; or start one that fits."""
        if self._held:
            self._resume_all()
            self._make_room_for_decodes()
            if self._decoding:
                return []
        holders = self._sorted((call for call in self._prefilling.values() if call.blocks), self._now_s)
        for call in holders or [*self._first.calls, *self._prefilling.values()]:
            if self._is_prompt(call) and self._begin(call):
                return [(call, min(call.missing_tokens, self._max_step_tokens))]
        return []

    def _capped_budget(self, now_s: float) -> int:
        cap = self._usual_cap_s()
        if not self._hurried and self._policy.batch.cap_s is None:
            cap = max(cap, min(_UNHURRIED_S, self._steps.pace().fixed_s / _UNHURRIED_WASTE))
        slack_s = self._paces.least_slack_s(now_s, self._clock.steps)
        decodes = len(self._decoding)
        # Steps of which the model is far off may take as long as nine in ten of them did lately.
        margin = max(1.0, self._steps.upper_ratio) if self._steps.is_unsure else 1.0
        fits = self._steps.budget_tokens(min(cap, slack_s) / margin, decodes, self._context_tokens + decodes)
        free = int(self._steps.pace().knee_tokens) - decodes
        return min(max(fits, free, LEAST_CHUNK), self._max_step_tokens - decodes)

    def _usual_cap_s(self) -> float:
        rule = self._policy.batch
        return self.step_cap_s or rule.cap_s or rule.cap_share * self._paces.tightest_s

    # ---- changes of phase ----

    def _join(self, call: LiveCall) -> None:
        """Its prompt is computed, or it was held: it decodes from the next step on."""
        call.is_decoding = True
        call.joined = self._clock.steps
        context = call.spec.context_tokens + call.produced
        self._decoding[call.call_id] = call
        self._table.note_phase(call, DECODING)
        self._context_tokens += context
        self._crossings[(context - call.joined) % self._kv.block_size] += 1
        self._paces.follow(call)

    def _part(self, call: LiveCall) -> None:
        """It no longer decodes."""
        context = call.context_tokens
        started = call.spec.context_tokens + call.produced
        self._crossings[(started - call.joined) % self._kv.block_size] -= 1
        call.produced = call.new_tokens
        if self._clock.steps > call.joined:
            call.segments.append((call.joined, self._clock.steps))
        call.is_decoding = False
        call.blocks = self._kv.blocks_for(context)
        self._context_tokens -= context
        del self._decoding[call.call_id]
        self._paces.unfollow(call)

    def _hold(self, call: LiveCall) -> None:
        self._part(call)
        call.to_compute = call.computed = call.spec.context_tokens + call.produced
        self._held[call.call_id] = call
        self._table.note_phase(call, HELD)
        self.holds += 1

    def _resume(self, call: LiveCall) -> None:
        del self._held[call.call_id]
        self._join(call)
        self._resumed.append(call)

    def _resume_all(self) -> None:
        for call in list(self._held.values()):
            if len(self._decoding) < self._slots:
                self._resume(call)

    def _evict(self, call: LiveCall) -> None:
        """It loses its KV cache and computes it again when its turn comes."""
        self._withdraw(call)
        self._release(call)
        self.recomputed_tokens += call.spec.context_tokens + call.produced if call.new_tokens else call.computed
        call.to_compute = call.spec.context_tokens + call.produced
        call.computed = 0
        self._prefilling[call.call_id] = call
        self._first.note_return()
        self._table.note_phase(call, PREFILLING)
        self._evicted.append(call)
        self.evictions += 1
        self._is_dirty = True

    def _withdraw(self, call: LiveCall) -> None:
        if call.is_decoding:
            self._part(call)
        self._held.pop(call.call_id, None)
        if self._prefilling.pop(call.call_id, None) is not None:
            self._first.note_gone()

    def _release(self, call: LiveCall) -> None:
        self._kv.give_back(call.blocks)
        call.blocks = 0

    def _blocks_of(self, call: LiveCall) -> int:
        return self._kv.blocks_for(call.context_tokens) if call.is_decoding else call.blocks

    def audit(self) -> None:
        """Check all invariants. Raises AssertionError."""
        phases = [*self._prefilling, *self._decoding, *self._held]
        assert sorted(phases) == sorted(self._live), f"{len(self._live)} live calls, {len(phases)} in a phase"
        assert sum(self._blocks_of(call) for call in self._live.values()) == self._kv.held, "blocks do not add up"
        context = sum(call.context_tokens for call in self._decoding.values())
        assert context == self._context_tokens, f"context is {self._context_tokens}, the calls add up to {context}"
        assert sum(self._crossings) == len(self._decoding), "block crossings do not add up"
        hurried = {name for name, call in self._live.items() if not goes_last(call)}
        assert self._hurried == hurried, f"in a hurry are {hurried}, the planner knows {self._hurried}"
        resumed = [call.ticket for call in self._resumed]
        assert len(set(resumed)) == len(resumed), "a call was resumed twice: what is told is not of one step"
        assert self._live or not (self._evicted or self._resumed), "calls are kept, and none is live"
        for call in self._live.values():
            assert len(call.segments) <= call.new_tokens, f"call {call.call_id} keeps more segments than it has tokens"
        self._table.audit(list(self._live.values()), self._clock.steps)
        self._paces.audit(self._decoding.values())
        self._kv.audit()
