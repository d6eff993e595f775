"""Programs over HTTP, from the request to the desk: names that exist, deadlines, whose call is whose."""

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import structlog

from tempo_router.config import ProgramsConfig, TempoConfig
from tests.http_edge import CHAT, Vllm, whole
from tests.program_edge import PROGRAMS, Desk, answer, error_of, served_by

NOW_S = 1_800_000_000.0
YEAR_S = 366 * 24 * 3600.0


class Clock:
    """Seconds since the epoch; stands still."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def served(clock: Clock) -> AsyncIterator[tuple[httpx.AsyncClient, Desk]]:
    config = TempoConfig(programs=ProgramsConfig(identify_by=("session", "openai", "trace", "prefix")))
    async with served_by(Vllm(answer), config, clock) as (http, desk):
        yield http, desk


# ---- a name that exists ----


@pytest.mark.parametrize("again_s", [0.0, 3.0])
async def test_asking_again_for_the_same_program_gives_it(served, clock: Clock, again_s: float) -> None:
    """A client that did not hear the first answer asks again, a while later."""
    http, _ = served
    fields = {"name": "night", "app": "research", "deadline_s": 60}
    made = (await http.post(PROGRAMS, json=fields)).json()
    clock.now_s += again_s
    again = await http.post(PROGRAMS, json=fields)
    assert (again.status_code, again.json()) == (200, made)


async def test_asking_again_by_date_or_after_it_was_moved_gives_it_too(served) -> None:
    http, _ = served
    by_date = {"name": "dated", "deadline": NOW_S + 60}
    made = (await http.post(PROGRAMS, json=by_date)).json()
    moved = (await http.post(f"{PROGRAMS}/dated/extend", json={"deadline": NOW_S + 90})).json()
    for fields in (by_date, {"name": "dated", "deadline": NOW_S + 90}):
        again = (await http.post(PROGRAMS, json=fields)).json()
        assert (again["id"], again["deadline"]) == (made["id"], moved["deadline"])


@pytest.mark.parametrize(
    ("fields", "field", "values"),
    [
        ({"app": "other", "deadline_s": 60}, "app", ("'research'", "'other'")),
        ({"deadline_s": 61}, "deadline", (f"{NOW_S + 60:.3f}", f"{NOW_S + 61:.3f}")),
        ({"objective": "best_effort"}, "deadline", (f"{NOW_S + 60:.3f}", "none")),
    ],
)
async def test_another_program_of_the_same_name_is_refused_with_both_values(served, fields, field, values) -> None:
    http, _ = served
    made = (await http.post(PROGRAMS, json={"name": "night", "app": "research", "deadline_s": 60})).json()
    refused = await http.post(PROGRAMS, json={"name": "night", **fields})
    assert error_of(refused) == (409, "program_exists", field)
    assert all(value in refused.json()["error"]["message"] for value in ("'night'", *values))
    assert (await http.get(f"{PROGRAMS}/night")).json() == made


async def test_the_name_of_a_program_that_is_over_is_refused(served) -> None:
    http, _ = served
    fields = {"name": "night", "deadline_s": 60}
    await http.post(PROGRAMS, json=fields)
    await http.post(f"{PROGRAMS}/night/cancel")
    refused = await http.post(PROGRAMS, json=fields)
    assert error_of(refused) == (409, "program_ended", "name")
    assert "'night' is cancelled" in refused.json()["error"]["message"]


async def test_an_ingress_that_tells_a_creation_again_is_answered_as_before(served, clock: Clock) -> None:
    """A new router is told all that may not be stored: meanwhile the deadline may have passed and the program ended."""
    http, desk = served
    told = []
    tell = desk.desk.asked
    desk.desk.asked = lambda owner, op: (told.append(op), tell(owner, op))
    made = (await http.post(PROGRAMS, json={"name": "night", "deadline_s": 60})).json()
    await http.post(f"{PROGRAMS}/night/cancel")
    clock.now_s += 100.0
    again = json.loads(await desk.ingress.ask(told[0].kind, told[0].body))
    assert (again["id"], again["status"]) == (made["id"], "cancelled")


# ---- names in paths ----


@pytest.mark.parametrize("name", ["team/task", "a%41", "50 %", "/", "a//b", "Ünal", "what?", "v1/programs"])
async def test_a_program_is_reached_by_its_name_whatever_is_in_it(served, name: str) -> None:
    http, _ = served
    made = (await http.post(PROGRAMS, json={"name": name, "deadline_s": 60})).json()
    path = f"{PROGRAMS}/{quote(name, safe='')}"
    assert (await http.get(path)).json()["id"] == made["id"]
    extended = await http.post(f"{path}/extend", json={"deadline_s": 90})
    assert (extended.status_code, extended.json()["id"]) == (200, made["id"])
    assert (await http.post(f"{path}/finish")).json()["status"] == "finished"


@pytest.mark.parametrize("path", ["/v1%2Fprograms", "/v1%2Fprograms/p", "/console%2Fstate%2Fp"])
async def test_a_path_whose_own_slashes_are_encoded_is_not_ours(served, path: str) -> None:
    """It would be split in other places than where it was checked."""
    http, _ = served
    assert (await http.get(path)).json() == {"choices": [{"text": "yes"}]}  # as the application answers


async def test_a_call_is_explained_by_its_name_whatever_is_in_it(served) -> None:
    http, _ = served
    assert (await http.get("/v1/requests/a%2Fb/explain")).json()["requests"] == [{"asked": "a/b"}]


@pytest.mark.parametrize("has_raw_path", [True, False])
async def test_a_name_is_found_below_a_root_and_without_the_raw_path(served, has_raw_path: bool) -> None:
    """ASGI servers may leave it out; then "/" cannot be in a name, but "%" can."""
    http, _ = served
    made = (await http.post(PROGRAMS, json={"name": "50 %41", "deadline_s": 60})).json()
    edge = http._transport.app
    path = "/api/v1/programs/50 %41"
    scope = {
        "type": "http", "method": "GET", "path": path, "root_path": "/api", "headers": [], "query_string": b"",
    }  # fmt: skip
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    raw = {"raw_path": b"/api/v1/%70rograms/50%20%2541"} if has_raw_path else {}
    await edge({**scope, **raw}, None, send)
    assert json.loads(sent[1]["body"])["id"] == made["id"]


# ---- a call that its program knows, though that is over ----


@pytest.mark.parametrize(
    ("ending", "code", "kind"),
    [("cancel", "program_cancelled", "server_error"), ("finish", "program_ended", "invalid_request_error")],
)
async def test_a_call_of_a_program_that_is_over_is_not_served_again(served, ending, code, kind) -> None:
    """Its router would end it again, and never say so of what it has not admitted."""
    http, _ = served
    made = (await http.post(PROGRAMS, json={"deadline_s": 60})).json()["id"]

    async def call(call_id: str) -> httpx.Response:
        return await http.post(CHAT, json={}, headers={"x-tempo-program": made, "x-tempo-call": call_id})

    assert (await call("known")).status_code == 200
    assert (await call("known")).status_code == 200
    assert (await http.post(f"{PROGRAMS}/{made}/{ending}")).status_code == 200
    again = await call("known")
    assert error_of(again) == (409, code, "program")
    assert again.json()["error"]["type"] == kind, "as a call that runs when its program is cancelled is told"
    assert error_of(await call("new")) == (409, "program_ended", "program")


async def test_a_call_of_a_session_that_ended_is_served_again(served) -> None:
    """As its new calls are: a session goes on."""
    http, _ = served
    headers = {"x-dynamo-session-id": "s", "x-tempo-call": "known"}
    assert (await http.post(CHAT, json={}, headers={**headers, "x-dynamo-session-final": "true"})).status_code == 200
    assert (await http.post(CHAT, json={}, headers=headers)).status_code == 200


# ---- lists ----


async def test_a_list_goes_on_after_a_program_that_is_in_it_and_not_after_another(served) -> None:
    """Else a client that pages would begin again, for ever."""
    http, _ = served
    for name in ("a", "b", "c"):
        await http.post(PROGRAMS, json={"name": name, "deadline_s": 60})
    first = (await http.get(PROGRAMS, params={"limit": 2})).json()
    assert ([one["name"] for one in first["data"]], first["has_more"]) == (["a", "b"], True)
    rest = (await http.get(PROGRAMS, params={"after": first["last_id"]})).json()
    assert ([one["name"] for one in rest["data"]], rest["has_more"]) == (["c"], False)
    assert error_of(await http.get(PROGRAMS, params={"after": "forgotten"})) == (400, "invalid_program", "after")

    running = {"status": "running", "after": first["last_id"]}
    assert len((await http.get(PROGRAMS, params=running)).json()["data"]) == 1
    await http.post(f"{PROGRAMS}/b/cancel")
    refused = await http.get(PROGRAMS, params=running)
    assert error_of(refused) == (400, "invalid_program", "after")
    assert repr(first["last_id"]) in refused.json()["error"]["message"]


# ---- deadlines that make no sense ----


@pytest.mark.parametrize("deadline_s", [NOW_S - 1, NOW_S, NOW_S + YEAR_S + 1])
async def test_a_deadline_in_the_past_or_beyond_a_year_is_refused_everywhere(served, deadline_s: float) -> None:
    http, desk = served
    made = (await http.post(PROGRAMS, json={"name": "known", "deadline_s": 60})).json()
    for path, fields in (
        (PROGRAMS, {"name": "new"}), (PROGRAMS, {"name": "known"}), (f"{PROGRAMS}/known/extend", {})
    ):  # fmt: skip
        refused = await http.post(path, json={**fields, "deadline": deadline_s})
        assert error_of(refused) == (400, "invalid_program", "deadline")
    for headers in ({"x-tempo-deadline": str(deadline_s)}, {"x-tempo-deadline-s": str(YEAR_S + 1)}):
        refused = await http.post(CHAT, json={}, headers={"x-tempo-program": "begun by a call", **headers})
        assert error_of(refused) == (400, "invalid_program", "deadline")
    assert (await http.get(f"{PROGRAMS}/known")).json() == made
    assert len(desk.desk.book) == 1


@pytest.mark.parametrize("deadline_s", [-1, 0, "soon", True, 10**400])
async def test_extending_by_what_is_no_time_is_refused(served, deadline_s: object) -> None:
    http, _ = served
    made = (await http.post(PROGRAMS, json={"name": "p", "deadline_s": 60})).json()
    refused = await http.post(f"{PROGRAMS}/p/extend", json={"deadline_s": deadline_s})
    assert error_of(refused) == (400, "invalid_program", "deadline_s")
    assert (await http.get(f"{PROGRAMS}/p")).json() == made


@pytest.mark.parametrize("limit", ["0", "1001", "00000000199999", "00000000" + "1" + "0" * 5000, "²", "1_0", "-1"])
async def test_a_limit_that_is_none_is_refused(served, limit: str) -> None:
    http, _ = served
    assert error_of(await http.get(PROGRAMS, params={"limit": limit})) == (400, "invalid_program", "limit")
    assert (await http.get(PROGRAMS, params={"limit": "000001000"})).status_code == 200


# ---- whose call is whose ----


async def test_a_chat_that_grows_is_one_program(served) -> None:
    """Only where nothing else is said, and never across tenants."""
    http, _ = served
    first = [{"role": "user", "content": "hello"}]
    longer = [*first, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
    other = [{"role": "user", "content": "another"}, *longer[1:]]

    async def program_of(messages, **headers: str) -> str:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return str((await http.post(CHAT, json={"messages": messages}, headers=given)).headers["x-tempo-program"])

    began = await program_of(first)
    assert began.startswith("prog-prefix_")
    assert await program_of(longer) == began
    assert await program_of(other) != began
    assert await program_of(longer, x_tenant_id="theirs") != began
    assert (await program_of(longer, x_session_id="s")).startswith("prog-session_")
    seen = (await http.get(f"{PROGRAMS}/{began}")).json()
    assert [one["parents"] for one in seen["calls"]] == [[], [seen["calls"][0]["id"]]]


async def test_chats_do_not_grow_into_programs_unless_that_is_asked_for() -> None:
    async with served_by(Vllm(answer), TempoConfig()) as (http, _):
        answered = await http.post(CHAT, json={"messages": [{"role": "user", "content": "hello"}]})
    assert (answered.status_code, "x-tempo-program" in answered.headers) == (200, False)


@pytest.mark.parametrize(
    ("left_out", "source"),
    [((), "session"), (("session",), "openai"), (("session", "openai"), "trace"), (("session", "openai", "trace"), "")],
)
async def test_sources_are_looked_at_in_their_order(left_out: tuple[str, ...], source: str) -> None:
    identify_by = tuple(one for one in ("session", "openai", "trace") if one not in left_out)
    config = TempoConfig(programs=ProgramsConfig(identify_by=identify_by))
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-session-id": "s"}
    async with served_by(Vllm(answer), config) as (http, _):
        answered = await http.post(CHAT, json={"metadata": {"thread_id": "m"}}, headers=headers)
    program_id = answered.headers.get("x-tempo-program", "")
    assert program_id.removeprefix("prog-").partition("_")[0] == source


# ---- no room for another ----

OTHERS = (
    {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
    {"x-claude-code-session-id": "s"},
    {"x-session-id": "s"},
)


async def test_a_call_that_asked_for_no_program_is_served_without_one_when_there_is_no_room() -> None:
    """Its client knows of no programs: it could not make sense of the refusal. The log says so once, with a count."""
    now_s = 100.0
    config = TempoConfig(programs=ProgramsConfig(max_programs=1))
    with structlog.testing.capture_logs() as logs:
        async with served_by(Vllm(answer), config, monotonic_s=lambda: now_s) as (http, desk):
            assert (await http.post(CHAT, json={}, headers={"x-tempo-program": "the one"})).status_code == 200
            for headers in OTHERS:
                answered = await http.post(CHAT, json={}, headers=headers)
                assert (answered.status_code, "x-tempo-program" in answered.headers) == (200, False)
            now_s += 60.0
            await http.post(CHAT, json={}, headers=OTHERS[0])
            refused = [
                await http.post(CHAT, json={}, headers={"x-tempo-program": "another"}),
                await http.post(CHAT, json={}, headers={"x-session-id": "s", "x-tempo-deadline-s": "60"}),
            ]
    assert {error_of(one) for one in refused} == {(503, "too_many_programs", None)}
    assert len(desk.desk.book) == 1
    told = [(one["reason"], one["calls"]) for one in logs if one["event"] == "calls_without_their_programs"]
    assert told == [("too_many_programs", 1), ("too_many_programs", 3)]


@pytest.mark.parametrize(("keeps_answers", "store", "programs"), [(False, True, 0), (True, True, 1), (True, False, 0)])
async def test_an_answer_begins_a_program_only_where_a_later_one_can_continue_it(
    keeps_answers: bool, store: bool, programs: int
) -> None:
    async with served_by(Vllm(answer), TempoConfig(), keeps_answers=keeps_answers) as (http, desk):
        answered = await http.post("/v1/responses", json={"input": "x", "store": store})
    assert answered.status_code == 200
    assert len(desk.desk.book) == programs


# ---- API keys ----


async def answer_with_key(vllm: Vllm, scope: Any, receive: Any, send: Any) -> None:
    """As vLLM's own middleware, which is behind the edge."""
    has_key = (b"authorization", b"Bearer one") in scope["headers"]
    await whole(send, {"choices": [{"text": "yes"}]} if has_key else {"error": {}}, 200 if has_key else 401)


