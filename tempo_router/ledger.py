"""Who was served what: programs in progress and tenants. Kept by RouterCore, read by policies."""

from collections.abc import Sequence
from math import log2
from typing import TYPE_CHECKING

from tempo_router.request import DispatchId, ProgramCall, ProgramId, ReplicaId, RequestId, RequestSpec
from tempo_router.running_mean import RunningMean

if TYPE_CHECKING:
    from tempo_router.policies.base import Job
    from tempo_router.replicas import Call

_IDLE_PROGRAMS = 100_000
_TENANTS = 10_000
_APPS = 1_000
_STAGES = 64
_SHARE_SMOOTHING = 1 / 64
INPUT_SERVICE = 1.0
OUTPUT_SERVICE = 2.0
"""Weights of a tenant's counter, as in VTC (Sheng et al., OSDI 2024)."""


class Program:
    """What the router knows of one program.

    stage: highest stage seen. live: its calls that wait or run. done_calls, done_tokens: of ended calls, output.
    attained_s: summed run time of its ended calls. attained_tokens: output tokens of ended and running calls.
    path_s: by stage, the longest chain of run times that ends before it. waited_s: summed waiting of started calls.
    home: replica of its last started call. is_lost: it can no longer make its deadline.
    is_retargeted: its deadline was moved, and counts whatever its calls say.
    bucket: its deadline, counted from its arrival, in half octaves of a second.
    """

    __slots__ = (
        "app",
        "arrival_s",
        "attained_s",
        "attained_tokens",
        "bucket",
        "deadline_s",
        "done_calls",
        "done_tokens",
        "home",
        "is_lost",
        "is_retargeted",
        "live",
        "model",
        "path_s",
        "program_id",
        "stage",
        "stage_calls",
        "tenant",
        "waited_s",
    )

    def __init__(self, spec: RequestSpec, program_id: ProgramId, deadline_s: float) -> None:
        self.program_id = program_id
        self.app = spec.app
        self.model = spec.model
        self.tenant = spec.tenant
        self.arrival_s = spec.arrival_s
        self.move_deadline(deadline_s)
        self.stage = spec.stage
        self.stage_calls = 0
        self.live: dict[RequestId, Job] = {}
        self.done_calls = 0
        self.done_tokens = 0
        self.attained_s = 0.0
        self.attained_tokens = 0
        self.path_s: dict[int, float] = {}
        self.waited_s = 0.0
        self.home: ReplicaId | None = None
        self.is_lost = False
        self.is_retargeted = False

    def move_deadline(self, deadline_s: float) -> None:
        """When its last call must have ended."""
        self.deadline_s = deadline_s
        self.bucket = round(2 * log2(max(deadline_s - self.arrival_s, 1e-3)))


class Tenant:
    """Service of one tenant. counter: weighted tokens, lifted when the tenant becomes active (VTC).

    live: its requests that wait or run. served, offered: weighted tokens since it is known; offered answers count by
        their expected length.
    """

    __slots__ = ("counter", "live", "offered", "served", "tenant")

    def __init__(self, tenant: str, counter: float) -> None:
        self.tenant = tenant
        self.counter = counter
        self.live = 0
        self.served = 0.0
        self.offered = 0.0


