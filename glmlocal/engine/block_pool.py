"""BlockPool: which KV blocks are free and who holds the others. Torch-free; it hands out numbers, never memory."""

from __future__ import annotations


class BlockPool:
    """A fixed number of equal blocks, each free or held by one owner.

    Invariants: free + held = num_blocks; no block is handed out twice; freeing restores the counts.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end: low ids first, so memory stays compact
        self._held: set[int] = set()

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """That many blocks, or None, changing nothing, when fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back. Raises ValueError for a block that is not held: that is a bug of the caller."""
        for block in blocks:
            if block not in self._held:
                raise ValueError(f"block {block} is freed but not held")
            self._held.remove(block)
            self._free.append(block)
