"""What one process writes about a step, another reads."""

from hypothesis import given
from hypothesis import strategies as st

from cluster import wire_pb2 as wire
from cluster.codec import message_from_step, step_from_message
from tempo_router.events import StepReport

counts = st.integers(0, 2**40)


@given(st.builds(StepReport, st.floats(0, 1e6), counts, counts, counts, st.floats(0, 1e15)))
def test_a_step_survives_the_wire(step):
    encoded = message_from_step(step).SerializeToString()
    assert step_from_message(wire.StepReport.FromString(encoded)) == step


def test_a_worker_that_does_not_report_attention_is_understood():
    older = wire.StepReport(duration_s=0.01, prefill_tokens=5, decodes=2, context_tokens=30)
    assert step_from_message(older) == StepReport(0.01, 5, 2, 30)
