"""How a program unfolds: where each call stands, what is refused, and how it ends."""

import pytest

from tempo_router.errors import ProgramError
from tempo_router.program_book import ProgramBook
from tempo_router.program_graph import MAX_ARROWS, MAX_CALLS, NewCall, ProgramGraph
from tempo_router.program_ops import BeginCall, CreateProgram, EndCall, FinishProgram
from tempo_router.request import ProgramId


def program(deadline_s: float | None = 160.0) -> ProgramGraph:
    return ProgramGraph(ProgramId("p"), "tenant", "app", created_s=100.0, deadline_s=deadline_s)


def begin(graph: ProgramGraph, call_id: str, at_s: float = 101.0, **said):
    return graph.begin(NewCall(call_id, **said), at_s)[0]


def end(graph: ProgramGraph, call_id: str, at_s: float = 110.0, attempt: int = 0, status="completed", tokens: int = 5):
    return graph.end(call_id, attempt, status, at_s, prompt_tokens=3, output_tokens=tokens)


def refused(code: str, message: str):
    return pytest.raises(ProgramError, match=message, check=lambda error: error.code == code)


def test_calls_that_say_nothing_follow_one_another():
    graph = program()
    assert begin(graph, "a").stage == 0
    end(graph, "a")
    later = begin(graph, "b")
    assert (later.stage, later.parents) == (1, ("a",))


def test_calls_at_the_same_time_are_siblings_even_when_the_first_has_ended():
    """A client that sends ten calls two at a time means one stage."""
    graph = program()
    begin(graph, "plan")
    end(graph, "plan")
    for call_id in ("x", "y"):
        assert begin(graph, call_id).parents == ("plan",)
    end(graph, "x")
    assert begin(graph, "z").stage == 1
    end(graph, "y")
    end(graph, "z")
    joined = begin(graph, "sum")
    assert (joined.stage, set(joined.parents)) == (2, {"x", "y", "z"})


def test_parents_decide_the_stage():
    graph = program()
    begin(graph, "a")
    end(graph, "a")
    begin(graph, "b", parents=("a",))
    end(graph, "b")
    assert begin(graph, "c", parents=("a", "b", "a")).stage == 2
    assert graph.calls["c"].parents == ("a", "b")


def test_agents_go_their_own_ways():
    """A sub-agent's first call follows the last one of who started it; later ones follow its own."""
    graph = program()
    begin(graph, "main", branch="main")
    end(graph, "main")
    first = begin(graph, "sub1", branch="sub", parent_branch="main")
    assert (first.stage, first.parents) == (1, ("main",))
    end(graph, "sub1")
    begin(graph, "main2", branch="main")
    assert graph.calls["main2"].parents == ("main",)
    assert begin(graph, "sub2", branch="sub").parents == ("sub1",)


def test_what_makes_no_sense_is_refused_and_changes_nothing():
    graph = program()
    begin(graph, "a", stage=2)
    end(graph, "a")
    before = repr(graph)
    with refused("invalid_program", "stage 1 goes backwards: the program is at stage 2"):
        begin(graph, "b", stage=1)
    with refused("invalid_program", "stage 2 goes backwards: a parent is of stage 2"):
        begin(graph, "b", stage=2, parents=("a",))
    with refused("unknown_call", "parent 'nobody' is no call of program 'p'"):
        begin(graph, "b", parents=("a", "nobody"))
    with refused("invalid_program", "cannot follow itself"):
        begin(graph, "b", parents=("b",))
    with refused("invalid_program", "stage 1001 is above 1000"):
        begin(graph, "b", stage=1001)
    assert repr(graph) == before


def test_a_call_that_is_told_twice_is_one_call():
    graph = program()
    call, is_news = graph.begin(NewCall("a"), 101.0)
    assert is_news
    assert graph.begin(NewCall("a"), 105.0) == (call, False)
    assert end(graph, "a") is call
    assert end(graph, "a", tokens=9) is None
    assert call.output_tokens == 5
    assert graph.begin(NewCall("a"), 120.0) == (call, False)


def test_a_failed_call_may_be_tried_again_and_old_news_of_it_counts_for_nothing():
    graph = program()
    begin(graph, "a")
    end(graph, "a", status="failed")
    assert begin(graph, "a", attempt=1).status == "running"
    assert end(graph, "a", attempt=0) is None
    assert end(graph, "a", attempt=1) is not None
    with refused("call_ended", "was answered"):
        begin(graph, "a", attempt=2)
    assert len(graph.calls) == 1


def test_it_is_finished_when_its_last_call_has_ended():
    graph = program()
    begin(graph, "a")
    assert graph.close("op", 105.0)
    assert not graph.is_over
    end(graph, "a", at_s=150.0)
    assert (graph.status, graph.is_met) == ("finished", True)
    assert not graph.close("op", 151.0)


