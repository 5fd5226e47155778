"""Dense products on CPU: ``project`` is the block product that linear layers, the gate and experts share."""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import Any

import numba
import numpy as np

from shared.kernels.jit import (
    BF16,
    FP16,
    FP32,
    I32,
    KIND_BF16,
    KIND_FP32,
    call,
    helper,
    parallel_kernel,
    routine,
    take_next,
    view1,
    view2,
)
from shared.kernels.simd import LANES, TILE_ROWS
from shared.kernels.tiles import dot_block, widen

COLUMN_BLOCK = 16
"""Output columns of one work item."""
PANEL_ROWS = 16
"""From this many rows on it pays to widen a block's weights once, ahead of the products."""


@helper
def new_panel(depth):
    """Room for a block's widened weights; rows are padded so that they do not fall on the same cache sets."""
    return np.empty((COLUMN_BLOCK, depth + LANES), np.float32)


@helper
def sequence(n):
    """0 .. n - 1 as int32."""
    numbers = np.empty(n, np.int32)
    for i in range(n):
        numbers[i] = i
    return numbers


def _project(x, numbers, rows, w, kind, cols, depth, panel, y, stride):
    inputs, xi = view2(x, 1, depth, FP32), view1(numbers, rows, I32)
    outputs = view2(y, rows, stride, FP32)
    if kind == KIND_BF16 and rows < PANEL_ROWS:
        dot_block(inputs, xi, rows, view2(w, cols, depth, BF16), 0, 0, cols, outputs, 0, 0)
        return
    wide = view2(w, cols, depth, FP32)
    if kind != KIND_FP32:
        wide = view2(panel, cols, depth + LANES, FP32)
        brain, half = view2(w, cols, depth, BF16), view2(w, cols, depth, FP16)
        for n in range(cols):
            for k in range(depth):
                wide[n, k] = widen(brain[n, k]) if kind == KIND_BF16 else widen(half[n, k])
    for m in range(0, rows, TILE_ROWS):  # few rows at a time: they stay in the first-level cache
        part = xi[m : m + TILE_ROWS]
        dot_block(inputs, part, len(part), wide, 0, 0, cols, outputs, m, 0)


def compile_project() -> Any:
    """The routine y[r, c] = x[numbers[r]] . w[c] for up to COLUMN_BLOCK rows of w.

    Arguments, int64: addresses of x (fp32 rows of ``depth``) and numbers (int32), rows, address and kind of w, its
    rows, depth, address of a panel, address of y (fp32) and elements from one row of y to the next.
    """
    return routine("void(" + ", ".join(["int64"] * 10) + ")", _project)


@helper
def weight_stride(depth, kind):
    """Bytes of a weight row."""
    return depth * 4 if kind == KIND_FP32 else depth * 2


@helper
def _items(counter, project, x, w, kind, bias, y, rows, depth, cols):
    numbers, panel = sequence(rows), new_panel(depth)
    outputs, offsets = view2(y, rows, cols, FP32), view1(bias, cols, FP32)
    while True:
        first = take_next(counter) * COLUMN_BLOCK
        if first >= cols:
            return
        count = min(COLUMN_BLOCK, cols - first)
        weights = w + first * weight_stride(depth, kind)
        call(project, (x, numbers, rows, weights, kind, count, depth, panel, y + first * 4, cols))
        for m in range(rows if bias else 0):
            for n in range(first, first + count):
                outputs[m, n] += offsets[n]


@parallel_kernel
def linear(threads, project, x, w, kind, bias, y, rows, depth, cols):
    """y [rows, cols] = x [rows, depth] @ w [cols, depth].T + bias; x, w, bias (or 0) and y are addresses."""
    counter = np.zeros(1, np.int64)
    if threads == 1:
        _items(counter, project, x, w, kind, bias, y, rows, depth, cols)
    else:
        for _ in numba.prange(threads):
            _items(counter, project, x, w, kind, bias, y, rows, depth, cols)
