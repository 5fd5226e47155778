"""Dense products on CPU: ``project`` is the block product that linear layers, the gate and experts share."""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import Any

import numba
import numpy as np

from shared.kernels.jit import (
    BF16,
    FP8,
    FP16,
    FP32,
    I32,
    I64,
    KIND_BF16,
    KIND_FP8,
    KIND_FP16,
    KIND_FP32,
    call,
    helper,
    parallel_kernel,
    routine,
    take_next,
    view1,
    view2,
)
from shared.kernels.simd import E4M3_UNIT, LANES, TILE_ROWS
from shared.kernels.tiles import dot_block, widen, widen_rows

STREAMS = 4
"""A work item reads so many places of a matrix side by side, each in order: prefetchers of the hardware follow each."""
WIDE_ITEM, NARROW_ITEM = 64, 16
"""Output columns of a work item; the narrow one when there would be too few for all threads."""
MOST_ROWS = 32
"""That meet bf16 weights at a time: they stay in the second-level cache while columns pass."""
PANEL_COLS = 16


@helper
def new_panel(depth):
    """Room for some columns' widened weights; rows are padded so that they do not fall on the same cache sets.

    Or for as many rows rounded to bf16 (pairs.py).
    """
    return np.empty((PANEL_COLS, depth + 2 * LANES), np.float32)


@helper
def sequence(n):
    """0 .. n - 1 as int32."""
    numbers = np.empty(n, np.int32)
    for i in range(n):
        numbers[i] = i
    return numbers


@helper
def item_width(cols, matrices, threads):
    """Columns of a work item for products with ``matrices`` weights of ``cols`` columns."""
    return WIDE_ITEM if cols * matrices >= 4 * WIDE_ITEM * threads else NARROW_ITEM


@helper
def item_count(cols, width):
    """Work items of one matrix."""
    return max(1, (cols // STREAMS * STREAMS + width - 1) // width)


@helper
def item_columns(item, width, cols, columns):
    """Fill ``columns`` with those of a work item, neighbours far apart; returns how many."""
    span, rows = cols // STREAMS, width // STREAMS
    n, last = 0, min((item + 1) * rows, span)
    for row in range(item * rows, last):
        for stream in range(STREAMS):
            columns[n] = stream * span + row
            n += 1
    for column in range(STREAMS * span, cols if last == span else 0):
        columns[n] = column
        n += 1
    return n


@helper
def new_columns(width):
    """Room for the columns of a work item of this width."""
    return np.empty(width + STREAMS, np.int32)


@helper
def new_block(rows, width):
    """Room for the products of a work item."""
    return np.empty((rows, width + STREAMS), np.float32)


@helper
def _fp8_rows(w, depth):
    """(values, factors, sizes of a block) of ``Fp8Blocks.where`` at an address."""
    where = view1(w, 4, I64)
    across = (depth + where[3] - 1) // where[3]
    return view2(where[0], 1, depth, FP8), view2(where[1], 1, across, FP32), where[2], where[3]


@helper
def _whole_vectors(w):
    """Whether FP8 blocks begin where vectors do."""
    return view1(w, 4, I64)[3] % LANES == 0


@helper
def _widen_odd_fp8(w, columns, depth, wide):
    """For blocks of any width."""
    values, factors, high, apart = _fp8_rows(w, depth)
    for near in range(0, depth, apart):
        for n in range(len(columns)):
            factor = factors[columns[n] // high, near // apart] * np.float32(E4M3_UNIT)
            for k in range(near, min(near + apart, depth)):
                wide[n, k] = widen(values[columns[n], k]) * factor


@helper
def _widen_columns(w, kind, columns, depth, wide):
    if kind == KIND_BF16:
        widen_rows(view2(w, 1, depth, BF16), columns, wide)
    elif kind == KIND_FP16:
        widen_rows(view2(w, 1, depth, FP16), columns, wide)
    elif _whole_vectors(w):
        widen_rows(_fp8_rows(w, depth), columns, wide)
    else:
        _widen_odd_fp8(w, columns, depth, wide)


def _project(x, numbers, rows, w, kind, columns, cols, depth, panel, y, stride):
    inputs, xi = view2(x, 1, depth, FP32), view1(numbers, rows, I32)
    outputs, wi = view2(y, rows, stride, FP32), view1(columns, cols, I32)
    if kind == KIND_BF16:
        for m in range(0, rows, MOST_ROWS):
            part = xi[m : m + MOST_ROWS]
            dot_block(inputs, part, len(part), view2(w, 1, depth, BF16), wi, 0, cols, outputs, m, 0)
        return
    if rows <= TILE_ROWS and kind == KIND_FP8 and _whole_vectors(w):
        dot_block(inputs, xi, rows, _fp8_rows(w, depth), wi, 0, cols, outputs, 0, 0)
        return
    if kind == KIND_FP32:
        for m in range(0, rows, TILE_ROWS):  # few rows at a time: they stay in the first-level cache
            part = xi[m : m + TILE_ROWS]
            dot_block(inputs, part, len(part), view2(w, 1, depth, FP32), wi, 0, cols, outputs, m, 0)
        return
    wide = view2(panel, PANEL_COLS, depth + LANES, FP32)
    for first in range(0, cols, PANEL_COLS):
        some = wi[first : first + PANEL_COLS]
        _widen_columns(w, kind, some, depth, wide)
        for m in range(0, rows, TILE_ROWS):
            part = xi[m : m + TILE_ROWS]
            dot_block(inputs, part, len(part), wide[:, :depth], 0, 0, len(some), outputs, m, first)


def compile_project() -> Any:
    """The routine y[r, c] = x[numbers[r]] . w[columns[c]].

    Arguments, int64: addresses of x (fp32 rows of ``depth``) and numbers (int32), rows, address and kind of w, address
    of columns (int32), how many, depth, address of a panel, address of y (fp32) and elements from one row of y to the
    next.
    """
    return routine("void(" + ", ".join(["int64"] * 11) + ")", _project)


@helper
def _items(counter, project, x, w, kind, bias, y, rows, depth, cols, width):
    numbers, panel, columns, block = sequence(rows), new_panel(depth), new_columns(width), new_block(rows, width)
    outputs, offsets = view2(y, rows, cols, FP32), view1(bias, cols, FP32)
    while True:
        item = take_next(counter)
        if item >= item_count(cols, width):
            return
        count = item_columns(item, width, cols, columns)
        call(project, (x, numbers, rows, w, kind, columns, count, depth, panel, block, block.shape[1]))
        for m in range(rows):
            for n in range(count):
                column = columns[n]
                outputs[m, column] = block[m, n] + offsets[column] if bias else block[m, n]


@parallel_kernel
def linear(threads, project, x, w, kind, bias, y, rows, depth, cols):
    """y [rows, cols] = x [rows, depth] @ w [cols, depth].T + bias; x, w, bias (or 0) and y are addresses."""
    counter, width = np.zeros(1, np.int64), item_width(cols, 1, threads)
    if threads == 1:
        _items(counter, project, x, w, kind, bias, y, rows, depth, cols, width)
    else:
        for _ in numba.prange(threads):
            _items(counter, project, x, w, kind, bias, y, rows, depth, cols, width)