def test_a_program_is_late_when_its_last_call_was_not_when_somebody_says_so():
    graph = program()
    begin(graph, "a")
    end(graph, "a", at_s=159.0)
    graph.close("op", 500.0)
    assert graph.is_met is True
    late = program()
    begin(late, "a")
    end(late, "a", at_s=160.5)
    late.close("op", 161.0)
    assert late.is_met is False


def test_nothing_can_be_added_to_what_is_over():
    graph = program()
    graph.close("op", 105.0)
    with refused("program_ended", "call 'b': program 'p' is finished"):
        begin(graph, "b")
    with refused("program_ended", "finish: program 'p' is finished"):
        graph.close("another op", 106.0)
    with refused("program_ended", "cancel"):
        graph.cancel("another op", "", 106.0)
    with refused("program_ended", "extend"):
        graph.move_deadline(200.0)


def test_cancelling_ends_what_runs_once():
    graph = program()
    begin(graph, "a")
    assert graph.cancel("op", "no longer needed", 105.0)
    assert graph.calls["a"].status == "cancelled"
    assert end(graph, "a") is None
    assert not graph.cancel("op", "no longer needed", 106.0)
    assert graph.is_met is False


def test_a_later_deadline_gives_a_relegated_program_another_chance():
    graph = program()
    assert graph.relegate(120.0)
    assert not graph.relegate(121.0)
    graph.move_deadline(500.0)
    assert (graph.status, graph.relegated_s) == ("running", None)


def test_a_program_has_a_bounded_number_of_calls():
    graph = program()
    for number in range(MAX_CALLS):
        begin(graph, str(number), stage=0)
    with refused("invalid_program", "calls at most"):
        begin(graph, "one more", stage=0)


def test_its_calls_name_a_bounded_number_of_parents_in_all():
    """One is always allowed, and what is inferred is cut, not refused: else a program at its bound could not go on."""
    graph = program()
    before = tuple(str(number) for number in range(1000))
    for call_id in before:
        begin(graph, call_id, stage=0)
    for number in range(MAX_ARROWS // 1000):
        begin(graph, f"follows {number}", parents=before)
    with refused("invalid_program", f"1000 parents: .* {MAX_ARROWS} already, of {MAX_ARROWS} at most"):
        begin(graph, "one more", parents=before)
    assert begin(graph, "after one", parents=("7",)).parents == ("7",)
    sibling = begin(graph, "beside it")
    assert (sibling.parents, sibling.stage) == (("7",), 1)
    stage = begin(graph, "next", stage=2)
    assert (len(stage.parents), stage.stage) == (1, 2)


def test_what_the_engine_has_answered_counts_when_its_ingress_is_gone_and_may_be_asked_again():
    """The client may have read all of it, or nothing of the last bytes."""
    book = ProgramBook()
    book.apply(CreateProgram("p", "t", deadline_s=160.0), 100.0)
    for name in ("answered", "running"):
        book.apply(BeginCall("p", "t", NewCall(name, owner="ingress")), 101.0)
    graph = book.of_tenant("p", "t")
    graph.answered("answered", 10, 42)
    book.owner_gone("ingress", 110.0)
    found = {call_id: (call.status, call.output_tokens) for call_id, call in graph.calls.items()}
    assert found == {"answered": ("completed", 42), "running": ("cancelled", 0)}
    again, is_news = graph.begin(NewCall("answered", attempt=1, owner="another"), 111.0)
    assert is_news
    assert (again.status, again.output_tokens) == ("running", 0)


def test_a_call_is_not_held_by_another_program_that_has_the_name_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """That of the call is forgotten by then."""
    monkeypatch.setattr("tempo_router.program_book.MOST_ENDED", 1)
    book = ProgramBook()
    for call_id in ("first", "second"):
        call = NewCall(call_id, owner="ingress")
        graph, _ = book.apply(BeginCall("p", "t", call, is_new_allowed=True, may_restart=True), 100.0)
        assert graph is not None
        assert book.holder("p", call_id) is graph
        book.apply(EndCall("p", call_id, 0, "completed"), 101.0)
        book.apply(FinishProgram(graph.program_id, "t", f"finish {call_id}"), 102.0)
    assert graph.program_id == "p.2"
    book.apply(CreateProgram("other", "t", deadline_s=160.0), 103.0)
    book.apply(FinishProgram("other", "t", "finish other"), 103.0)
    book.apply(CreateProgram("p.2", "t", deadline_s=160.0), 104.0)
    assert book.holder("p", "second") is None
