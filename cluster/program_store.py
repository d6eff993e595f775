"""Programs in Redis: one hash each, changed by scripts that apply a transition once and only for the present router.

Under the application's prefix:

| key | holds |
| --- | --- |
| `program:{id}` | `about` (JSON), `status`, `calls`, `done`, `tokens` (counters), and `c:{call}` for each call |
| `programs` | ids of the programs in progress |
| `ended` | ids of the last programs that ended, by when they ended: a late message must not begin one anew |
| `patterns` | outlines of finished programs, newest first |

A call's value is `attempt|status|JSON`. Beginning a call again with an attempt that is there, or ending one that has
ended, changes nothing; a program that is over stays over. A router with an old fence is refused everything. Where the
counters are not what the router says (Redis was restarted without its last seconds), it writes the whole program.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import structlog

from cluster.redis_store import RedisStore, ScriptCall
from tempo_router.errors import LeaseLostError, StoreRefusedError
from tempo_router.known_stages import KnownStage
from tempo_router.patterns import Outline, StageOutline
from tempo_router.program_book import MOST_ENDED, Change
from tempo_router.program_graph import GraphCall, Objective, ProgramGraph, ProgramStatus
from tempo_router.request import ProgramId

log = structlog.get_logger()

APPLIED, KNOWN, STALE, MISSING = 1, 0, -1, -2
REFUSED = -3
"""No script's code: Redis did not run it, or not to its end."""

MOST_AT_ONCE = 512
"""Changes in one round trip."""

# Every script: KEYS fence, program, programs, ended. ARGV fence, expiry in ms, ...
# Returns APPLIED, KNOWN, STALE or MISSING.
_GUARD = """
local current = tonumber(redis.call('HGET', KEYS[1], 'fence') or '0')
if current > tonumber(ARGV[1]) then return -1 end
"""

# ARGV[3]: when it ended, in ms; empty while it is in progress. ARGV[4]: its id.
_PLACE = f"""
if ARGV[3] == '' then
    redis.call('SADD', KEYS[3], ARGV[4])
    redis.call('ZREM', KEYS[4], ARGV[4])
else
    redis.call('SREM', KEYS[3], ARGV[4])
    redis.call('ZADD', KEYS[4], ARGV[3], ARGV[4])
    redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -{MOST_ENDED + 1})
end
"""

# ARGV: fence, expiry, end, id, then field and value of all that it holds. Replaces what is there.
_WHOLE = (
    _GUARD
    + """
redis.call('DEL', KEYS[2])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIREAT', KEYS[2], ARGV[2])
"""
    + _PLACE
    + "return 1"
)

# ARGV: fence, expiry, call's field, attempt, value, how many calls there are with it.
_CALL_BEGAN = (
    _GUARD
    + """
if redis.call('EXISTS', KEYS[2]) == 0 then return -2 end
local known = redis.call('HGET', KEYS[2], ARGV[3])
if known and tonumber(string.match(known, '^(%d+)|')) >= tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[5])
local calls = redis.call('HINCRBY', KEYS[2], 'calls', known and 0 or 1)
if known and string.match(known, '^%d+|(%a+)|') ~= 'running' then
    -- Another attempt at a call that had ended: it has not ended any more, and its tokens do not count.
    redis.call('HINCRBY', KEYS[2], 'done', -1)
    -- Not -tokens: Lua writes -0 as "-0", which HINCRBY refuses.
    local tokens = cjson.decode(string.match(known, '^%d+|%a+|(.*)$')).output_tokens or 0
    redis.call('HINCRBY', KEYS[2], 'tokens', 0 - tokens)
end
redis.call('PEXPIREAT', KEYS[2], ARGV[2])
if calls ~= tonumber(ARGV[6]) then return -2 end
return 1
"""
)

# ARGV: fence, expiry, call's field, attempt, value, output tokens.
_CALL_ENDED = (
    _GUARD
    + """
local known = redis.call('HGET', KEYS[2], ARGV[3])
if not known then return -2 end
local attempt, status = string.match(known, '^(%d+)|(%a+)|')
if attempt ~= ARGV[4] or status ~= 'running' then return 0 end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[5])
redis.call('HINCRBY', KEYS[2], 'done', 1)
redis.call('HINCRBY', KEYS[2], 'tokens', ARGV[6])
redis.call('PEXPIREAT', KEYS[2], ARGV[2])
return 1
"""
)