class Ledger:
    """Programs and tenants. All methods cost O(1) but `arrived` of a tenant that was idle: O(active tenants)."""

    def __init__(self) -> None:
        self.programs: dict[ProgramId, Program] = {}
        self.tenants: dict[str, Tenant] = {}
        self._last_counter = 0.0
        self._shares: dict[str, list[RunningMean]] = {}

    def program(self, spec: RequestSpec) -> Program | None:
        """The program that a call belongs to; None for a request alone."""
        slo = spec.slo
        return self.programs.get(slo.program_id) if isinstance(slo, ProgramCall) else None

    def tenant(self, spec: RequestSpec) -> Tenant | None:
        """The account of a request's tenant, if it was ever active."""
        return self.tenants.get(spec.tenant)

    def arrived(self, job: "Job") -> None:
        """A request waits now (or again: `left` must have been called for what it was before)."""
        spec = job.spec
        tenant = self._account(spec)
        tenant.live += 1
        if spec.attempt == 0:
            tenant.offered += INPUT_SERVICE * spec.prompt_tokens + OUTPUT_SERVICE * job.lengths.mean
        slo = spec.slo
        if not isinstance(slo, ProgramCall):
            return
        program = self.programs.get(slo.program_id)
        if program is None:
            program = self.programs[slo.program_id] = Program(spec, slo.program_id, spec.arrival_s + slo.ttlt_s)
            self._forget_idle()
        program.move_deadline(spec.arrival_s + slo.ttlt_s)
        if spec.stage > program.stage:
            program.stage = spec.stage
            program.stage_calls = 0
        program.stage_calls += 1
        program.live[spec.request_id] = job

    def started(self, job: "Job", replica_id: ReplicaId, waited_s: float) -> None:
        """A request was dispatched; `job` is its view from now on."""
        spec = job.spec
        tenant = self._account(spec)
        tenant.counter += INPUT_SERVICE * spec.context_tokens
        tenant.served += INPUT_SERVICE * spec.context_tokens
        program = self.program(spec)
        if program is not None:
            program.live[spec.request_id] = job
            program.home = replica_id
            program.waited_s += waited_s

    def progressed(self, calls: Sequence["Call | None"], news: Sequence[tuple[DispatchId, int]]) -> None:
        """The calls of one step produced tokens, as in Replica.progress; what nobody wants any more is left out.

        Tenants are few, so their tokens are summed first.
        """
        by_tenant: dict[str, int] = {}
        for call, (_, tokens) in zip(calls, news, strict=True):
            if call is None or call.is_aborted:
                continue
            spec = call.spec
            name = spec.tenant
            by_tenant[name] = by_tenant.get(name, 0) + tokens
            if isinstance(spec.slo, ProgramCall):
                program = self.programs.get(spec.slo.program_id)
                if program is not None:
                    program.attained_tokens += tokens
        for name, tokens in by_tenant.items():
            tenant = self.tenants[name]
            tenant.counter += OUTPUT_SERVICE * tokens
            tenant.served += OUTPUT_SERVICE * tokens

    def left(self, spec: RequestSpec, *, run_s: float = 0.0, output_tokens: int | None = None) -> None:
        """A request neither waits nor runs. output_tokens: of a completed answer; None when it was given up."""
        tenant = self.tenants[spec.tenant]
        tenant.live -= 1
        if tenant.live == 0:
            self._last_counter = tenant.counter
        program = self.program(spec)
        if program is None:
            return
        program.live.pop(spec.request_id, None)
        if output_tokens is None:
            return
        program.done_calls += 1
        program.done_tokens += output_tokens
        program.attained_s += run_s
        before_s = program.path_s.get(spec.stage, 0.0)
        program.path_s[spec.stage + 1] = max(program.path_s.get(spec.stage + 1, 0.0), before_s + run_s)

    def program_ended(self, program_id: ProgramId, *, is_complete: bool = True) -> Program | None:
        """Forget a program; None if it was not known. A complete one tells how its stages share the time."""
        program = self.programs.pop(program_id, None)
        if program is not None and is_complete and not program.live:
            self._learn_shares(program)
        return program

    def share_through(self, app: str, stage: int) -> float | None:
        """Part of a program's run time that passes until the end of a stage, 0 to 1.

        The mean over the ended programs of the app that came that far; None before the first one.
        """
        means = self._shares.get(app)
        if means is None or not 0 <= stage < len(means) or not means[stage].count:
            return None
        return means[stage].value

    def _learn_shares(self, program: Program) -> None:
        total_s = max(program.path_s.values(), default=0.0)
        if total_s <= 0:
            return
        means = self._shares.pop(program.app, [])
        self._shares[program.app] = means
        while len(self._shares) > _APPS:
            del self._shares[next(iter(self._shares))]
        for after, path_s in program.path_s.items():
            if 0 < after <= _STAGES:
                means.extend(RunningMean(_SHARE_SMOOTHING) for _ in range(after - len(means)))
                means[after - 1].add(path_s / total_s)

    def _account(self, spec: RequestSpec) -> Tenant:
        tenant = self.tenants.get(spec.tenant)
        if tenant is None:
            tenant = self.tenants[spec.tenant] = Tenant(spec.tenant, 0.0)
            self._forget_tenants()
        if tenant.live == 0:
            # Idle time earns no credit.
            active = [other.counter for other in self.tenants.values() if other.live]
            tenant.counter = max(tenant.counter, min(active) if active else self._last_counter)
        return tenant

    def _forget_idle(self) -> None:
        """Programs that nobody finishes must not fill the memory: the oldest without live calls go."""
        if len(self.programs) <= _IDLE_PROGRAMS:
            return
        for program_id, program in self.programs.items():
            if not program.live:
                del self.programs[program_id]
                return

    def _forget_tenants(self) -> None:
        if len(self.tenants) <= _TENANTS:
            return
        for name, tenant in self.tenants.items():
            if not tenant.live:
                del self.tenants[name]
                return
