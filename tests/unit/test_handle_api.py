"""What the ingress makes of the targets that a caller of the Python handle gives."""

import math
import pickle

import pytest

from deployments.handle_api import GenerateRequest, ProgramPlace
from deployments.ingress import _of_program, _raise_failure, chosen_targets, placed
from deployments.request_context import AdmissionRejected, AdmissionVerdict, RequestContext, RequestFailure
from tempo_router.config import TempoConfig
from tempo_router.errors import InvalidSloError, ProgramError, RequestFailedError, TempoError
from tempo_router.program_ops import CallTicket
from tempo_router.request import BestEffort, Deadline, Latency, ProgramCall, ProgramId, Slo

CONFIG = TempoConfig()


@pytest.mark.parametrize(
    ("slo", "field"),
    [
        (Deadline(ttlt_s=-5), "slo.ttlt_s"),
        (Deadline(ttlt_s=math.nan), "slo.ttlt_s"),
        (Deadline(ttlt_s=10**400), "slo.ttlt_s"),
        (Latency(ttft_s=0, tbt_s=0.1), "slo.ttft_s"),
        (Latency(ttft_s=1, tbt_s=math.inf), "slo.tbt_s"),
    ],
)
def test_targets_that_make_no_sense_are_refused_by_name(slo: Slo, field: str) -> None:
    with pytest.raises(InvalidSloError) as raised:
        chosen_targets(GenerateRequest(prompt="x", slo=slo), CONFIG)
    assert raised.value.field == field


def test_targets_a_tier_or_nothing_can_be_given() -> None:
    assert chosen_targets(GenerateRequest(prompt="x", slo=Deadline(5)), CONFIG) == (Deadline(5), "")
    assert chosen_targets(GenerateRequest(prompt="x", tier="background"), CONFIG) == (BestEffort(), "background")
    assert chosen_targets(GenerateRequest(prompt="x"), CONFIG)[1] == "chat"


def test_an_unknown_tier_and_both_at_once_are_refused() -> None:
    with pytest.raises(InvalidSloError, match="background"):
        chosen_targets(GenerateRequest(prompt="x", tier="platinum"), CONFIG)
    with pytest.raises(InvalidSloError, match="not both"):
        chosen_targets(GenerateRequest(prompt="x", tier="chat", slo=Deadline(5)), CONFIG)


@pytest.mark.parametrize(
    "error",
    [
        InvalidSloError("slo.ttft_s", -1, "must be a number of seconds"),
        ProgramError("unknown_program", "there is no such program", "program"),
        AdmissionRejected(AdmissionVerdict(False, reject_reason="queue_full", retry_after_s=2.0)),
        RequestFailedError("too late"),
    ],
)
def test_what_is_raised_crosses_processes(error: TempoError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - what was pickled right here
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_a_request_that_failed_on_the_way_raises_its_reason() -> None:
    context = RequestContext(BestEffort(), "", "", "", arrival_s=0.0, is_streaming=True)
    _raise_failure(context)
    context.report_failure(RequestFailure("slo_expired", "too late", 504))
    with pytest.raises(RequestFailedError, match="slo_expired: too late"):
        _raise_failure(context)


def test_a_place_in_a_new_program_has_a_deadline_from_now_or_a_date() -> None:
    assert placed(ProgramPlace("p", deadline_s=5.0), "t").deadline_s == 5.0
    assert placed(ProgramPlace("p", deadline=1_800_000_000.0), "t").deadline_epoch_s == 1_800_000_000.0
    with pytest.raises(ProgramError, match="not both"):
        placed(ProgramPlace("p", deadline_s=5.0, deadline=1_800_000_000.0), "t")


def test_a_generation_says_its_call_and_whether_its_target_is_out_of_reach() -> None:
    context = RequestContext(Deadline(5), "", "", "", arrival_s=0.0, is_streaming=True)
    assert _of_program(context) == {"call_id": "", "is_relegated": False}
    context.report_relegated()
    assert _of_program(context) == {"call_id": "", "is_relegated": True}
    late = CallTicket("p", "c", 0, 0, "app", left_s=-1.0, is_relegated=True)
    own_target = RequestContext(Deadline(5), "", "", "", arrival_s=0.0, is_streaming=True, program=late)
    assert _of_program(own_target) == {"call_id": "c", "is_relegated": True}
    context = RequestContext(ProgramCall(ProgramId("p"), 0.0), "", "", "", 0.0, is_streaming=True, program=late)
    context.report_relegated()
    context.report_redated(ProgramCall(ProgramId("p"), 60.0))
    assert _of_program(context) == {"call_id": "c", "is_relegated": False}
