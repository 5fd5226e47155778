"""The grouped feed-forward of one layer's experts on CPU with AMX tiles: ``cpu_experts`` for CPUs that have them.

Three passes, each over work items that threads take in turn: pack the rows of every expert; gate, up and activation,
whose results are packed where they are made; down.
"""
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
from shared.kernels.cpu_amx import add_bias, find_next, find_tiles, new_spare, new_tiles
from shared.kernels.cpu_elementwise import activate
from shared.kernels.cpu_experts import segments, valid
from shared.kernels.jit import FP32, I32, I64, call, helper, parallel_kernel, take_next, view1, view2
from shared.kernels.tiles import bits_of, from_bits


@helper
def _offsets(starts, depth, parts):
    """Where the packed rows of each segment begin, in bytes, and where the last ones end."""
    offsets = np.zeros(len(starts), np.int64)
    for s in range(len(starts) - 1):
        offsets[s + 1] = offsets[s] + packed_bytes(starts[s + 1] - starts[s], depth, parts)
    return offsets


@helper
def _pack_segments(counter, routine, parts, x, tokens, starts, given):
    packed, offsets, depth = given
    while True:
        segment = take_next(counter)
        if segment >= len(starts) - 1:
            return
        numbers = tokens[starts[segment] : starts[segment + 1]]
        most = block_rows(parts)
        for first in range(0, len(numbers), most):
            target = packed.ctypes.data + offsets[segment] + packed_bytes(first, depth, parts)
            call(routine, (x, numbers[first:], min(most, len(numbers) - first), depth, parts, target))


@helper
def _rounded(value):
    """The bits of an fp32 rounded to bf16, as ``amx.split`` does it."""
    bits = bits_of(value)
    near = np.int32(bits + np.int32(32767) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)
    return near if value == value else np.int32(0x7FC00000)


@helper
def _rest(value, bits):
    """What is left of an fp32 behind its rounded bits."""
    return value - from_bits(bits) if (bits & np.int32(0x7F800000)) != np.int32(0x7F800000) else np.float32(0.0)


