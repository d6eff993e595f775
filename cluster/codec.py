"""Between the core's types and the wire's messages.

An arrival time leaves a process as an age and becomes a time again on the receiver's own monotonic clock, so
a request grows older by the transfer time that nobody counted (well under a millisecond on a local network).
"""

from typing import assert_never

from cluster import wire_pb2 as wire
from tempo_router.actions import Admit, Redate, Reject, Relegate, Retune
from tempo_router.events import CallFinished, Progressed, ReplicaCapacity, ReplicaLoad, StepReport
from tempo_router.metrics import Outcome
from tempo_router.request import (
    BestEffort,
    Deadline,
    DispatchId,
    GroupId,
    Latency,
    ProgramCall,
    ProgramId,
    ReplicaId,
    RequestId,
    RequestSpec,
    Slo,
)
from tempo_router.standing import Standing


def header_from_spec(spec: RequestSpec, now_s: float) -> wire.RequestHeader:
    """Describe a request for another process. now_s: the clock of spec.arrival_s."""
    header = wire.RequestHeader(
        request_id=spec.request_id,
        attempt=spec.attempt,
        group_id=spec.group_id,
        group_size=spec.group_size,
        model=spec.model,
        app=spec.app,
        tenant=spec.tenant,
        tier=spec.tier,
        age_s=max(0.0, now_s - spec.arrival_s),
        prompt_tokens=spec.prompt_tokens,
        max_output_tokens=spec.max_output_tokens,
        generated_tokens=spec.generated_tokens,
        stage=spec.stage,
        prefix_id=spec.prefix_id,
        prefix_tokens=spec.prefix_tokens,
        program_id=spec.program_id,
        call_id=spec.call_id,
    )
    _write_slo(header, spec.slo)
    return header


def spec_from_header(header: wire.RequestHeader, now_s: float) -> RequestSpec:
    """The request as the core knows it, its arrival on the clock of now_s. Raises ValueError without an SLO."""
    return RequestSpec(
        request_id=RequestId(header.request_id),
        arrival_s=now_s - header.age_s,
        slo=_read_slo(header, f"request {header.request_id!r}"),
        prompt_tokens=header.prompt_tokens,
        max_output_tokens=header.max_output_tokens,
        group_id=GroupId(header.group_id),
        group_size=header.group_size,
        model=header.model,
        app=header.app,
        tenant=header.tenant,
        tier=header.tier,
        attempt=header.attempt,
        generated_tokens=header.generated_tokens,
        stage=header.stage,
        prefix_id=header.prefix_id,
        prefix_tokens=header.prefix_tokens,
        program_id=header.program_id,
        call_id=header.call_id,
    )


def retarget_message(dispatch_id: int, slo: Slo) -> wire.Retarget:
    """A running call has another target from now on."""
    message = wire.Retarget(dispatch_id=dispatch_id)
    _write_slo(message, slo)
    return message


def verdict_message(action: Admit | Reject) -> wire.RouterToIngress:
    """Whether a request was taken in, as its ingress is told."""
    verdict = wire.Verdict(request_id=action.request_id, attempt=action.attempt)
    if isinstance(action, Admit):
        verdict.is_admitted = True
        verdict.expected_wait_s = action.expected_wait_s
        verdict.success_probability = action.success_probability
    else:
        verdict.reject_reason = action.reason
        if action.retry_after_s is not None:
            verdict.retry_after_s = action.retry_after_s
    return wire.RouterToIngress(verdicts=[verdict])


def target_news(action: Relegate | Redate, now_s: float) -> wire.RouterToIngress:
    """A request was given up, or has another deadline. now_s: the clock of the action."""
    news = wire.TargetNews(request_id=action.request_id)
    if isinstance(action, Redate):
        news.redated.program_id, news.redated.left_s = action.program_id, action.deadline_s - now_s
    else:
        news.is_relegated = True
    return wire.RouterToIngress(target_news=[news])


def redated_from_news(news: wire.TargetNews, arrival_s: float, now_s: float) -> ProgramCall | None:
    """The new target of a request that arrived then, on the clock of now_s; None if it was given up."""
    if not news.HasField("redated"):
        return None
    return ProgramCall(ProgramId(news.redated.program_id), now_s + news.redated.left_s - arrival_s)


def slo_from_retarget(message: wire.Retarget) -> Slo:
    """The new target. Raises ValueError without one."""
    return _read_slo(message, f"dispatch {message.dispatch_id}")


def _write_slo(message: wire.RequestHeader | wire.Retarget, slo: Slo) -> None:
    match slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            message.latency.ttft_s = ttft_s
            message.latency.tbt_s = tbt_s
        case Deadline(ttlt_s=ttlt_s):
            message.deadline.ttlt_s = ttlt_s
        case ProgramCall(program_id=program_id, ttlt_s=ttlt_s):
            message.program.program_id = program_id
            message.program.ttlt_s = ttlt_s
        case BestEffort():
            message.best_effort.SetInParent()
        case _:
            assert_never(slo)


