"""Causal attention over the paged cache on CPU.

Each (row, head) takes its positions in ascending order, whatever the block layout: all scores first, then the softmax
with its fixed-order sum, then the values one position after the other. Only the loops around that are arranged for
reuse: the heads of a group share a key, and up to ROW_GROUP rows of a sequence share a stretch of positions.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import Any

import numba
import numpy as np

from shared.kernels.cpu_elementwise import softmax, softmax_beside
from shared.kernels.jit import FP32, I32, I64, call, helper, parallel_kernel, routine, take_next, view1, view2
from shared.kernels.tiles import MIX_LANES, dot_block, mix_block

ROW_GROUP = 8
"""Consecutive rows of one work item, when there are enough rows."""
STRETCH = 64
"""Cache positions that are used for all rows of a work item before the next ones are touched."""


@helper
def _softmaxes(scores, starts, ends, group, scale, sinks, totals):
    """Turn scores [rows * group, positions] into weights, each row over its own range of positions, and ``totals``.

    sinks: address of fp32 [group], or 0.
    """
    beside = view1(sinks, group, FP32)
    for t in range(len(ends)):
        for g in range(group):
            row, count = scores[t * group + g, starts[t] :], ends[t] - starts[t]
            if sinks:
                totals[t * group + g] = softmax_beside(row, count, scale, beside[g])
            else:
                totals[t * group + g] = softmax(row, count, scale)


def _attend(q, k, v, sinks, cache, ranges, scores, out, rows, heads, group, depth, width, stride, length, scale):
    queries, outputs = view2(q, rows * heads, depth, FP32), view2(out, rows * heads, width, FP32)
    keys, values = view2(k, 1, depth, FP32), view2(v, 1, stride, FP32)
    at, scored = view1(cache, length, I64), view2(scores, rows * group, length, FP32)
    starts, ends = view1(ranges, rows, I64), view1(ranges + rows * 8, rows, I64)
    for near in range(starts[0], length, STRETCH):
        for t in range(rows):
            a, b = max(near, starts[t]), min(near + STRETCH, ends[t])
            dot_block(queries, t * heads, group, keys, at, a, max(a, b), scored, t * group, a)
    totals = view1(scores + rows * group * length * 4, rows * group, FP32)
    _softmaxes(scored, starts, ends, group, np.float32(scale), sinks, totals)
    for t in range(rows):
        for g in range(group):
            for d in range(width):
                outputs[t * heads + g, d] = np.float32(0)
    for near in range(starts[0], length, STRETCH):
        for t in range(rows):
            a, b = max(near, starts[t]), min(near + STRETCH, ends[t])
            for d in range(0, width, MIX_LANES):
                lanes = min(MIX_LANES, width - d)
                mix_block(scored, t * group, group, a, max(a, b), values, at, outputs, t * heads, d, lanes)
    for t in range(rows):
        for g in range(group):
            for d in range(width):
                outputs[t * heads + g, d] /= totals[t * group + g]


def compile_attend() -> Any:
    """The routine: one key-value head, consecutive rows of one sequence.

    Arguments, int64: addresses of q (its first head of the group), k, v, the group's sinks (or 0), the positions' rows
    in k and v (int64), the rows' ranges of positions (int64 starts, then ends), room for rows * group * (length + 1)
    fp32, out; then rows, heads from one row of q to the next, heads of the group, D, width of values and of out,
    elements from one value to the next, cache positions of the last row; float64: scale.
    """
    return routine("void(" + "int64, " * 15 + "float64)", _attend)


@helper
def _locate(table, block_size, kv_heads, head, at):
    """Where a sequence's positions lie in the cache seen as [slots * kv_heads, D]."""
    for p in range(len(at)):
        slot = np.int64(table[p // block_size]) * block_size + p % block_size
        at[p] = slot * kv_heads + head


@helper
def _run(sequence, positions, first, stop):
    """End of the rows from ``first`` on that belong to one sequence at rising positions."""
    last = first + 1
    while last < stop and sequence[last] == sequence[first] and positions[last] > positions[last - 1]:
        last += 1
    return last


@helper
def _first_seen(end, window, chunk):
    """The first of positions 0 .. end - 1 that the last of them sees."""
    first = max(0, end - window) if window else 0
    return max(first, (end - 1) // chunk * chunk) if chunk else first


@helper
def _items(counter, attend, addresses, sizes, size, sees, scale):
    rows, heads, kv_heads, depth, width, stride, _, block_size, sequences, max_blocks = sizes
    q, k, v, _, _, _, sinks, out = addresses
    tables = view2(addresses[3], sequences, max_blocks, I32)
    sequence, positions = view1(addresses[4], rows, I32), view1(addresses[5], rows, I32)
    group, longest = heads // kv_heads, 0
    for t in range(rows):
        longest = max(longest, np.int64(positions[t]) + 1)
    at = np.empty(longest, np.int64)
    ranges, scores = np.empty(2 * size, np.int64), np.empty(size * group * (longest + 1), np.float32)
    while True:
        item = take_next(counter)
        first, head = item // kv_heads * size, item % kv_heads
        if first >= rows:
            return
        stop = min(first + size, rows)
        while first < stop:
            last = _run(sequence, positions, first, stop)
            count, length = last - first, np.int64(positions[last - 1]) + 1
            _locate(tables[sequence[first]], block_size, kv_heads, head, at[:length])
            for t in range(count):
                end = np.int64(positions[first + t]) + 1
                ranges[t], ranges[count + t] = _first_seen(end, sees[0], sees[1]), end
            skip, beside = first * heads + head * group, sinks + head * group * 4 if sinks else 0
            rest = (count, heads, group, depth, width, stride, length, scale)
            call(attend, (q + skip * depth * 4, k, v, beside, at, ranges, scores, out + skip * width * 4, *rest))
            first = last


@helper
def _known(addresses, sizes):
    """Whether every block that a row will read exists: nothing outside the cache may be touched."""
    rows, _, _, _, _, _, blocks, block_size, sequences, max_blocks = sizes
    tables = view2(addresses[3], sequences, max_blocks, I32)
    sequence, positions = view1(addresses[4], rows, I32), view1(addresses[5], rows, I32)
    for t in range(rows):
        s, used = sequence[t], positions[t] // block_size + 1
        if s < 0 or s >= sequences or positions[t] < 0 or used > max_blocks:
            return False
        for b in range(used):
            if tables[s, b] < 0 or tables[s, b] >= blocks:
                return False
    return True


@parallel_kernel
def attention(threads, attend, addresses, sizes, sees, scale):
    """See ``Kernels.attention``. Returns False, having written nothing, when a row needs a block that there is not.

    addresses: q, k, v, tables, sequence, positions, sinks (or 0), out (fp32 and int32); sizes: rows (at least 1),
    heads, kv_heads, D, width of values, elements from one value to the next, blocks, block_size, sequences, max_blocks;
    sees: window and chunk.
    """
    if not _known(addresses, sizes):
        return False
    counter = np.zeros(1, np.int64)
    size = ROW_GROUP if sizes[0] >= ROW_GROUP * threads else 1
    if threads == 1:
        _items(counter, attend, addresses, sizes, size, sees, scale)
    else:
        for _ in numba.prange(threads):
            _items(counter, attend, addresses, sizes, size, sees, scale)
    return True
