"""What a request's record tells: every decision, in order, and how it ended."""

import pytest

from tempo_router.actions import Abort, Admit, Defer, Dispatch, Evict, Expire, Readmit, Redate, Reject, Relegate
from tempo_router.attainment import Attainment
from tempo_router.explain import DecisionLog, missed_by_s
from tempo_router.metrics import Outcome
from tempo_router.prediction import LengthHistograms
from tempo_router.request import BestEffort, Deadline, DispatchId, Latency, ProgramCall, ProgramId, ReplicaId, RequestId
from tempo_router.standing import Standing
from tests.builders import CHAT, request

GPU = ReplicaId("gpu0")


def outcome(met: bool | None, ttft_s: float = 1.0, ttlt_s: float = 5.0, tokens: int = 11, late: int = 0) -> Outcome:
    return Outcome("latency", ttft_s, ttlt_s, tokens, tokens - late, late, 0.5, met)


def arrived(log: DecisionLog, name: str, at_s: float = 10.0, **said) -> RequestId:
    spec = request(name, arrival_s=at_s, **said)
    log.arrived(spec, LengthHistograms().lookup(spec), 0.5, 12.0, at_s)
    return spec.request_id


def told(log: DecisionLog, name: str) -> list[tuple[float, str]]:
    [one] = log.find(name, "")
    return [(each["at_s"], each["what"]) for each in one.shown()["decisions"]]


def test_a_record_tells_the_life_of_a_request():
    log = DecisionLog(10)
    name = arrived(log, "r")
    log.decided(Admit(name, 0, 0.25, 0.9), 10.0)
    log.decided(Defer(name, "no_room"), 10.5)
    standing = Standing(density=3.0, is_admitted=False, later_s=2.0)
    log.decided(Dispatch(DispatchId(1), name, 0, GPU, -5, standing), 11.0)
    log.decided(Evict(name, 0), 12.0)
    arrived(log, "r", attempt=1, at_s=12.5)
    log.decided(Relegate(name), 13.0)
    log.decided(Dispatch(DispatchId(2), name, 1, GPU, -5), 14.0)
    log.decided(Abort(DispatchId(2), GPU), 15.0)
    log.ended(name, outcome(False, ttft_s=4.0), 16.0)
    assert told(log, "r") == [
        (0.0, "arrived"), (0.0, "queued"), (0.5, "deferred"), (1.0, "dispatched"), (2.0, "evicted"),
        (2.5, "resubmitted"), (3.0, "relegated"), (4.0, "dispatched"), (5.0, "aborted"), (6.0, "ended"),
    ]  # fmt: skip
    [shown] = [one.shown() for one in log.find("r", "")]
    assert shown["decisions"][3] == {
        "at_s": 1.0, "what": "dispatched", "replica": "gpu0", "priority": -5, "density": 3.0, "later_stages_s": 2.0
    }  # fmt: skip
    assert (shown["slo_met"], shown["missed_by_s"]) == (False, 2.0)
    assert list(shown["estimated_output_tokens"]) == ["0.1", "0.5", "0.9"]


def test_a_deferral_is_told_when_the_plan_makes_it_though_the_request_never_runs():
    log = DecisionLog(10)
    name = arrived(log, "r")
    log.decided(Defer(name, "no_room"), 10.25)
    log.decided(Readmit(name), 11.0)
    log.decided(Defer(name, "no_worth"), 12.0)
    log.decided(Expire(name), 14.0)
    assert told(log, "r") == [
        (0.0, "arrived"), (0.25, "deferred"), (1.0, "admitted"), (2.0, "deferred"), (4.0, "expired")
    ]  # fmt: skip
    [shown] = [one.shown() for one in log.find("r", "")]
    reasons = [one["reason"] for one in shown["decisions"] if one["what"] in ("deferred", "admitted")]
    assert all(said in why for said, why in zip(("no room", "room for it again", "in time"), reasons, strict=True))


def test_a_plan_that_changes_its_mind_often_crowds_out_nothing_else():
    log = DecisionLog(10)
    name = arrived(log, "r")
    for number in range(500):
        log.decided(Defer(name, "no_room") if number % 2 == 0 else Readmit(name), 11.0 + number)
    log.decided(Dispatch(DispatchId(1), name, 0, GPU, -5), 600.0)
    whats = [what for _, what in told(log, "r")]
    assert whats == ["arrived", *["deferred", "admitted"] * 4, "dispatched"]
    [shown] = [one.shown() for one in log.find("r", "")]
    assert shown["decisions"][1]["at_s"] == 1.0
    assert (shown["decisions"][8]["at_s"], shown["decisions"][8]["turn"]) == (500.0, 500)


