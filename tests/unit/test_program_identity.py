"""Which program a call belongs to, from what clients send: each source, their order, and whose names are whose."""

import itertools

import pytest

from deployments.program_identity import Identity, ProgramFields, first_answer, identify, program_id_of, resolved_id
from tempo_router.config import IdentitySource
from tempo_router.errors import ProgramError

ALL: tuple[IdentitySource, ...] = ("session", "openai", "trace")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def of(body: ProgramFields | None = None, tenant: str = "t", sources=ALL, **headers: str) -> Identity | None:
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return identify(sent, body or ProgramFields(), tenant, sources)


def found(*args, **kwargs) -> Identity:
    identity = of(*args, **kwargs)
    assert identity is not None
    return identity


def pairs(*in_order):
    """Every two of them, in their order."""
    return list(itertools.combinations(in_order, 2))


def test_nothing_said_is_no_program():
    assert of(content_type="application/json") is None
    assert of(ProgramFields(metadata={"colour": "blue"})) is None


def test_an_id_of_ours_is_taken_as_it_is_and_never_creates():
    given = "prog_" + "0" * 32
    identity = found(x_tempo_program=given)
    assert (identity.program_id, identity.source, identity.is_new_allowed) == (given, "explicit", False)


def test_a_name_of_the_clients_own_belongs_to_its_tenant():
    ours, theirs = found(x_tempo_program="night", tenant="ours"), found(x_tempo_program="night", tenant="theirs")
    assert ours.program_id != theirs.program_id
    assert ours.is_new_allowed
    assert not ours.may_restart
    assert resolved_id("ours", "night") == ours.program_id
    assert resolved_id("theirs", ours.program_id) == ours.program_id


def test_a_name_is_the_same_program_in_a_header_and_in_the_body():
    in_body = identify([], ProgramFields(program="é"), "", ALL)
    for encoding in ("utf-8", "latin-1"):
        assert identify([(b"x-tempo-program", "é".encode(encoding))], ProgramFields(), "", ALL) == in_body


def test_an_id_of_someone_elses_making_is_a_name():
    """The Agents SDK calls its traces so."""
    identity = found(x_tempo_program="trace_" + "0" * 32)
    assert (identity.source, identity.is_new_allowed) == ("named", True)


def test_equal_names_from_different_sources_are_different_programs():
    names = {
        found(x_tempo_program="x").program_id,
        found(x_session_id="x").program_id,
        found(ProgramFields(conversation="x")).program_id,
        found(baggage="session.id=x").program_id,
    }
    assert len(names) == 4


@pytest.mark.parametrize(
    ("headers", "agent", "parent_agent"),
    [
        ({"x_claude_code_session_id": "s"}, "", ""),
        (
            {"x_claude_code_session_id": "s", "x_claude_code_agent_id": "a", "x_claude_code_parent_agent_id": "m"},
            "a", "m",
        ),
        ({"session_id": "s"}, "", ""),
        ({"x_dynamo_session_id": "s"}, "s", ""),
        ({"x_session_id": "s"}, "s", ""),
        ({"x_session_affinity": "s"}, "s", ""),
    ],
)  # fmt: skip
def test_the_sessions_of_agents_are_programs(headers, agent, parent_agent):
    identity = found(**headers)
    assert identity.program_id == program_id_of("t", "session", "s")
    assert (identity.agent, identity.parent_agent, identity.may_restart) == (agent, parent_agent, True)


@pytest.mark.parametrize("prefix", ["x_dynamo_session_id", "x_session_id"])
def test_a_sub_agents_session_belongs_to_the_program_of_who_started_it(prefix):
    parent_header = {"x_dynamo_session_id": "x_dynamo_parent_session_id", "x_session_id": "x_parent_session_id"}[prefix]
    identity = found(**{prefix: "sub", parent_header: "main"})
    assert identity.parent_id == program_id_of("t", "session", "main")
    assert identity.program_id == program_id_of("t", "session", "sub")
    assert (identity.agent, identity.parent_agent) == ("sub", "main")


def test_the_end_of_a_session_ends_the_task_but_the_end_of_a_sub_agent_does_not():
    assert found(x_dynamo_session_id="s", x_dynamo_session_final="true").is_last
    sub = found(x_dynamo_session_id="s", x_dynamo_parent_session_id="m", x_dynamo_session_final="true")
    assert not sub.is_last


