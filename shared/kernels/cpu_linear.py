"""Dense products on CPU: ``project`` is the block product that linear layers, the gate and experts share."""

import numba
import numpy as np

from shared.kernels.jit import BF16, FP16, FP32, parallel_kernel, take_next, view1, view2
from shared.kernels.simd import LANES, TILE_ROWS, dot_block, widen

COLUMN_BLOCK = 16
"""Output columns of one work item."""
PANEL_ROWS = 16
"""From this many rows on it pays to widen a block's weights once, ahead of the products."""
KIND_FP32, KIND_BF16, KIND_FP16 = 0, 1, 2
"""How a kernel is told the dtype of weights."""


@numba.njit(nogil=True)
def new_panel(depth):  # noqa: ANN001, ANN201
    """Room for a block's widened weights; rows are padded so that they do not fall on the same cache sets."""
    return np.empty((COLUMN_BLOCK, depth + LANES), np.float32)


@numba.njit(nogil=True)
def sequence(n):  # noqa: ANN001, ANN201
    """0 .. n - 1 as int32."""
    numbers = np.empty(n, np.int32)
    for i in range(n):
        numbers[i] = i
    return numbers


@numba.njit(nogil=True)
def _widen_block(w, kind, cols, depth, panel):  # noqa: ANN001, ANN202
    """Copy weight rows at an address into the panel, as fp32."""
    brain, half = view2(w, cols, depth, BF16), view2(w, cols, depth, FP16)
    for n in range(cols):
        if kind == KIND_BF16:
            for k in range(depth):
                panel[n, k] = widen(brain[n, k])
        else:
            for k in range(depth):
                panel[n, k] = widen(half[n, k])


@numba.njit(nogil=True)
def project(x, xi, w, kind, cols, panel, y, i, j):  # noqa: ANN001, ANN201
    """y[i + r, j + c] = x[xi[r]] . w[c] for all of xi and up to COLUMN_BLOCK rows of w, which is an address."""
    rows, depth = len(xi), x.shape[1]
    if kind == KIND_BF16 and rows < PANEL_ROWS:
        dot_block(x, xi, rows, view2(w, cols, depth, BF16), 0, 0, cols, y, i, j)
        return
    wide = panel
    if kind == KIND_FP32:
        wide = view2(w, cols, depth, FP32)
    else:
        _widen_block(w, kind, cols, depth, panel)
    for m in range(0, rows, TILE_ROWS):  # few rows at a time: they stay in the first-level cache
        part = xi[m : m + TILE_ROWS]
        dot_block(x, part, len(part), wide, 0, 0, cols, y, i + m, j)


@numba.njit(nogil=True)
def _items(counter, x, w, kind, bias, y):  # noqa: ANN001, ANN202
    rows, depth = x.shape
    cols = y.shape[1]
    every, panel = sequence(rows), new_panel(depth)
    stride = depth * (4 if kind == KIND_FP32 else 2)
    while True:
        first = take_next(counter) * COLUMN_BLOCK
        if first >= cols:
            return
        count = min(COLUMN_BLOCK, cols - first)
        project(x, every, w + first * stride, kind, count, panel, y, 0, first)
        for m in range(rows if len(bias) else 0):
            for n in range(first, first + count):
                y[m, n] += bias[n]


@parallel_kernel
def linear(threads, x, w, kind, bias, y, rows, depth, cols):  # noqa: ANN001, ANN201
    """y [rows, cols] = x [rows, depth] @ w [cols, depth].T + bias; x, w, bias (or 0) and y are addresses."""
    counter = np.zeros(1, np.int64)
    inputs, outputs = view2(x, rows, depth, FP32), view2(y, rows, cols, FP32)
    offsets = view1(bias, cols if bias else 0, FP32)
    if threads == 1:
        _items(counter, inputs, w, kind, offsets, outputs)
    else:
        for _ in numba.prange(threads):
            _items(counter, inputs, w, kind, offsets, outputs)
