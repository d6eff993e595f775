"""Prompts that begin as earlier ones did: whose cache they can use, and, as an option, whose task they go on with.

Both are kept per tenant and in this process alone. Where an application has several ingresses, a client that stays on
one of them is recognised more often; what is not recognised costs a cache hit, or begins another program.
"""

import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

BLOCK_TOKENS = 64
_MOST_BLOCKS = 2048
"""Of one prompt; what is longer shares at least so much."""

_KNOWN_BLOCKS = 200_000
_KNOWN_CHATS = 50_000


class SharedPrefixes:
    """Blocks of tokens that prompts began with. Costs some microseconds per block; 60 bytes for each that is known."""

    def __init__(self, most: int = _KNOWN_BLOCKS) -> None:
        self._most = most
        self._line_of: OrderedDict[bytes, str] = OrderedDict()

    def note(self, tenant: str, tokens: Sequence[int]) -> tuple[str, int]:
        """(name of what the prompt begins with, how many of its tokens were in an earlier prompt of that name).

        A prompt that begins as none before has a name of its own, for those to come; "" for one below a block.
        """
        chain = _chain(tenant, tokens)
        known = 0
        for digest in chain:
            if digest not in self._line_of:
                break
            known += 1
        if not chain:
            return "", 0
        line = self._line_of[chain[known - 1]] if known else uuid.uuid4().hex
        for digest in chain:
            self._line_of.setdefault(digest, line)
            self._line_of.move_to_end(digest)
        while len(self._line_of) > self._most:
            self._line_of.popitem(last=False)
        return line, known * BLOCK_TOKENS


class GrowingChats:
    """Chats by their messages: a request whose messages begin with all those of an earlier one goes on with it."""

    def __init__(self, most: int = _KNOWN_CHATS) -> None:
        self._most = most
        self._name_of: OrderedDict[bytes, str] = OrderedDict()

    def name(self, tenant: str, messages: Sequence[bytes]) -> str:
        """The name of the chat that these messages (each as JSON) continue; a new one if none is known."""
        digests = []
        state = hashlib.blake2b(tenant.encode(), digest_size=16)
        for message in messages:
            state.update(hashlib.blake2b(message, digest_size=16).digest())
            digests.append(state.digest())
        found = next((self._name_of[digest] for digest in reversed(digests[:-1]) if digest in self._name_of), None)
        name = found or uuid.uuid4().hex
        if digests:
            self._name_of[digests[-1]] = name
            self._name_of.move_to_end(digests[-1])
        if len(self._name_of) > self._most:
            self._name_of.popitem(last=False)
        return name


def _chain(tenant: str, tokens: Sequence[int]) -> list[bytes]:
    """A hash for each whole block, over all that comes before it, too."""
    whole = min(len(tokens) // BLOCK_TOKENS, _MOST_BLOCKS)
    state = hashlib.blake2b(tenant.encode(), digest_size=16)
    digests = []
    content = np.asarray(tokens[: whole * BLOCK_TOKENS], dtype="<u4").tobytes()
    for start in range(0, len(content), 4 * BLOCK_TOKENS):
        state.update(content[start : start + 4 * BLOCK_TOKENS])
        digests.append(state.digest())
    return digests
