"""A program that can no longer make it, by what it still needs at least, is relegated at once."""

from typing import cast

import msgspec
import pytest

from cluster import wire_pb2 as wire
from cluster.program_desk import ProgramDesk
from cluster.program_store import ProgramStore
from cluster.redis_store import RedisStore
from tempo_router.config import ProgramsConfig
from tempo_router.events import Event, ProgramOutlined, ProgramRelegated
from tempo_router.known_stages import KnownStage
from tempo_router.pattern_history import PatternHistory
from tempo_router.program_graph import NewCall
from tempo_router.program_history import ProgramHistory
from tempo_router.program_ops import BeginCall, CallTicket, CreateProgram, EndCall, ExtendProgram
from tempo_router.request import ProgramCall, ProgramId
from tests.builders import arrived, planned_replica, progressed, router
from tests.unit.test_program_history import RESEARCH, program, runs

PROGRAM = ProgramId("p")


class Desk:
    """A desk whose clock stands still, whose core is heard and whose Redis is away: what is written waits.

    least_s: what programs need at least.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.least_s = 0.0
        self.asked = 0
        self.events: list[Event] = []
        self.answers: list[wire.ProgramAnswer] = []
        self.desk = ProgramDesk(
            ProgramsConfig(), ProgramStore(cast(RedisStore, None)), fence=1, handle=self.events.append,
            send=lambda _, message: self.answers.extend(message.program_answers), cancel_calls=lambda _: None,
            outlook=lambda _, __: None, least_left_s=lambda _: self.least_s, epoch_s=lambda: self.now_s,
        )  # fmt: skip
        self.desk.settled()

    def ask(self, op: object) -> None:
        self.asked += 1
        body = msgspec.json.encode(op)
        self.desk.asked("ingress", wire.ProgramOp(op_id=f"{self.asked}", kind=type(op).__name__, body=body))

    def looks(self) -> str:
        self.desk._relegate_hopeless(self.now_s)
        graph = self.desk.book.find(PROGRAM)
        assert graph is not None
        return graph.status


@pytest.fixture
def desk() -> Desk:
    """One program with 100 s; its first call has been answered, its client runs a tool."""
    one = Desk()
    one.ask(CreateProgram(PROGRAM, "", "app", 1100.0))
    one.ask(BeginCall(PROGRAM, "", NewCall("first", owner="ingress")))
    one.ask(EndCall(PROGRAM, "first", 0, "completed", 10, 10))
    return one


def test_a_program_whose_rest_no_longer_fits_is_relegated_in_the_middle_of_a_tool(desk: Desk):
    desk.least_s = 60.0
    assert desk.looks() == "running"
    desk.now_s = 1039.0
    assert desk.looks() == "running"
    desk.now_s = 1041.0
    assert desk.looks() == "relegated"
    assert [type(event) for event in desk.events] == [ProgramRelegated]
    desk.ask(BeginCall(PROGRAM, "", NewCall("second", owner="ingress")))
    ticket = msgspec.json.decode(desk.answers[-1].result, type=CallTicket)
    assert ticket.is_relegated, "its client is told with the next call"


def test_one_of_which_nothing_certain_is_to_come_is_left_alone_until_its_deadline(desk: Desk):
    desk.now_s = 1099.0
    assert desk.looks() == "running"


def test_with_more_time_it_has_a_chance_again(desk: Desk):
    desk.least_s = 101.0
    assert desk.looks() == "relegated"
    desk.ask(ExtendProgram(PROGRAM, "", 1300.0))
    assert desk.looks() == "running"


def after_first_call(history: ProgramHistory, *known: KnownStage) -> float:
    """What a program needs at least, in steps of a sequence alone, when its first call has been answered."""
    core = router(policy="tempo")
    history.lengths, core._history = core._lengths, history
    core.handle(planned_replica("gpu0"))
    if known:
        core.handle(ProgramOutlined(0.0, PROGRAM, known))
    core.handle(arrived("first", slo=ProgramCall(PROGRAM, 60.0), app="research", prompt_tokens=400))
    core.handle(progressed("gpu0", 1.0, {1: 50}, {1: "completed"}, output_tokens=50))
    assert not core.ledger.programs[PROGRAM].live
    return core.least_left_s(PROGRAM) / core.steps.pace().alone_s


def taught(history: ProgramHistory) -> ProgramHistory:
    for number in range(20):
        runs(history, program(f"p{number}"), RESEARCH)
    return history


def test_between_its_calls_a_program_needs_at_least_what_its_like_still_needed():
    assert after_first_call(taught(PatternHistory())) == pytest.approx(700 + 60 + 600)


def test_means_tell_nothing_of_what_is_needed_at_least():
    assert after_first_call(taught(ProgramHistory())) == 0.0


@pytest.mark.parametrize("kind", [ProgramHistory, PatternHistory])
def test_a_known_graph_tells_it_whatever_others_needed(kind):
    rest = after_first_call(taught(kind()), KnownStage(0), KnownStage(1, 3, output_tokens=100), KnownStage(2))
    assert rest > 68
    only = after_first_call(taught(kind()), KnownStage(0), KnownStage(1, 3, output_tokens=100))
    assert only == pytest.approx(68, rel=0.01)
    assert after_first_call(taught(kind()), KnownStage(0)) == 0.0