@pytest.mark.parametrize("shown", [{}, {"authorization": "Bearer none"}, {"authorization": "Basic two"}])
async def test_without_a_key_nothing_is_told_or_begun(shown: dict[str, str]) -> None:
    async with served_by(Vllm(answer), TempoConfig(), api_keys=("one", "two")) as (http, desk):
        for method, path in (
            ("GET", PROGRAMS),
            ("POST", PROGRAMS),
            ("POST", f"{PROGRAMS}/p/cancel"),
            ("GET", "/v1/requests/r/explain"),
            ("GET", "/console/state"),
            ("GET", "/console/state/"),
            ("POST", CHAT),
            ("POST", "/invocations"),
            ("GET", "/v1/models"),
        ):
            fields = {"deadline_s": 60} if path == PROGRAMS else {}
            headers = {"x-tempo-program": "p", **shown}
            refused = await http.request(method, path, json=fields, headers=headers)
            assert error_of(refused) == (401, "invalid_api_key", None), path
        assert (await http.get("/health")).status_code == 200
        assert (await http.options(CHAT)).status_code == 200
    assert len(desk.desk.book) == 0


async def test_with_a_key_all_is_served_and_so_are_the_nodes_of_a_graph() -> None:
    async with served_by(Vllm(answer_with_key), TempoConfig(), api_keys=("one", "two")) as (http, _):
        for key in ("one", "two"):
            headers = {"authorization": f"bearer {key}"}
            assert (await http.get(PROGRAMS, headers=headers)).status_code == 200
            fields = {"deadline_s": 60, "graph": {"nodes": [{"id": "a", "prompt": "A"}]}}
            ran = await http.post(PROGRAMS, json=fields, headers=headers)
            assert (ran.status_code, ran.json().get("outputs")) == (200, {"a": "yes"})