@pytest.mark.parametrize(
    "body",
    [
        ProgramFields(conversation="c"),
        ProgramFields(conversation={"id": "c"}),
        ProgramFields(metadata={"thread_id": "c"}),
        ProgramFields(metadata={"run_id": "c", "session_id": "c"}),
    ],
)
def test_openais_conversation_fields_are_programs(body):
    assert found(body).program_id == program_id_of("t", "openai", "c")


def test_an_answer_that_is_continued_names_its_program():
    identity = found(ProgramFields(previous_response_id="resp_1"))
    assert identity.continues == "resp_1"
    answer = first_answer("t", ALL)
    assert answer is not None
    assert answer.source == "openai"
    assert first_answer("t", ("session",)) is None


def test_trace_context_stands_in_when_nothing_better_is_there():
    assert found(traceparent=TRACE).program_id == program_id_of("t", "trace", "0af7651916cd43dd8448eb211c80319c")
    assert found(traceparent=TRACE, baggage="a=b, gen_ai.conversation.id=c;p=1").name == "c"
    assert of(traceparent="00-" + "0" * 32 + "-b7ad6b7169203331-01") is None
    assert of(traceparent="nonsense") is None


def test_the_first_source_that_says_something_is_taken():
    body = ProgramFields(conversation="c", metadata={"tempo_program": "m"})
    everything = {"x_tempo_program": "p", "x_session_id": "s", "traceparent": TRACE}
    assert found(body, **everything).name == "p"
    assert found(body, traceparent=TRACE, x_session_id="s").name == "m"
    assert found(ProgramFields(conversation="c"), x_session_id="s", traceparent=TRACE).name == "s"
    assert found(ProgramFields(conversation="c"), traceparent=TRACE).name == "c"
    assert found(ProgramFields(program="b", metadata={"tempo_program": "m"})).name == "b"


@pytest.mark.parametrize(
    ("spoken_first", "spoken_later"),
    pairs("x_claude_code_session_id", "x_dynamo_session_id", "x_session_id", "x_session_affinity", "session_id"),
)
def test_sessions_are_looked_for_in_their_order(spoken_first, spoken_later):
    assert found(**{spoken_later: "b", spoken_first: "a"}).name == "a"


def test_a_session_keeps_to_its_own_headers_for_agents_and_parents():
    """Those of others may be there as well: a proxy adds its own."""
    others = {"x_dynamo_session_id": "d", "x_dynamo_parent_session_id": "dp", "x_dynamo_session_final": "true"}
    claude = found(x_claude_code_session_id="c", x_claude_code_agent_id="a", **others, x_parent_session_id="p")
    assert (claude.name, claude.parent_id, claude.agent, claude.is_last) == ("c", "", "a", False)
    dynamo = found(x_dynamo_session_id="d", x_session_id="s", x_parent_session_id="p", x_claude_code_agent_id="a")
    assert (dynamo.name, dynamo.parent_id, dynamo.agent) == ("d", "", "d")


@pytest.mark.parametrize(
    ("spoken_first", "spoken_later"),
    pairs(
        {"conversation": "conversation"},
        {"previous_response_id": "previous_response_id"},
        *({"metadata": {name: name}} for name in ("thread_id", "session_id", "conversation_id", "run_id")),
    ),
)
def test_openais_fields_are_looked_at_in_their_order(spoken_first, spoken_later):
    metadata = {**spoken_later.get("metadata", {}), **spoken_first.get("metadata", {})}
    body = ProgramFields(**{**spoken_later, **spoken_first, **({"metadata": metadata} if metadata else {})})
    assert found(body).name == next(iter(spoken_first.get("metadata", spoken_first)))


def test_baggage_is_looked_at_before_the_trace_and_a_conversation_before_a_session():
    assert found(traceparent=TRACE, baggage="session.id=s").name == "s"
    assert found(baggage="session.id=s,gen_ai.conversation.id=c").name == "c"


