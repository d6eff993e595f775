"""What no scheduler can beat: an upper bound on the goodput of a trace, by linear programming.

The program is a relaxation of the simulated engine in which the future is known, work is fluid, and a unit may be
accepted in part. Every schedule of the real engine is a point of it: spread each step's work evenly over the step's
duration and cut time into buckets. What then holds in every bucket:

* Steps. The engine's time is filled with steps of some shape (decode rows, prefill tokens). Step time is linear
  between the entries of the profile's tables, so the shapes at the corners of the linear pieces, mixed freely, stand
  for all shapes. Attention costs depend only on the calls and are added to the time: for a prompt, the cheapest way
  to cut it into chunks; for an answer, its context at each token. A step holds at most `slots` rows and the engine's
  token limit.
* Windows. A call works between the earliest end of its parents (alone on the engine, nothing waited for) and the
  latest end that leaves its descendants the same; what does not fit is worth nothing. Decoding starts no earlier
  than the shortest prefill and follows the prefill, children follow parents (in fractions, to the end of a bucket).
* Steps in a row. A call makes one token in a step, and the calls of a path through a program never share one. So the
  tokens and chunks on a unit's longest path are at most the number of steps between its arrival and its deadline;
  accepted in part, at most in proportion. This is what sets a price on large steps: the fixed part of a step is shared
  by all that it computes, but who needs many of them needs them short. All replicas' steps are counted, since a path
  may move between them, so with several the limit is weak.
* Streams. Token i counts if it is made in or before the bucket of its due time; each pays its row and its context,
  and needs the prefill to have happened.

Long windows use buckets of twice, four times, ... the width, and what they use is handed down to the fine ones.
The solver's precision does not matter: the figure reported is the Lagrangian bound of its dual values, computed here,
which is valid whatever those are.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

from tempo_router.errors import ConfigError
from tempo_router.request import BestEffort, Deadline, Latency, SloClass
from tempo_router.simulation.engine_limits import EngineLimits, missing_tokens
from tempo_router.simulation.linear_program import LinearProgram
from tempo_router.simulation.step_profiles import StepProfile
from tempo_router.simulation.trace import Trace, TraceCall, Unit

ASSUMPTIONS = (
    "The future is known; work is fluid and units may be accepted in part.",
    "A cache saves at most the prefix_tokens of a call, and at least one prompt token is computed.",
    "Memory for the KV cache is unlimited; preemption and moving between replicas cost nothing.",
    "Nothing but engine steps takes time: no routing, no network, no scheduling.",
    "A call waits for its parents' ends and its gap; a unit is worth nothing after its deadline.",
    "Stream tokens count one by one; late ones cost nothing.",
    "A call's pace is limited by the fastest step.",
)
_SERIAL_ASSUMPTION = (
    "What a unit does one after the other takes as many steps in its window, wherever in it and on whichever replica."
)
# Buckets that a window is cut into, at least (guessed); more is tighter and slower.
_BUCKETS_PER_WINDOW = 3
_BUCKETS_PER_STREAM = 6
_MOST_BUCKETS = 200_000
"""Half an hour in pieces of 9 ms: more take gigabytes, and below a second the bound hardly gets tighter (guessed)."""
# Steps in a row are limited if they are this share of those that the window could hold at the fastest pace. Below, the
# limit would only bind steps ten times as long as the fastest; without it the bound is looser, but valid.
_LONG_PATH = 0.1


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound and how it came about.

    total: good output tokens, or the sum of the given values. per_s: total over the arrival span; None where all
        comes at once, which has no rate.
    accepted, offered: the same by class, in the relaxed optimum and in the trace; accepted sums to `total` but for the
        solver's tolerance. solve_s: time in the solver. is_cut_short: the time limit ended it, so `total` is loose.
    """

    total: float
    per_s: float | None
    accepted: dict[SloClass, float]
    offered: dict[SloClass, float]
    rows: int
    columns: int
    nonzeros: int
    bucket_s: float
    solve_s: float
    is_cut_short: bool
    assumptions: tuple[str, ...]


