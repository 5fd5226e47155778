"""Inner loops as explicit 16-lane vectors: where the exactness contract is made.

A dot product is always: lane l sums the products at l, l + 16, l + 32, ... by fused multiply-add, in that order; then
lanes i and i + 8 are added, then 4, 2 and 1 apart. A weighted sum of rows adds row after row, by fused multiply-add.
Tiles compute several such results side by side to reuse what they load; the bits of one result do not depend on the
tile, on the number of threads, or on whether the CPU has 512, 256 or 128 bit registers.
"""

from collections.abc import Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

LANES = 16
_FLOAT, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)


def tile_shape() -> tuple[int, int]:
    """(rows, columns) of the dot tile: as many accumulators as the registers hold beside the operands."""
    wide = llvmlite.binding.get_host_cpu_features().get("avx512f", False) and not config.CPU_NAME
    return (4, 4) if wide else (3, 2)


TILE_ROWS, TILE_COLS = tile_shape()
_STRIPS = {4: (4, 2, 1), 3: (3, 1)}
_ZERO = ir.Constant(_I64, 0)


def _splat_float(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


def _call(builder: ir.IRBuilder, name: str, result: Any, *args: Any) -> Any:
    """Call an LLVM intrinsic by its full name (llvmlite cannot spell the names of vector types)."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", _VECTOR, a, b, c)


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    vector_type = ir.VectorType(scalar.type, LANES)
    vector = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _first_lanes(builder: ir.IRBuilder, count: Any) -> Any:
    """Mask of the first ``count`` lanes."""
    lanes = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lanes, _splat(builder, count))


def _raw_load(builder: ir.IRBuilder, pointer: Any, element: Any, mask: Any) -> Any:
    vector = ir.VectorType(element, LANES)
    pointer = builder.bitcast(pointer, vector.as_pointer())
    if mask is None:
        return builder.load(pointer, align=2)
    name = f"llvm.masked.load.v{LANES}{element.intrinsic_name}.p0"
    return _call(builder, name, vector, pointer, ir.Constant(_I32, 2), mask, ir.Constant(vector, [0] * LANES))


def _load(builder: ir.IRBuilder, pointer: Any, dtype: types.Type, mask: Any = None) -> Any:
    """16 elements widened to fp32; lanes outside ``mask`` are not read and become zero."""
    if dtype == types.float32:
        return _raw_load(builder, pointer, _FLOAT, mask)
    if dtype == types.uint16:  # fp16
        return builder.fpext(_raw_load(builder, pointer, ir.HalfType(), mask), _VECTOR)
    wide = builder.zext(_raw_load(builder, pointer, _I16, mask), ir.VectorType(_I32, LANES))
    shifted = builder.shl(wide, ir.Constant(wide.type, [16] * LANES))  # bf16 is the upper half of fp32
    return builder.bitcast(shifted, _VECTOR)


def _store(builder: ir.IRBuilder, vector: Any, pointer: Any, mask: Any = None) -> None:
    pointer = builder.bitcast(pointer, _VECTOR.as_pointer())
    if mask is None:
        builder.store(vector, pointer, align=4)
        return
    name = f"llvm.masked.store.v{LANES}f32.p0"
    _call(builder, name, ir.VoidType(), vector, pointer, ir.Constant(_I32, 4), mask)


def _fold(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """Sum each of up to 16 vectors over its lanes; lane i of the result belongs to vector i."""
    vectors = vectors + [vectors[-1]] * (LANES - len(vectors))
    width = LANES
    while width > 1:
        half = width // 2
        low = [i for i in range(2 * LANES) if i % width < half]
        high = [i + half for i in low]
        indices = [ir.Constant(ir.VectorType(_I32, LANES), order) for order in (low, high)]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(*(builder.shuffle_vector(a, b, index) for index in indices)) for a, b in pairs
        ]
        width = half
    return vectors[0]


class _Rows:
    """Row pointers of a 2-D array inside an intrinsic; ``index`` is an array of row numbers or the first one."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: Any, value: Any) -> None:
        self.builder, self.kind = builder, kind
        self.array = context.make_array(kind)(context, builder, value)
        self.size = context.get_abi_sizeof(context.get_data_type(kind.dtype))

    @property
    def depth(self) -> Any:
        return cgutils.unpack_tuple(self.builder, self.array.shape)[1]

    def row(self, number: Any, column: Any = None) -> Any:
        stride = cgutils.unpack_tuple(self.builder, self.array.strides)[0]
        pointer = cgutils.pointer_add(self.builder, self.array.data, self.builder.mul(number, stride))
        return pointer if column is None else self.element(pointer, column)

    def load(self, row: Any, column: Any, mask: Any = None) -> Any:
        """16 elements of a row from ``column`` on, as fp32."""
        return _load(self.builder, self.element(row, column), self.kind.dtype, mask)

    def element(self, row: Any, column: Any) -> Any:
        return cgutils.pointer_add(self.builder, row, self.builder.mul(column, ir.Constant(_I64, self.size)))


def _number(context: Any, builder: ir.IRBuilder, kind: Any, value: Any, position: Any) -> Any:
    """Row number at a position: looked up when ``value`` is an array of row numbers, else counted from it."""
    if not isinstance(kind, types.Array):
        return builder.add(value, position)
    data = context.make_array(kind)(context, builder, value).data
    return builder.sext(builder.load(builder.gep(data, [position])), _I64)


def _loop(builder: ir.IRBuilder, start: Any, stop: Any, step: int, state: list[Any], body: Any) -> list[Any]:
    """``for i in range(start, stop, step): state = body(i, state)`` with the state in registers."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    counter = builder.phi(_I64)
    carried = [builder.phi(value.type) for value in state]
    builder.cbranch(builder.icmp_signed("<", counter, stop), inside, after)
    builder.position_at_end(inside)
    results = body(counter, carried)
    following = builder.add(counter, ir.Constant(_I64, step))
    latch = builder.block
    builder.branch(head)
    for phi, first, value in zip([counter, *carried], [start, *state], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, latch)
    builder.position_at_end(after)
    return carried


def _over_lanes(builder: ir.IRBuilder, n: Any, state: list[Any], step: Any) -> list[Any]:
    """Run ``step`` on whole vectors at 0, 16, ... and once with a mask on what is left of n elements."""
    whole = builder.and_(n, ir.Constant(_I64, -LANES))
    state = _loop(builder, ir.Constant(_I64, 0), whole, LANES, state, step)
    before = builder.block
    with builder.if_then(builder.icmp_signed("<", whole, n)):
        rest = step(whole, state, _first_lanes(builder, builder.sub(n, whole)))
        tail = builder.block
    return [_join(builder, (before, value), (tail, new)) for value, new in zip(state, rest, strict=True)]


def _join(builder: ir.IRBuilder, *origins: tuple[Any, Any]) -> Any:
    phi = builder.phi(origins[0][1].type)
    for block, value in origins:
        phi.add_incoming(value, block)
    return phi


def _dot_tile(builder: ir.IRBuilder, xs: list[Any], x: _Rows, ws: list[Any], w: _Rows) -> list[Any]:
    """The dot products of all pairs of row pointers (up to 16), row-major."""

    def step(k: Any, sums: list[Any], mask: Any = None) -> list[Any]:
        a = [x.load(row, k, mask) for row in xs]
        b = [w.load(row, k, mask) for row in ws]
        pairs = [(i, j) for i in a for j in b]
        return [_fma(builder, i, j, total) for (i, j), total in zip(pairs, sums, strict=True)]

    totals = _fold(builder, _over_lanes(builder, x.depth, [_splat_float(0.0)] * len(xs) * len(ws), step))
    return [builder.extract_element(totals, ir.Constant(_I32, i)) for i in range(len(xs) * len(ws))]


@intrinsic
def dot_block(typing_context, x, xi, rows, w, wi, first, last, y, i, j):  # noqa: ANN001, ANN201
    """y[i + r, j + c] = x[xi[r]] . w[row first + c] for r < rows, first + c < last.

    w's row n is wi[n] when wi is an array, else wi + n. x and y fp32 [.., depth of x]; w fp32, or int16 holding bf16.
    """

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        kinds = signature.args
        left, right, out = (_Rows(context, builder, kinds[a], args[a]) for a in (0, 3, 7))
        _, xi, rows, _, wi, first, last, _, i, j = args

        def tile(m: Any, height: int, n: Any, width: int) -> None:
            xs = [left.row(_number(context, builder, kinds[1], xi, _plus(builder, m, r))) for r in range(height)]
            ws = [right.row(_number(context, builder, kinds[4], wi, _plus(builder, n, c))) for c in range(width)]
            sums = iter(_dot_tile(builder, xs, left, ws, right))
            column = builder.add(j, builder.sub(n, first))
            for r in range(height):
                target = out.row(builder.add(i, _plus(builder, m, r)), column)
                for c in range(width):
                    builder.store(next(sums), builder.gep(target, [ir.Constant(_I64, c)]), align=4)

        def columns(n: Any, width: int) -> None:
            heights = _STRIPS[TILE_ROWS] if width > 1 else (1,)
            _strips(builder, _ZERO, rows, heights, lambda m, height: tile(m, height, n, width))

        _strips(builder, first, last, (TILE_COLS, 1), columns)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, xi, i64, w, wi, i64, i64, y, i64, i64), codegen


def _plus(builder: ir.IRBuilder, value: Any, constant: int) -> Any:
    return builder.add(value, ir.Constant(_I64, constant))


def _strips(builder: ir.IRBuilder, start: Any, stop: Any, sizes: Sequence[int], body: Any) -> None:
    """``body(i, size)`` over start .. stop - 1 in strips of the first size, then what is left in the next, down to 1."""
    for size in sizes:
        left = builder.srem(builder.sub(stop, start), ir.Constant(_I64, size))
        end = builder.sub(stop, left)
        _loop(builder, start, end, size, [], lambda i, _, size=size: body(i, size) or [])
        start = end


@intrinsic
def mix_block(typing_context, p, i, rows, first, last, v, vi, y, j, d, lanes):  # noqa: ANN001, ANN201
    """y[j + r, d + l] += p[i + r, n] * v[vi[n], d + l] for n = first .. last - 1 in this order; r < rows, l < lanes <= 16.

    p, v and y are fp32; vi int64.
    """

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        kinds = signature.args
        weights, values, out = (_Rows(context, builder, kinds[a], args[a]) for a in (0, 5, 7))
        _, i, rows, first, last, _, vi, _, j, d, lanes = args
        mask = _first_lanes(builder, lanes)

        def strip(m: Any, height: int) -> None:
            ps = [weights.row(builder.add(i, _plus(builder, m, r))) for r in range(height)]
            ys = [out.row(builder.add(j, _plus(builder, m, r))) for r in range(height)]

            def step(n: Any, sums: list[Any]) -> list[Any]:
                value = values.load(values.row(_number(context, builder, kinds[6], vi, n)), d, mask)
                factors = [_splat(builder, builder.load(weights.element(row, n))) for row in ps]
                return [_fma(builder, f, value, total) for f, total in zip(factors, sums, strict=True)]

            sums = _loop(builder, first, last, 1, [out.load(row, d, mask) for row in ys], step)
            for total, row in zip(sums, ys, strict=True):
                _store(builder, total, out.element(row, d), mask)

        _strips(builder, _ZERO, rows, _STRIPS[TILE_ROWS], strip)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(p, i64, i64, i64, i64, v, vi, y, i64, i64, i64), codegen


def _reduction(start: float, combine: Any) -> Any:
    """An intrinsic (array, n) -> fp32: the first n elements combined per lane, then lanes 8, 4, 2 and 1 apart."""

    @intrinsic
    def reduce(typing_context, array, n):  # noqa: ANN001, ANN202
        def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            first = _splat_float(start)

            def step(k: Any, state: list[Any], mask: Any = None) -> list[Any]:
                values = _load(builder, builder.gep(data, [k]), types.float32, mask)
                values = values if mask is None else builder.select(mask, values, first)
                return [combine(builder, values, state[0])]

            (lanes,) = _over_lanes(builder, args[1], [first], step)
            for distance in (8, 4, 2, 1):
                order = [(lane + distance) % LANES for lane in range(LANES)]
                index = ir.Constant(ir.VectorType(_I32, LANES), order)
                lanes = combine(builder, builder.shuffle_vector(lanes, lanes, index), lanes)
            return builder.extract_element(lanes, ir.Constant(_I32, 0))

        return types.float32(array, types.int64), codegen

    return reduce


def _larger(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


lane_sum = _reduction(0.0, lambda builder, a, b: builder.fadd(a, b))
lane_max = _reduction(float("-inf"), _larger)


@intrinsic
def bits_of(typing_context, value):  # noqa: ANN001, ANN201
    """The bits of an fp32 as int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], _I32)


@intrinsic
def from_bits(typing_context, bits):  # noqa: ANN001, ANN201
    """The fp32 with these int32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], _FLOAT)


@intrinsic
def widen(typing_context, value):  # noqa: ANN001, ANN201
    """One stored element (fp32, int16 = bf16, uint16 = fp16) as fp32."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        if value == types.float32:
            return args[0]
        if value == types.uint16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _FLOAT)
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _FLOAT)

    return types.float32(value), codegen