def test_baggage_that_is_malformed_is_passed_over():
    """A tracing library's header must not cost a request."""
    for baggage in ("foo;a=b", ",;=,=", "foo"):
        assert identify([(b"baggage", baggage.encode())], ProgramFields(), "", ALL) is None
    found = identify([(b"baggage", b"foo;a=b, session.id=s1;p=q")], ProgramFields(), "", ALL)
    assert found is not None
    assert (found.source, found.name) == ("trace", "s1")


def test_our_own_words_win_one_by_one_header_then_body_then_metadata():
    metadata = {"tempo_program": "m", "tempo_stage": "m", "tempo_parents": ["m"]}
    assert found(ProgramFields(metadata=metadata)).label == "m"
    body = ProgramFields(program={"id": "b", "stage": "b"}, metadata=metadata)
    assert (found(body).name, found(body).label, found(body).parents) == ("b", "b", ("m",))
    spoken = found(body, x_tempo_program="h")
    assert (spoken.name, spoken.label, spoken.parents) == ("h", "b", ("m",))


def test_sources_can_be_left_out():
    assert of(x_session_id="s", sources=("trace",)) is None
    assert of(traceparent=TRACE, sources=()) is None
    assert of(x_tempo_program="p", sources=()) is not None


def test_our_own_words_place_a_call():
    identity = found(
        x_tempo_program="p", x_tempo_stage="3", x_tempo_parent="a, b", x_tempo_call="c", x_tempo_attempt="2",
        x_tempo_agent="writer", x_tempo_deadline_s="60", x_tempo_final="true",
    )  # fmt: skip
    assert (identity.stage, identity.label) == (3, "")
    assert identity.parents == ("a", "b")
    assert (identity.call_id, identity.attempt, identity.agent) == ("c", 2, "writer")
    assert (identity.deadline_s, identity.is_last) == (60.0, True)
    assert found(x_tempo_program="p", x_tempo_stage="plan").label == "plan"


def test_the_header_wins_over_the_body():
    body = ProgramFields(program={"id": "b", "stage": 1, "parents": ["x"]})
    identity = found(body, x_tempo_program="h", x_tempo_stage="2")
    assert (identity.name, identity.stage, identity.parents) == ("h", 2, ("x",))


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        (ProgramFields(program=5), {}, "program"),
        (ProgramFields(program={"id": ""}), {}, "program"),
        (ProgramFields(program={"id": "p", "stages": 1}), {}, "program"),
        (ProgramFields(program={"id": "p", "stage": True}), {}, "stage"),
        (ProgramFields(program={"id": "p", "parents": "a" * 200}), {}, "parent"),
        (ProgramFields(program={"id": "p", "deadline_s": 10**400}), {}, "deadline_s"),
        (ProgramFields(program={"id": "p", "deadline": 10**400}), {}, "deadline"),
        (ProgramFields(program={"id": "p", "deadline_s": [60]}), {}, "deadline_s"),
        (ProgramFields(program={"id": "p", "parents": ["x"] * 1001}), {}, "parent"),
        (None, {"x_tempo_program": "x" * 201}, "program"),
        (None, {"x_tempo_program": "p", "x_tempo_stage": "-1"}, "stage"),
        (None, {"x_tempo_program": "p", "x_tempo_stage": "1001"}, "stage"),
        (None, {"x_tempo_program": "p", "x_tempo_attempt": "x"}, "attempt"),
        (None, {"x_tempo_program": "p", "x_tempo_deadline_s": "soon"}, "deadline_s"),
        (None, {"x_tempo_program": "p", "x_tempo_deadline_s": "nan"}, "deadline_s"),
        (None, {"x_tempo_program": "p", "x_tempo_deadline_s": "1_0"}, "deadline_s"),
        (None, {"x_tempo_program": "p", "x_tempo_deadline_s": "5", "x_tempo_deadline": "9"}, "deadline"),
        (None, {"x_tempo_stage": "1"}, "stage"),
    ],
)
def test_what_makes_no_sense_names_the_field(body, headers, field):
    with pytest.raises(ProgramError) as refused:
        of(body, **headers)
    assert refused.value.field == field


def test_a_strangers_header_that_cannot_be_a_name_is_passed_over():
    assert of(x_session_id="x" * 300) is None
    assert of(x_session_id=" ") is None
