"""KV blocks of a real engine, for a planner that counts them."""

import math
from collections.abc import Callable

from tempo_router.kv_blocks import KvBlocks


class EngineBlocks(KvBlocks):
    """Counts as the planner does, from where the engine says it is.

    An engine shares blocks between calls and takes them chunk by chunk, so the sum of what calls need says little; its
    own count of free blocks is true. `measure` sets it before each plan; what the plan takes and gives back is
    reckoned from there. cached_tokens_of: leading tokens of a request, by its name, that the engine has cached now.
    shared_blocks_of: blocks of the engine that a request, by its name, has or would find, and others hold too.

    least_each, most_each: blocks of the engine that block_size tokens of a call take. With several kinds of layers each
    takes its own, and those with a sliding window no more for a long context: then it is what live calls take now.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        cached_tokens_of: Callable[[str], int],
        shared_blocks_of: Callable[[str], int] = lambda _: 0,
        *,
        least_each: float = 1.0,
        most_each: float = 1.0,
    ) -> None:
        super().__init__(blocks, block_size)
        self._cached_tokens_of = cached_tokens_of
        self._shared_blocks_of = shared_blocks_of
        self._each = least_each
        self._least_each = least_each
        self._most_each = most_each
        self._shared = 0

    @property
    def free(self) -> int:
        """Blocks that nobody needs, as far as is known since the last measurement; may be below zero."""
        return self.blocks - self.held + self._shared

    def measure(self, free: int, *, promised: int = 0, spare: int = 0, for_decodes: int = 0) -> None:
        """The engine has so many of its own blocks free.

        promised: ours that prompts which are partly computed will still take. spare: blocks of the engine that it keeps
        from prompts, but not from calls that decode; for_decodes: ours that these need now.
        """
        self._each = self._blocks_each(free, promised)
        ours = int(free / self._each) - promised
        if spare:
            ours = max(ours - math.ceil(spare / self._each), min(ours, for_decodes))
        self._shared = ours - (self.blocks - self.held)

    def _blocks_each(self, free: int, promised: int) -> float:
        taken = self.held - promised
        if self._least_each == self._most_each or taken <= 0:
            return self._least_each
        return min(self._most_each, max(self._least_each, (self.blocks - free) / taken))

    def take(self, blocks: int) -> bool:
        """Whoever asks has looked at `free` before, or tells what the engine did."""
        self.held += blocks
        return True

    def shared(self, prefix_id: str) -> int:
        """What the engine counts; prefix_id is the request's name."""
        return int(self._shared_blocks_of(prefix_id) / self._each)

    def share(self, blocks: int) -> None:
        """They were free, or are not."""
        self._shared += blocks

    def use(self, prefix_id: str, prefix_tokens: int) -> int:
        """What the engine has cached of this request; prefix_id is the request's name."""
        return min(self._cached_tokens_of(prefix_id), prefix_tokens)

    def keep(self, prefix_id: str, tokens: int) -> None:
        """The engine keeps what it likes."""

    def audit(self) -> None:
        """Check the counts. Raises AssertionError."""
        assert self.held >= 0, f"{self.held} blocks are held"
