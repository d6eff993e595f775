"""What one process writes about a step or a plan, another reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import wire_pb2 as wire
from cluster.codec import (
    capacity_from_facts,
    message_from_retune,
    message_from_standing,
    message_from_step,
    redated_from_news,
    retarget_message,
    slo_from_retarget,
    standing_from_message,
    standings_from_message,
    step_from_message,
    target_news,
)
from tempo_router.actions import Redate, Relegate, Retune
from tempo_router.events import StepReport
from tempo_router.request import DispatchId, ProgramCall, ProgramId, ReplicaId, RequestId
from tempo_router.standing import Standing
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL

counts = st.integers(0, 2**40)


@given(st.builds(StepReport, st.floats(0, 1e6), counts, counts, counts, st.floats(0, 1e15)))
def test_a_step_survives_the_wire(step):
    encoded = message_from_step(step).SerializeToString()
    assert step_from_message(wire.StepReport.FromString(encoded)) == step


def test_a_worker_that_does_not_report_attention_is_understood():
    older = wire.StepReport(duration_s=0.01, prefill_tokens=5, decodes=2, context_tokens=30)
    assert step_from_message(older) == StepReport(0.01, 5, 2, 30)


standings = st.builds(Standing, st.floats(0, 1e9), st.booleans(), st.floats(0, 1e6), st.booleans())
caps = st.one_of(st.none(), st.floats(1e-6, 10))
slos = st.sampled_from((CHAT, TOOL, AGENT, BACKGROUND))


@given(standings)
def test_a_standing_survives_the_wire(standing):
    encoded = message_from_standing(standing).SerializeToString()
    assert standing_from_message(wire.Standing.FromString(encoded)) == standing


@given(st.lists(standings, max_size=5), caps)
def test_a_plan_survives_the_wire(known, cap_s):
    retune = Retune(ReplicaId("gpu0"), tuple((DispatchId(n), one) for n, one in enumerate(known, 1)), cap_s)
    read = wire.Retune.FromString(message_from_retune(retune).SerializeToString())
    assert tuple(standings_from_message(read)) == retune.standings
    assert (read.step_cap_s if read.HasField("step_cap_s") else None) == cap_s


def test_news_of_targets_keep_their_order_when_messages_are_merged():
    name, program = RequestId("r"), ProgramId("p")
    merged = target_news(Relegate(name), 100.0)
    for one in (Redate(name, program, 160.0), Relegate(name)):
        merged.MergeFrom(target_news(one, 100.0))
    read = wire.RouterToIngress.FromString(merged.SerializeToString())
    # It arrived 5 s ago on the reader's clock, and has 60 s left.
    told = [(news.request_id, redated_from_news(news, 995.0, 1000.0)) for news in read.target_news]
    assert told == [("r", None), ("r", ProgramCall(program, 65.0)), ("r", None)]


def test_a_plan_with_a_column_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        standings_from_message(wire.Retune(dispatch_ids=[1, 2], densities=[1.0, 2.0], are_admitted=[True]))


@given(slos)
def test_a_new_target_survives_the_wire(slo):
    encoded = retarget_message(7, slo).SerializeToString()
    assert slo_from_retarget(wire.Retarget.FromString(encoded)) == slo


def test_a_target_that_this_version_does_not_know_is_refused():
    with pytest.raises(ValueError, match="dispatch 7 came without an SLO"):
        slo_from_retarget(wire.Retarget(dispatch_id=7))


def test_only_who_says_so_has_a_step_planner():
    assert not capacity_from_facts(wire.EngineFacts(max_running=4)).has_step_planner
    assert capacity_from_facts(wire.EngineFacts(max_running=4, has_step_planner=True)).has_step_planner