def token_goodput_bound(
    trace: Trace,
    profiles: Sequence[StepProfile],
    slots: int,
    *,
    value: Callable[[Unit], float] | None = None,
    bucket_s: float = 4.0,
    time_limit_s: float = 300.0,
    serial_steps: bool = True,
) -> Bound:
    """Good output tokens that no schedule of the trace on these replicas exceeds.

    profiles: one per replica. slots: rows in a step, per replica. value: worth of a unit that is met as a whole, in
    place of its good tokens (a stream: every token on time). bucket_s: finest time resolution; smaller is tighter
        and slower. On a mixed trace of half an hour at 1.5x on an A100, 1 s gave a bound 0.2 % lower than 4 s,
        in nearly three times the time.
    time_limit_s: the solver stops there; the bound is then loose, most often what is offered (is_cut_short).
    serial_steps: with the steps in a row; without them the bound is looser and takes about half the time. There they
        took 1.8 % off at 1.5x and 3.0 % at 2x; on an H100, whose steps are short anyway, nothing.
    Raises ConfigError on profiles of an unknown kind and on settings out of range, too many buckets among them.
    """
    if not profiles or slots < 1 or not bucket_s > 0:
        raise ConfigError(f"{len(profiles)} profiles, slots={slots}, bucket_s={bucket_s}: each must be above zero")
    engine = EngineLimits.of(profiles, slots)
    plans = [plan for unit in trace.units if (plan := _plan(unit, engine, value)) is not None]
    model = _Model(engine, bucket_s, plans, serial_steps=serial_steps)
    total, point, solve_s, has_ended = model.program.solve(time_limit_s)
    accepted: dict[SloClass, float] = {"latency": 0.0, "deadline": 0.0, "program": 0.0}
    offered = dict(accepted)
    for unit in trace.units:
        if not isinstance(unit.slo, BestEffort):
            offered[_class_of(unit)] += unit.output_tokens if value is None else value(unit)
    for slo_class, column, worth in model.worths:
        accepted[slo_class] += worth * float(point[column])
    total = min(total, sum(offered.values()))
    return Bound(
        total=total,
        per_s=total / trace.span_s if trace.span_s > 0 else None if total > 0 else 0.0,
        accepted=accepted,
        offered=offered,
        rows=model.program.rows,
        columns=model.program.columns,
        nonzeros=model.program.nonzeros,
        bucket_s=bucket_s,
        solve_s=solve_s,
        is_cut_short=not has_ended,
        assumptions=(*ASSUMPTIONS, _SERIAL_ASSUMPTION) if serial_steps else ASSUMPTIONS,
    )


def request_goodput_bound(
    trace: Trace, profiles: Sequence[StepProfile], slots: int, *, bucket_s: float = 4.0, time_limit_s: float = 300.0
) -> Bound:
    """Units that can meet their SLO as a whole: no schedule meets more."""
    return token_goodput_bound(
        trace, profiles, slots, value=lambda _: 1.0, bucket_s=bucket_s, time_limit_s=time_limit_s
    )


def _class_of(unit: Unit) -> SloClass:
    if unit.is_program:
        return "program"
    return "latency" if isinstance(unit.slo, Latency) else "deadline"


# ---- the units ----


