"""The reductions of every kernel, as numba intrinsics; where the exactness contract is made.

A dot product is always: lane l sums the products at l, l + 16, l + 32, ... by fused multiply-add, in that order; then
lanes 8 apart are added, then 4, 2 and 1 apart. A weighted sum of rows adds row after row by fused multiply-add. Tiles
compute several results side by side to reuse what they load; the bits of a result do not depend on its neighbours.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from shared.kernels.jit import intrinsic
from shared.kernels.simd import (
    FLOAT,
    I32,
    LANES,
    TILE_COLS,
    TILE_ROWS,
    Emitter,
    Fp8Rows,
    Rows,
    from_e4m3,
    row_number,
    row_soon,
    stored_rows,
)

MIX_LANES = 2 * LANES
"""Most columns of one ``mix_block``."""
PREFETCH = 512
"""How many bf16 or fp8 weights ahead memory is asked for."""
_HEIGHTS = {4: (4, 2, 1), 3: (3, 1)}[TILE_ROWS]
"""Rows of a tile: the first as often as it fits, the next for what is left."""


def _dot_tile(emit: Emitter, x: Rows, xs: list[Any], w: Rows | Fp8Rows, ws: list[Any], soon: list[Any]) -> Any:
    """The dot products of all pairs of row pointers (up to 16 pairs), row-major in one vector.

    ``soon``: rows of w that will be wanted some time after ``ws``, or none.
    """

    def step(k: Any, sums: list[Any], mask: Any = None) -> list[Any]:
        a, b = [x.load(row, k, mask) for row in xs], [w.load(row, k, mask) for row in ws]
        for row in soon:
            emit.prefetch(w.at(row, k), far=True)
        if w.dtype != types.float32:  # weights from memory: several short rows at a time defeat the hardware's guesses
            for row in ws:
                emit.prefetch(emit.builder.gep(w.at(row, k), [emit.number(PREFETCH)]))
        pairs = [(left, right) for left in a for right in b]
        return [emit.fma(left, right, total) for (left, right), total in zip(pairs, sums, strict=True)]

    return emit.fold(emit.over_lanes(x.depth, [emit.vector(0.0)] * len(xs) * len(ws), step))


@intrinsic
def dot_block(typing_context, x, xi, rows, w, wi, first, last, y, i, j):
    """y[i + r, j + c] = x[row r] . w[row first + c] for r < rows and first + c < last.

    Row n of x is xi[n] when xi is an array, else xi + n; likewise for w. x and y are fp32; w is fp32, int16 holding
    bf16, uint16 holding fp16, or what ``Fp8Rows`` takes. wi of int64 are positions of a cache, far from each other:
    their rows are asked for ahead. Columns of weights are int32 and come often, or stand side by side.
    """

    def codegen(context, builder, signature, args):
        emit, kinds = Emitter(context, builder), signature.args
        left, out = Rows(emit, kinds[0], args[0]), Rows(emit, kinds[7], args[7])
        right = stored_rows(emit, kinds[3], args[3])
        _, xi, rows, _, wi, first, last, _, i, j = args
        scattered = isinstance(kinds[4], types.Array) and kinds[4].dtype == types.int64

        def tile(m: Any, height: int, n: Any, width: int) -> None:
            ms, ns = [emit.plus(m, r) for r in range(height)], [emit.plus(n, c) for c in range(width)]
            xs = [left.row(row_number(emit, kinds[1], xi, r)) for r in ms]
            ws = [right.row(row_number(emit, kinds[4], wi, c)) for c in ns]
            soon = [right.row(row_soon(emit, kinds[4], wi, c)) for c in ns] if scattered else []
            sums, column = _dot_tile(emit, left, xs, right, ws, soon), builder.add(j, builder.sub(n, first))
            for r, row in enumerate(ms):
                emit.store_part(sums, r * width, width, out.at(out.row(builder.add(i, row)), column))

        def columns(n: Any, width: int) -> None:
            heights = _HEIGHTS if width > 1 else (1,)
            emit.strips(emit.number(0), rows, heights, lambda m, height: tile(m, height, n, width))

        emit.strips(first, last, (TILE_COLS, 1), columns)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, xi, i64, w, wi, i64, i64, y, i64, i64), codegen


@intrinsic
def widen_rows(typing_context, w, wi, y):
    """y[c] = row wi[c] of w as fp32, for every entry of wi; w as in ``dot_block``."""

    def codegen(context, builder, signature, args):
        emit, kinds = Emitter(context, builder), signature.args
        stored, out = stored_rows(emit, kinds[0], args[0]), Rows(emit, kinds[2], args[2])
        (count,) = cgutils.unpack_tuple(builder, context.make_array(kinds[1])(context, builder, args[1]).shape)

        def one(c: Any, _: int) -> None:
            row, target = stored.row(row_number(emit, kinds[1], args[1], c)), out.row(c)

            def step(k: Any, _: list[Any], mask: Any = None) -> list[Any]:
                emit.store(stored.load(row, k, mask), out.at(target, k), mask)
                return []

            emit.over_lanes(stored.depth, [], step)

        emit.strips(emit.number(0), count, (1,), one)
        return context.get_dummy_value()

    return types.void(w, wi, y), codegen


@intrinsic
def mix_block(typing_context, p, i, rows, first, last, v, vi, y, j, d, lanes):
    """y[j + r, d + l] += p[i + r, n] * v[vi[n], d + l] for n = first .. last - 1 in this order.

    r < rows, l < lanes <= MIX_LANES; p, v and y are fp32, vi int64.
    """

    def codegen(context, builder, signature, args):
        emit, kinds = Emitter(context, builder), signature.args
        weights, values, out = (Rows(emit, kinds[a], args[a]) for a in (0, 5, 7))
        _, i, rows, first, last, _, vi, _, j, d, lanes = args
        offsets = range(0, MIX_LANES, LANES)
        parts = [(emit.plus(d, skip), emit.first_lanes(emit.plus(lanes, -skip))) for skip in offsets]

        def strip(m: Any, height: int) -> None:
            ps = [weights.row(builder.add(i, emit.plus(m, r))) for r in range(height)]
            ys = [out.row(builder.add(j, emit.plus(m, r))) for r in range(height)]

            def step(n: Any, sums: list[Any]) -> list[Any]:
                row, soon = (values.row(number(emit, kinds[6], vi, n)) for number in (row_number, row_soon))
                for column, _ in parts:
                    emit.prefetch(values.at(soon, column), far=True)
                b = [values.load(row, column, mask) for column, mask in parts]
                a = [emit.splat(builder.load(builder.gep(p, [n]))) for p in weight_pointers]
                pairs = [(factor, value) for factor in a for value in b]
                return [emit.fma(factor, value, total) for (factor, value), total in zip(pairs, sums, strict=True)]

            weight_pointers = [builder.bitcast(pointer, FLOAT.as_pointer()) for pointer in ps]
            sums = [out.load(row, column, mask) for row in ys for column, mask in parts]
            sums = iter(emit.loop(first, last, 1, sums, step))
            for row in ys:
                for column, mask in parts:
                    emit.store(next(sums), out.at(row, column), mask)

        emit.strips(emit.number(0), rows, _HEIGHTS, strip)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(p, i64, i64, i64, i64, v, vi, y, i64, i64, i64), codegen


def _reduction(start: float, combine: Any) -> Any:
    """An intrinsic (fp32 array, n) -> fp32: the first n elements combined per lane, then lanes 8, 4, 2 and 1 apart."""

    @intrinsic
    def reduce(typing_context, array, n):
        def codegen(context, builder, signature, args):
            emit = Emitter(context, builder)
            data = context.make_array(signature.args[0])(context, builder, args[0]).data

            def step(k: Any, state: list[Any], mask: Any = None) -> list[Any]:
                values = emit.load(builder.gep(data, [k]), types.float32, mask)
                values = values if mask is None else builder.select(mask, values, emit.vector(start))
                return [combine(builder, values, state[0])]

            (lanes,) = emit.over_lanes(args[1], [emit.vector(start)], step)
            for distance in (8, 4, 2, 1):
                order = [(lane + distance) % LANES for lane in range(LANES)]
                lanes = combine(builder, emit.shuffle(lanes, lanes, order), lanes)
            return builder.extract_element(lanes, ir.Constant(I32, 0))

        return types.float32(array, types.int64), codegen

    return reduce


lane_sum = _reduction(0.0, lambda builder, a, b: builder.fadd(a, b))
lane_max = _reduction(
    float("-inf"), lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)
)  # NaN is never larger


@intrinsic
def bits_of(typing_context, value):
    """The bits of an fp32 as int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


@intrinsic
def from_bits(typing_context, bits):
    """The fp32 with these int32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], FLOAT)


@intrinsic
def widen(typing_context, value):
    """One stored weight (int16 holds bf16, uint16 fp16, uint8 fp8: see ``from_e4m3``) as fp32."""

    def codegen(context, builder, signature, args):
        if value == types.uint8:
            return from_e4m3(builder, args[0])
        if value == types.uint16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), FLOAT)
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16)), FLOAT)

    return types.float32(value), codegen
