"""The grouped feed-forward of one layer's experts on CPU, straight from where the weights lie (memory-mapped files).

Work items are (expert, block of output columns): first gate, up and activation for all experts, then, after all threads
are done with that, down. A block's weights are read once for all rows of its expert.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numba
import numpy as np

from shared.kernels.cpu_elementwise import activate
from shared.kernels.cpu_linear import COLUMN_BLOCK, new_panel, sequence, weight_stride
from shared.kernels.jit import FP32, I32, I64, call, helper, parallel_kernel, take_next, view1, view2


@helper
def _segments(ids):
    """Where each run of equal ids starts, and the end."""
    starts = np.empty(len(ids) + 1, np.int64)
    count = 0
    for p in range(len(ids)):
        if p == 0 or ids[p] != ids[p - 1]:
            starts[count] = p
            count += 1
    starts[count] = len(ids)
    return starts[: count + 1]


@helper
def _take_block(counter, starts, width):
    """The next work item: (segment or -1 at the end, first column, columns)."""
    blocks = (width + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    item = take_next(counter)
    first = item % blocks * COLUMN_BLOCK
    segment = item // blocks if item < (len(starts) - 1) * blocks else -1
    return segment, first, min(COLUMN_BLOCK, width - first)


@helper
def _gate_up(counter, project, x, tokens, ids, starts, table, kind, activation, hidden):
    """hidden[p] = activation(gate x) * (up x) for every part p."""
    depth, width = x.shape[1], hidden.shape[1]
    panel, ups = new_panel(depth), np.empty((len(ids), COLUMN_BLOCK), np.float32)
    while True:
        segment, first, cols = _take_block(counter, starts, width)
        if segment < 0:
            return
        a, b = starts[segment], starts[segment + 1]
        expert, numbers, skip = ids[a], tokens[a:b], first * weight_stride(depth, kind)
        gate, up, block = table[expert, 0] + skip, table[expert, 1] + skip, hidden[a:b, first:]
        call(project, (x, numbers, b - a, gate, kind, cols, depth, panel, block, width))
        call(project, (x, numbers, b - a, up, kind, cols, depth, panel, ups, COLUMN_BLOCK))
        for p in range(a, b):
            activate(hidden[p, first : first + cols], ups[p - a], activation)


@helper
def _down(counter, project, hidden, numbers, ids, starts, table, kind, out):
    """out[p] = down hidden[p] for every part p."""
    depth, width = hidden.shape[1], out.shape[1]
    panel = new_panel(depth)
    while True:
        segment, first, cols = _take_block(counter, starts, width)
        if segment < 0:
            return
        a, b = starts[segment], starts[segment + 1]
        down, block = table[ids[a], 2] + first * weight_stride(depth, kind), out[a:b, first:]
        call(project, (hidden, numbers[a:b], b - a, down, kind, cols, depth, panel, block, width))


@helper
def _valid(tokens, ids, rows, table):
    for p in range(len(ids)):
        if tokens[p] < 0 or tokens[p] >= rows or ids[p] < 0 or ids[p] >= len(table):
            return False
        if table[ids[p], 0] == 0 or (p and ids[p] < ids[p - 1]):
            return False
    return True


@parallel_kernel
def experts(threads, project, addresses, sizes, kind, activation):
    """See ``Kernels.experts``. Returns False, having written nothing, when an id or a token is not valid.

    addresses: x, tokens, ids, table (int64 [experts, 3], 0 = not resident), out; sizes: rows, hidden, expert_hidden,
    parts (at least 1), experts.
    """
    rows, width, inner, count, known = sizes
    x, out = view2(addresses[0], rows, width, FP32), view2(addresses[4], count, width, FP32)
    tokens, ids = view1(addresses[1], count, I32), view1(addresses[2], count, I32)
    table = view2(addresses[3], known, 3, I64)
    if not _valid(tokens, ids, rows, table):
        return False
    starts, parts = _segments(ids), sequence(count)
    hidden, first, second = np.empty((count, inner), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64)
    if threads == 1:
        _gate_up(first, project, x, tokens, ids, starts, table, kind, activation, hidden)
        _down(second, project, hidden, parts, ids, starts, table, kind, out)
    else:
        for _ in numba.prange(threads):
            _gate_up(first, project, x, tokens, ids, starts, table, kind, activation, hidden)
        for _ in numba.prange(threads):
            _down(second, project, hidden, parts, ids, starts, table, kind, out)
    return True
