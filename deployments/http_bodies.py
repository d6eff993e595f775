"""Bodies of requests and answers: read within a limit, looked into, and changed where a field is ours."""

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from deployments import openai_errors
from deployments.asgi import Message, Receive
from deployments.openai_errors import ApiError

# A client that is still sending when it is refused often never reads the answer; so the rest is read and dropped,
# up to this many times the limit.
_DRAINED_LIMITS = 8
_TRUE_WORDS = frozenset({"1", "true", "t", "yes", "y", "on"})


class BodyContent(msgspec.Struct, gc=False):
    """What is decoded of a body; the rest is only checked for being JSON."""

    slo: Any = None
    service_tier: Any = None
    user: Any = None
    stream: Any = None
    prompt: msgspec.Raw = msgspec.Raw()
    program: Any = None
    metadata: Any = None
    conversation: Any = None
    previous_response_id: Any = None
    background: Any = None
    store: Any = None
    messages: msgspec.Raw = msgspec.Raw()


_fields_decoder = msgspec.json.Decoder(BodyContent)
_object_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BodyTooLargeError(Exception):
    """The body exceeds the limit."""


class RefusedError(Exception):
    """The request is refused before anyone else sees it."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


async def read_body(headers: Iterable[tuple[bytes, bytes]], receive: Receive, limit_bytes: int) -> bytes | None:
    """The whole body; None if the client left. Raises BodyTooLargeError after dropping a bounded rest."""
    declared = next((value for name, value in headers if name.lower() == b"content-length"), b"")
    if declared.isdigit() and len(declared) < 19 and int(declared) > limit_bytes * _DRAINED_LIMITS:
        raise BodyTooLargeError
    chunks: list[bytes] = []
    read_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        read_bytes += len(chunk)
        if read_bytes <= limit_bytes:
            chunks.append(chunk)
        elif read_bytes > limit_bytes * _DRAINED_LIMITS:
            raise BodyTooLargeError
        else:
            chunks.clear()
        if not message.get("more_body", False):
            break
    if read_bytes > limit_bytes:
        raise BodyTooLargeError
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what the server says, such as the client's disconnect."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def with_length(scope: Message, body_bytes: int) -> Message:
    """A request's scope, or the start of an answer, with another length of its body."""
    headers = [
        (name, str(body_bytes).encode() if name.lower() == b"content-length" else value)
        for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}


def decoded(body: bytes) -> BodyContent:
    """What the edge needs to know of a body. Raises RefusedError for what is no JSON object."""
    try:
        if not body.isascii():
            body.decode()  # the decoder does not look into the text that it skips
        return _fields_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _decoded_leniently(body, str(error))
    except RecursionError as error:
        raise RefusedError(openai_errors.malformed_json("it is nested too deeply")) from error


def _decoded_leniently(body: bytes, problem: str) -> BodyContent:
    """Python's own JSON knows NaN and Infinity, and so do its clients: such a value is to be named, not hidden."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(openai_errors.malformed_json(problem)) from error
    if not isinstance(fields, dict):
        raise RefusedError(openai_errors.malformed_json("it must be a JSON object"))
    known = (name for name in BodyContent.__struct_fields__ if name not in ("prompt", "messages"))
    return BodyContent(**{name: fields[name] for name in known if name in fields})


def without(body: bytes, *names: str) -> bytes:
    """The body without these fields; everything else byte for byte."""
    try:
        fields: dict[str, Any] = _object_decoder.decode(body)
    except msgspec.DecodeError:
        fields = json.loads(body)
        return json.dumps({name: value for name, value in fields.items() if name not in names}).encode()
    return msgspec.json.encode({name: value for name, value in fields.items() if name not in names})


def with_echo(body: bytes, service_tier: str) -> bytes:
    """An answer with its `service_tier` replaced; the same object where it has none. OpenAI has it at the top."""
    fields = _object_decoder.decode(body)
    if "service_tier" not in fields:
        return body
    fields["service_tier"] = msgspec.Raw(msgspec.json.encode(service_tier))
    return msgspec.json.encode(fields)


def with_echo_in_event(body: bytes, service_tier: str) -> bytes:
    """An event of the responses API with `service_tier` of its response replaced."""
    head, separator, payload = body.partition(b"data: ")
    event = _object_decoder.decode(payload)
    response = _object_decoder.decode(event["response"]) if "response" in event else {}
    if not separator or "service_tier" not in response:
        return body
    response["service_tier"] = msgspec.Raw(msgspec.json.encode(service_tier))
    event["response"] = msgspec.Raw(msgspec.json.encode(response))
    return head + separator + msgspec.json.encode(event) + b"\n\n"


def messages_of(messages: msgspec.Raw) -> list[bytes]:
    """The messages of a chat, each as its client wrote it; none if they are no list."""
    if not bytes(messages).lstrip().startswith(b"["):
        return []
    return [bytes(one) for one in msgspec.json.decode(messages, type=list[msgspec.Raw])]


def prompts_of(prompt: msgspec.Raw) -> int:
    """How many prompts a completions body holds: a list of texts or of token lists counts, anything else is one."""
    text = bytes(prompt).lstrip()
    if not text.startswith(b"[") or text[1:].lstrip()[:1] not in (b'"', b"["):
        return 1
    return max(1, len(msgspec.json.decode(text, type=list[msgspec.Raw])))


def is_true(value: object) -> bool:
    """Truth as pydantic, and so vLLM, reads it from JSON."""
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in _TRUE_WORDS)
