"""A call's way into its program and out of it, whether it came over HTTP or by the Python handle."""

import time

from deployments.program_client import ProgramClient
from deployments.program_identity import Identity
from deployments.request_context import RequestContext
from tempo_router.program_ops import EndCall
from tempo_router.request import ProgramCall, ProgramId


async def join(
    programs: ProgramClient, identity: Identity, context: RequestContext, *, has_own_slo: bool, now_epoch_s: float
) -> None:
    """Find the request's place. The program's deadline is its target, unless it has its own.

    Raises ProgramError, RouterUnavailableError; then there is nothing to leave.
    """
    ticket = await programs.begin(identity, tenant=context.tenant, app=context.app, now_epoch_s=now_epoch_s)
    context.program = ticket
    context.app = context.app or ticket.app
    if has_own_slo:
        return
    if ticket.left_s is not None:
        # Counted from the arrival, which was a little before the router looked at its clock.
        left_s = ticket.left_s + max(0.0, time.monotonic() - context.arrival_s)
        context.slo, context.tier = ProgramCall(ProgramId(ticket.program_id), left_s), ""
        context.is_relegated = ticket.is_relegated


def leave(
    programs: ProgramClient,
    context: RequestContext,
    *,
    is_last: bool,
    response_id: str = "",
    is_background: bool = False,
) -> None:
    """The answer has been given, or nobody wants it any more. One in the background may still go on."""

    def end() -> None:
        ticket = context.program
        assert ticket is not None
        context.on_outcome = None
        programs.end(
            EndCall(
                ticket.program_id, ticket.call_id, ticket.attempt, context.call_status,
                prompt_tokens=context.prompt_tokens,
                output_tokens=sum(outcome.output_tokens for outcome in context.outcomes),
                is_last=is_last,
                response_id=response_id,
            )
        )  # fmt: skip

    if is_background and context.is_admitted and not context.has_ended:
        context.on_outcome = lambda: end() if context.has_ended else None
    else:
        end()
