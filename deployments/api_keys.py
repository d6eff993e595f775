"""Who may ask: `engine.frontend_kwargs.api_key` for all that an ingress answers, not only for what vLLM does.

vLLM checks the key in its own application, which is behind the edge: by then a call has begun a program.
"""

import hmac
from collections.abc import Iterable, Sequence

from deployments import console

# As vLLM guards them, and what the console shows. Other paths, such as /health, /metrics and /tokenize, stay open.
GUARDED_PREFIXES = ("/v1", "/v2", "/inference", "/cohere", console.STATE_PATH)


class ApiKeys:
    """keys: any of them lets in; none: everybody may ask. paths: to be guarded beside those prefixes."""

    def __init__(self, keys: Sequence[str], paths: frozenset[str]) -> None:
        self._keys = [key.encode() for key in keys]
        self._paths = paths

    def refuses(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request needs a key that it does not show. A browser asks with OPTIONS before it shows one."""
        if not self._keys or method == "OPTIONS":
            return False
        if not path.startswith(GUARDED_PREFIXES) and path not in self._paths:
            return False
        shown = next((value for name, value in headers if name.lower() == b"authorization"), b"")
        scheme, _, key = shown.partition(b" ")
        # All of them, so that the time taken says nothing.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        return scheme.lower() != b"bearer" or not any(matches)

    def of_ourselves(self) -> list[tuple[bytes, bytes]]:
        """The header of a request that this ingress makes to itself."""
        return [(b"authorization", b"Bearer " + key) for key in self._keys[:1]]
