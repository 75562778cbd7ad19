"""BlockPool: which KV blocks are free, who shares the others, and which hold a prefix that may come again.

Torch-free; it hands out numbers, never memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Names a full block by its tokens and all before them; ``parent`` is the name of the block before, or b""."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """A fixed number of equal blocks. A block is held by one or more owners, or free; free ones may be *cached*: their
    content has a name, and they serve a request that wants it until the memory is needed, least recently used first.

    Invariants: free + held = num_blocks; a block that is held is not handed out; a name leads to one block; freeing
    restores the counts. ``on_evict`` is told (block, name) of a *long* cached block before its memory is given away.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.on_evict: Callable[[int, bytes], None] | None = None
        self._blank = list(range(num_blocks - 1, -1, -1))  # popped from the end: low ids first, memory stays compact
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with a name; the next to be given away first
        self._holders: dict[int, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._long: set[int] = set()

    @property
    def num_free_blocks(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks with a name, held or free."""
        return len(self._name_of)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """That many blocks for one owner, or None, changing nothing, when fewer are free."""
        if count > self.num_free_blocks:
            return None
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def find(self, name: bytes) -> int | None:
        """The block of that name, held or free."""
        return self._block_of.get(name)

    def name(self, block: int) -> bytes | None:
        return self._name_of.get(block)

    def holders(self) -> dict[int, int]:
        """Held blocks and how many hold each: for tests."""
        return dict(self._holders)

    def is_held(self, block: int) -> bool:
        return block in self._holders

    def share(self, block: int) -> None:
        """One more owner for a block that was found."""
        if block not in self._name_of:
            raise ValueError(f"block {block} has no name: only a cached block can be shared")
        self._cached.pop(block, None)
        self._holders[block] = self._holders.get(block, 0) + 1

    def register(self, block: int, name: bytes) -> None:
        """A held block is full and will not change. A second block of the same content stays without a name."""
        if block not in self._holders or block in self._name_of:
            raise ValueError(f"block {block} cannot be registered: it is free, or has a name")
        if name not in self._block_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back. Raises ValueError for a block that is not held: that is a bug of the caller."""
        for block in reversed(blocks):  # the end of a prefix is worth less than its beginning, so it goes first
            holders = self._holders.get(block)
            if holders is None:
                raise ValueError(f"block {block} is freed but not held")
            if holders > 1:
                self._holders[block] = holders - 1
                continue
            del self._holders[block]
            if block in self._name_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def mark_long(self, blocks: Iterable[int]) -> None:
        """These belong to a prefix that is worth more than forgetting."""
        self._long.update(block for block in blocks if block in self._name_of)

    def long_blocks(self) -> list[tuple[int, bytes]]:
        """(block, name) of the long prefixes that are in memory."""
        return [(block, self._name_of[block]) for block in self._long]

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        name = self._name_of[block]
        if block in self._long:
            self._long.discard(block)
            if self.on_evict is not None:
                self.on_evict(block, name)
        del self._name_of[block]
        del self._block_of[name]
        return block
