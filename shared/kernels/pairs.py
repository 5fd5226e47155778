"""AVX-512's products of bf16 pairs as numba intrinsics: bf16 weights times rows that are rounded to bf16.

For CPUs that have them but no AMX tiles (amx.py): twice the products of an instruction on fp32, and no weight is
widened. Lane l of an accumulator sums the products at 2 l and 2 l + 1, then those 32 elements further, and so on, as
the instruction does; lanes are then added as in tiles.py. So the order of operations of each output is fixed, whatever
stands beside it.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import config

from shared.kernels.jit import BF16, FP32, I32, helper, intrinsic, routine, view1, view2
from shared.kernels.simd import FLOAT, I16, LANES, Emitter, Rows, row_number
from shared.kernels.simd import I32 as INT32
from shared.kernels.tiles import PREFETCH

STEP = 2 * LANES
"""Elements of the depth that one instruction takes."""
HEIGHT, WIDTH = 4, 4
"""Of a tile: rows and columns whose products are summed side by side."""
MOST_ROWS = 16
"""Rounded at a time: they stay in the first-level cache while columns pass."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_FLOATS, _INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
_SHORTS, _HALVES, _PAIRS = ir.VectorType(I16, STEP), ir.VectorType(_BFloat(), LANES), ir.VectorType(_BFloat(), STEP)


def available() -> bool:
    """Does this CPU have them?"""
    features = llvmlite.binding.get_host_cpu_features()
    has = all(features.get(name, False) for name in ("avx512bf16", "avx512f", "avx512bw"))
    return bool(has and not config.CPU_NAME and platform.machine() == "x86_64")  # type: ignore[attr-defined]


@intrinsic
def round_rows(typing_context, x, xi, rows, y):
    """y[r] = row xi[r] of x (fp32 [.., depth]) rounded to bf16 (int16 [.., at least depth]), for r < rows."""

    def codegen(context, builder, signature, args):
        emit, kinds = Emitter(context, builder), signature.args
        source, out = Rows(emit, kinds[0], args[0]), Rows(emit, kinds[3], args[3])

        def one(r: Any, _: int) -> None:
            row, target = source.row(row_number(emit, kinds[1], args[1], r)), out.row(r)

            def step(k: Any, _: list[Any], mask: Any = None) -> list[Any]:
                halves = builder.fptrunc(source.load(row, k, mask), _HALVES)
                pointer = builder.bitcast(out.at(target, k), _HALVES.as_pointer())
                builder.store(halves, pointer, align=2)
                return []

            emit.over_lanes(source.depth, [], step)

        emit.strips(emit.number(0), args[2], (1,), one)
        return context.get_dummy_value()

    return types.void(x, xi, types.int64, y), codegen


def _load_pairs(emit: Emitter, pointer: Any, count: Any = None) -> Any:
    """32 bf16 at a pointer; from ``count`` on they are not read and become zero."""
    builder, pointer = emit.builder, emit.builder.bitcast(pointer, _SHORTS.as_pointer())
    if count is None:
        return builder.bitcast(builder.load(pointer, align=1), _PAIRS)
    lanes = ir.Constant(ir.VectorType(I16, STEP), list(range(STEP)))
    limit = builder.insert_element(ir.Constant(_SHORTS, ir.Undefined), builder.trunc(count, I16), ir.Constant(INT32, 0))
    limit = builder.shuffle_vector(limit, limit, ir.Constant(ir.VectorType(INT32, STEP), [0] * STEP))
    mask = builder.icmp_signed("<", lanes, limit)
    name, nothing = f"llvm.masked.load.v{STEP}i16.p0", ir.Constant(_SHORTS, [0] * STEP)
    return builder.bitcast(emit.call(name, _SHORTS, pointer, ir.Constant(INT32, 1), mask, nothing), _PAIRS)


def _reach(emit: Emitter, depth: Any, m: Any, rows: Any) -> Callable[[Any], Any]:
    """How far beyond the start of its row a tile of rows m, .. asks for weights when it is at k, in elements.

    Tiles that follow each other over the same columns find them in the cache: between them they ask for the columns
    after those, evenly, or memory would rest while all but the first compute.
    """
    builder, height = emit.builder, emit.number(HEIGHT)
    tiles = builder.sdiv(emit.plus(rows, HEIGHT - 1), height)
    share = builder.sdiv(emit.number(1 << 16), tiles)
    done = builder.sdiv(builder.mul(builder.sdiv(m, height), depth), tiles)
    lead = builder.add(emit.plus(builder.sub(depth, builder.sdiv(depth, tiles)), PREFETCH), done)
    return lambda k: builder.add(lead, builder.ashr(builder.mul(k, share), emit.number(16)))


