"""The block pool's rules, one by one."""

from __future__ import annotations

import pytest

from cloud.serving.block_pool import BlockPool, chain_root, hash_block, hash_blocks
from cloud.serving.request import Request
from wire.errors import InvalidInputError

ROOT = chain_root("model", b"tenant")


def test_equal_tokens_of_two_tenants_or_models_have_different_names() -> None:
    roots = {chain_root("model", b"a"), chain_root("model", b"b"), chain_root("other", b"a"), chain_root("modela", b"")}
    assert len({hash_block(root, [1, 2, 3, 4]) for root in roots}) == 4


def test_a_name_depends_on_everything_before_it() -> None:
    first, second = hash_blocks(ROOT, [1, 2, 3, 4], 2), hash_blocks(ROOT, [9, 2, 3, 4], 2)
    assert first[1] != second[1]


def test_only_full_blocks_have_names() -> None:
    assert len(hash_blocks(ROOT, list(range(7)), 4)) == 1


def test_allocating_more_than_is_free_changes_nothing() -> None:
    pool = BlockPool(3, 4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    pool.check_integrity()


def test_a_freed_block_is_found_until_it_is_needed_for_something_else() -> None:
    pool = BlockPool(2, 4)
    names = hash_blocks(ROOT, list(range(8)), 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.seal(block, name)
    pool.free(blocks)
    assert pool.find_prefix(names) == blocks
    pool.allocate(1)
    assert pool.find_prefix(names) == blocks[:1], "the tail is evicted before the head"
    assert pool.num_evictions == 1
    pool.check_integrity()


def test_nameless_blocks_are_reused_before_named_ones() -> None:
    pool = BlockPool(3, 4)
    named, nameless = pool.allocate(1), pool.allocate(2)
    assert named is not None
    assert nameless is not None
    pool.seal(named[0], hash_block(ROOT, [1, 2, 3, 4]))
    pool.free(named)
    pool.free(nameless)
    assert set(pool.allocate(2) or []) == set(nameless)


def test_a_locked_block_survives_the_end_of_its_first_user() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.seal(blocks[0], hash_block(ROOT, [1, 2, 3, 4]))
    pool.lock(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 2
    with pytest.raises(InvalidInputError, match="free already"):
        pool.free(blocks)


def test_the_second_block_with_the_same_content_stays_nameless() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    name = hash_block(ROOT, [1, 2, 3, 4])
    pool.seal(blocks[0], name)
    pool.seal(blocks[1], name)
    assert pool.find_prefix([name]) == [blocks[0]]
    pool.check_integrity()


def test_a_full_block_cannot_be_renamed() -> None:
    pool = BlockPool(1, 4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.seal(blocks[0], hash_block(ROOT, [1, 2, 3, 4]))
    with pytest.raises(InvalidInputError, match="already has a name"):
        pool.seal(blocks[0], hash_block(ROOT, [5, 6, 7, 8]))


def test_a_prompt_is_hashed_only_as_far_as_it_is_cached() -> None:
    pool = BlockPool(8, 4)
    request = Request("r", list(range(20)), b"root")
    first, second = list(Request("other", list(range(8)), b"root").hashes(4))
    for block, name in zip(pool.allocate(2), (first, second), strict=True):
        pool.seal(block, name)
    assert len(pool.find_prefix(request.hashes(4))) == 2
    assert len(request.block_hashes) == 3  # the two found and the first that is not here
    assert len(list(request.hashes(4))) == 5