@helper
def _pack_hidden(hidden, parts, item, count, cols, out):
    """Pack products [2 tiles, 16, rows of the block] of an item, which are columns of rows of ``cols``, at ``out``."""
    wide, columns, half = breadth(count, parts), block_columns(count, parts), TILE // 2
    packed = view1(out, depth_steps(cols) * TILE * columns, I32)
    for stream in range(STREAMS):
        tile = item_tile(item, stream, cols)
        for pair in range(half if tile * TILE < cols else 0):
            low = (stream * TILE + 2 * pair) * wide
            target = (tile // 2 * TILE + tile % 2 * half + pair) * columns
            for t in range(wide):
                first, second = hidden[low + t], hidden[low + wide + t]
                for p in range(parts):
                    upper, other = _rounded(first), _rounded(second)
                    packed[target + p * wide + t] = ((upper >> np.int32(16)) & np.int32(65535)) | other
                    first, second = _rest(first, upper), _rest(second, other)


@helper
def _add_item_bias(bias, item, wide, cols, block):
    offsets = view1(bias, cols, FP32)
    for stream in range(STREAMS if bias else 0):
        first = item_tile(item, stream, cols) * TILE
        for n in range(min(TILE, max(0, cols - first))):
            for t in range(wide):
                block[(stream * TILE + n) * wide + t] += offsets[first + n]


@helper
def _gate_up(counter, multiply, parts, work, activation, rows_in, rows_out):
    """Packed rows_out = activation(gate x) * (up x); rows_in, rows_out: (packed, where segments begin, elements)."""
    (packed, inputs, depth), (hidden, outputs, cols), (ids, starts, table) = rows_in, rows_out, work
    each = item_count(cols)
    total = (len(starts) - 1) * each
    shapes, products, gates, ups = new_shapes(), new_products(), new_block(), new_block()
    spare, spare_up = new_spare(cols, depth), new_spare(cols, depth)
    gate_tiles, up_tiles, gate_next, up_next = new_tiles(), new_tiles(), new_tiles(), new_tiles()
    following = take_next(counter)
    while following < total:
        number, following = following, take_next(counter)
        segment, item, after = number // each, number % each, min(following, total - 1)
        expert, soon = ids[starts[segment]], ids[starts[after // each]]
        find_tiles(table[expert, 0], item, cols, depth, spare, gate_tiles)
        find_tiles(table[expert, 1], item, cols, depth, spare_up, up_tiles)
        find_next(table[expert, 1], item, cols, depth, up_next)
        find_next(table[soon, 0], after % each, cols, depth, gate_next)
        rows = starts[segment + 1] - starts[segment]
        for first in range(0, rows, block_rows(parts)):
            count = min(block_rows(parts), rows - first)
            columns, wide = block_columns(count, parts), breadth(count, parts)
            right = packed.ctypes.data + inputs[segment] + packed_bytes(first, depth, parts)
            set_shapes(shapes, columns)
            call(multiply, (gate_tiles, up_next, right, columns, depth, products))
            sum_parts(products, count, parts, gates)
            call(multiply, (up_tiles, gate_next, right, columns, depth, products))
            sum_parts(products, count, parts, ups)
            _add_item_bias(table[expert, 3], item, wide, cols, gates)
            _add_item_bias(table[expert, 4], item, wide, cols, ups)
            used = STREAMS * TILE * wide
            activate(gates[:used], ups[:used], activation)
            target = hidden.ctypes.data + outputs[segment] + packed_bytes(first, cols, parts)
            _pack_hidden(gates, parts, item, count, cols, target)
            up_next[0] = gate_next[0] = 0
    release()


@helper
def _down(counter, routines, parts, work, rows_in, out, cols):
    """out[p] = down hidden[p] for every part p; rows_in: see ``_gate_up``."""
    (packed, inputs, depth), (ids, starts, table) = rows_in, work
    each, (_, multiply, store) = item_count(cols), routines
    total, spare, block = (len(starts) - 1) * each, new_spare(cols, depth), new_block()
    tiles, ahead, shapes, products = new_tiles(), new_tiles(), new_shapes(), new_products()
    following = take_next(counter)
    while following < total:
        number, following = following, take_next(counter)
        segment, item, after = number // each, number % each, min(following, total - 1)
        expert, soon = ids[starts[segment]], ids[starts[after // each]]
        find_tiles(table[expert, 2], item, cols, depth, spare, tiles)
        find_next(table[soon, 2], after % each, cols, depth, ahead)
        rows = starts[segment + 1] - starts[segment]
        for first in range(0, rows, block_rows(parts)):
            count, target = min(block_rows(parts), rows - first), out + (starts[segment] + first) * cols * 4
            right = packed.ctypes.data + inputs[segment] + packed_bytes(first, depth, parts)
            columns = block_columns(count, parts)
            set_shapes(shapes, columns)
            call(multiply, (tiles, ahead, right, columns, depth, products))
            sum_parts(products, count, parts, block)
            call(store, (block, item, count, breadth(count, parts), target, cols))
            add_bias(table[expert, 5], item, count, target, cols)
            ahead[0] = 0
    release()


@parallel_kernel
def experts(threads, routines, parts, addresses, sizes, activation):
    """See ``Kernels.experts`` and ``cpu_experts.experts``: the same arguments, bf16 weights."""
    rows, width, inner, count, known = sizes
    x, out = addresses[0], addresses[4]
    tokens, ids = view1(addresses[1], count, I32), view1(addresses[2], count, I32)
    table = view2(addresses[3], known, 6, I64)
    if not valid(tokens, ids, rows, table):
        return False
    starts, counters = segments(ids), np.zeros((3, 1), np.int64)
    inputs, outputs = _offsets(starts, width, parts), _offsets(starts, inner, parts)
    given, hidden = (np.empty(inputs[-1], np.uint8), inputs, width), (np.empty(outputs[-1], np.uint8), outputs, inner)
    if inner % DEPTH:
        hidden[0][:] = 0
    work = (ids, starts, table)
    if threads == 1:
        _pack_segments(counters[0], routines[0], parts, x, tokens, starts, given)
        _gate_up(counters[1], routines[1], parts, work, activation, given, hidden)
        _down(counters[2], routines, parts, work, hidden, out, width)
    else:
        for _ in numba.prange(threads):
            _pack_segments(counters[0], routines[0], parts, x, tokens, starts, given)
        for _ in numba.prange(threads):
            _gate_up(counters[1], routines[1], parts, work, activation, given, hidden)
        for _ in numba.prange(threads):
            _down(counters[2], routines, parts, work, hidden, out, width)
    return True