def test_a_request_whose_deadline_moved_is_explained_by_the_new_one():
    log = DecisionLog(10)
    name = arrived(log, "r", slo=ProgramCall(ProgramId("p"), 5.0))
    log.decided(Relegate(name), 12.0)
    log.decided(Redate(name, ProgramId("p"), 70.0), 13.0)
    log.ended(name, outcome(False, ttlt_s=61.0), 71.0)
    assert told(log, "r")[1:] == [(2.0, "relegated"), (3.0, "redated"), (61.0, "ended")]
    [shown] = [one.shown() for one in log.find("r", "")]
    assert (shown["targets_s"], shown["missed_by_s"]) == ({"ttlt": 60.0}, 1.0)


def test_what_an_engine_preempts_is_told_with_the_reason():
    log = DecisionLog(10)
    name = arrived(log, "r")
    log.decided(Dispatch(DispatchId(1), name, 0, GPU, -5), 11.0)
    log.preempted(DispatchId(1), GPU, 12.5)
    log.preempted(DispatchId(2), GPU, 12.5)
    assert told(log, "r") == [(0.0, "arrived"), (1.0, "dispatched"), (2.5, "preempted")]
    [shown] = [one.shown() for one in log.find("r", "")]
    assert (shown["decisions"][-1]["replica"], "KV cache" in shown["decisions"][-1]["reason"]) == ("gpu0", True)


def test_refusals_are_told_with_their_reasons():
    log = DecisionLog(10)
    log.decided(Reject(arrived(log, "full"), 0, "queue_full", 2.0), 10.0)
    log.decided(Expire(arrived(log, "late")), 12.0)
    assert told(log, "full")[-1] == (0.0, "rejected")
    assert [log.find(name, "")[0].shown()["is_open"] for name in ("full", "late")] == [False, True]
    assert told(log, "late")[-1] == (2.0, "expired")


def test_only_the_last_requests_are_remembered():
    log = DecisionLog(3)
    for number in range(5):
        arrived(log, f"r{number}")
    assert len(log) == 3
    assert not log.find("r1", "")
    log.decided(Relegate(RequestId("r1")), 11.0)
    assert log.ended(RequestId("r1"), outcome(True), 11.0) is None


def test_a_client_finds_its_request_by_the_id_of_its_response():
    log = DecisionLog(10)
    arrived(log, "chatcmpl-abc-0-12345678")
    arrived(log, "0_cmpl-x-99", group_id="cmpl-x-99", group_size=2)
    arrived(log, "1_cmpl-x-99", group_id="cmpl-x-99", group_size=2)
    assert len(log.find("chatcmpl-abc", "")) == 1
    assert len(log.find("cmpl-x", "")) == 2
    assert len(log.find("abc", "")) == 1, "the x-request-id that was sent"
    assert not log.find("chatcmpl", "")
    assert not log.find("chatcmpl-abc", "another tenant")


def test_an_end_is_told_once():
    log = DecisionLog(10)
    name = arrived(log, "r")
    assert log.ended(name, outcome(True), 12.0) is not None
    assert log.ended(name, outcome(False), 13.0) is None


@pytest.mark.parametrize(
    ("slo", "ended", "missed"),
    [
        (CHAT, outcome(True), None),
        (BestEffort(), outcome(None), None),
        (Latency(0.5, 1.0), outcome(False), 0.5),
        (Latency(2.0, 0.1), outcome(False), 2.0),
        (Deadline(4.0), outcome(False), 1.0),
        (ProgramCall(ProgramId("p"), 4.5), outcome(False), 0.5),
        (Deadline(4.0), Outcome("deadline", None, None, 0, 0, 0, None, is_met=False), None),
    ],
)
def test_a_miss_is_measured_where_something_came(slo, ended, missed):
    assert missed_by_s(slo, ended) == missed


def test_attainment_is_of_the_last_minute():
    service = Attainment(window_s=10.0)
    service.add(outcome(False, late=11), 0.0)
    for at_s in (5.0, 8.0):
        service.add(outcome(True), at_s)
    early = service.shown(9.0)["classes"]["latency"]
    assert (early["requests"], early["attainment"]) == (3, pytest.approx(2 / 3))
    later = service.shown(12.0)
    assert later["classes"]["latency"]["attainment"] == 1.0
    assert later["classes"]["latency"]["good_tokens_per_s"] == pytest.approx(2.2)
    assert later["classes"]["deadline"] == {
        "requests": 0, "attainment": None, "good_tokens_per_s": 0.0, "tokens_per_s": 0.0
    }  # fmt: skip
