"""KV cache in blocks: what calls hold, and the prefixes that ended calls left behind."""

from collections import OrderedDict


class KvBlocks:
    """Counts blocks. Blocks of cached prefixes count as free: they are dropped, oldest use first, when room is needed.

    A prefix is cached under its name, one entry per name, holding the longest context seen of it.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.held = 0
        self._cached: OrderedDict[str, int] = OrderedDict()
        self._cached_blocks = 0

    @property
    def free(self) -> int:
        """Blocks that no live call holds."""
        return self.blocks - self.held

    @property
    def free_tokens(self) -> int:
        """The same in tokens."""
        return self.free * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one call fill."""
        return -(-tokens // self.block_size)

    def take(self, blocks: int) -> bool:
        """Give a live call so many more blocks. False, and nothing changes, if there are not so many."""
        if blocks > self.free:
            return False
        self.held += blocks
        while self._cached_blocks > self.free:
            _, tokens = self._cached.popitem(last=False)
            self._cached_blocks -= tokens // self.block_size
        return True

    def give_back(self, blocks: int) -> None:
        """A live call needs them no longer."""
        self.held -= blocks

    def shared(self, _prefix_id: str) -> int:
        """Blocks of a call, or of one that is to begin, that other live calls hold: none, each has its own here."""
        return 0

    def share(self, blocks: int) -> None:
        """So many of the blocks taken last others hold too; below zero, of those given back last."""

    def cached_tokens(self, prefix_id: str, prefix_tokens: int) -> int:
        """Leading tokens, whole blocks only, that need not be computed for a prompt that shares prefix_tokens."""
        tokens = min(self._cached.get(prefix_id, 0), prefix_tokens)
        return tokens // self.block_size * self.block_size

    def use(self, prefix_id: str, prefix_tokens: int) -> int:
        """`cached_tokens`, for a call that starts now: its copy takes the place of an entry that it reads whole."""
        tokens = self.cached_tokens(prefix_id, prefix_tokens)
        if tokens:
            self._cached.move_to_end(prefix_id)
            if tokens == self._cached[prefix_id]:
                self._forget(prefix_id)
        return tokens

    def keep(self, prefix_id: str, tokens: int) -> None:
        """A call of this prefix ended with so many tokens of context: they stay as long as nobody needs the room."""
        whole = tokens // self.block_size * self.block_size
        if self._cached.get(prefix_id, 0) > whole:
            self._cached.move_to_end(prefix_id)
            return
        if prefix_id in self._cached:
            self._forget(prefix_id)
        if 0 < whole // self.block_size <= self.free - self._cached_blocks:
            self._cached[prefix_id] = whole
            self._cached_blocks += whole // self.block_size

    def audit(self) -> None:
        """Check the counts. Raises AssertionError."""
        assert 0 <= self.held <= self.blocks, f"{self.held} of {self.blocks} blocks are held"
        cached = sum(tokens // self.block_size for tokens in self._cached.values())
        assert cached == self._cached_blocks, f"{cached} cached blocks, {self._cached_blocks} counted"
        assert cached <= self.free, f"{cached} cached blocks, {self.free} free"

    def _forget(self, prefix_id: str) -> None:
        self._cached_blocks -= self._cached.pop(prefix_id) // self.block_size
