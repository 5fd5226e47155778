"""Blocks on AMX tiles: up to 16 rows of activations meet two tiles of weight rows at a time, a work item.

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
    PARTS,
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
NARROW, MIDDLE = 5, 10
"""Most rows whose parts fit into one right tile, and into two."""


@helper
def breadth(count):
    """Rows that a block of ``count`` has room for."""
    return count if count <= MIDDLE else TILE


@helper
def block_columns(count):
    """Columns of a packed block: some part of one right tile, or whole tiles."""
    if count <= NARROW:
        return PARTS * count
    return 2 * TILE if count <= MIDDLE else 3 * TILE


@helper
def depth_steps(depth):
    """Tiles along the depth."""
    return (depth + DEPTH - 1) // DEPTH


@helper
def packed_bytes(rows, depth):
    """Size of packed rows: blocks of 16, and one of what is left."""
    columns = rows // TILE * block_columns(TILE) + block_columns(rows % TILE)
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
def set_shapes(shapes, count):
    """Shape this thread's tiles for a block of ``count`` rows (layout of the 64 bytes: manual of LDTILECFG)."""
    width = 4 * min(TILE, block_columns(count))
    if shapes[16] == width:
        return
    shapes[0] = 1
    for register in range(REGISTERS):
        is_left = LEFT <= register < RIGHT
        shapes[16 + 2 * register] = LINE if is_left else width
        shapes[48 + register] = TILE
    configure(shapes)


@helper
def _split_rows(sources, count, k, depth, spare, parts):
    """parts [3, breadth of the block, 16 pairs] = those of step k of every row; odd ends go through ``spare``."""
    apart, left = breadth(count) * LINE, depth - k * DEPTH
    for t in range(count):
        source = sources[t] + k * DEPTH * 4
        if left < DEPTH:
            spare[:left] = view1(source, left, FP32)
            source = np.int64(spare.ctypes.data)
        split(source, parts.ctypes.data + t * LINE, apart)


def _pack_block(x, rows, count, depth, out):
    numbers, sources, columns = view1(rows, count, I32), np.empty(TILE, np.int64), block_columns(count)
    parts, spare = np.zeros((PARTS * TILE, TILE), np.int32), np.zeros(DEPTH, np.float32)
    for t in range(count):
        sources[t] = x + numbers[t] * depth * 4
    for k in range(depth_steps(depth)):
        _split_rows(sources, count, k, depth, spare, parts)
        for first in range(0, columns, TILE):
            target = out + k * columns * LINE + first * 4
            turn(parts.ctypes.data + first * LINE, LINE, target, columns * 4, TILE, min(TILE, columns - first))


def _multiply_item(tiles, following, right, count, depth, products):
    columns, steps = block_columns(count), depth_steps(depth)
    at, ahead = view1(tiles, STREAMS, I64), view1(following, STREAMS, I64)
    stride, width = steps * LINE, columns * 4
    if count > NARROW:
        multiply_two((at[0], at[1]), (ahead[0], ahead[1]), stride, right, width, steps, products)
    if count <= NARROW:
        multiply_one((at[0], at[1]), (ahead[0], ahead[1]), stride, right, width, steps, products)
    elif count > MIDDLE:
        last = 2 * LINE
        multiply_one((at[0], at[1]), (0, 0), stride, right + last, width, steps, products + last)


@helper
def new_products():
    """Room for what ``multiply`` writes."""
    return np.empty(STREAMS * TILE * PARTS * TILE, np.float32)


@helper
def new_block():
    """Room for the sums of an item with a block; ``turn`` reads one line more than is used."""
    return np.empty(STREAMS * TILE * TILE + TILE, np.float32)


@helper
def sum_parts(products, count, block):
    """block [2, 16, breadth] = what ``multiply`` wrote, summed over parts."""
    columns, wide = block_columns(count), breadth(count)
    for n in range(STREAMS * TILE):
        at = n * columns
        for t in range(wide):
            block[n * wide + t] = products[at + t] + products[at + wide + t] + products[at + 2 * wide + t]


def _store_item(products, item, count, y, cols):
    wide = breadth(count)
    block = view1(products, STREAMS * TILE * wide, FP32)
    for stream in range(STREAMS):
        first = item_tile(item, stream, cols) * TILE
        valid, source = min(TILE, cols - first), stream * TILE * wide
        if count == 1:
            row = view1(y, cols, FP32)
            for n in range(valid):
                row[first + n] = block[source + n]
        elif valid > 0:
            turn(products + source * 4, wide * 4, y + first * 4, cols * 4, count, valid)


def compile_routines() -> tuple[Any, Any, Any]:
    """What kernels on tiles call by address: pack, multiply, store. All arguments are int64, most of them addresses.

    pack (x, numbers, count, depth, out): pack rows ``numbers`` (int32) of fp32 x, rows of ``depth``.
    multiply (tiles, following, packed rows, count, depth, out): out [2, 16, columns of the block] = products of the
    weights at two addresses; following: two more that memory is asked for meanwhile, none when the first is 0. The
    thread's tiles must have the block's shapes.
    store (block, item, count, y, cols): write what ``sum_parts`` made of an item's products to rows of ``cols`` at y.
    """
    signatures = ("int64, " * n for n in (5, 6, 5))
    functions = (_pack_block, _multiply_item, _store_item)
    pack, multiply, store = (
        routine(f"void({arguments[:-2]})", function) for arguments, function in zip(signatures, functions, strict=True)
    )
    return pack, multiply, store
