"""The grouped feed-forward of one layer's experts on CPU, straight from where the weights lie (memory-mapped files).

Work items are (expert, block of output columns): first gate, up and activation for all experts, then, after all threads
are done with that, down. A block's weights are read once for all rows of its expert.
"""

import numba
import numpy as np

from shared.kernels.cpu_elementwise import activate
from shared.kernels.cpu_linear import COLUMN_BLOCK, KIND_FP32, new_panel, project, sequence
from shared.kernels.jit import FP32, I32, I64, parallel_kernel, take_next, view1, view2


@numba.njit(nogil=True)
def _segments(ids):  # noqa: ANN001, ANN202
    """Where each run of equal ids starts, and the end."""
    starts = np.empty(len(ids) + 1, np.int64)
    count = 0
    for p in range(len(ids)):
        if p == 0 or ids[p] != ids[p - 1]:
            starts[count] = p
            count += 1
    starts[count] = len(ids)
    return starts[: count + 1]


@numba.njit(nogil=True)
def _gate_up(counter, x, tokens, ids, starts, table, kind, activation, hidden):  # noqa: ANN001, ANN202
    """hidden[p] = activation(gate x) * (up x) for every part p."""
    depth, width = x.shape[1], hidden.shape[1]
    blocks, stride = (width + COLUMN_BLOCK - 1) // COLUMN_BLOCK, depth * (4 if kind == KIND_FP32 else 2)
    panel, ups = new_panel(depth), np.empty((len(ids), COLUMN_BLOCK), np.float32)
    while True:
        item = take_next(counter)
        if item >= (len(starts) - 1) * blocks:
            return
        segment, first = item // blocks, item % blocks * COLUMN_BLOCK
        a, b, count = starts[segment], starts[segment + 1], min(COLUMN_BLOCK, width - first)
        rows, expert = tokens[a:b], ids[a]
        project(x, rows, table[expert, 0] + first * stride, kind, count, panel, hidden, a, first)
        project(x, rows, table[expert, 1] + first * stride, kind, count, panel, ups, 0, 0)
        for p in range(a, b):
            activate(hidden[p, first : first + count], ups[p - a], activation)


@numba.njit(nogil=True)
def _down(counter, hidden, parts, ids, starts, table, kind, out):  # noqa: ANN001, ANN202
    """out[p] = down hidden[p] for every part p."""
    depth, width = hidden.shape[1], out.shape[1]
    blocks, stride = (width + COLUMN_BLOCK - 1) // COLUMN_BLOCK, depth * (4 if kind == KIND_FP32 else 2)
    panel = new_panel(depth)
    while True:
        item = take_next(counter)
        if item >= (len(starts) - 1) * blocks:
            return
        segment, first = item // blocks, item % blocks * COLUMN_BLOCK
        a, b, count = starts[segment], starts[segment + 1], min(COLUMN_BLOCK, width - first)
        weights = table[ids[a], 2] + first * stride
        project(hidden, parts[a:b], weights, kind, count, panel, out, a, first)


@numba.njit(nogil=True)
def _valid(tokens, ids, rows, table):  # noqa: ANN001, ANN202
    for p in range(len(ids)):
        if tokens[p] < 0 or tokens[p] >= rows or ids[p] < 0 or ids[p] >= len(table):
            return False
        if table[ids[p], 0] == 0 or (p and ids[p] < ids[p - 1]):
            return False
    return True


@parallel_kernel
def experts(threads, addresses, sizes, kind, activation):  # noqa: ANN001, ANN201
    """See ``Kernels.experts``. Returns False, having written nothing, when an id or a token is not valid.

    addresses: x, tokens, ids, table (int64 [experts, 3], 0 = not resident), out; sizes: rows, hidden, expert_hidden, parts,
    experts.
    """
    rows, width, inner, count, known = sizes
    x, out = view2(addresses[0], rows, width, FP32), view2(addresses[4], count, width, FP32)
    tokens, ids = view1(addresses[1], count, I32), view1(addresses[2], count, I32)
    table = view2(addresses[3], known, 3, I64)
    if not _valid(tokens, ids, rows, table):
        return False
    if count == 0:
        return True
    starts, parts = _segments(ids), sequence(count)
    hidden, counters = np.empty((count, inner), np.float32), np.zeros((2, 8), np.int64)
    if threads == 1:
        _gate_up(counters[0], x, tokens, ids, starts, table, kind, activation, hidden)
        _down(counters[1], hidden, parts, ids, starts, table, kind, out)
    else:
        for _ in numba.prange(threads):
            _gate_up(counters[0], x, tokens, ids, starts, table, kind, activation, hidden)
        for _ in numba.prange(threads):
            _down(counters[1], hidden, parts, ids, starts, table, kind, out)
    return True