def _dot_tile(emit: Emitter, x: Rows, xs: list[Any], w: Rows, ws: list[Any], reach: Callable[[Any], Any]) -> Any:
    """The dot products of all pairs of row pointers (up to 16 pairs), row-major in one vector."""
    builder = emit.builder

    def step(k: Any, sums: list[Any], count: Any = None) -> list[Any]:
        a, b = [_load_pairs(emit, x.at(row, k)) for row in xs], [_load_pairs(emit, w.at(row, k), count) for row in ws]
        for row in ws:
            emit.prefetch(w.at(row, reach(k)))
        both = zip([(left, right) for left in a for right in b], sums, strict=True)
        return [emit.call(f"llvm.x86.avx512bf16.dpbf16ps.{STEP * 16}", _FLOATS, total, *pair) for pair, total in both]

    zeros = [emit.vector(0.0)] * len(xs) * len(ws)
    whole = builder.and_(w.depth, emit.number(-STEP))
    sums = emit.loop(emit.number(0), whole, STEP, zeros, step)
    before = builder.block
    with builder.if_then(builder.icmp_signed("<", whole, w.depth)):
        rest = step(whole, sums, builder.sub(w.depth, whole))
        tail = builder.block
    joined = [builder.phi(_FLOATS) for _ in sums]
    for phi, value, new in zip(joined, sums, rest, strict=True):
        phi.add_incoming(value, before)
        phi.add_incoming(new, tail)
    return emit.fold(joined)


@intrinsic
def dot_pairs(typing_context, x, rows, w, wi, count, y, i):
    """y[i + r, c] = x[r] . w[wi[c]] for r < rows and c < count. x, w int16 that hold bf16; y fp32.

    Rows of x are as long as the depth of w rounded up to STEP, and zero there.
    """

    def codegen(context, builder, signature, args):
        emit, kinds = Emitter(context, builder), signature.args
        left, right, out = (Rows(emit, kinds[a], args[a]) for a in (0, 2, 5))

        def tile(m: Any, height: int, n: Any, width: int) -> None:
            ms, ns = [emit.plus(m, r) for r in range(height)], [emit.plus(n, c) for c in range(width)]
            xs = [left.row(r) for r in ms]
            ws = [right.row(row_number(emit, kinds[3], args[3], c)) for c in ns]
            sums = _dot_tile(emit, left, xs, right, ws, _reach(emit, right.depth, m, args[1]))
            for r, row in enumerate(ms):
                emit.store_part(sums, r * width, width, out.at(out.row(builder.add(args[6], row)), n))

        def columns(n: Any, width: int) -> None:
            heights = (HEIGHT, 2, 1) if width > 1 else (1,)
            emit.strips(emit.number(0), args[1], heights, lambda m, height: tile(m, height, n, width))

        emit.strips(emit.number(0), args[4], (WIDTH, 1), columns)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, w, wi, i64, y, i64), codegen


@helper
def _stride(depth):
    """Elements from one rounded row to the next: not a power of two, for the sake of cache sets."""
    return (depth + STEP - 1) // STEP * STEP + STEP


def _project(x, numbers, rows, w, kind, columns, cols, depth, panel, y, stride):
    inputs, xi, weights = view2(x, 1, depth, FP32), view1(numbers, rows, I32), view2(w, 1, depth, BF16)
    outputs, wi, apart = view2(y, rows, stride, FP32), view1(columns, cols, I32), _stride(depth)
    rounded = view2(panel, MOST_ROWS, apart, BF16)
    for r in range(min(rows, MOST_ROWS)):
        rounded[r, depth:] = 0
    for m in range(0, rows, MOST_ROWS):
        part = xi[m : m + MOST_ROWS]
        round_rows(inputs, part, len(part), rounded)
        dot_pairs(rounded, len(part), weights, wi, cols, outputs, m)


def compile_project() -> Any:
    """The routine of ``cpu_linear.compile_project`` for bf16 weights alone, with rows rounded to bf16.

    Its panel has room for MOST_ROWS rows of bf16.
    """
    return routine("void(" + ", ".join(["int64"] * 11) + ")", _project)
