"""A graph of calls that a client declares whole, so that the server runs it. Pure: checks it, and fills in prompts.

{"nodes": [
    {"id": "plan", "prompt": "Plan a report on tides."},
    {"id": "search", "tool": "web search", "after": ["plan"]},
    {"id": "write", "messages": [{"role": "user", "content": "Write it. Plan: {{plan}} Found: {{search}}"}],
     "max_tokens": 400, "sampling": {"temperature": 0}}
]}

A node waits for those in `after` and for those whose outputs its templates name; `{{name}}` stands for the output of
that node. A tool is a gap: the client runs it and posts its output, any JSON value; text stands in templates as it is,
all else as JSON. Everything is checked before anything runs.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cluster.program_desk import TOOL
from tempo_router.config import unknown_key_message
from tempo_router.errors import ProgramError
from tempo_router.program_graph import MAX_ARROWS

MAX_NODES = 1000
MAX_TEMPLATE_CHARS = 1_000_000
MAX_FILLED_CHARS = 8_000_000
"""Of one node's templates with the outputs in them: a short template may name a long output any number of times.
Of the inputs of one tool, too, which may wait for all other nodes."""
MAX_OUTPUT_BYTES = 256 * 1024
MAX_LABEL_CHARS = 200
MAX_DEPTH = 100
"""Of messages, sampling and outputs: whatever reads or writes them later recurs, and may stand deep already."""
_MAX_TOKENS = 10_000_000
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
# Its length is bounded, and spaces are stripped later: a client's template is searched in time that grows as it does.
_REFERENCE = re.compile(r"\{\{([^{}]{1,100})\}\}")
_KEYS = ("id", "after", "prompt", "messages", "max_tokens", "sampling", "tool", "label")
_RESERVED = (
    "model", "stream", "stream_options", "n", "prompt", "messages", "max_tokens", "max_completion_tokens", "slo",
    "program", "user", "metadata", "conversation", "previous_response_id", "background",
)  # fmt: skip
"""The last line says to whom and to what a call belongs."""


@dataclass(frozen=True, slots=True)
class Node:
    """One step. after: all that it waits for. tool: what the client calls it, "" for a call of the model."""

    node_id: str
    after: tuple[str, ...]
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tool: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class DeclaredGraph:
    """Nodes in an order in which each comes after what it waits for."""

    nodes: tuple[Node, ...]


class Unanswered:
    """Of each node how many of those that it waits for have no output yet: what ends costs only what waits for it.

    ready: the nodes that wait for nothing.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.ready = [node for node in nodes if not node.after]
        self._missing = {node.node_id: len(node.after) for node in nodes}
        self._waiting: dict[str, list[Node]] = {}
        for node in nodes:
            for name in node.after:
                self._waiting.setdefault(name, []).append(node)

    def answered(self, node_id: str) -> list[Node]:
        """A node has its output. Returns those that wait for nothing any more, for the first time."""
        waiting = self._waiting.pop(node_id, [])
        for node in waiting:
            self._missing[node.node_id] -= 1
        return [node for node in waiting if self._missing[node.node_id] == 0]


def parse_graph(value: object) -> DeclaredGraph:
    """Check a declared graph. Raises ProgramError that says which node and field is wrong."""
    if not isinstance(value, dict) or set(value) != {"nodes"} or not isinstance(value["nodes"], list):
        raise _wrong("graph", "must be an object with a list of nodes")
    declared = value["nodes"]
    if not 1 <= len(declared) <= MAX_NODES:
        raise _wrong("graph.nodes", f"{len(declared)} nodes; there may be 1 to {MAX_NODES}")
    ids: dict[str, int] = {}
    for number, one in enumerate(declared):
        node_id = one.get("id") if isinstance(one, dict) else None
        if not isinstance(node_id, str) or not _ID.fullmatch(node_id):
            raise _wrong(f"graph.nodes[{number}].id", "must be 1 to 64 letters, digits and _.:-")
        if node_id in ids:
            raise _wrong(f"graph.nodes[{number}].id", f"{node_id!r} is also node {ids[node_id]}")
        ids[node_id] = number
    nodes = [_node(one, f"graph.nodes[{number}]", ids) for number, one in enumerate(declared)]
    arrows = sum(len(node.after) for node in nodes)
    if arrows > MAX_ARROWS:
        raise _wrong("graph.nodes", f"the nodes wait for {arrows} others in all; that may be {MAX_ARROWS}")
    return DeclaredGraph(tuple(_ordered(nodes, ids)))