# ARGV: fence, expiry, end, id, status, about, how many calls there are, how many have ended.
_STATUS = (
    _GUARD
    + """
local status = redis.call('HGET', KEYS[2], 'status')
if not status then return -2 end
if status == 'finished' or status == 'cancelled' then return 0 end
redis.call('HSET', KEYS[2], 'status', ARGV[5], 'about', ARGV[6])
redis.call('PEXPIREAT', KEYS[2], ARGV[2])
"""
    + _PLACE
    + """
if redis.call('HGET', KEYS[2], 'calls') ~= ARGV[7] or redis.call('HGET', KEYS[2], 'done') ~= ARGV[8] then return -2 end
return 1
"""
)

# KEYS: fence, patterns. ARGV: fence, most, pattern, how many of the newest may be of a write whose answer was lost.
# An outline holds the moment at which its program ended, so equal ones are one.
_LEARN = (
    _GUARD
    + """
if redis.call('LPOS', KEYS[2], ARGV[3], 'MAXLEN', ARGV[4]) then return 0 end
redis.call('LPUSH', KEYS[2], ARGV[3])
redis.call('LTRIM', KEYS[2], 0, tonumber(ARGV[2]) - 1)
return 1
"""
)

_SCRIPT_NAMES = {
    _WHOLE: "whole",
    _CALL_BEGAN: "call began",
    _CALL_ENDED: "call ended",
    _STATUS: "status",
    _LEARN: "learn",
}
"""Of scripts, for logs."""

PROGRAMS = "programs"
ENDED = "ended"
PATTERNS = "patterns"
_CALL = "c:"
_LOADED_AT_ONCE = 32
"""Programs in one round trip at the start: a large one has thousands of calls."""


class About(msgspec.Struct, omit_defaults=True, rename={"program_id": "id"}):
    """What is stored of a program beside its calls."""

    program_id: str
    tenant: str
    app: str
    created_s: float
    deadline_s: float | None
    objective: Objective
    name: str = ""
    reason: str = ""
    closed_by: str = ""
    last_s: float = 0.0
    relegated_s: float | None = None
    ended_s: float | None = None
    created_by: str = ""
    asked_s: float | None = None
    outline: tuple[KnownStage, ...] = ()
    run_by: str = ""
    runner: str = ""


class _StoredCall(msgspec.Struct, omit_defaults=True):
    stage: int
    began_s: float
    parents: tuple[str, ...] = ()
    label: str = ""
    branch: str = ""
    owner: str = ""
    ended_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    alias: str = ""
    asked_as: str = ""


class _StoredOutline(msgspec.Struct, array_like=True):
    app: str
    span_s: float
    is_complete: bool
    at_s: float
    stages: tuple[tuple[int, int, float, int, int, int, float], ...]


_outlines = msgspec.msgpack.Decoder(_StoredOutline)


def _name_of(script: str) -> str:
    return _SCRIPT_NAMES.get(script, script)


def key_of(program_id: str) -> str:
    """Where a program is, under the application's prefix."""
    return f"program:{program_id}"


