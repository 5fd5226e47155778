"""Blocks on AMX tiles: up to 48 columns, parts of rows, meet two tiles of weight rows at a time, a work item.

The depth is counted in steps of 32; odd sizes are padded with zeros. The tiles of an item lie far apart in the matrix:
streams that the hardware's prefetchers follow side by side.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import Any

import numpy as np

from shared.kernels.amx import (
    DEPTH,
    LEFT,
    LEFTS,
    LINE,
    MOST_PARTS,
    REGISTERS,
    RIGHT,
    TILE,
    configure,
    multiply_one,
    multiply_two,
    split,
    turn,
)
from shared.kernels.jit import FP32, I32, I64, helper, routine, view1

STREAMS = LEFTS
WIDEST = 3 * TILE
"""Most columns of a block."""


@helper
def block_rows(parts):
    """Most rows of a block when each has so many parts."""
    return WIDEST // parts


@helper
def block_columns(count, parts):
    """Columns of a packed block of ``count`` rows: less than a right tile, or two or three whole ones."""
    used = parts * count
    if used <= TILE:
        return used
    return 2 * TILE if used <= 2 * TILE else WIDEST


@helper
def breadth(count, parts):
    """Columns from one part of a block's rows to the next."""
    return count if parts * count <= 2 * TILE else WIDEST // parts


@helper
def depth_steps(depth):
    """Tiles along the depth."""
    return (depth + DEPTH - 1) // DEPTH


@helper
def packed_bytes(rows, depth, parts):
    """Size of packed rows: whole blocks, and one of what is left."""
    most = block_rows(parts)
    columns = rows // most * WIDEST + block_columns(rows % most, parts)
    return columns * depth_steps(depth) * LINE


@helper
def item_count(cols):
    """Work items of a matrix."""
    return ((cols + TILE - 1) // TILE + STREAMS - 1) // STREAMS


@helper
def item_tile(item, stream, cols):
    """Which tile a stream of an item reads; beyond the matrix there is nothing to read."""
    return stream * item_count(cols) + item


@helper
def new_shapes():
    """Memory for the shapes of a thread's tiles."""
    return np.zeros(LINE, np.uint8)


@helper
def set_shapes(shapes, columns):
    """Shape this thread's tiles for a block (layout of the 64 bytes: manual of LDTILECFG)."""
    width = 4 * min(TILE, columns)
    if shapes[16] == width:
        return
    shapes[0] = 1
    for register in range(REGISTERS):
        is_left = LEFT <= register < RIGHT
        shapes[16 + 2 * register] = LINE if is_left else width
        shapes[48 + register] = TILE
    configure(shapes)


@helper
def _split_rows(sources, apart, k, depth, spare, columns):
    """columns [3 parts, breadth, 16 pairs] = step k of every row, ``apart`` bytes for each part."""
    left = depth - k * DEPTH
    for t in range(len(sources)):
        source = sources[t] + k * DEPTH * 4
        if left < DEPTH:
            spare[:left] = view1(source, left, FP32)
            source = np.int64(spare.ctypes.data)
        split(source, columns.ctypes.data + t * LINE, apart)


def _pack_block(x, rows, count, depth, parts, out):
    numbers, sources, width = view1(rows, count, I32), np.empty(count, np.int64), block_columns(count, parts)
    columns, spare = np.zeros((MOST_PARTS * WIDEST, TILE), np.int32), np.zeros(DEPTH, np.float32)
    for t in range(count):
        sources[t] = x + numbers[t] * depth * 4
    for k in range(depth_steps(depth)):
        _split_rows(sources, breadth(count, parts) * LINE, k, depth, spare, columns)
        for first in range(0, width, TILE):
            target = out + k * width * LINE + first * 4
            turn(columns.ctypes.data + first * LINE, LINE, target, width * 4, TILE, min(TILE, width - first))


def _multiply_item(tiles, following, right, columns, depth, products):
    at, ahead = view1(tiles, STREAMS, I64), view1(following, STREAMS, I64)
    steps, width = depth_steps(depth), columns * 4
    stride, last = steps * LINE, 2 * LINE
    if columns > TILE:
        multiply_two((at[0], at[1]), (ahead[0], ahead[1]), stride, right, width, steps, products)
    if columns <= TILE:
        multiply_one((at[0], at[1]), (ahead[0], ahead[1]), stride, right, width, steps, products)
    elif columns > 2 * TILE:
        multiply_one((at[0], at[1]), (0, 0), stride, right + last, width, steps, products + last)


@helper
def new_products():
    """Room for what ``multiply`` writes."""
    return np.empty(STREAMS * TILE * WIDEST, np.float32)


@helper
def new_block():
    """Room for the sums of an item with a block; ``turn`` reads one line more than is used."""
    return np.empty(STREAMS * TILE * WIDEST + TILE, np.float32)


@helper
def sum_parts(products, count, parts, block):
    """block [2, 16, breadth] = what ``multiply`` wrote, summed over parts."""
    columns, wide = block_columns(count, parts), breadth(count, parts)
    for n in range(STREAMS * TILE):
        at, to = n * columns, n * wide
        if parts == 1:
            for t in range(wide):
                block[to + t] = products[at + t]
        else:
            for t in range(wide):
                block[to + t] = products[at + t] + products[at + wide + t] + products[at + 2 * wide + t]


def _store_item(sums, item, count, wide, y, cols):
    block = view1(sums, STREAMS * TILE * wide, FP32)
    for stream in range(STREAMS):
        first = item_tile(item, stream, cols) * TILE
        valid, source = min(TILE, cols - first), stream * TILE * wide
        if count == 1:
            row = view1(y, cols, FP32)
            for n in range(valid):
                row[first + n] = block[source + n]
        else:
            for t in range(0, count if valid > 0 else 0, TILE):
                target = y + (t * cols + first) * 4
                turn(sums + (source + t) * 4, wide * 4, target, cols * 4, min(TILE, count - t), valid)


def compile_routines() -> tuple[Any, Any, Any]:
    """What kernels on tiles call by address: pack, multiply, store. All arguments are int64, most of them addresses.

    pack (x, numbers, count, depth, parts, out): pack rows ``numbers`` (int32) of fp32 x, rows of ``depth``.
    multiply (tiles, following, packed rows, columns, depth, out): out [2, 16, columns] = products of the
    weights at two addresses; following: two more that memory is asked for meanwhile, none when the first is 0. The
    thread's tiles must have the block's shapes.
    store (block, item, count, breadth, y, cols): write what ``sum_parts`` made to rows of ``cols`` at y.
    """
    signatures = ("int64, " * n for n in (6, 6, 6))
    functions = (_pack_block, _multiply_item, _store_item)
    pack, multiply, store = (
        routine(f"void({arguments[:-2]})", function) for arguments, function in zip(signatures, functions, strict=True)
    )
    return pack, multiply, store