def _read_slo(header: wire.RequestHeader | wire.Retarget, name: str) -> Slo:
    match header.WhichOneof("slo"):
        case "latency":
            return Latency(header.latency.ttft_s, header.latency.tbt_s)
        case "deadline":
            return Deadline(header.deadline.ttlt_s)
        case "program":
            return ProgramCall(ProgramId(header.program.program_id), header.program.ttlt_s)
        case "best_effort":
            return BestEffort()
        case _:
            raise ValueError(f"{name} came without an SLO; sender and receiver differ in version")


def message_from_outcome(request_id: RequestId, outcome: Outcome) -> wire.Outcome:
    """How a request ended, for the router."""
    return wire.Outcome(
        request_id=request_id,
        slo_class=outcome.slo_class,
        ttft_s=outcome.ttft_s,
        ttlt_s=outcome.ttlt_s,
        output_tokens=outcome.output_tokens,
        good_tokens=outcome.good_tokens,
        late_tokens=outcome.late_tokens,
        max_tbt_s=outcome.max_tbt_s,
        is_met=outcome.is_met,
    )


def outcome_from_message(message: wire.Outcome) -> Outcome:
    """The outcome as metrics know it."""
    return Outcome(
        slo_class=message.slo_class,  # type: ignore[arg-type]
        ttft_s=message.ttft_s if message.HasField("ttft_s") else None,
        ttlt_s=message.ttlt_s if message.HasField("ttlt_s") else None,
        output_tokens=message.output_tokens,
        good_tokens=message.good_tokens,
        late_tokens=message.late_tokens,
        max_tbt_s=message.max_tbt_s if message.HasField("max_tbt_s") else None,
        is_met=message.is_met if message.HasField("is_met") else None,
    )


def message_from_step(step: StepReport) -> wire.StepReport:
    """One measured step for the router."""
    return wire.StepReport(
        duration_s=step.duration_s,
        prefill_tokens=step.prefill_tokens,
        decodes=step.decodes,
        context_tokens=step.context_tokens,
        attention_tokens=step.attention_tokens,
    )


def step_from_message(message: wire.StepReport) -> StepReport:
    """The step as the step-time model reads it."""
    return StepReport(
        duration_s=message.duration_s,
        prefill_tokens=message.prefill_tokens,
        decodes=message.decodes,
        context_tokens=message.context_tokens,
        attention_tokens=message.attention_tokens,
    )


def capacity_from_facts(facts: wire.EngineFacts) -> ReplicaCapacity:
    """What the core needs to know of an engine."""
    return ReplicaCapacity(
        max_running=facts.max_running,
        max_step_tokens=facts.max_step_tokens,
        kv_tokens=facts.kv_tokens,
        has_step_planner=facts.has_step_planner,
    )


def message_from_standing(standing: Standing) -> wire.Standing:
    """How one call stands, beside its dispatch."""
    return wire.Standing(
        density=standing.density,
        is_admitted=standing.is_admitted,
        later_s=standing.later_s,
        is_relegated=standing.is_relegated,
    )


def standing_from_message(message: wire.Standing) -> Standing:
    """The standing as planners order by it."""
    return Standing(message.density, message.is_admitted, message.later_s, message.is_relegated)


def message_from_retune(retune: Retune) -> wire.Retune:
    """How all running calls of one engine stand."""
    message = wire.Retune(step_cap_s=retune.step_cap_s)
    if retune.standings:
        message.dispatch_ids.extend(dispatch_id for dispatch_id, _ in retune.standings)
        densities, are_admitted, later_s, are_relegated = zip(*(one for _, one in retune.standings), strict=True)
        message.densities.extend(densities)
        message.are_admitted.extend(are_admitted)
        message.later_s.extend(later_s)
        message.are_relegated.extend(are_relegated)
    return message


def standings_from_message(message: wire.Retune) -> list[tuple[int, Standing]]:
    """(dispatch id, standing) of each call. Raises ValueError for columns of different lengths."""
    columns = (message.densities, message.are_admitted, message.later_s, message.are_relegated)
    return list(zip(message.dispatch_ids, map(Standing, *columns), strict=True))


def progressed_from_message(progress: wire.Progress, worker_id: ReplicaId, now_s: float) -> Progressed:
    """News of one step, stamped with the router's clock."""
    return Progressed(
        at_s=now_s,
        replica_id=worker_id,
        load=ReplicaLoad(
            running=progress.running,
            waiting=progress.waiting,
            free_kv_tokens=progress.free_kv_tokens,
            prefix_hit_tokens=progress.prefix_hit_tokens,
            prefix_query_tokens=progress.prefix_query_tokens,
            preemptions=progress.preemptions,
        ),
        step=step_from_message(progress.step) if progress.HasField("step") else None,
        tokens=tuple(zip(progress.token_dispatch_ids, progress.token_counts, strict=True)),  # type: ignore[arg-type]
        finished=tuple(
            CallFinished(DispatchId(one.dispatch_id), one.reason, one.output_tokens)  # type: ignore[arg-type]
            for one in progress.finished
        ),
    )