def filled(template: str, outputs: Mapping[str, Any]) -> str:
    """A template with the outputs that it names. They are put in as they are: what they hold is not looked at again."""
    return _REFERENCE.sub(lambda found: as_text(outputs[found.group(1).strip()]), template)


def request_body(node: Node, outputs: Mapping[str, Any], model: str) -> tuple[str, dict[str, Any]]:
    """(path, body) of the OpenAI request that answers a node. Raises ProgramError if it becomes too large."""
    templates = [node.prompt, *(text for message in node.messages for text in _texts(message))]
    named = Counter(name for template in templates for name in _names(template))
    texts = {name: as_text(outputs[name]) for name in named}
    chars = sum(map(len, templates)) + sum(len(texts[name]) * times for name, times in named.items())
    if chars > MAX_FILLED_CHARS:
        problem = f"has {chars} characters with the outputs that it names; there may be {MAX_FILLED_CHARS}"
        raise _wrong(f"graph.nodes.{node.node_id}", problem)
    body: dict[str, Any] = {"model": model, **node.sampling}
    if node.max_tokens is not None:
        body["max_tokens"] = node.max_tokens
    if node.messages:
        body["messages"] = [_filled_deep(message, texts) for message in node.messages]
        return "/v1/chat/completions", body
    body["prompt"] = filled(node.prompt, texts)
    return "/v1/completions", body


