"""`/v1/programs`: create, look at, list, extend, finish and cancel programs.

Answers are the views of `tempo_router.program_view`; errors have OpenAI's shape. A path may name a program by its id
or, within its tenant, by the name that the client gave it in `x-tempo-program`.
"""

import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote

import msgspec

from cluster.program_desk import ExplainRequest, ListPrograms, ViewConsole, ViewProgram
from deployments import console, openai_errors
from deployments.declared_graph import DeclaredGraph
from deployments.handle_api import NewProgram
from deployments.openai_errors import ApiError
from deployments.program_client import ProgramClient
from deployments.program_identity import program_id_of, resolved_id
from deployments.program_outline import outline_of, parse_outline
from deployments.slo_wire import as_float
from tempo_router.config import unknown_key_message
from tempo_router.errors import ProgramError, RouterUnavailableError
from tempo_router.known_stages import KnownStage
from tempo_router.program_ops import CancelGraph, CancelProgram, CreateProgram, ExtendProgram, FinishProgram

PREFIX = "/v1/programs"
REQUESTS = "/v1/requests"
_CREATE = ("app", "deadline_s", "deadline", "objective", "name", "user", "graph", "outline", "stream")
_STATUSES = ("running", "relegated", "finished", "cancelled")
_FILTERS = ("status", "app", "name", "limit", "after", "user")
_MAX_NAME_CHARS = 128


class ProgramApi:
    """Answers one request at a time; knows no HTTP beyond method, path and body. epoch_s: the clock of dates."""

    def __init__(self, client: ProgramClient, epoch_s: Callable[[], float], *, has_console: bool = False) -> None:
        self._client = client
        self._has_console = has_console
        self._epoch_s = epoch_s

    async def answer(self, method: str, path: str, query: bytes, body: bytes, tenant: str) -> tuple[int, Any]:
        """(status, JSON value), or (status, ApiError). path: still encoded, as names in it may hold "/" and "%"."""
        try:
            return await self._routed(method, path, query, body, tenant)
        except ProgramError as error:
            refused = openai_errors.program_refused(error)
            return refused.status, refused
        except RouterUnavailableError:
            refused = openai_errors.no_router()
            return refused.status, refused

    async def _routed(self, method: str, path: str, query: bytes, body: bytes, tenant: str) -> tuple[int, Any]:
        if path == console.STATE_PATH and method == "GET" and self._has_console:
            asked = ViewConsole(tenant=_query(query).get("tenant", ""))
            return 200, {**await self._client.ask(asked), "at": self._epoch_s()}
        if path.startswith(f"{REQUESTS}/"):
            return await self._explain(method, path, query, tenant)
        parts = [unquote(part) for part in path.removeprefix(PREFIX).strip("/").split("/") if part]
        match (method, *parts):
            case ("POST",):
                return 200, await self.create(creation(body, tenant)[0])
            case ("GET",):
                filters = _query(query)
                return 200, await self.listed(tenant or filters.get("user", ""), filters)
            case ("GET", given):
                return 200, await self.view(given, tenant or _query(query).get("user", ""))
            case ("POST", given, "extend"):
                fields = _fields(body, ("deadline_s", "deadline", "user"))
                return 200, await self.extend(given, fields, _tenant(fields, tenant))
            case ("POST", given, "finish"):
                return 200, await self.finish(given, _tenant(_fields(body, ("user",)), tenant))
            case ("POST", given, "cancel"):
                fields = _fields(body, ("reason", "user"))
                return 200, await self.cancel(given, _text(fields, "reason"), _tenant(fields, tenant))
            case _:
                refused = openai_errors.no_such_route(method, path)
                return refused.status, refused

    # ---- one by one, as the Python handle has them, too; they raise ProgramError, RouterUnavailableError ----

    async def create(self, new: NewProgram, graph: DeclaredGraph | None = None, operation: str = "") -> Any:
        """Make a program, or find the one of this name, if it is equal and not over.

        graph: the one that it declares, checked. If nobody answers, its program is cancelled, should it be made yet:
        nothing would run it, and its name is free for who tries again. operation: names this wish, for `undo`.
        """
        if new.objective not in ("deadline", "best_effort"):
            raise ProgramError("invalid_program", "must be 'deadline' or 'best_effort'", "objective")
        given = {"deadline_s": new.deadline_s, "deadline": new.deadline}
        op = CreateProgram(
            program_id=program_id_of(new.tenant, "named", new.name) if new.name else f"prog_{uuid.uuid4().hex}",
            tenant=new.tenant,
            app=_text({"app": new.app}, "app"),
            deadline_s=self._deadline(given),
            objective=new.objective,  # type: ignore[arg-type]
            name=_text({"name": new.name}, "name"),
            operation=operation or new_operation(),
            asked_s=new.deadline_s,
            outline=_outline(new.outline, graph),
            is_graph=graph is not None,
            runner="" if graph is None else self._client.ingress_id,
        )
        try:
            return await self._client.ask(op)
        except ProgramError:
            raise
        except BaseException:
            if graph is not None:
                self.undo(op.program_id, op.tenant, op.operation, "nobody waited when it was made")
            raise

    def undo(self, program_id: str, tenant: str, operation: str, why: str) -> None:
        """Cancel what this operation made for a graph that nothing will run, also if the router is away now."""
        reason = f"its graph was never run: {why}"
        self._client.tell(CancelGraph(program_id, tenant, new_operation(), reason, run_by=operation))

    async def view(self, given: str, tenant: str) -> Any:
        """All of a program."""
        return await self._ask_about(given, ViewProgram(resolved_id(tenant, given), tenant))

    async def extend(self, given: str, fields: Mapping[str, Any], tenant: str) -> Any:
        """Another deadline: fields are deadline_s or deadline."""
        deadline_s = self._deadline(fields)
        if deadline_s is None:
            raise ProgramError("invalid_program", "give deadline_s or deadline", "deadline_s")
        return await self._ask_about(given, ExtendProgram(resolved_id(tenant, given), tenant, deadline_s))

    async def finish(self, given: str, tenant: str) -> Any:
        """No further call will come."""
        return await self._ask_about(given, FinishProgram(resolved_id(tenant, given), tenant, new_operation()))

    async def cancel(self, given: str, reason: str, tenant: str) -> Any:
        """Give it up, with all that runs."""
        op = CancelProgram(resolved_id(tenant, given), tenant, new_operation(), reason or "cancelled by the client")
        return await self._ask_about(given, op)

    async def _ask_about(self, given: str, op: Any) -> Any:
        """Errors call the program as the client does."""
        try:
            return await self._client.ask(op)
        except ProgramError as error:
            if error.code != "unknown_program":
                raise
            raise ProgramError(error.code, f"there is no program {given[:200]!r}", error.field) from None

    async def listed(self, tenant: str, filters: Mapping[str, str]) -> Any:
        """Programs of a tenant: filters are status, app, name, limit, after, as text."""
        for key in filters:
            if key not in _FILTERS:
                raise ProgramError("invalid_program", unknown_key_message(key[:64], _FILTERS), key[:64])
        status, limit = filters.get("status"), filters.get("limit", "100")
        if status is not None and status not in _STATUSES:
            raise ProgramError("invalid_program", f"must be one of {', '.join(_STATUSES)}", "status")
        if not limit.isascii() or not limit.isdigit() or len(limit) > 9 or not 1 <= int(limit) <= 1000:
            raise ProgramError("invalid_program", "must be a whole number from 1 to 1000", "limit")
        op = ListPrograms(
            tenant,
            status,  # type: ignore[arg-type]
            filters.get("app"),
            filters.get("name"),
            int(limit),
            filters.get("after"),
        )
        return await self._client.ask(op)

    async def explain(self, given: str, tenant: str) -> Any:
        """Why one of the last requests was served as it was."""
        found = await self._client.ask(ExplainRequest(given, tenant))
        if not found:
            message = f"no request {given[:200]!r} is remembered (ingress.explained_requests)"
            raise ProgramError("unknown_request", message)
        return {"object": "request.explanation", "requests": found}

    async def _explain(self, method: str, path: str, query: bytes, tenant: str) -> tuple[int, Any]:
        match (method, *path.removeprefix(REQUESTS).strip("/").split("/")):
            case ("GET", given, "explain"):
                return 200, await self.explain(unquote(given), tenant or _query(query).get("user", ""))
            case _:
                refused = openai_errors.no_such_route(method, path)
                return refused.status, refused

    def _deadline(self, fields: Mapping[str, Any]) -> float | None:
        """The date that the client wants, in seconds since the epoch."""
        relative, absolute = _seconds(fields, "deadline_s"), _seconds(fields, "deadline")
        if relative is not None and absolute is not None:
            raise ProgramError("invalid_program", "give deadline_s or deadline, not both", "deadline")
        return absolute if relative is None else self._epoch_s() + relative


