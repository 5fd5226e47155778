"""Dense products on CPU with bf16 weights and AMX tiles: what ``cpu_linear`` does on CPUs without them."""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numba
import numpy as np

from shared.kernels.amx import DEPTH, TILE, release
from shared.kernels.amx_blocks import (
    STREAMS,
    block_columns,
    block_rows,
    breadth,
    depth_steps,
    item_count,
    item_tile,
    new_block,
    new_products,
    new_shapes,
    packed_bytes,
    set_shapes,
    sum_parts,
)
from shared.kernels.cpu_linear import sequence
from shared.kernels.jit import BF16, FP32, call, helper, parallel_kernel, take_next, view1, view2

CHUNK_BYTES = 1 << 20
"""Rows are multiplied in chunks whose packed form is no larger: it stays in the second-level cache."""


@helper
def new_spare(cols, depth):
    """Room for the tiles of an item that must be padded; none for sizes that never need it."""
    return np.zeros((STREAMS if cols % TILE or depth % DEPTH else 0, TILE, depth_steps(depth) * DEPTH), np.int16)


@helper
def _padded(at, valid, depth, spare):
    """Address of a copy of ``valid`` weight rows that is padded with zeros to a whole tile."""
    rows = view2(at, valid, depth, BF16)
    for r in range(TILE):
        for k in range(depth):
            spare[r, k] = rows[r, k] if r < valid else 0
    return np.int64(spare.ctypes.data)


@helper
def find_tiles(w, item, cols, depth, spare, tiles):
    """Fill ``tiles`` with where the weights of an item lie; a stream that has none reads those of the first."""
    for stream in range(STREAMS):
        first = item_tile(item, stream, cols) * TILE
        at, valid = w + first * depth * 2, min(TILE, cols - first)
        if valid <= 0:
            tiles[stream] = tiles[0]
        elif valid == TILE and depth % DEPTH == 0:
            tiles[stream] = at
        else:
            tiles[stream] = _padded(at, valid, depth, spare[stream])


@helper
def find_next(w, item, cols, depth, tiles):
    """Fill ``tiles`` with where memory is to be read for an item."""
    for stream in range(STREAMS):
        tiles[stream] = w + item_tile(item, stream, cols) * TILE * depth * 2


@helper
def new_tiles():
    """Room for the addresses of an item's tiles."""
    return np.empty(STREAMS, np.int64)


@helper
def add_bias(bias, item, count, y, cols):
    """Add a bias (fp32 at an address; 0: none) to an item's products in rows of ``cols`` at y."""
    offsets, rows = view1(bias, cols, FP32), view2(y, count, cols, FP32)
    for stream in range(STREAMS if bias else 0):
        first = item_tile(item, stream, cols) * TILE
        for t in range(count):
            for n in range(first, min(first + TILE, cols)):
                rows[t, n] += offsets[n]


@helper
def _pack_all(me, threads, pack, x, parts, rows, depth, packed):
    numbers, most = sequence(rows), block_rows(parts)
    for first in range(me * most, rows, threads * most):
        target = packed.ctypes.data + packed_bytes(first, depth, parts)
        call(pack, (x, numbers[first:], min(most, rows - first), depth, parts, target))


@helper
def _items(counter, routines, packed, parts, w, bias, y, rows, depth, cols):
    each, most, (_, multiply, store) = item_count(cols), block_rows(parts), routines
    chunk = max(1, CHUNK_BYTES // packed_bytes(most, depth, parts)) * most
    total = (rows + chunk - 1) // chunk * each
    tiles, ahead, spare = new_tiles(), new_tiles(), new_spare(cols, depth)
    shapes, products, block = new_shapes(), new_products(), new_block()
    following = take_next(counter)
    while following < total:
        number, following = following, take_next(counter)
        item, begin = number % each, number // each * chunk
        find_tiles(w, item, cols, depth, spare, tiles)
        find_next(w, following % each, cols, depth, ahead)
        if following >= total:
            ahead[0] = 0
        for first in range(begin, min(begin + chunk, rows), most):
            count, target = min(most, rows - first), y + first * cols * 4
            right, columns = packed.ctypes.data + packed_bytes(first, depth, parts), block_columns(count, parts)
            set_shapes(shapes, columns)
            call(multiply, (tiles, ahead, right, columns, depth, products))
            sum_parts(products, count, parts, block)
            call(store, (block, item, count, breadth(count, parts), target, cols))
            add_bias(bias, item, count, target, cols)
            ahead[0] = 0
    release()


@parallel_kernel
def linear(threads, routines, parts, x, w, bias, y, rows, depth, cols):
    """y [rows, cols] = x [rows, depth] @ w [cols, depth].T + bias; x, w (bf16), bias (or 0) and y are addresses.

    routines: addresses of those of ``amx_blocks``; parts: of each row, 1 or 3.
    """
    counter, packed = np.zeros(1, np.int64), np.empty(packed_bytes(rows, depth, parts), np.uint8)
    if threads == 1 or rows <= TILE:
        _pack_all(0, 1, routines[0], x, parts, rows, depth, packed)
    else:
        for me in numba.prange(threads):
            _pack_all(me, threads, routines[0], x, parts, rows, depth, packed)
    if threads == 1:
        _items(counter, routines, packed, parts, w, bias, y, rows, depth, cols)
    else:
        for _ in numba.prange(threads):
            _items(counter, routines, packed, parts, w, bias, y, rows, depth, cols)
