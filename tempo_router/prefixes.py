"""Which replica is believed to have which prefix cached."""

from collections import OrderedDict

from tempo_router.request import ReplicaId, RequestSpec

_MAX_PREFIXES = 65_536


class PrefixMemory:
    """Where the last call of each prefix ran. The prefixes that ended last are kept, some ten thousand of them."""

    def __init__(self, most: int = _MAX_PREFIXES) -> None:
        self._most = most
        self._known: OrderedDict[str, tuple[ReplicaId, int]] = OrderedDict()

    def remember(self, spec: RequestSpec, replica_id: ReplicaId, new_tokens: int) -> None:
        """A call ended there, with its context and so many further tokens in the cache."""
        if not spec.prefix_id:
            return
        self._known.pop(spec.prefix_id, None)
        self._known[spec.prefix_id] = (replica_id, spec.context_tokens + new_tokens)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def cached_tokens(self, spec: RequestSpec) -> int:
        """Leading tokens of the context that some replica is believed to have cached."""
        known = self._find(spec)
        return min(spec.prefix_tokens, known[1], spec.context_tokens - 1) if known is not None else 0

    def home(self, spec: RequestSpec) -> ReplicaId | None:
        """The replica, attached or not, that has the prefix of a request, as far as is known."""
        known = self._find(spec)
        return known[0] if known is not None else None

    def _find(self, spec: RequestSpec) -> tuple[ReplicaId, int] | None:
        return self._known.get(spec.prefix_id) if spec.prefix_tokens else None
