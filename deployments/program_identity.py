"""Which program a call belongs to, from what its client sends anyway. Pure: no clock, no server.

The first source that says something is taken:

| # | source | program | agent | its parent |
| --- | --- | --- | --- | --- |
| 1 | our own | `x-tempo-program`; body `program`; `metadata.tempo_program` | `x-tempo-agent` | |
| 2 | session | `x-claude-code-session-id` | `x-claude-code-agent-id` | `x-claude-code-parent-agent-id` |
|   | session | `x-dynamo-session-id`, below `x-dynamo-parent-session-id` | the session | the parent session |
|   | session | `x-session-id`, below `x-parent-session-id`; `x-session-affinity` | the session | the parent session |
|   | session | `session-id` (also spelled `session_id`) | | |
| 3 | openai | `conversation`; `previous_response_id`; `metadata` (`thread_id`, `session_id`, ...) | | |
| 4 | trace | `baggage`: `gen_ai.conversation.id`, `session.id`; the trace id of `traceparent` | | |
| 5 | prefix | a prompt that continues an earlier one (prefix_growth.py) | | |

Of our own names the header wins over the body, and the body's `program` over `metadata`. Names that clients choose are
theirs alone: the program's id is a hash over tenant, source and name, so equal names of two tenants, or of two sources,
never meet. A session is a tree: a sub-agent belongs to the program of whoever started it.

`user`, `safety_identifier` and `prompt_cache_key` say who asks, and for what cache, not for which task.
"""

import hashlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deployments.slo_wire import NUMBER, as_float, header_text
from tempo_router.config import IdentitySource, unknown_key_message
from tempo_router.errors import ProgramError

Source = Literal["explicit", "named"] | IdentitySource

