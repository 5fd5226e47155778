"""Matrix tiles of Intel AMX as numba intrinsics: products of bf16 weights with fp32 rows.

An fp32 number is the sum of three bf16 numbers: itself rounded, what is left rounded, and what is left then. A row
becomes three columns of such *parts*, so that nothing of it is lost, or the first one alone. Each column is multiplied
into an fp32 accumulator of its own, 32 elements of the depth at a time, and the sums of a row's parts are added in the
end. They depend on nothing but weights and row, whatever stands in the columns beside them: the order of operations of
each output is fixed.

Weights are the left tiles, 16 of their rows by 32 elements, read where they lie. Columns of parts are packed side by
side as right tiles: [depth / 32] [16 pairs of elements] [columns] of two bf16 that follow each other in the depth.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import ctypes
import platform
from collections.abc import Sequence
from functools import partial
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config

from shared.kernels.jit import intrinsic
from shared.kernels.simd import FLOAT, I32, LANES, Emitter

TILE = 16
"""Weight rows of a left tile, pairs of elements and columns of a right tile."""
DEPTH = 32
"""Elements of the depth in one tile."""
LINE = 64
"""Bytes of a row of a tile."""
MOST_PARTS = 3
LEFTS = 2
"""Left tiles that are multiplied side by side."""
REGISTERS, LEFT, RIGHT = 8, 4, 6
"""Tile registers, and the first of those for left and right tiles; the others are accumulators."""

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_INTS, _FLOATS = ir.VectorType(I32, LANES), ir.VectorType(FLOAT, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)


def available() -> bool:
    """Does this CPU have bf16 tiles, and does the kernel let this process use them? Linux grants that once asked."""
    features = llvmlite.binding.get_host_cpu_features()
    has = all(features.get(name, False) for name in ("amx-tile", "amx-bf16", "avx512f", "avx512bw"))
    if not has or config.CPU_NAME or platform.machine() != "x86_64":  # type: ignore[attr-defined]
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def _pointer(emit: Emitter, address: Any) -> Any:
    return emit.builder.inttoptr(address, ir.IntType(8).as_pointer())


def _at(emit: Emitter, base: Any, index: Any, size: Any) -> Any:
    """Pointer to base + index * size; a size known now is a Python integer."""
    size = emit.number(size) if isinstance(size, int) else size
    return _pointer(emit, emit.builder.add(base, emit.builder.mul(index, size)))


def _tile(emit: Emitter, name: str, *args: Any) -> None:
    """An AMX instruction; numbers of tile registers are Python integers."""
    values = [ir.Constant(ir.IntType(8), arg) if isinstance(arg, int) else arg for arg in args]
    emit.call(f"llvm.x86.{name}", ir.VoidType(), *values)


@intrinsic
def configure(typing_context, shapes):
    """Set the tile registers' shapes for this thread from 64 bytes; ``release`` gives them back."""

    def codegen(context, builder, signature, args):
        emit = Emitter(context, builder)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        _tile(emit, "ldtilecfg", builder.bitcast(data, ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.Array(types.uint8, 1, "C")), codegen


@intrinsic
def release(typing_context):
    """Forget the tiles: a thread that holds some is slower to switch."""

    def codegen(context, builder, signature, args):
        _tile(Emitter(context, builder), "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def _multiply(groups: int) -> Any:
    """An intrinsic for two left tiles side by side and ``groups`` right tiles."""

    def step(emit: Emitter, k: Any, operands: Any, ahead: Sequence[Any]) -> None:
        lefts, stride, packed, width = operands
        base = emit.builder.add(packed, emit.builder.mul(emit.builder.mul(k, width), emit.number(TILE)))
        for g in range(groups):
            _tile(emit, "tileloadd64", RIGHT + g, _pointer(emit, emit.plus(base, g * LINE)), width)
        for s, address in enumerate(lefts):
            _tile(emit, "tileloadd64", LEFT + s, _at(emit, address, k, LINE), stride)
            for g in range(groups):
                _tile(emit, "tdpbf16ps", s * groups + g, LEFT + s, RIGHT + g)
        for address in ahead:  # in the order of memory, which its own prefetchers follow
            for line in range(TILE):
                emit.prefetch(_at(emit, emit.plus(address, line * LINE), k, TILE * LINE), far=True)

    @intrinsic
    def multiply(typing_context, left, following, stride, right, width, steps, out):
        def codegen(context, builder, signature, args):
            emit = Emitter(context, builder)
            lefts, ahead = (cgutils.unpack_tuple(builder, arg, LEFTS) for arg in args[:2])
            stride, packed, width, steps, out = args[2:]
            operands = lefts, stride, packed, width
            for register in range(LEFTS * groups):
                _tile(emit, "tilezero", register)
            with builder.if_else(builder.icmp_signed("==", ahead[0], emit.number(0))) as branches:
                for branch, fetched in zip(branches, ([], ahead), strict=True):
                    with branch:
                        body = partial(step, emit, operands=operands, ahead=fetched)
                        emit.loop(emit.number(0), steps, 1, [], lambda k, _, body=body: body(k))
            for s in range(LEFTS):
                for g in range(groups):
                    target = builder.add(emit.plus(out, g * LINE), builder.mul(width, emit.number(s * TILE)))
                    _tile(emit, "tilestored64", s * groups + g, _pointer(emit, target), width)
            return context.get_dummy_value()

        i64 = types.int64
        some = types.UniTuple(i64, LEFTS)
        return types.void(some, some, i64, i64, i64, i64, i64), codegen

    return multiply


multiply_one, multiply_two = _multiply(1), _multiply(2)
"""out[s] = left[s] @ right, fp32 [16, columns] each, with one or two right tiles.

(left, following, stride, right, width, steps, out): left: addresses of two tiles of 16 weight rows, ``stride`` bytes
from row to row; right: address of packed columns, ``width`` bytes (4 each) together; steps: tiles
along the depth; following: addresses of what memory is asked for meanwhile (16 * stride bytes each), which may be any;
following[0] = 0: nothing.
"""


def _transposed(emit: Emitter, rows: Sequence[Any]) -> list[Any]:
    """16 vectors of 16 lanes: what was lane j of vector i becomes lane i of vector j."""
    rows = list(rows)
    for distance in (8, 4, 2, 1):
        low = [lane + LANES - distance if lane & distance else lane for lane in range(LANES)]
        high = [lane + LANES if lane & distance else lane + distance for lane in range(LANES)]
        for i in range(LANES):
            if not i & distance:
                j = i + distance
                rows[i], rows[j] = emit.shuffle(rows[i], rows[j], low), emit.shuffle(rows[i], rows[j], high)
    return rows


@intrinsic
def turn(typing_context, source, source_stride, out, stride, rows, lanes):
    """out[r, l] = source[l, r] for r < rows and l < lanes, at most 16 each; elements of 4 bytes, strides in bytes.

    Reads 16 lines of 64 bytes from source.
    """

    def codegen(context, builder, signature, args):
        emit = Emitter(context, builder)
        source, source_stride, out, stride, rows, lanes = args
        mask = emit.first_lanes(lanes)
        lines = [emit.load(_at(emit, source, emit.number(n), source_stride), types.float32) for n in range(LANES)]
        for r, line in enumerate(_transposed(emit, lines)):
            with builder.if_then(builder.icmp_signed("<", emit.number(r), rows)):
                emit.store(line, _at(emit, out, emit.number(r), stride), mask)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64, i64, i64), codegen


@intrinsic
def split(typing_context, source, out, apart):
    """The parts of 32 fp32 at an address: 16 pairs of bf16 each, at out, out + apart and out + 2 * apart."""

    def codegen(context, builder, signature, args):
        emit = Emitter(context, builder)
        source, out, apart = args
        values = [emit.load(_pointer(emit, emit.plus(source, skip)), types.float32) for skip in (0, LINE)]
        upper, below_half, one, sixteen, exponent, nothing, nan = (
            ir.Constant(_INTS, [n] * LANES) for n in (-65536, 32767, 1, 16, 0x7F800000, 0, 0x7FC00000)
        )

        def rounded(value: Any) -> Any:
            """To bf16, ties to even, in the upper half of 32 bits; NaN stays NaN."""
            bits = builder.bitcast(value, _INTS)
            odd = builder.and_(builder.lshr(bits, sixteen), one)
            near = builder.and_(builder.add(bits, builder.add(odd, below_half)), upper)
            return builder.select(builder.fcmp_unordered("uno", value, value), nan, near)

        def rest(value: Any, bits: Any) -> Any:
            """What is left of a value; nothing of infinity and NaN."""
            finite = builder.icmp_unsigned("!=", builder.and_(bits, exponent), exponent)
            left = builder.fsub(value, builder.bitcast(bits, _FLOATS))
            return builder.select(finite, left, builder.bitcast(nothing, _FLOATS))

        both = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
        for p in range(MOST_PARTS):
            bits = [rounded(value) for value in values]
            values = [rest(value, part) for value, part in zip(values, bits, strict=True)]
            halves = [builder.trunc(builder.lshr(b, sixteen), _SHORTS) for b in bits]
            pairs = builder.shuffle_vector(*halves, both)
            target = builder.bitcast(_at(emit, out, emit.number(p), apart), pairs.type.as_pointer())
            builder.store(pairs, target, align=4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64), codegen