def creation(body: bytes, tenant: str) -> tuple[NewProgram, bool]:
    """(what is to be made, whether its events are to be streamed) from the body of `POST /v1/programs`."""
    fields = _fields(body, _CREATE)
    return new_program(fields, tenant), fields.get("stream") is True


def new_program(fields: Mapping[str, Any], tenant: str) -> NewProgram:
    """What the body of `POST /v1/programs` asks for. Raises ProgramError for what has the wrong type."""
    return NewProgram(
        deadline_s=_seconds(fields, "deadline_s"),
        deadline=_seconds(fields, "deadline"),
        app=_text(fields, "app"),
        name=_text(fields, "name"),
        objective=fields.get("objective", "deadline"),
        tenant=_tenant(fields, tenant),
        graph=fields.get("graph"),
        outline=fields.get("outline"),
    )


def _outline(outline: object, graph: DeclaredGraph | None) -> tuple[KnownStage, ...]:
    if graph is None:
        return () if outline is None else parse_outline(outline)
    if outline is not None:
        raise ProgramError("invalid_program", "outline: give a graph or an outline, not both", "outline")
    return outline_of(graph)


def _fields(body: bytes, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not body.strip():
        return {}
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProgramError("invalid_program", f"the request body is not valid: {error}") from error
    if not isinstance(fields, dict):
        raise ProgramError("invalid_program", "the request body must be a JSON object")
    for key in fields:
        if key not in known:
            raise ProgramError("invalid_program", unknown_key_message(key[:64], known), key[:64])
    return {key: value for key, value in fields.items() if value is not None}


def _query(query: bytes) -> dict[str, str]:
    return dict(parse_qsl(query.decode("latin-1")))


def _tenant(fields: Mapping[str, Any], tenant: str) -> str:
    return tenant or _text(fields, "user")


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str) or len(value) > _MAX_NAME_CHARS or not value.isprintable():
        rule = f"must be text of at most {_MAX_NAME_CHARS} printable characters"
        raise ProgramError("invalid_program", f"{name}: {rule}", name)
    return value


def _seconds(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    number = as_float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise ProgramError("invalid_program", f"{name}={str(value)[:64]}: must be a number of seconds above zero", name)
    return number


def new_operation() -> str:
    """A name for what a client wants, so that it is carried out once."""
    return f"op_{uuid.uuid4().hex}"


def as_bytes(value: Any) -> bytes:
    """The body of an answer: ApiErrors have their own."""
    return value.body() if isinstance(value, ApiError) else msgspec.json.encode(value)