MAX_NAME_CHARS = 200
# Not simply `trace_...`, which is what others call theirs.
_ID = re.compile(r"prog(-(named|session|openai|trace|prefix))?_[0-9a-f]{32}(\.\d+)?", re.ASCII)
_CALL = re.compile(r"[A-Za-z0-9_.:@/-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)
_MAX_PARENTS = 1000
_METADATA = ("thread_id", "session_id", "conversation_id", "run_id")
_BAGGAGE = ("gen_ai.conversation.id", "session.id")
_BODY_KEYS = ("id", "stage", "parents", "call", "attempt", "agent", "deadline_s", "deadline", "final")
_TRUE = ("1", "true", "yes")

# (header of the session, of its parent session); of the agent and its parent where these are apart from the session.
_SESSIONS = (
    ("x-claude-code-session-id", ""),
    ("x-dynamo-session-id", "x-dynamo-parent-session-id"),
    ("x-session-id", "x-parent-session-id"),
    ("x-session-affinity", "x-parent-session-id"),
    ("session-id", ""),
)
_AGENTS = {"x-claude-code-session-id": ("x-claude-code-agent-id", "x-claude-code-parent-agent-id")}


@dataclass(frozen=True, slots=True)
class ProgramFields:
    """The fields of a request's body that matter here, decoded and not yet checked."""

    program: object = None
    metadata: object = None
    conversation: object = None
    previous_response_id: object = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a call is in which program.

    program_id: ours. name: as the client wrote it. source: "explicit" for an id of ours, "named" for a name in our
    header. deadline_s, deadline_epoch_s: for a program that this call creates. parent_id: program of the parent
    session, "" for none; then program_id is an alias of it. continues: an answer whose program goes on.
    """

    source: Source
    program_id: str
    name: str = ""
    parent_id: str = ""
    continues: str = ""
    stage: int | None = None
    label: str = ""
    parents: tuple[str, ...] = ()
    agent: str = ""
    parent_agent: str = ""
    call_id: str = ""
    attempt: int = 0
    deadline_s: float | None = None
    deadline_epoch_s: float | None = None
    is_last: bool = False
    is_tool: bool = False

    @property
    def is_new_allowed(self) -> bool:
        """Whether a call may create the program: not one of our ids, which only `POST /v1/programs` gives out."""
        return self.source != "explicit"

    @property
    def may_restart(self) -> bool:
        """Whether another program begins when this one is over: a session goes on, a named task does not."""
        return self.source not in ("explicit", "named")

    @property
    def is_asked_for(self) -> bool:
        """Whether the client wants this program: it said so in our words, or gave it a deadline."""
        return not self.may_restart or self.deadline_s is not None or self.deadline_epoch_s is not None


def program_id_of(tenant: str, source: str, name: str) -> str:
    """The id of a program whose name its client chose."""
    digest = hashlib.sha256(f"{tenant}\0{source}\0{name}".encode()).hexdigest()[:32]
    return f"prog-{source}_{digest}"


def resolved_id(tenant: str, given: str) -> str:
    """The id that a client means in a path: an id, or a name that it gave in `x-tempo-program`."""
    return given if _ID.fullmatch(given) else program_id_of(tenant, "named", given)


def identify(
    headers: Iterable[tuple[bytes, bytes]], body: ProgramFields, tenant: str, sources: Sequence[IdentitySource]
) -> Identity | None:
    """The call's place, or None if nothing says so. Raises ProgramError with the field for what makes no sense."""
    sent = _sent(headers)
    own = _own_fields(sent, body)
    given = own.pop("program", None)
    if given is not None:
        name = _name(given, "program")
        if _ID.fullmatch(name):
            return _placed(Identity("explicit", name), own)
        return _placed(Identity("named", program_id_of(tenant, "named", name), name), own)
    found = _by_others(sent, body, tenant, sources)
    if found is None and own:
        field = next(iter(own))
        raise ProgramError("invalid_program", f"{field} needs a program: send x-tempo-program too", field)
    return None if found is None else _placed(found, own)


def first_answer(tenant: str, sources: Sequence[IdentitySource]) -> Identity | None:
    """A program of its own for an answer that says nothing, if later ones may name it by `previous_response_id`."""
    return Identity("openai", program_id_of(tenant, "openai", uuid.uuid4().hex)) if "openai" in sources else None


def grown_chat(tenant: str, name: str) -> Identity:
    """The program of a chat that is known by its growing messages (prefix_growth.py)."""
    return Identity("prefix", program_id_of(tenant, "prefix", name))


# ---- our own fields ----


def _own_fields(sent: Mapping[str, str], body: ProgramFields) -> dict[str, object]:
    """What was said in our own words, by field: from headers, else the body's `program`, else metadata."""
    own: dict[str, object] = {}
    if isinstance(body.metadata, dict):
        for name in ("program", "stage", "parents"):
            value = body.metadata.get(f"tempo_{name}")
            if value is not None:
                own[name] = value
    if isinstance(body.program, str):
        own["program"] = body.program
    elif isinstance(body.program, dict):
        for key, value in body.program.items():
            if key not in _BODY_KEYS:
                raise ProgramError("invalid_program", unknown_key_message(str(key)[:64], _BODY_KEYS), "program")
            if value is not None:
                own["program" if key == "id" else key] = value
    elif body.program is not None:
        raise ProgramError("invalid_program", "must be the id of a program, or an object with its id", "program")
    for header, field in _OWN_HEADERS:
        if sent.get(header):
            own[field] = sent[header]
    return own


_OWN_HEADERS = (
    ("x-tempo-program", "program"),
    ("x-tempo-stage", "stage"),
    ("x-tempo-parent", "parents"),
    ("x-tempo-parents", "parents"),
    ("x-tempo-call", "call"),
    ("x-tempo-attempt", "attempt"),
    ("x-tempo-agent", "agent"),
    ("x-tempo-deadline-s", "deadline_s"),
    ("x-tempo-deadline", "deadline"),
    ("x-tempo-final", "final"),
)


def _placed(identity: Identity, own: Mapping[str, object]) -> Identity:
    stage, label = _stage(own.get("stage"))
    if own.get("deadline_s") is not None and own.get("deadline") is not None:
        raise ProgramError("invalid_program", "give deadline_s or deadline, not both", "deadline")
    final = own.get("final", False)
    return Identity(
        source=identity.source,
        program_id=identity.program_id,
        name=identity.name,
        parent_id=identity.parent_id,
        continues=identity.continues,
        stage=stage,
        label=label,
        parents=_parents(own.get("parents")),
        agent=_name(own["agent"], "agent") if "agent" in own else identity.agent,
        parent_agent=identity.parent_agent,
        call_id=_call(own["call"], "call") if "call" in own else "",
        attempt=_whole(own.get("attempt", 0), "attempt", 1_000_000),
        deadline_s=_positive(own.get("deadline_s"), "deadline_s"),
        deadline_epoch_s=_positive(own.get("deadline"), "deadline"),
        is_last=final is True or str(final).lower() in _TRUE or identity.is_last,
    )


def _stage(value: object) -> tuple[int | None, str]:
    """A number is the stage, a word is what the client calls the step."""
    if value is None:
        return None, ""
    if isinstance(value, str) and not re.fullmatch(r"[+-]?\d+", value.strip(), re.ASCII):
        return None, _name(value, "stage")
    return _whole(value, "stage", 1000), ""


def _parents(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) > _MAX_PARENTS:
        raise ProgramError("invalid_program", f"must be ids of calls, at most {_MAX_PARENTS}", "parent")
    return tuple(_call(part.strip() if isinstance(part, str) else part, "parent") for part in parts if part != "")


def _call(value: object, field: str) -> str:
    if not isinstance(value, str) or not _CALL.fullmatch(value):
        message = f"{str(value)[:64]!r} is no id of a call: 1 to 128 letters, digits and _.:@/-"
        raise ProgramError("invalid_program", message, field)
    return value


def _whole(value: object, field: str, most: int) -> int:
    text = str(value).strip() if isinstance(value, str) else value
    if isinstance(text, str) and re.fullmatch(r"\d{1,9}", text, re.ASCII):
        text = int(text)
    if isinstance(text, bool) or not isinstance(text, int) or not 0 <= text <= most:
        raise ProgramError("invalid_program", f"{str(value)[:64]!r} is no whole number from 0 to {most}", field)
    return text


def _positive(value: object, field: str) -> float | None:
    if value is None:
        return None
    number = math.nan
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        number = float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = as_float(value)
    if not (math.isfinite(number) and number > 0):
        raise ProgramError("invalid_program", f"{str(value)[:64]!r} is no number of seconds above zero", field)
    return number


def _name(value: object, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ProgramError("invalid_program", "must be a name", field)
    if len(value) > MAX_NAME_CHARS or not value.isprintable():
        raise ProgramError("invalid_program", f"must be at most {MAX_NAME_CHARS} printable characters", field)
    return value.strip()


# ---- what others send ----


def _by_others(
    sent: Mapping[str, str], body: ProgramFields, tenant: str, sources: Sequence[IdentitySource]
) -> Identity | None:
    finders: dict[IdentitySource, Callable[[], Identity | None]] = {
        "session": lambda: _session(sent, tenant),
        "openai": lambda: _openai(body, tenant),
        "trace": lambda: _trace(sent, tenant),
    }
    for source, find in finders.items():
        found = find() if source in sources else None
        if found is not None:
            return found
    return None


def _session(sent: Mapping[str, str], tenant: str) -> Identity | None:
    for header, parent_header in _SESSIONS:
        session = _usable(sent.get(header))
        if session is None:
            continue
        is_last = sent.get("x-dynamo-session-final", "").lower() in _TRUE and header == "x-dynamo-session-id"
        parent = _usable(sent.get(parent_header)) if parent_header else None
        agent_header, parent_agent_header = _AGENTS.get(header, ("", ""))
        own_id = program_id_of(tenant, "session", session)
        if parent is not None and parent != session:
            parent_id = program_id_of(tenant, "session", parent)
            # The end of a sub-agent's session is not the end of the task.
            return Identity("session", own_id, parent, parent_id, agent=session, parent_agent=parent)
        agent = _usable(sent.get(agent_header)) if agent_header else (session if parent_header else None)
        started_by = _usable(sent.get(parent_agent_header)) if parent_agent_header else None
        return Identity("session", own_id, session, agent=agent or "", parent_agent=started_by or "", is_last=is_last)
    return None


def _openai(body: ProgramFields, tenant: str) -> Identity | None:
    conversation = body.conversation.get("id") if isinstance(body.conversation, dict) else body.conversation
    named = _usable(conversation)
    if named is None and _usable(body.previous_response_id) is not None:
        answer = str(body.previous_response_id)
        return Identity("openai", program_id_of(tenant, "openai", answer), answer, continues=answer)
    if named is None and isinstance(body.metadata, dict):
        named = next((found for key in _METADATA if (found := _usable(body.metadata.get(key))) is not None), None)
    return None if named is None else Identity("openai", program_id_of(tenant, "openai", named), named)


def _trace(sent: Mapping[str, str], tenant: str) -> Identity | None:
    members = (part.split(";")[0].strip() for part in sent.get("baggage", "").split(","))
    baggage = dict(member.split("=", 1) for member in members if "=" in member)
    named = next((found for key in _BAGGAGE if (found := _usable(baggage.get(key))) is not None), None)
    if named is None:
        trace = _TRACEPARENT.fullmatch(sent.get("traceparent", "").strip())
        named = trace.group(1) if trace is not None else None
    return None if named is None else Identity("trace", program_id_of(tenant, "trace", named), named)


def _usable(value: object) -> str | None:
    """Someone else's header is not ours to refuse: what cannot be a name is passed over."""
    if not isinstance(value, str):
        return None
    name = value.strip()
    return name if 0 < len(name) <= MAX_NAME_CHARS and name.isprintable() else None


def _sent(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by normalised name; of several of one name the first."""
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1").lower().replace("_", "-")
        found.setdefault(name, header_text(raw_value))
    return found
