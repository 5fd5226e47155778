"""Causal attention over the paged cache on CPU.

Each (row, head) takes its positions in ascending order, whatever the block layout: all scores first, then the softmax with
its fixed-order sum, then the values one position after the other. Only the loops around that are arranged for reuse:
the heads of a group share a key, and up to ROW_GROUP rows of a sequence share a stretch of positions.
"""

import numba
import numpy as np

from shared.kernels.cpu_elementwise import softmax
from shared.kernels.jit import FP32, I32, parallel_kernel, take_next, view1, view2
from shared.kernels.simd import LANES, dot_block, mix_block

ROW_GROUP = 8
"""Consecutive rows of one work item, when there are enough rows."""
STRETCH = 64
"""Cache positions that are used for all rows of a work item before the next ones are touched."""


@numba.njit(nogil=True)
def _cache_rows(table, block_size, kv_heads, head, count):  # noqa: ANN001, ANN202
    """Where positions 0 .. count - 1 of a sequence lie in the cache seen as [slots * kv_heads, D]."""
    at = np.empty(count, np.int64)
    for p in range(count):
        slot = np.int64(table[p // block_size]) * block_size + p % block_size
        at[p] = slot * kv_heads + head
    return at


@numba.njit(nogil=True)
def _attend(q, k, v, at, positions, head, group, scale, window, out):  # noqa: ANN001, ANN202
    """One key-value head, and consecutive rows of one sequence: q, out [rows * heads, D]; ``head`` = first query head."""
    rows, depth = len(positions), q.shape[1]
    heads = q.shape[0] // rows
    scores = np.empty((rows * group, len(at)), np.float32)
    ends = positions.astype(np.int64) + 1
    starts = np.maximum(ends - window, 0) if window else np.zeros(rows, np.int64)
    for near in range(starts[0], len(at), STRETCH):
        for t in range(rows):
            a, b = max(near, starts[t]), min(near + STRETCH, ends[t])
            dot_block(q, t * heads + head, group, k, at, a, max(a, b), scores, t * group, a)
    for t in range(rows):
        for g in range(group):
            row = scores[t * group + g, starts[t] :]
            total = softmax(row, ends[t] - starts[t], scale)
            for p in range(ends[t] - starts[t]):
                row[p] /= total
            out[t * heads + head + g] = 0
    for near in range(starts[0], len(at), STRETCH):
        for t in range(rows):
            a, b = max(near, starts[t]), min(near + STRETCH, ends[t])
            for d in range(0, depth, LANES):
                lanes = min(LANES, depth - d)
                mix_block(scores, t * group, group, a, max(a, b), v, at, out, t * heads + head, d, lanes)


@numba.njit(nogil=True)
def _known(tables, sequence, positions, block_size, blocks):  # noqa: ANN001, ANN202
    """Whether every block that a row will read exists: nothing outside the cache may be touched."""
    sequences, max_blocks = tables.shape
    for t in range(len(sequence)):
        s, used = sequence[t], positions[t] // block_size + 1
        if s < 0 or s >= sequences or positions[t] < 0 or used > max_blocks:
            return False
        for b in range(used):
            if tables[s, b] < 0 or tables[s, b] >= blocks:
                return False
    return True


@numba.njit(nogil=True)
def _items(counter, q, k, v, tables, sequence, positions, block_size, kv_heads, size, scale, window, out):  # noqa: ANN001, ANN202
    rows = len(positions)
    heads = q.shape[0] // rows
    group = heads // kv_heads
    items = (rows + size - 1) // size * kv_heads
    while True:
        item = take_next(counter)
        if item >= items:
            return
        first, kv_head = item // kv_heads * size, item % kv_heads
        stop = min(first + size, rows)
        while first < stop:
            last = first + 1
            while last < stop and sequence[last] == sequence[first] and positions[last] > positions[last - 1]:
                last += 1
            count = positions[last - 1] + 1
            at = _cache_rows(tables[sequence[first]], block_size, kv_heads, kv_head, count)
            queries, outputs = q[first * heads : last * heads], out[first * heads : last * heads]
            _attend(
                queries, k, v, at, positions[first:last], kv_head * group, group, scale, window, outputs
            )
            first = last


@parallel_kernel
def attention(threads, addresses, sizes, window, scale):  # noqa: ANN001, ANN201
    """See ``Kernels.attention``. Returns False, having written nothing, when a row names no cache block.

    addresses: q, k, v, tables, sequence, positions, out; sizes: rows, heads, kv_heads, D, blocks, block_size, sequences,
    max_blocks. fp32 and int32.
    """
    rows, heads, kv_heads, depth, blocks, block_size, sequences, max_blocks = sizes
    q, out = view2(addresses[0], rows * heads, depth, FP32), view2(addresses[6], rows * heads, depth, FP32)
    slots = blocks * block_size * kv_heads
    k, v = view2(addresses[1], slots, depth, FP32), view2(addresses[2], slots, depth, FP32)
    tables = view2(addresses[3], sequences, max_blocks, I32)
    sequence, positions = view1(addresses[4], rows, I32), view1(addresses[5], rows, I32)
    if not _known(tables, sequence, positions, block_size, blocks):
        return False
    counter, narrow = np.zeros(1, np.int64), np.float32(scale)
    size = ROW_GROUP if rows >= ROW_GROUP * threads else 1
    if threads == 1:
        _items(counter, q, k, v, tables, sequence, positions, block_size, kv_heads, size, narrow, window, out)
    else:
        for _ in numba.prange(threads):
            _items(
                counter, q, k, v, tables, sequence, positions, block_size, kv_heads, size, narrow, window, out
            )
    return True