@dataclass(frozen=True, slots=True)
class _Work:
    """One call of a plan. Windows are (start, end); a decode window is None for answers of one token.

    prefill_gpu_s, decode_gpu_s: time beyond the steps that is spread as the work itself is. chunks: fewest.
    """

    prefill: tuple[float, float]
    decode: tuple[float, float] | None
    missing: int
    tokens: int
    chunks: int
    prefill_min_s: float
    decode_gpu_s: float
    parents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A unit that can have some value.

    late_gpu_s: time beyond the steps that may fall anywhere in the unit's window. steps: fewest of the engine that the
    whole unit takes one after the other. dues: index and due time of a stream's tokens after the first that can be made
    in time.
    """

    slo_class: SloClass
    worth: float
    start_s: float
    end_s: float
    works: tuple[_Work, ...]
    late_gpu_s: float
    steps: int
    first_due_s: float | None = None
    dues: tuple[tuple[int, float], ...] = ()
    s_per_context_token: float = 0.0
    counts_tokens: bool = False


def _plan(unit: Unit, engine: EngineLimits, value: Callable[[Unit], float] | None) -> _Plan | None:
    worth = float(unit.output_tokens) if value is None else value(unit)
    if worth <= 0 or not unit.calls:
        return None
    match unit.slo:
        case Latency():
            return _stream_plan(unit, unit.slo, engine, worth, counts_tokens=value is None)
        case Deadline(ttlt_s=ttlt_s):
            return _deadline_plan(unit, unit.arrival_s + ttlt_s, engine, worth)
        case BestEffort():
            return None


def _stream_plan(unit: Unit, slo: Latency, engine: EngineLimits, worth: float, *, counts_tokens: bool) -> _Plan | None:
    (call,) = unit.calls
    first = unit.arrival_s + engine.shortest_prefill_s(call)
    dues = [unit.arrival_s + slo.ttft_s + i * slo.tbt_s for i in range(call.output_tokens)]
    makeable = [first + engine.shortest_decode_s(call, i) <= due + 1e-9 for i, due in enumerate(dues)]
    if not any(makeable) or (not counts_tokens and not all(makeable)):
        return None
    end = max(due for due, can in zip(dues, makeable, strict=True) if can)
    later = tuple((i, due) for i, due in enumerate(dues) if i and makeable[i])
    work = _work(call, engine, (unit.arrival_s, end if counts_tokens else dues[0]), (first, end), ())
    growth = engine.attention.s_per_context_token * (call.output_tokens - 1) * (call.output_tokens - 2) / 2
    prompt_s = engine.attention.prompt_s(call.prompt_tokens - work.missing, work.missing)
    return _Plan(
        slo_class="latency",
        worth=worth,
        start_s=unit.arrival_s,
        end_s=end,
        works=(work,),
        late_gpu_s=prompt_s if counts_tokens else prompt_s + growth,
        steps=_serial_steps(call, engine),
        first_due_s=dues[0] if makeable[0] else None,
        dues=later,
        s_per_context_token=engine.attention.s_per_context_token,
        counts_tokens=counts_tokens,
    )


def _deadline_plan(unit: Unit, deadline_s: float, engine: EngineLimits, worth: float) -> _Plan | None:
    calls = unit.calls
    prefills = [engine.shortest_prefill_s(call) for call in calls]
    decodes = [engine.shortest_decode_s(call, call.output_tokens - 1) for call in calls]
    order = list(TopologicalSorter({i: call.parents for i, call in enumerate(calls)}).static_order())
    starts = [unit.arrival_s] * len(calls)
    ends = [deadline_s] * len(calls)
    steps = [0] * len(calls)
    for i in order:
        for parent in calls[i].parents:
            starts[i] = max(starts[i], starts[parent] + prefills[parent] + decodes[parent] + calls[i].gap_s)
            steps[i] = max(steps[i], steps[parent])
        steps[i] += _serial_steps(calls[i], engine)
    for i in reversed(order):
        for parent in calls[i].parents:
            ends[parent] = min(ends[parent], ends[i] - decodes[i] - prefills[i] - calls[i].gap_s)
    if any(starts[i] + prefills[i] + decodes[i] > ends[i] + 1e-9 for i in order):
        return None
    works = tuple(
        _work(call, engine, (starts[i], ends[i] - decodes[i]), (starts[i] + prefills[i], ends[i]), call.parents)
        for i, call in enumerate(calls)
    )
    late = 0.0
    for call, work in zip(calls, works, strict=True):
        late += engine.attention.prompt_s(call.prompt_tokens - work.missing, work.missing)
        late += engine.attention.s_per_context_token * work.tokens * (work.tokens - 1) / 2
    return _Plan(
        slo_class=_class_of(unit),
        worth=worth,
        start_s=unit.arrival_s,
        end_s=deadline_s,
        works=works,
        late_gpu_s=late,
        steps=max(steps),
    )


def _serial_steps(call: TraceCall, engine: EngineLimits) -> int:
    return call.output_tokens - 1 + math.ceil(missing_tokens(call) / engine.attention.max_chunk)


def _work(
    call: TraceCall,
    engine: EngineLimits,
    prefill: tuple[float, float],
    decode: tuple[float, float],
    parents: tuple[int, ...],
) -> _Work:
    missing, tokens = missing_tokens(call), call.output_tokens - 1
    return _Work(
        prefill=prefill,
        decode=decode if tokens else None,
        missing=missing,
        tokens=tokens,
        chunks=math.ceil(missing / engine.attention.max_chunk),
        prefill_min_s=missing * engine.s_per_prefill_token,
        decode_gpu_s=engine.attention.s_per_context_token * tokens * call.prompt_tokens,
        parents=parents,
    )


# ---- the linear program ----


_DECODES, _PREFILL, _GPU = range(3)


@dataclass(frozen=True, slots=True)
class _Spread:
    """Columns of one quantity in consecutive buckets from `first` on."""

    first: int
    columns: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.first + len(self.columns) - 1

    def upto(self, bucket: int) -> tuple[int, ...]:
        return self.columns[: max(0, bucket - self.first + 1)]


class _Model:
    """The buckets, at widths of bucket_s * 2**level, and the units that use them."""

    def __init__(self, engine: EngineLimits, bucket_s: float, plans: Sequence[_Plan], *, serial_steps: bool) -> None:
        self.program = LinearProgram()
        self.worths: list[tuple[SloClass, int, float]] = []
        self._engine = engine
        self._serial_steps = serial_steps
        self._bucket_s = bucket_s
        self._origin_s = min((plan.start_s for plan in plans), default=0.0)
        horizon_s = max((plan.end_s for plan in plans), default=0.0) - self._origin_s
        self._horizon_s = horizon_s
        if horizon_s / bucket_s > _MOST_BUCKETS:
            raise ConfigError(
                f"bucket_s={bucket_s:g}: the {horizon_s:.6g} s to the last deadline make {horizon_s / bucket_s:.3g}"
                f" buckets, at most {_MOST_BUCKETS} are possible; take {1.1 * horizon_s / _MOST_BUCKETS:.2g} s or more"
                " (--bucket-s)"
            )
        levels = 1 + max((self._level(plan) for plan in plans), default=0)
        coarse = max(1, math.ceil(horizon_s / (bucket_s * (1 << (levels - 1)))))
        self._sizes: list[int] = [coarse << (levels - 1 - level) for level in range(levels)]
        self._uses: dict[tuple[int, int, int], tuple[list[int], list[float]]] = {}
        self._steps: list[list[int]] = []
        if plans:
            self._supply()
            for plan in plans:
                self._add(plan)
            self._balance()

    def _level(self, plan: _Plan) -> int:
        """Width of a plan's buckets: by its shortest call window, so that each has enough of them."""
        wanted = _BUCKETS_PER_STREAM if plan.dues or plan.slo_class == "latency" else _BUCKETS_PER_WINDOW
        shortest = min((work.decode or work.prefill)[1] - work.prefill[0] for work in plan.works)
        return max(0, math.floor(math.log2(max(shortest, 1e-9) / (self._bucket_s * wanted))))

    def _supply(self) -> None:
        """Steps of each shape in each finest bucket, and at every level the steps that a path may take there.

        A path's steps are among those of all replicas, and no more than one replica could do at the fastest pace.
        """
        steps: list[int] = []
        for k in range(self._sizes[0]):
            # The coarsest buckets may reach beyond the last deadline; nothing there counts.
            seconds = min(self._bucket_s, max(0.0, self._horizon_s - k * self._bucket_s))
            counts: list[int] = []
            for replicas, shapes in self._engine.groups:
                time = [self.program.column(0.0, replicas * seconds / shape.seconds) for shape in shapes]
                attention = self.program.column(0.0, replicas * seconds)
                self.program.row(
                    [*time, attention],
                    [*(shape.seconds for shape in shapes), 1.0],
                    -math.inf,
                    replicas * seconds,
                )
                for column, shape in zip(time, shapes, strict=True):
                    self._use(_DECODES, 0, k, column, -shape.decodes)
                    self._use(_PREFILL, 0, k, column, -shape.prefill)
                self._use(_GPU, 0, k, attention, -1.0)
                counts.extend(time)
            steps.append(self._sum_of(counts, seconds / self._engine.step_s))
        self._steps.append(steps)
        for level in range(1, len(self._sizes)):
            finer = self._steps[level - 1]
            halves = (finer[2 * k : 2 * k + 2] for k in range(self._sizes[level]))
            self._steps.append([self._sum_of(two, sum(self.program.tops[column] for column in two)) for two in halves])

    def _sum_of(self, columns: Sequence[int], top: float) -> int:
        """A column that is at most the sum of the given ones."""
        total = self.program.column(0.0, top)
        self.program.row([total, *columns], [1.0, *[-1.0] * len(columns)], -math.inf, 0.0)
        return total

    def _use(self, resource: int, level: int, bucket: int, column: int, amount: float) -> None:
        columns, amounts = self._uses.setdefault((resource, level, bucket), ([], []))
        columns.append(column)
        amounts.append(amount)

    def _balance(self) -> None:
        """What a bucket's units use is at most what it supplies or hands down to its two halves."""
        for resource in (_DECODES, _PREFILL, _GPU):
            for level in range(len(self._sizes) - 1, -1, -1):
                for bucket in range(self._sizes[level]):
                    if level:
                        top = self._most(resource) * (1 << (level - 1))
                        for half in (2 * bucket, 2 * bucket + 1):
                            handed = self.program.column(0.0, top)
                            self._use(resource, level, bucket, handed, -1.0)
                            self._use(resource, level - 1, half, handed, 1.0)
                    columns, amounts = self._uses.pop((resource, level, bucket))
                    self.program.row(columns, amounts, -math.inf, 0.0)

    def _most(self, resource: int) -> float:
        """The most of a resource in a finest bucket."""
        total = 0.0
        for replicas, shapes in self._engine.groups:
            rates = {
                _DECODES: max(shape.decodes / shape.seconds for shape in shapes),
                _PREFILL: max(shape.prefill / shape.seconds for shape in shapes),
                _GPU: 1.0,
            }
            total += replicas * self._bucket_s * rates[resource]
        return total

    # -- one unit --

    def _add(self, plan: _Plan) -> None:
        level = self._level(plan)
        calls = [self._call(work, level) for work in plan.works]
        growth_s = plan.s_per_context_token * sum(index for index, _ in plan.dues) if plan.counts_tokens else 0.0
        late = self._spread((plan.start_s, plan.end_s), level, plan.late_gpu_s + growth_s, math.inf)
        for k, column in enumerate(late.columns, late.first):
            self._use(_GPU, level, k, column, 1.0)
        if plan.counts_tokens:
            self._count_tokens(plan, level, *calls[0], late)
        else:
            self._accept(plan, level, calls, late)

    def _call(self, work: _Work, level: int) -> tuple[_Spread, _Spread | None]:
        """Columns of a call's prefill and decode, as fractions of it."""
        prefill = self._spread(work.prefill, level, 1.0, 1 / work.prefill_min_s)
        for k, column in enumerate(prefill.columns, prefill.first):
            self._use(_PREFILL, level, k, column, work.missing)
        if work.decode is None:
            return prefill, None
        decode = self._spread(work.decode, level, 1.0, 1 / (work.tokens * self._engine.decode_step_s))
        for k, column in enumerate(decode.columns, decode.first):
            self._use(_DECODES, level, k, column, work.tokens)
            self._use(_GPU, level, k, column, work.decode_gpu_s)
        self._follow(prefill, decode)
        return prefill, decode

    def _spread(self, window: tuple[float, float], level: int, top: float, per_s: float) -> _Spread:
        """Columns up to `top`, and up to per_s times the seconds that the window has in a bucket."""
        width = self._bucket_s * (1 << level)
        first, last = self._bucket(window[0], level), self._bucket(window[1], level)
        columns = []
        for k in range(first, last + 1):
            opens = max(window[0], self._origin_s + k * width)
            closes = min(window[1], self._origin_s + (k + 1) * width)
            most = top if math.isinf(per_s) else min(top, max(0.0, closes - opens + 1e-6) * per_s)
            columns.append(self.program.column(0.0, most))
        return _Spread(first, tuple(columns))

    def _bucket(self, at_s: float, level: int) -> int:
        k = math.floor((at_s - self._origin_s) / (self._bucket_s * (1 << level)))
        return min(max(0, k), self._sizes[level] - 1)

    def _follow(self, before: _Spread, after: _Spread) -> None:
        """At the end of each bucket, `after` is not further than `before`."""
        for k in range(after.first, min(before.last, after.last + 1)):
            led, done = before.upto(k), after.upto(k)
            self.program.row([*done, *led], [1.0] * len(done) + [-1.0] * len(led), -math.inf, 0.0)

    def _accept(self, plan: _Plan, level: int, calls: Sequence[tuple[_Spread, _Spread | None]], late: _Spread) -> None:
        """All or nothing, relaxed to a fraction: every part is done as far as the unit is accepted."""
        program = self.program
        unit = program.column(plan.worth, 1.0)
        self.worths.append((plan.slo_class, unit, plan.worth))
        self._limit_steps(plan, unit, plan.steps, plan.end_s)
        for spread in (part for call in calls for part in call if part is not None):
            program.row([unit, *spread.columns], [-1.0, *[1.0] * len(spread.columns)], 0.0, 0.0)
        program.row([unit, *late.columns], [-plan.late_gpu_s, *[1.0] * len(late.columns)], 0.0, 0.0)
        for work, (prefill, _) in zip(plan.works, calls, strict=True):
            for parent in work.parents:
                parent_prefill, parent_decode = calls[parent]
                self._follow(parent_decode or parent_prefill, prefill)
        decode = calls[0][1]
        if decode is not None:
            by_bucket = Counter(self._bucket(due, level) for _, due in plan.dues)
            made = 0
            for k, tokens in sorted(by_bucket.items()):
                made += tokens
                done = decode.upto(k)
                program.row([unit, *done], [-made / len(plan.dues), *[1.0] * len(done)], 0.0, math.inf)

    def _count_tokens(self, plan: _Plan, level: int, prefill: _Spread, decode: _Spread | None, late: _Spread) -> None:
        """A stream token by token: columns hold the share of those due in a bucket that are made in time."""
        program = self.program
        program.row(prefill.columns, [1.0] * len(prefill.columns), -math.inf, 1.0)
        if plan.first_due_s is not None:
            first = program.column(1.0, 1.0)
            self.worths.append((plan.slo_class, first, 1.0))
            ready = prefill.upto(self._bucket(plan.first_due_s, level))
            program.row([first, *ready], [1.0, *[-1.0] * len(ready)], -math.inf, 0.0)
        paid = [*late.columns, *prefill.columns]
        costs = [*[1.0] * len(late.columns), *[-plan.late_gpu_s] * len(prefill.columns)]
        good: list[int] = []
        counts: list[float] = []
        due_in: dict[int, list[tuple[int, float]]] = {}
        for index, due in plan.dues:
            due_in.setdefault(self._bucket(due, level), []).append((index, due))
        for k, group in sorted(due_in.items()):
            indices = [index for index, _ in group]
            column = program.column(len(indices), 1.0)
            self.worths.append((plan.slo_class, column, len(indices)))
            good.append(column)
            counts.append(len(indices))
            self._limit_steps(plan, column, indices[0] + plan.works[0].chunks, group[-1][1])
            ready = prefill.upto(k)
            program.row([column, *ready], [1.0, *[-1.0] * len(ready)], -math.inf, 0.0)
            assert decode is not None
            done = decode.upto(k)
            program.row([*good, *done], [*counts, *[-plan.works[0].tokens] * len(done)], -math.inf, 0.0)
            paid.append(column)
            costs.append(-plan.s_per_context_token * len(indices) * (indices[0] - 1))
        program.row(paid, costs, 0.0, math.inf)

    def _limit_steps(self, plan: _Plan, share: int, steps: int, end_s: float) -> None:
        """What needs `steps` one after the other between the plan's start and end_s is done in the share of a column.

        Buckets that the window cuts are counted in full: its steps could all be in the part that lies inside.
        """
        first, last = self._bucket(plan.start_s, 0), self._bucket(end_s, 0)
        most = (last + 1 - first) * self._bucket_s / self._engine.step_s
        if not self._serial_steps or steps < _LONG_PATH * most:
            return
        counts = self._steps_between(first, last)
        self.program.row([share, *counts], [1.0, *[-1.0 / steps] * len(counts)], -math.inf, 0.0)

    def _steps_between(self, first: int, last: int) -> list[int]:
        """Columns that sum to the steps of the finest buckets first..last, as few as the levels allow."""
        columns = []
        level = 0
        end = last + 1
        while first < end:
            if level + 1 == len(self._steps):
                columns.extend(self._steps[level][first:end])
                break
            if first % 2:
                columns.append(self._steps[level][first])
                first += 1
            if end % 2:
                end -= 1
                columns.append(self._steps[level][end])
            first, end, level = first // 2, end // 2, level + 1
        return columns
