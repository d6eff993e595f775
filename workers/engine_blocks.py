"""KV blocks of a real engine, for a planner that counts them."""

from collections.abc import Callable

from tempo_router.kv_blocks import KvBlocks


class EngineBlocks(KvBlocks):
    """Counts as the planner does, from where the engine says it is.

    An engine shares blocks between calls and takes them chunk by chunk, so the sum of what calls need says little; its
    own count of free blocks is true. `measure` sets it before each plan; what the plan takes and gives back is
    reckoned from there. cached_tokens_of: leading tokens of a request, by its name, that the engine has cached now.
    """

    def __init__(self, blocks: int, block_size: int, cached_tokens_of: Callable[[str], int]) -> None:
        super().__init__(blocks, block_size)
        self._cached_tokens_of = cached_tokens_of
        self._shared = 0

    @property
    def free(self) -> int:
        """Blocks that nobody needs, as far as is known since the last measurement; may be below zero."""
        return self.blocks - self.held + self._shared

    def measure(self, free: int) -> None:
        """The engine has so many free blocks, less what it has promised to prompts that are partly computed."""
        self._shared = free - (self.blocks - self.held)

    def take(self, blocks: int) -> bool:
        """Whoever asks has looked at `free` before, or tells what the engine did."""
        self.held += blocks
        return True

    def use(self, prefix_id: str, prefix_tokens: int) -> int:
        """What the engine has cached of this request; prefix_id is the request's name."""
        return min(self._cached_tokens_of(prefix_id), prefix_tokens)

    def keep(self, prefix_id: str, tokens: int) -> None:
        """The engine keeps what it likes."""

    def audit(self) -> None:
        """Check the counts. Raises AssertionError."""
        assert self.held >= 0, f"{self.held} blocks are held"
