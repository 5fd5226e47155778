"""Block bookkeeping: nothing is handed out twice, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.attention.kv_cache import BlockPool, BlockTable, blocks_for


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
