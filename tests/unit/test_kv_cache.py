"""Block bookkeeping: nothing is handed out twice, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.attention.kv_cache import BlockPool, BlockTable, block_key, blocks_for


def test_blocks_hold_every_token_and_no_more_than_needed():
    assert [blocks_for(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_a_table_that_cannot_grow_keeps_what_it_has():
    pool = BlockPool(3, 4)
    first, second = BlockTable(pool, 12), BlockTable(pool, 12)
    assert first.grow_to(8)
    before = first.ids.tolist()
    assert not second.grow_to(8)
    assert (second.ids.tolist(), first.ids.tolist(), pool.free) == ([], before, 1)


def test_growing_keeps_the_blocks_in_order_of_position():
    table = BlockTable(BlockPool(8, 2), 16)
    assert table.grow_to(3)
    before = table.ids.tolist()
    assert table.grow_to(9)
    assert table.ids.tolist()[: len(before)] == before
    assert table.grow_to(5), "less than it holds is no reason to shrink"
    assert len(table.ids) == 5


def test_release_is_idempotent():
    pool = BlockPool(4, 4)
    table = BlockTable(pool, 16)
    table.grow_to(16)
    table.release()
    table.release()
    assert (pool.free, pool.leaked()) == (4, [])


@pytest.mark.parametrize("blocks", [[1], [0, 0]])
def test_giving_back_a_block_that_is_not_out_is_noticed(blocks):
    pool = BlockPool(4, 4)
    assert pool.take(1) == [0]
    with pytest.raises(ValueError, match="not all out"):
        pool.give_back(np.array(blocks, dtype=np.int32))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60))
def test_no_block_belongs_to_two_tables(steps):
    pool = BlockPool(12, 4)
    tables = [BlockTable(pool, 48) for _ in range(5)]
    for which, tokens in steps:
        if tokens == 0:
            tables[which].release()
        elif not tables[which].grow_to(tokens):
            assert blocks_for(tokens, 4) - len(tables[which].ids) > pool.free
        held = [block for table in tables for block in table.ids.tolist()]
        assert len(held) == len(set(held)) == pool.used
    for table in tables:
        table.release()
    assert pool.leaked() == []


def named(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """Take a block for each key, name it, and hand all of them back."""
    blocks = pool.take(len(keys))
    assert blocks is not None
    for block, key in zip(blocks.tolist(), keys, strict=True):
        pool.name(block, key)
    pool.give_back(blocks)
    return blocks.tolist()


def test_a_key_stands_for_all_tokens_up_to_the_end_of_its_block():
    one, two = np.array([1, 2], np.int32), np.array([3, 4], np.int32)
    assert block_key(block_key(b"", one), two) == block_key(block_key(b"", one), two)
    assert len({block_key(b"", one), block_key(b"", two), block_key(block_key(b"", one), two)}) == 3


def test_named_blocks_are_found_as_far_as_the_chain_is_known():
    pool = BlockPool(4, 4)
    blocks = named(pool, [b"a", b"b"])
    assert (pool.free, pool.used) == (4, 0)
    assert pool.find([b"a", b"b", b"c"]).tolist() == blocks
    assert pool.find([b"x", b"b"]).tolist() == []
    assert pool.leaked() == blocks


def test_a_shared_block_is_out_until_its_last_holder_lets_go():
    pool = BlockPool(2, 4)
    named(pool, [b"a"])
    first, second = pool.find([b"a"]), pool.find([b"a"])
    pool.give_back(first)
    assert pool.free == 1
    assert pool.take(2) is None
    pool.give_back(second)
    assert pool.free == 2


def test_kept_blocks_make_room_oldest_first_and_ends_of_sequences_before_their_beginnings():
    pool = BlockPool(4, 4)
    named(pool, [b"a", b"b"])
    named(pool, [b"c", b"d"])
    held = pool.take(1)
    assert held is not None
    assert [len(pool.find([key])) for key in (b"b", b"a", b"c", b"d")] == [0, 1, 1, 1]


def test_the_first_of_two_blocks_with_one_key_is_the_one_that_is_found():
    pool = BlockPool(4, 4)
    first = named(pool, [b"a"])
    other = pool.take(1)
    assert other is not None
    pool.name(int(other[0]), b"a")
    pool.give_back(other)
    assert pool.find([b"a"]).tolist() == first


def test_without_reuse_nothing_is_found():
    pool = BlockPool(4, 4, reuse=False)
    named(pool, [b"a"])
    assert pool.find([b"a"]).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 3)), max_size=80))
def test_no_block_is_lost_or_changed_under_a_holder_whatever_is_shared(steps):
    """Tables hold prefixes of four chains of keys; a block's key must stay what its holders think it is."""
    pool = BlockPool(10, 1)
    chains = [[bytes([chain, place]) for place in range(6)] for chain in range(4)]
    tables: list[tuple[BlockTable, list[bytes]]] = [(BlockTable(pool, 6), []) for _ in range(4)]
    content: dict[int, bytes] = {}
    for which, length, chain in steps:
        table, keys = tables[which]
        table.release()
        keys[:] = chains[chain][:length]
        found = pool.find(keys)
        assert [content[block] for block in found.tolist()] == keys[: len(found)]
        table.begin_with(found)
        if not table.grow_to(length):
            table.release()
            keys.clear()
            continue
        for block, key in list(zip(table.ids.tolist(), keys, strict=True))[len(found) :]:
            content[block] = key
            pool.name(block, key)
        for other, theirs in tables:
            assert [content[block] for block in other.ids.tolist()] == theirs[: len(other.ids)]
        assert pool.used == len({block for other, _ in tables for block in other.ids.tolist()})
    for table, _ in tables:
        table.release()
    assert (pool.leaked(), pool.free) == ([], 10)