class ProgramStore:
    """One application's programs. keep_s: how long one is kept after its deadline, or its end."""

    def __init__(self, store: RedisStore, *, keep_s: float = 600.0, most_patterns: int = 5000) -> None:
        self._store = store
        self._keep_s = keep_s
        self._most_patterns = most_patterns
        # How many changes were refused since a script was last taken: by its text, and by Redis's word for the reason.
        self._refusals: dict[str, Counter[str]] = {}

    async def write(self, changes: Sequence[ScriptCall]) -> list[int]:
        """Apply what `script_for` made, in order and in one round trip. The codes; raises LeaseLostError, and more.

        Raises StoreUnavailableError; then any part may have been applied, and all may be told again. What Redis would
        refuse every time is dropped, and logged as an error. A later change of that program then finds its counters
        wrong, and the program is written whole.
        """
        answers = await self._store.run(changes)
        codes = [REFUSED if isinstance(answer, StoreRefusedError) else int(answer) for answer in answers]
        if STALE in codes:
            raise LeaseLostError("another router writes this application's programs now")
        if self._refusals or REFUSED in codes:
            self._tell_refusals(changes, answers)
        return codes

    def _tell_refusals(self, changes: Sequence[ScriptCall], answers: Sequence[Any]) -> None:
        """Log the first refusal of a script for each reason, and how many there were once it is not refused again."""
        refused: set[str] = set()
        for (text, keys, _), answer in zip(changes, answers, strict=True):
            if not isinstance(answer, StoreRefusedError):
                continue
            refused.add(text)
            by_code = self._refusals.setdefault(text, Counter())
            if not by_code[answer.code]:
                log.error(
                    "write_refused", key=keys[0], script=_name_of(text), problem=str(answer),
                    effect="this change is dropped, as are others that are refused so; those behind it are written",
                )  # fmt: skip
            by_code[answer.code] += 1
        taken = {text for text, _, _ in changes} - refused
        for text in [one for one in self._refusals if one in taken]:
            log.warning("writes_taken_again", script=_name_of(text), dropped=self._refusals.pop(text).total())

    def script_for(self, change: Change, fence: int, now_s: float) -> ScriptCall:
        """A transition as it is now; what its program or call becomes later is another one."""
        graph = change.program
        keys = _keys(graph)
        until_ms = self._expiry_ms(graph, now_s)
        match change.kind:
            case "began" if change.call is not None:
                call = change.call
                return (
                    _CALL_BEGAN,
                    keys,
                    (fence, until_ms, _CALL + call.call_id, call.attempt, _call_value(call), len(graph.calls)),
                )
            case "ended" if change.call is not None:
                call = change.call
                value = _call_value(call)
                return (
                    _CALL_ENDED, keys,
                    (fence, until_ms, _CALL + call.call_id, call.attempt, value, call.output_tokens),
                )  # fmt: skip
            case "status" | "outlined":
                over_ms, ended = _end_ms(graph), len(graph.calls) - len(graph.running)
                return (
                    _STATUS,
                    keys,
                    (fence, until_ms, over_ms, graph.program_id, graph.status, _about(graph), len(graph.calls), ended),
                )
            case _:
                return self.script_for_whole(graph, fence, now_s)

    def script_for_whole(self, graph: ProgramGraph, fence: int, now_s: float) -> ScriptCall:
        """All of a program, in place of whatever is there."""
        ended = [call for call in graph.calls.values() if call.status != "running"]
        fields: list[Any] = [
            "about", _about(graph), "status", graph.status, "calls", len(graph.calls),
            "done", len(ended), "tokens", sum(call.output_tokens for call in ended),
        ]  # fmt: skip
        for call in graph.calls.values():
            fields += [_CALL + call.call_id, _call_value(call)]
        arguments = (fence, self._expiry_ms(graph, now_s), _end_ms(graph), graph.program_id, *fields)
        return _WHOLE, _keys(graph), arguments

    def script_for_pattern(self, outline: Outline, fence: int, *, is_again: bool = False) -> ScriptCall:
        """One more outline, the oldest beyond the bound forgotten. is_again: it may be anywhere among them already."""
        stored = _StoredOutline(outline.app, outline.span_s, outline.is_complete, outline.at_s, outline.stages)
        looked_at = self._most_patterns if is_again else MOST_AT_ONCE
        return _LEARN, (PATTERNS,), (fence, self._most_patterns, msgspec.msgpack.encode(stored), looked_at)

    async def load_live(self) -> list[ProgramGraph]:
        """All programs in progress that can be read."""
        ids = sorted(name.decode() for name in await self._store.members(PROGRAMS))
        return await self._load(ids)

    async def load_ended(self) -> list[ProgramGraph]:
        """The last programs that ended, at most MOST_ENDED, the oldest first."""
        return await self._load([name.decode() for name in await self._store.ranked(ENDED)])

    async def load(self, program_id: str) -> ProgramGraph | None:
        """One program, over or not; None if it is not stored or cannot be read."""
        return next(iter(await self._load([program_id])), None)

    async def load_patterns(self) -> list[Outline]:
        """Outlines of finished programs, newest first. One that cannot be read (another version's) is passed over."""
        outlines: list[Outline] = []
        for stored in await self._store.newest(PATTERNS, self._most_patterns):
            try:
                one = _outlines.decode(stored)
            except msgspec.DecodeError:
                continue
            stages = tuple(StageOutline(*stage) for stage in one.stages)
            outlines.append(Outline(one.app, one.span_s, stages, one.is_complete, one.at_s))
        return outlines

    async def counters(self, program_id: str) -> dict[str, int]:
        """calls, done and tokens as the scripts counted them; empty for an unknown program."""
        [fields] = await self._store.hashes([key_of(program_id)])
        if isinstance(fields, StoreRefusedError):
            raise fields
        return {name: int(fields[name.encode()]) for name in ("calls", "done", "tokens") if fields}

    async def _load(self, ids: Sequence[str]) -> list[ProgramGraph]:
        graphs: list[ProgramGraph] = []
        for first in range(0, len(ids), _LOADED_AT_ONCE):
            some = ids[first : first + _LOADED_AT_ONCE]
            found = await self._store.hashes([key_of(one) for one in some])
            read = (_read(program_id, fields) for program_id, fields in zip(some, found, strict=True) if fields)
            graphs += [graph for graph in read if graph is not None]
        return graphs

    def _expiry_ms(self, graph: ProgramGraph, now_s: float) -> int:
        until_s = (graph.ended_s or graph.last_s) if graph.is_over else max(now_s, graph.deadline_s or 0.0)
        # Twice: a program in progress must not vanish before its router gives it up.
        return int((until_s + self._keep_s * (1 if graph.is_over else 2)) * 1000)


