"""The plan over all that waits and runs: what each unit is worth per GPU second, and who fits (docs/scheduling.md).

A unit is a request alone or a whole program. Everything here is computed for all of them at once, in arrays.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from tempo_router.columns import MISSING, Columns
from tempo_router.config import SchedulingConfig
from tempo_router.facts import (
    BEST_EFFORT,
    CONTEXT,
    DEADLINE,
    DEADLINE_S,
    FIRST_DUE_S,
    GENERATED,
    KIND,
    LIMIT,
    PROGRAM,
    PROMPT,
    STREAM,
    TBT_S,
)
from tempo_router.ledger import Program
from tempo_router.metrics import INPUT_WEIGHT, OUTPUT_WEIGHT
from tempo_router.plan_table import ABOVE, MEAN, PRODUCED, TAIL, UNIT, UPPER, PlannedJob, PlanTable
from tempo_router.policies.base import Context, Job
from tempo_router.program_history import ProgramHistory
from tempo_router.program_time import chances, deviations, margin_of, serial_s, unseen
from tempo_router.replicas import Call
from tempo_router.request import RequestSpec
from tempo_router.reserve import Reserve
from tempo_router.standing import Standing
from tempo_router.step_cap import ArrivedUnit, StepCap
from tempo_router.step_time import Pace
from tempo_router.timeline import ALL_BUCKETS, BUCKET_ENDS_S, admit, due_in_bucket
from tempo_router.value import PREFILL_WALL_RATIO
from tempo_router.waiting import WaitingRequest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_UNSEEN_COST = 2.0
"""GPU time of unseen stages over that of decoding their longest calls: for prompts, and calls beside them."""

_standing: Callable[[Iterable[object]], Standing] = partial(tuple.__new__, Standing)
"""A standing from its values in order, at half the cost of the call that checks them."""

_NOBODY: tuple[Ints, Floats] = (np.zeros(0, dtype=np.int64), np.zeros((4, 0)))

_MEANS = attrgetter(
    "calls", "prompt_tokens", "squared_prompts", "output_tokens",
    "chain_tokens", "chain_prompt_tokens", "gaps_s", "stages", "unknown",
)  # fmt: skip
"""Of a forecast, all in one tuple."""


class _Left:
    """What is left of each answer, given its length's distribution and the tokens that exist. Arrays over calls.

    mean: expected tokens to come. upper: not exceeded with probability 0.7.
    """

    def __init__(self, table: PlanTable, rows: Ints, numbers: Floats) -> None:
        self._table = table
        self._rows = rows
        self.generated, self.above, self.tail = numbers[PRODUCED], numbers[ABOVE], numbers[TAIL]
        self.mean, self.upper = numbers[MEAN], numbers[UPPER]

    def within(self, calls: Ints, tokens: Floats) -> tuple[Floats, Floats]:
        """(P(at most so many more tokens), expected whole length counting only those that fit), of these calls."""
        atoms, generated, tail = self._atoms(calls), self.generated[calls], self.tail[calls]
        fits = (atoms > generated[:, None]) & (atoms <= (generated + tokens)[:, None])
        above = np.maximum(self.above[calls], 1)
        share = fits.sum(axis=1) / above
        length = np.where(fits, atoms, 0.0).sum(axis=1) / above
        tail_share = 1.0 - np.exp(-np.maximum(tokens, 0.0) / tail)
        some = self.above[calls] > 0
        probability = np.where(some, share, tail_share)
        expected = np.where(some, length, tail_share * (generated + tail))
        return np.where(tokens > 0, probability, 0.0), np.where(tokens > 0, expected, 0.0)

    def beyond(self, calls: Ints, lost: Floats) -> Floats:
        """Expected tokens still to come after the next `lost` ones, of these calls."""
        atoms, generated, tail = self._atoms(calls), self.generated[calls], self.tail[calls]
        above = np.maximum(self.above[calls], 1)
        rest = np.maximum(atoms - (generated + lost)[:, None], 0.0)
        known = np.where(atoms > generated[:, None], rest, 0.0).sum(axis=1) / above
        fading = np.where(lost < 5.0 * tail, tail * np.exp(-lost / tail), 0.0)
        return np.where(self.above[calls] > 0, known, fading)

    def _atoms(self, calls: Ints) -> Floats:
        return self._table.atoms(self._rows[calls])


class TempoPlan:
    """Makes plans and keeps what they need between two of them: the reserve, and what is known of each job.

    `arrived` for every new unit, `make` as often as wanted; `make` writes `standing` of every job it is given.
    """

    def __init__(self, config: SchedulingConfig) -> None:
        self._config = config
        self._switches = config.switches
        self._reserve = Reserve()
        self._new: list[Job] = []
        self._cap = StepCap(config.step_cap_share)
        self._table = PlanTable()
        self._waiting = _NOBODY
        self.step_cap_s: float | None = None
        self.last_s = float("-inf")

    def arrived(self, job: Job, *, is_new: bool) -> None:
        """A request came. is_new: it is not a further call of a program that is known."""
        if is_new:
            self._new.append(job)

    def retarget(self, job: PlannedJob) -> None:
        """The job has another target."""
        self._table.retarget(job)

    def make(
        self,
        waiting: Sequence[WaitingRequest],
        running: Sequence[Call],
        context: Context,
        history: ProgramHistory,
        *,
        replicas: int,
    ) -> None:
        """Give every job its standing. replicas: how many share the work; GPU seconds per second."""
        self.last_s = context.now_s
        jobs: list[PlannedJob] = [*running, *waiting]
        rows = self._table.update(running, waiting)
        if not jobs:
            self._new.clear()
            self._waiting = _NOBODY
            return
        units = _Units(jobs, self._table, rows, context, history, self._config)
        density = self._density(units, context)
        self._note_arrivals(units, density, context.now_s)
        if self._switches.adaptive_cap and self._switches.step_cap:
            self.step_cap_s = self._cap.choose(context.pace, replicas, context.now_s)
        order = np.argsort(-density, kind="stable")
        admitted = np.zeros(units.count, dtype=np.bool_)
        worthy = order[density[order] > 0.0]
        if self._switches.timeline:
            admitted[worthy] = self._admit(units, density, worthy, context.now_s, replicas)
        else:
            admitted[worthy] = True
        later = units.later_s if self._switches.look_ahead else np.zeros(units.count)
        verdicts = (density, admitted, later, units.is_hopeless)
        standings = list(map(_standing, zip(*(column.tolist() for column in verdicts), strict=True)))
        for job, unit in zip(jobs, units.unit_of.tolist(), strict=True):
            standing = standings[unit]
            # What was given up stays so, whatever the plan says of it.
            job.standing = standing._replace(is_relegated=True) if job.is_given_up else standing
        self._waiting = (rows[len(running) :], np.array(verdicts, dtype=np.float64)[:, units.unit_of[len(running) :]])

    def columns(self, waiting: Sequence[WaitingRequest]) -> Columns:
        """The waiting requests of the plan that was just made, for the policy that orders them."""
        rows, standings = self._waiting
        # A request that was given up stays so, whatever the plan says of its program.
        standings[-1] = [request.is_relegated for request in waiting]
        return self._table.columns(rows, standings)

    def _density(self, units: "_Units", context: Context) -> Floats:
        density = units.value / np.maximum(units.cost_s, 1e-9)
        phi = self._config.tenant_exponent
        if phi > 0:
            density = density * _tenant_factors(units, context) ** phi
        return np.where(np.isfinite(density), np.maximum(density, 0.0), 0.0)

    def _note_arrivals(self, units: "_Units", density: Floats, now_s: float) -> None:
        """New units enter the histogram with the density that they came with."""
        for job in self._new:
            unit = units.index_of(job.spec)
            if unit is not None:
                self._reserve.add(float(density[unit]), units.demand(np.array([unit]), ALL_BUCKETS)[0], now_s)
                arrived = units.as_arrived(unit, now_s)
                if arrived is not None:
                    self._cap.note(arrived)
        self._new.clear()

    def _admit(
        self, units: "_Units", density: Floats, order: Ints, now_s: float, replicas: int
    ) -> npt.NDArray[np.bool_]:
        capacity = self._config.capacity_factor * replicas * BUCKET_ENDS_S
        factor = self._config.reserve_factor if self._switches.reserve else 0.0
        kept = self._reserve.needs(density[order], now_s)

        def allowance_of(ranks: Ints, buckets: slice) -> Floats:
            allowance: Floats = capacity[None, buckets] - factor * kept.of(ranks, buckets)
            return allowance

        def demand_of(ranks: Ints, buckets: slice) -> Floats:
            return units.demand(order[ranks], buckets)

        return admit(demand_of, allowance_of, order.size)


class _Units:
    """Calls grouped into units, with value, cost and demand of each unit. All arrays are over units but `unit_of`."""

    def __init__(
        self,
        jobs: Sequence[PlannedJob],
        table: PlanTable,
        rows: Ints,
        context: Context,
        history: ProgramHistory,
        config: SchedulingConfig,
    ) -> None:
        self._config = config
        self._now_s = context.now_s
        self._jobs = jobs
        self._table = table
        pace = context.pace
        numbers = table.numbers(rows)
        slots = numbers[UNIT].astype(np.int64)
        # Units are numbered in the order of their first calls. Of assignments to one slot the last one stays.
        calls = np.arange(rows.size)
        first = np.empty(table.capacity, dtype=np.int64)
        first[slots[::-1]] = calls[::-1]
        self._first_calls = np.nonzero(first[slots] == calls)[0]
        self.count = self._first_calls.size
        self._number = np.full(table.capacity, -1)
        self._number[slots[self._first_calls]] = np.arange(self.count)
        self.unit_of: Ints = self._number[slots]
        known = context.ledger.programs.get
        # The ledger has no program of the name None.
        self.programs: list[Program | None] = [
            None if name is None else known(name) for name in table.program_ids(slots[self._first_calls])
        ]
        self.left = _Left(table, rows, numbers)
        self._facts = numbers[: LIMIT + 1]
        self.missing = numbers[MISSING]
        self.generated = numbers[PRODUCED]
        self._measure_calls(pace)
        self._forecast(history)
        self._worth(context)

    def index_of(self, spec: RequestSpec) -> int | None:
        """The unit of a request, if a job of it is in the plan."""
        slot = self._table.slot_of(spec)
        return None if slot is None else int(self._number[slot])

    def tenants(self) -> list[str]:
        """Whose each unit is."""
        return [self._jobs[first].spec.tenant for first in self._first_calls.tolist()]

    def _measure_calls(self, pace: Pace) -> None:
        """Per call: what it costs, how long its prefill takes."""
        facts, generated = self._facts, self.generated
        context_tokens = facts[CONTEXT]
        produced = generated - facts[GENERATED]
        margin = margin_of(pace)
        past = np.maximum(context_tokens - self.missing, 0.0)
        self.prefill_s = margin * self.missing * (pace.prefill_token_s + pace.attention_s * (past + self.missing / 2))
        now = context_tokens + produced
        self.token_s = pace.share_s + pace.decode_s + pace.context_token_s * (now + self.left.mean / 2)
        rest = self.left.mean
        missing_s = self.prefill_s
        if not self._config.switches.remaining_cost:
            rest = rest + generated
            missing_s = margin * context_tokens * (pace.prefill_token_s + pace.attention_s * context_tokens / 2)
        self.call_cost_s = missing_s + margin * rest * self.token_s
        self.wall_s = PREFILL_WALL_RATIO * self.prefill_s
        self.tau_s = margin * pace.tau_s
        self._pace = pace

    def _forecast(self, history: ProgramHistory) -> None:
        """Per unit: what is still to come after its current stage."""
        is_ahead = self._config.switches.look_ahead
        different, of_unit = history.forecasts(self.programs if is_ahead else [None] * self.count)
        pace = self._pace
        wait_s = history.wait_s(self._now_s)
        means = np.array([_MEANS(one) for one in different], dtype=np.float64).T.take(of_unit, axis=1)
        calls, prompts, squared, self.later_tokens = means[:4]
        chain_tokens, chain_prompts, gaps, stages, unknown = means[4:]
        mean_context = (prompts + self.later_tokens / 2) / np.maximum(calls, 1e-9)
        token_s = pace.share_s + pace.decode_s + pace.context_token_s * mean_context
        self.later_cost_s = (
            prompts * pace.prefill_token_s + pace.attention_s * squared / 2 + self.later_tokens * token_s
        )
        if unknown.any():
            left_s = self._facts[DEADLINE_S, self._first_calls] - self._now_s
            left_s = np.where(unknown > 0.0, np.maximum(left_s, 0.0), 0.0)
            unseen_tokens, unseen_gaps_s = unseen(unknown, left_s, self.tau_s)
            chain_tokens = chain_tokens + unseen_tokens
            gaps = gaps + unseen_gaps_s
            self.later_tokens = self.later_tokens + unseen_tokens
            self.later_cost_s += _UNSEEN_COST * unseen_tokens * (pace.share_s + pace.decode_s)
        self.chain_tokens, self.gaps_s = chain_tokens, gaps
        self._longer_s = deviations(different, of_unit) * self.tau_s
        self.chain_prefill_s = chain_prompts * pace.prefill_token_s
        self.later_s = serial_s(chain_tokens, chain_prompts, gaps, stages, pace, wait_s)

    def _worth(self, context: Context) -> None:
        now_s = self._now_s
        kind = self._facts[KIND]
        self.tbt_s = self._facts[TBT_S]
        self.due_s = self._facts[FIRST_DUE_S] + self.generated * self.tbt_s - now_s
        left_s = self._facts[DEADLINE_S] - now_s
        is_fresh = self.missing > 0
        unit_of, count = self.unit_of, self.count
        self._last_call = np.zeros(count, dtype=np.int64)
        self._last_call[unit_of] = np.arange(unit_of.size)
        # What is the same for all calls of a unit: taken from its last call.
        self.kind = np.zeros(count)
        self.kind[unit_of] = kind
        self.left_s = np.zeros(count)
        self.left_s[unit_of] = left_s
        self.live_cost_s = _sums(unit_of, self.call_cost_s, count)
        self.cost_s = self.live_cost_s + self.later_cost_s
        tokens, chance = self._streams(np.nonzero(kind == STREAM)[0], is_fresh)
        answers = np.nonzero(kind == DEADLINE)[0]
        tokens[answers], chance[answers] = self._deadlines(answers, left_s[answers])
        good = np.zeros(count)
        good[unit_of] = tokens
        self.chance = np.zeros(count)
        self.chance[unit_of] = chance
        crit_s = np.zeros(count)
        np.maximum.at(crit_s, unit_of, self.wall_s + self.left.upper * self.tau_s)
        self.crit_s = crit_s + self.later_s
        is_program = self.kind == PROGRAM
        is_lost = np.array([one is not None and one.is_lost for one in self.programs], dtype=np.bool_)
        program_chance = np.where(is_program & ~is_lost, chances(self.left_s, self.crit_s, self._longer_s), 0.0)
        done = np.array([0.0 if one is None else one.done_tokens for one in self.programs])
        expected = _sums(unit_of, self.generated + self.left.mean, count) + self.later_tokens + done
        self.chance = np.where(is_program, program_chance, self.chance)
        good = np.where(is_program, program_chance * expected, good)
        prompt_tokens = _sums(unit_of, self._facts[PROMPT], count)
        self.value = self._value(good, prompt_tokens, is_program, self.chance, context.mean_length)
        self.full_value = self._value(expected, prompt_tokens, is_program, np.ones(count), context.mean_length)
        self.is_hopeless = (is_program & (self.left_s <= 0.0)) | (is_program & (program_chance <= 0.0))

    def _streams(self, calls: Ints, is_fresh: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(tokens that will be on time, chance that all are) of streams; zeros for others. calls: the streams."""
        tokens, chance = np.zeros(self.generated.size), np.zeros(self.generated.size)
        tbt_s = self.tbt_s[calls]
        wall_s = np.where(is_fresh[calls], self.wall_s[calls], self.prefill_s[calls])
        late_s = wall_s + self.tau_s - self.due_s[calls]
        catch_up_s = np.maximum(tbt_s - self.tau_s, 1e-3 * tbt_s)
        first_lost = (self.generated[calls] == 0) & (late_s > 0)
        lost = np.maximum(late_s, 0.0) / catch_up_s + first_lost
        tokens[calls] = self.left.beyond(calls, lost)
        chance[calls] = late_s <= 0.0
        return tokens, chance

    def _deadlines(self, calls: Ints, left_s: Floats) -> tuple[Floats, Floats]:
        """(expected tokens, chance to be in time) of answers that are due as a whole."""
        possible = np.where(np.isfinite(left_s), (left_s - self.wall_s[calls]) / self.tau_s, 0.0)
        chance, tokens = self.left.within(calls, possible)
        return tokens, chance

    def _value(
        self,
        good: Floats,
        prompts: Floats,
        is_program: npt.NDArray[np.bool_],
        chance: Floats,
        mean_length: float,
    ) -> Floats:
        config = self._config
        if config.objective == "gain":
            value: Floats = INPUT_WEIGHT * prompts * chance + OUTPUT_WEIGHT * good
            return value
        bonus = np.where(is_program, config.dag_weight, 1.0) * mean_length
        mixed: Floats = (1 - config.request_weight) * good + config.request_weight * bonus * chance
        return mixed

    def as_arrived(self, unit: int, now_s: float) -> ArrivedUnit | None:
        """What the choice of the step cap needs of a unit that has just come; None for best effort."""
        if self.kind[unit] == BEST_EFFORT:
            return None
        first = self._last_call[unit]
        is_stream = self.kind[unit] == STREAM
        rest = float(self.left.mean[first])
        upper = float(self.left.upper[first])
        work_s = float(self.prefill_s[first] + rest * (self.token_s[first] - self._pace.share_s))
        later_s = float(self.later_cost_s[unit] - self.later_tokens[unit] * self._pace.share_s)
        return ArrivedUnit(
            at_s=now_s,
            work_s=max(work_s + later_s, 1e-6),
            prefill_s=float(self.prefill_s[first] + self.chain_prefill_s[unit]),
            serial_tokens=rest + float(self.chain_tokens[unit]),
            spread_tokens=upper - rest,
            # Without waits: these grow with the overload, which would shorten the cap, which would add to the overload.
            gaps_s=float(self.gaps_s[unit]),
            left_s=float("inf") if is_stream else float(self.left_s[unit]),
            tbt_s=float(self.tbt_s[first]) if is_stream else float("inf"),
            value=float(self.full_value[unit]),
        )

    def demand(self, units: Ints, buckets: slice) -> Floats:
        """Cumulative GPU seconds that these units need by the end of each of these buckets: (units, buckets)."""
        is_stream = self.kind[units] == STREAM
        streams, others = units[is_stream], units[~is_stream]
        if not streams.size:
            return self._demand_of_others(others, buckets)
        demand = np.empty((units.size, BUCKET_ENDS_S[buckets].size))
        demand[is_stream] = self._demand_of_streams(streams, buckets)
        demand[~is_stream] = self._demand_of_others(others, buckets)
        return demand

    def _demand_of_streams(self, units: Ints, buckets: slice) -> Floats:
        calls = self._last_call[units]
        due_s, tbt_s = self.due_s[calls], self.tbt_s[calls]
        tokens = np.clip((BUCKET_ENDS_S[None, buckets] - due_s[:, None]) / tbt_s[:, None] + 1, 0, None)
        tokens = np.minimum(tokens, self.left.mean[calls][:, None])
        demand: Floats = due_in_bucket(self.prefill_s[calls], due_s, buckets) + self.token_s[calls][:, None] * tokens
        return demand

    def _demand_of_others(self, units: Ints, buckets: slice) -> Floats:
        left_s = self.left_s[units]
        finite = np.where(np.isfinite(left_s), left_s, 0.0)
        if self._config.switches.serial_demand:
            # A chain of calls cannot be hurried: it must be served from its latest start on, all the way.
            chain_s = np.maximum(self.crit_s[units], 1e-3)
            latest_s = np.maximum(finite - chain_s, 0.0)
            demand: Floats = BUCKET_ENDS_S[None, buckets] - latest_s[:, None]
            demand /= chain_s[:, None]
            np.clip(demand, 0.0, 1.0, out=demand)
            demand *= self.cost_s[units][:, None]
            return demand
        live = due_in_bucket(self.live_cost_s[units], finite - self.later_s[units], buckets)
        return live + due_in_bucket(self.later_cost_s[units], finite, buckets)


def _sums(unit_of: Ints, amounts: Floats, count: int) -> Floats:
    """Amounts of calls, added up by unit."""
    sums: Floats = np.bincount(unit_of, amounts, count).astype(np.float64)
    return sums


def _tenant_factors(units: _Units, context: Context) -> Floats:
    """(mean served/offered) / (own served/offered), within a factor of eight."""
    shares = {name: (one.served + 1.0) / (one.offered + 1.0) for name, one in context.ledger.tenants.items()}
    mean = sum(shares.values()) / max(len(shares), 1)
    own = np.array([shares.get(tenant, mean) for tenant in units.tenants()])
    factors: Floats = np.clip(mean / np.maximum(own, 1e-12), 1 / 8, 8)
    return factors
