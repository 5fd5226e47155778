"""The grouped feed-forward of one layer's experts on CPU, straight from where the weights lie (memory-mapped files).

Work items are (expert, block of output columns): first gate, up and activation for all experts, then, after all threads
are done with that, down. A block's weights are read once for all rows of its expert.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numba
import numpy as np

from shared.kernels.cpu_elementwise import activate
from shared.kernels.cpu_linear import item_columns, item_count, item_width, new_block, new_columns, new_panel, sequence
from shared.kernels.jit import FP32, I32, I64, call, helper, parallel_kernel, take_next, view1, view2


@helper
def segments(ids):
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
def _take_item(counter, starts, cols, width, columns):
    """The next work item: (segment or -1 at the end, how many columns)."""
    item, each = take_next(counter), item_count(cols, width)
    if item >= (len(starts) - 1) * each:
        return -1, 0
    return item // each, item_columns(item % each, width, cols, columns)


@helper
def _add_bias(block, rows, address, cols, columns, count):
    """Add what belongs to these columns of a bias (fp32 at an address; 0: none) to rows of their products."""
    bias = view1(address, cols, FP32)
    for r in range(rows if address else 0):
        for n in range(count):
            block[r, n] += bias[columns[n]]


@helper
def _gate_up(counter, project, x, tokens, ids, starts, table, kind, activation, hidden, width):
    """hidden[p] = activation(gate x) * (up x) for every part p."""
    depth, cols = x.shape[1], hidden.shape[1]
    panel, columns, gates, ups = (
        new_panel(depth),
        new_columns(width),
        new_block(len(ids), width),
        new_block(len(ids), width),
    )
    stride = gates.shape[1]
    while True:
        segment, count = _take_item(counter, starts, cols, width, columns)
        if segment < 0:
            return
        a, b = starts[segment], starts[segment + 1]
        expert, numbers = ids[a], tokens[a:b]
        call(project, (x, numbers, b - a, table[expert, 0], kind, columns, count, depth, panel, gates, stride))
        call(project, (x, numbers, b - a, table[expert, 1], kind, columns, count, depth, panel, ups, stride))
        _add_bias(gates, b - a, table[expert, 3], cols, columns, count)
        _add_bias(ups, b - a, table[expert, 4], cols, columns, count)
        for r in range(b - a):
            activate(gates[r, :count], ups[r], activation)
            for n in range(count):
                hidden[a + r, columns[n]] = gates[r, n]


@helper
def _down(counter, project, hidden, numbers, ids, starts, table, kind, out, width):
    """out[p] = down hidden[p] for every part p."""
    depth, cols = hidden.shape[1], out.shape[1]
    panel, columns, block = new_panel(depth), new_columns(width), new_block(len(ids), width)
    while True:
        segment, count = _take_item(counter, starts, cols, width, columns)
        if segment < 0:
            return
        a, b = starts[segment], starts[segment + 1]
        down = table[ids[a], 2]
        call(project, (hidden, numbers[a:b], b - a, down, kind, columns, count, depth, panel, block, block.shape[1]))
        _add_bias(block, b - a, table[ids[a], 5], cols, columns, count)
        for r in range(b - a):
            for n in range(count):
                out[a + r, columns[n]] = block[r, n]


@helper
def valid(tokens, ids, rows, table):
    for p in range(len(ids)):
        if tokens[p] < 0 or tokens[p] >= rows or ids[p] < 0 or ids[p] >= len(table):
            return False
        if table[ids[p], 0] == 0 or (p and ids[p] < ids[p - 1]):
            return False
    return True


@parallel_kernel
def experts(threads, project, addresses, sizes, kind, activation):
    """See ``Kernels.experts``. Returns False, having written nothing, when an id or a token is not valid.

    addresses: x, tokens, ids, table (int64 [experts, 6]: gate, up, down, 0 = not resident; their biases, 0 = none),
    out; sizes: rows, hidden, expert_hidden, parts (at least 1), experts.
    """
    rows, width, inner, count, known = sizes
    x, out = view2(addresses[0], rows, width, FP32), view2(addresses[4], count, width, FP32)
    tokens, ids = view1(addresses[1], count, I32), view1(addresses[2], count, I32)
    table = view2(addresses[3], known, 6, I64)
    if not valid(tokens, ids, rows, table):
        return False
    starts, parts = segments(ids), sequence(count)
    wide, narrow = item_width(inner, len(starts) - 1, threads), item_width(width, len(starts) - 1, threads)
    hidden, first, second = np.empty((count, inner), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64)
    if threads == 1:
        _gate_up(first, project, x, tokens, ids, starts, table, kind, activation, hidden, wide)
        _down(second, project, hidden, parts, ids, starts, table, kind, out, narrow)
    else:
        for _ in numba.prange(threads):
            _gate_up(first, project, x, tokens, ids, starts, table, kind, activation, hidden, wide)
        for _ in numba.prange(threads):
            _down(second, project, hidden, parts, ids, starts, table, kind, out, narrow)
    return True