def _keys(graph: ProgramGraph) -> tuple[str, ...]:
    return key_of(graph.program_id), PROGRAMS, ENDED


def _end_ms(graph: ProgramGraph) -> int | str:
    return int((graph.ended_s or graph.last_s) * 1000) if graph.is_over else ""


def _about(graph: ProgramGraph) -> bytes:
    return msgspec.json.encode(
        About(
            graph.program_id, graph.tenant, graph.app, graph.created_s, graph.deadline_s, graph.objective, graph.name,
            graph.reason, graph.closed_by, graph.last_s, graph.relegated_s, graph.ended_s,
            graph.created_by, graph.asked_s, graph.outline, graph.run_by, graph.runner,
        )
    )  # fmt: skip


def _call_value(call: GraphCall) -> bytes:
    stored = _StoredCall(
        call.stage, call.began_s, call.parents, call.label, call.branch, call.owner, call.ended_s,
        call.prompt_tokens, call.output_tokens, call.alias, call.asked_as,
    )  # fmt: skip
    return f"{call.attempt}|{call.status}|".encode() + msgspec.json.encode(stored)


def _read(program_id: str, fields: dict[bytes, bytes] | StoreRefusedError) -> ProgramGraph | None:
    """None, said aloud, for what another hand or another version wrote: it must not keep a router from starting."""
    problem: Exception
    if isinstance(fields, StoreRefusedError):
        problem = fields
    else:
        try:
            return _graph(fields)
        except (KeyError, ValueError, msgspec.DecodeError) as error:
            problem = error
    effect = "this program is unknown; the others are read"
    log.error("program_unreadable", program_id=program_id, problem=repr(problem), effect=effect)
    return None


def _graph(fields: dict[bytes, bytes]) -> ProgramGraph:
    about = msgspec.json.decode(fields[b"about"], type=About)
    status = msgspec.convert(fields[b"status"].decode(), ProgramStatus)
    graph = ProgramGraph(
        ProgramId(about.program_id), about.tenant, about.app, about.created_s, about.deadline_s, about.objective,
        about.name, status, about.reason, about.closed_by, -1, about.last_s, about.relegated_s, about.ended_s,
        {call.call_id: call for call in _calls(fields)}, about.created_by, about.asked_s, about.outline,
        about.run_by, about.runner,
    )  # fmt: skip
    graph.last_s = max([graph.last_s, *(call.ended_s or call.began_s for call in graph.calls.values())])
    return graph


def _calls(fields: dict[bytes, bytes]) -> Iterable[GraphCall]:
    for name, value in fields.items():
        if not name.startswith(_CALL.encode()):
            continue
        attempt, status, rest = value.split(b"|", 2)
        one = msgspec.json.decode(rest, type=_StoredCall)
        yield GraphCall(
            name.decode().removeprefix(_CALL), int(attempt), one.stage, one.parents, one.began_s, one.label, one.branch,
            one.owner, msgspec.convert(status.decode(), Any), one.ended_s, one.prompt_tokens, one.output_tokens,
            alias=one.alias, asked_as=one.asked_as,
        )  # fmt: skip
