"""BlockPool as a state machine, against a model of it that is a page of dictionaries."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from glmlocal.engine.block_pool import BlockPool

NUM_BLOCKS = 6


class Pool(RuleBasedStateMachine):
    """``owners`` are what requests hold; ``content`` is what a block's memory says, by what was written there last."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.owners: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.evicted: list[tuple[int, bytes]] = []
        self.pool.on_evict = lambda block, name: self.evicted.append((block, name))

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free_blocks
        blocks = self.pool.allocate(count)
        if count > free:
            assert blocks is None
            assert self.pool.num_free_blocks == free
            return
        assert blocks is not None
        assert len(set(blocks)) == count
        assert not any(block in owner for owner in self.owners for block in blocks)
        for block, name in self.evicted:  # what was told is what was there
            assert self.content[block] == name
        self.evicted.clear()
        for block in blocks:
            self.content.pop(block, None)  # overwritten
        if blocks:
            self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def register(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from([block for owner in self.owners for block in owner]))
        if self.pool.name(block) is None:
            self.content[block] = name
            self.pool.register(block, name)
            assert self.pool.find(name) is not None

    @rule(name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def share(self, name: bytes) -> None:
        block = self.pool.find(name)
        if block is not None:
            assert self.content[block] == name  # nobody wrote over it since it got its name
            self.pool.share(block)
            self.owners.append([block])

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), is_long=st.booleans())
    def free(self, data: st.DataObject, is_long: bool) -> None:
        index = data.draw(st.integers(0, len(self.owners) - 1))
        blocks = self.owners.pop(index)
        if is_long:
            self.pool.mark_long(blocks)
        self.pool.free(blocks)

    @invariant()
    def counts_agree(self) -> None:
        held: dict[int, int] = {}
        for owner in self.owners:
            for block in owner:
                held[block] = held.get(block, 0) + 1
        assert self.pool.holders() == held
        assert self.pool.num_free_blocks == NUM_BLOCKS - len(held)
        for block, name in self.pool.long_blocks():
            assert self.pool.find(name) == block


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase
