from __future__ import annotations

import pytest

from glmlocal.engine.block_pool import BlockPool, block_hash


def filled(pool: BlockPool, *names: bytes) -> list[int]:
    blocks = pool.allocate(len(names))
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.register(block, name)
    return blocks


def test_a_name_depends_on_every_token_before_it() -> None:
    first = block_hash(b"", [1, 2, 3])
    names = {first, block_hash(b"", [1, 2, 4]), block_hash(first, [1, 2, 3]), block_hash(b"", [1, 2, 3, 0])}
    assert len(names) == 4
    assert block_hash(b"", (1, 2, 3)) == first


def test_blank_blocks_go_first_then_the_end_of_the_prefix_that_was_used_longest_ago() -> None:
    pool = BlockPool(5, 4)
    old, new = filled(pool, b"old0", b"old1"), filled(pool, b"new0", b"new1")
    pool.free(old)
    pool.free(new)
    assert pool.allocate(1) == [4]
    assert pool.allocate(1) == [old[1]]
    assert pool.find(b"old1") is None
    assert pool.find(b"old0") == old[0]
    assert pool.allocate(2) == [old[0], new[1]]


def test_a_shared_block_is_free_when_its_last_holder_has_gone() -> None:
    pool = BlockPool(1, 4)
    (block,) = filled(pool, b"name")
    pool.share(block)
    pool.free([block])
    assert pool.num_free_blocks == 0
    assert pool.allocate(1) is None
    pool.free([block])
    assert pool.num_free_blocks == 1
    pool.share(block)  # held again from the cache
    assert pool.allocate(1) is None


def test_evicting_tells_of_long_prefixes_alone_and_once() -> None:
    pool = BlockPool(3, 4)
    told: list[tuple[int, bytes]] = []
    pool.on_evict = lambda block, name: told.append((block, name))
    blocks = filled(pool, b"long", b"short", b"long too")
    pool.mark_long([blocks[0], blocks[2]])
    assert pool.long_blocks() == [(blocks[0], b"long"), (blocks[2], b"long too")]
    pool.free(blocks)
    again = pool.allocate(3)
    assert told == [(blocks[2], b"long too"), (blocks[0], b"long")]
    assert again is not None
    pool.free(again)
    assert pool.long_blocks() == []
    pool.allocate(3)
    assert len(told) == 2


def test_misuse_is_an_error() -> None:
    pool = BlockPool(2, 4)
    (block,) = filled(pool, b"name")
    with pytest.raises(ValueError, match="has a name"):
        pool.register(block, b"other")
    with pytest.raises(ValueError, match="free"):
        pool.register(1, b"other")
    with pytest.raises(ValueError, match="no name"):
        pool.share(1)
    pool.free([block])
    with pytest.raises(ValueError, match="not held"):
        pool.free([block])