def tool_inputs(node: Node, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool needs: the outputs that it waits for. Raises ProgramError if they are too large together."""
    chars = sum(len(as_text(outputs[name])) for name in node.after)
    if chars > MAX_FILLED_CHARS:
        problem = f"the outputs that the tool waits for have {chars} characters; there may be {MAX_FILLED_CHARS}"
        raise _wrong(f"graph.nodes.{node.node_id}", f"{problem}: let it wait for fewer nodes")
    return {name: outputs[name] for name in node.after}


def as_text(output: Any) -> str:
    """An output as templates hold it."""
    return output if isinstance(output, str) else msgspec.json.encode(output).decode()


def parse_output(body: bytes) -> tuple[Any, str]:
    """(output of a tool, its tenant as far as the body says) from {"output": any JSON, "user": ...}.

    Raises ProgramError.
    """
    if len(body) > MAX_OUTPUT_BYTES:
        raise _wrong("output", f"is larger than {MAX_OUTPUT_BYTES} bytes")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong("output", f"is not JSON: {error}") from error
    if not isinstance(value, dict) or set(value) - {"user"} != {"output"}:
        raise _wrong("output", "the body must be an object with the key 'output'")
    _check_depth(value["output"], "output")
    user = value.get("user") or ""
    if not isinstance(user, str):
        raise _wrong("user", "must be text")
    return value["output"], user


def json_value(value: Any, where: str) -> Any:
    """What a caller in Python gave, as JSON holds it. Raises ProgramError that says what cannot be JSON, and where.

    NaN and the infinities are refused: JSON does not have them, and encoders make null of them.
    """
    try:
        return _json_value(value, where)
    except RecursionError as error:
        raise _wrong(where, "holds itself, or is nested too deeply") from error


def _json_value(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {_key(key, where): _json_value(each, f"{where}.{str(key)[:64]}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(each, f"{where}[{number}]") for number, each in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _wrong(where, f"is {value}, which JSON does not have")
        return float(value)
    if value is None or isinstance(value, bool | int):
        return value
    try:
        plain = msgspec.to_builtins(value)
        msgspec.json.encode(plain)
    except (TypeError, ValueError) as error:
        raise _wrong(where, f"{type(value).__name__} cannot be JSON: {error}") from error
    return _json_value(plain, where) if isinstance(plain, dict | list) else plain


def _key(key: Any, where: str) -> str:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise _wrong(where, f"the key {str(key)[:64]!r} is {type(key).__name__}; keys must be text or whole numbers")
    return str(key)


def _node(one: dict[str, Any], where: str, ids: Mapping[str, int]) -> Node:
    for key in one:
        if key not in _KEYS:
            raise _wrong(f"{where}.{str(key)[:64]}", unknown_key_message(str(key)[:64], _KEYS))
    tool, prompt, messages = _short(one, "tool", where), _text(one, "prompt", where), _messages(one, where)
    if sum(map(bool, (tool, prompt, messages))) != 1:
        raise _wrong(where, "needs exactly one of prompt, messages and tool")
    if tool and ("max_tokens" in one or "sampling" in one):
        raise _wrong(where, "a tool has neither max_tokens nor sampling")
    after = _after(one, where, ids)
    named = dict.fromkeys((*after, *_references(prompt, messages, where, ids)))
    if one["id"] in named:
        raise _wrong(f"{where}.after", f"{one['id']!r} cannot wait for itself")
    return Node(
        node_id=one["id"],
        after=tuple(named),
        prompt=prompt,
        messages=messages,
        max_tokens=_count(one, where),
        sampling=_sampling(one, where),
        tool=tool,
        label=_label(one, tool, where),
    )


def _after(one: Mapping[str, Any], where: str, ids: Mapping[str, int]) -> list[str]:
    after = one.get("after", [])
    if not isinstance(after, list) or not all(isinstance(name, str) for name in after):
        raise _wrong(f"{where}.after", "must be a list of node ids")
    for name in after:
        if name not in ids:
            raise _wrong(f"{where}.after", f"there is no node {name[:64]!r}")
    return after


def _references(prompt: str, messages: Iterable[object], where: str, ids: Mapping[str, int]) -> list[str]:
    named = _names(prompt)
    for message in messages:
        named += [name for text in _texts(message) for name in _names(text)]
    for name in named:
        if name not in ids:
            field_name = "prompt" if prompt else "messages"
            raise _wrong(f"{where}.{field_name}", f"the template names {name!r}, but there is no such node")
    return named


def _messages(one: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    messages = one.get("messages")
    if messages is None:
        return ()
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise _wrong(f"{where}.messages", "must be a list of chat messages")
    _check_depth(messages, f"{where}.messages")
    return tuple(messages)


def _sampling(one: Mapping[str, Any], where: str) -> dict[str, Any]:
    sampling = one.get("sampling", {})
    if not isinstance(sampling, dict):
        raise _wrong(f"{where}.sampling", "must be an object with fields of OpenAI's request")
    for name in sampling:
        if name in _RESERVED:
            raise _wrong(f"{where}.sampling.{name}", "is set by the graph")
    _check_depth(sampling, f"{where}.sampling")
    return sampling


def _count(one: Mapping[str, Any], where: str) -> int | None:
    count = one.get("max_tokens")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MAX_TOKENS):
        raise _wrong(f"{where}.max_tokens", f"must be a whole number above zero and at most {_MAX_TOKENS}")
    return count


def _text(one: Mapping[str, Any], name: str, where: str) -> str:
    value = one.get(name, "")
    if not isinstance(value, str) or len(value) > MAX_TEMPLATE_CHARS:
        raise _wrong(f"{where}.{name}", f"must be text of at most {MAX_TEMPLATE_CHARS} characters")
    return value


def _short(one: Mapping[str, Any], name: str, where: str) -> str:
    """What others show: on one line."""
    value = _text(one, name, where)
    if len(value) > MAX_LABEL_CHARS or not value.isprintable() or (value and not value.strip()):
        raise _wrong(f"{where}.{name}", f"must be at most {MAX_LABEL_CHARS} printable characters")
    return value


def _label(one: Mapping[str, Any], tool: str, where: str) -> str:
    """What the step is called. The router knows tools by how theirs begin."""
    label = _short(one, "label", where)
    if tool:
        return f"{TOOL}{label or tool}"
    if label.strip().startswith(TOOL):
        raise _wrong(f"{where}.label", f"{label[:64]!r} is that of a tool: only theirs begin with {TOOL!r}")
    return label or str(one["id"])


def _ordered(nodes: list[Node], ids: Mapping[str, int]) -> list[Node]:
    """Each after what it waits for. Raises ProgramError for a cycle, naming a node of it."""
    unanswered = Unanswered(nodes)
    order = list(unanswered.ready)
    for node in order:
        order += unanswered.answered(node.node_id)
    if len(order) < len(nodes):
        placed = {node.node_id for node in order}
        stuck = next(node.node_id for node in nodes if node.node_id not in placed)
        raise _wrong(f"graph.nodes[{ids[stuck]}].after", f"node {stuck!r} waits, by way of others, for itself")
    return order


def _names(template: str) -> list[str]:
    return [name.strip() for name in _REFERENCE.findall(template)]


def _check_depth(value: object, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [each for one in level if isinstance(one, dict | list) for each in _inside(one)]
    if level:
        raise _wrong(where, f"is nested more than {MAX_DEPTH} deep")


def _inside(value: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _filled_deep(value: Any, outputs: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return filled(value, outputs)
    if isinstance(value, dict):
        return {key: _filled_deep(each, outputs) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled_deep(each, outputs) for each in value]
    return value


def _wrong(where: str, problem: str) -> ProgramError:
    return ProgramError("invalid_program", f"{where}: {problem}", where)
