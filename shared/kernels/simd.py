"""Vectors of 16 fp32 lanes inside numba intrinsics: what LLVM code the reductions in ``tiles`` are made of.

Written as LLVM instructions, so that the order of operations is ours and not the vectoriser's. A CPU with narrower
registers splits a vector in two or four and computes the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config

LANES = 16
FLOAT, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
AHEAD = 16
"""Scattered rows are asked for so many rows before they are read: no hardware guesses where they are."""
E4M3_UNIT = 256.0
"""What ``from_e4m3`` leaves out."""
_INTS, _FLOATS = ir.VectorType(I32, LANES), ir.VectorType(FLOAT, LANES)


def tile_shape() -> tuple[int, int]:
    """(rows, columns) of the dot tile: as many accumulators as the registers hold beside the operands."""
    wide = llvmlite.binding.get_host_cpu_features().get("avx512f", False) and not config.CPU_NAME  # type: ignore[attr-defined]
    return (4, 4) if wide else (3, 2)


TILE_ROWS, TILE_COLS = tile_shape()


class Emitter:
    """Appends instructions to the function that numba is lowering. Values are LLVM values, counts and indices i64."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.context, self.builder = context, builder

    def number(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def plus(self, value: Any, constant: int) -> Any:
        return self.builder.add(value, self.number(constant))

    def vector(self, value: float) -> Any:
        """A constant in all lanes."""
        return ir.Constant(_FLOATS, [value] * LANES)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call(f"llvm.fma.v{LANES}f32", _FLOATS, a, b, c)

    def splat(self, scalar: Any) -> Any:
        """One value in all lanes."""
        empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        vector = self.builder.insert_element(empty, scalar, ir.Constant(I32, 0))
        return self.shuffle(vector, vector, [0] * LANES)

    def shuffle(self, a: Any, b: Any, order: Sequence[int]) -> Any:
        """Lanes of a (0 .. 15) and b (16 .. 31) in this order."""
        return self.builder.shuffle_vector(a, b, ir.Constant(_INTS, list(order)))

    def first_lanes(self, count: Any) -> Any:
        """Mask of the first ``count`` lanes."""
        lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
        return self.builder.icmp_signed("<", lanes, self.splat(count))

    def load(self, pointer: Any, dtype: types.Type, mask: Any = None) -> Any:
        """16 elements widened to fp32 (fp8: see ``from_e4m3``); lanes outside ``mask`` are not read and become zero."""
        if dtype == types.float32:
            return self._load(pointer, FLOAT, mask)
        if dtype == types.uint8:
            return from_e4m3(self.builder, self._load(pointer, I8, mask))
        bits = self._load(pointer, I16, mask)
        if dtype == types.uint16:
            return self.builder.fpext(self.builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
        wide = self.builder.zext(bits, _INTS)  # bf16 is the upper half of fp32
        return self.builder.bitcast(self.builder.shl(wide, ir.Constant(_INTS, [16] * LANES)), _FLOATS)

    def prefetch(self, pointer: Any, far: bool = False) -> None:
        """Ask for the cache line at an address, which may be any; ``far``: into the second-level cache only."""
        pointer = self.builder.bitcast(pointer, I8.as_pointer())
        read, keep, data = (ir.Constant(I32, flag) for flag in (0, 2 if far else 3, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)

    def store(self, vector: Any, pointer: Any, mask: Any = None) -> None:
        """Write the fp32 lanes in ``mask``, or all."""
        pointer = self.builder.bitcast(pointer, _FLOATS.as_pointer())
        if mask is None:
            self.builder.store(vector, pointer, align=4)
            return
        name = f"llvm.masked.store.v{LANES}f32.p0"
        self.call(name, ir.VoidType(), vector, pointer, ir.Constant(I32, 4), mask)

    def store_part(self, vector: Any, first: int, count: int, pointer: Any) -> None:
        """Write lanes first .. first + count - 1 side by side."""
        order = ir.Constant(ir.VectorType(I32, count), list(range(first, first + count)))
        part = self.builder.shuffle_vector(vector, vector, order)
        self.builder.store(part, self.builder.bitcast(pointer, part.type.as_pointer()), align=4)

    def fold(self, vectors: list[Any]) -> Any:
        """The sums of up to 16 vectors over their lanes, as one vector: lanes 8 apart are added, then 4, 2 and 1 apart.

        Two half-folded vectors share one register; the additions of each are those that it would see alone.
        """
        width = LANES
        vectors = vectors + vectors[-1:] * (LANES - len(vectors))
        while width > 1:
            low = [lane for lane in range(2 * LANES) if lane % width < width // 2]
            high = [lane + width // 2 for lane in low]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.builder.fadd(self.shuffle(a, b, low), self.shuffle(a, b, high)) for a, b in pairs]
            width //= 2
        return vectors[0]

    def loop(self, start: Any, stop: Any, step: int, state: list[Any], body: Callable[..., Any]) -> list[Any]:
        """``for i in range(start, stop, step): state = body(i, state)`` with the state in registers."""
        builder, before = self.builder, self.builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        counter, carried = builder.phi(I64), [builder.phi(value.type) for value in state]
        builder.cbranch(builder.icmp_signed("<", counter, stop), inside, after)
        builder.position_at_end(inside)
        results = [self.plus(counter, step), *(body(counter, carried) or [])]
        latch = builder.block
        builder.branch(head)
        for phi, first, value in zip([counter, *carried], [start, *state], results, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, latch)
        builder.position_at_end(after)
        return carried

    def over_lanes(self, n: Any, state: list[Any], step: Callable[..., list[Any]]) -> list[Any]:
        """``state = step(k, state)`` for k = 0, 16, ...; the rest of n elements goes to ``step(k, state, mask)``."""
        builder, whole = self.builder, self.builder.and_(n, self.number(-LANES))
        state = self.loop(self.number(0), whole, LANES, state, step)
        before = builder.block
        with builder.if_then(builder.icmp_signed("<", whole, n)):
            rest = step(whole, state, self.first_lanes(builder.sub(n, whole)))
            tail = builder.block
        joined = [builder.phi(value.type) for value in state]
        for phi, value, new in zip(joined, state, rest, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(new, tail)
        return joined

    def strips(self, start: Any, stop: Any, sizes: Sequence[int], body: Callable[[Any, int], None]) -> None:
        """``body(i, size)`` over start .. stop - 1 in strips of the first size, what is left in the next, down to 1."""
        for size in sizes:
            left = self.builder.srem(self.builder.sub(stop, start), self.number(size))
            end = self.builder.sub(stop, left)
            self.loop(start, end, size, [], lambda i, _, size=size: body(i, size))
            start = end

    def _load(self, pointer: Any, element: Any, mask: Any) -> Any:
        vector = ir.VectorType(element, LANES)
        pointer = self.builder.bitcast(pointer, vector.as_pointer())
        if mask is None:
            return self.builder.load(pointer, align=1)
        name = f"llvm.masked.load.v{LANES}{element.intrinsic_name}.p0"
        return self.call(name, vector, pointer, ir.Constant(I32, 1), mask, ir.Constant(vector, [0] * LANES))

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """Call an LLVM intrinsic by its full name (llvmlite cannot spell the names of vector types)."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)


class Rows:
    """Pointers into a 2-D array argument of an intrinsic."""

    def __init__(self, emit: Emitter, kind: Any, value: Any) -> None:
        self.emit, self.dtype = emit, kind.dtype
        array = emit.context.make_array(kind)(emit.context, emit.builder, value)
        self.data, self.depth = array.data, cgutils.unpack_tuple(emit.builder, array.shape)[1]
        self.stride = cgutils.unpack_tuple(emit.builder, array.strides)[0]
        self.size = emit.context.get_abi_sizeof(emit.context.get_data_type(kind.dtype))

    def row(self, number: Any) -> Any:
        return cgutils.pointer_add(self.emit.builder, self.data, self.emit.builder.mul(number, self.stride))

    def at(self, row: Any, column: Any) -> Any:
        """Pointer to one element of the row at a pointer."""
        bytes_in = self.emit.builder.mul(column, self.emit.number(self.size))
        return cgutils.pointer_add(self.emit.builder, row, bytes_in)

    def load(self, row: Any, column: Any, mask: Any = None) -> Any:
        """16 elements of the row at a pointer, from ``column`` on, as fp32."""
        return self.emit.load(self.at(row, column), self.dtype, mask)


class Fp8Rows:
    """Pointers into FP8 blocks: a tuple (values, factors, rows of a block, columns of a block) given to an intrinsic.

    Columns of a block are a multiple of 16. A row is a pair: its values, and the factors of its blocks.
    """

    def __init__(self, emit: Emitter, kind: Any, value: Any) -> None:
        values, factors, self.block_rows, self.block_columns = cgutils.unpack_tuple(emit.builder, value)
        self.values, self.factors = Rows(emit, kind[0], values), Rows(emit, kind[1], factors)
        self.emit, self.dtype, self.depth = emit, self.values.dtype, self.values.depth

    def row(self, number: Any) -> Any:
        return self.values.row(number), self.factors.row(self.emit.builder.udiv(number, self.block_rows))

    def at(self, row: Any, column: Any) -> Any:
        """Pointer to one value of a row."""
        return self.values.at(row[0], column)

    def load(self, row: Any, column: Any, mask: Any = None) -> Any:
        """16 elements of a row, from ``column`` on, as fp32."""
        builder = self.emit.builder
        at = self.factors.at(row[1], builder.udiv(column, self.block_columns))
        factor = builder.fmul(builder.load(builder.bitcast(at, FLOAT.as_pointer())), ir.Constant(FLOAT, E4M3_UNIT))
        return builder.fmul(self.values.load(row[0], column, mask), self.emit.splat(factor))


def from_e4m3(builder: ir.IRBuilder, codes: Any) -> Any:
    """E4M3 (i8, or a vector of them) as fp32, divided by ``E4M3_UNIT``, exactly.

    Its fields are those of an fp16, whose exponents begin 8 lower; but for NaN, where every bit behind the sign is set.
    """
    lanes = codes.type.count if isinstance(codes.type, ir.VectorType) else 0

    def shaped(element: Any) -> Any:
        return ir.VectorType(element, lanes) if lanes else element

    def constant(element: Any, value: int) -> Any:
        return ir.Constant(shaped(element), [value] * lanes if lanes else value)

    moved = builder.shl(builder.sext(codes, shaped(I16)), constant(I16, 7))
    half = builder.and_(moved, constant(I16, ~0x4000))  # there the sign is for a second time
    missing = builder.icmp_signed("==", builder.and_(codes, constant(I8, 0x7F)), constant(I8, 0x7F))
    half = builder.or_(half, builder.sext(missing, shaped(I16)))
    return builder.fpext(builder.bitcast(half, shaped(ir.HalfType())), shaped(FLOAT))


def stored_rows(emit: Emitter, kind: Any, value: Any) -> Rows | Fp8Rows:
    """Rows of weights: a 2-D array, or the tuple that ``Fp8Rows`` takes."""
    return (Fp8Rows if isinstance(kind, types.BaseTuple) else Rows)(emit, kind, value)


def row_number(emit: Emitter, kind: Any, value: Any, position: Any) -> Any:
    """Which row stands at a position: looked up when ``value`` is an array of row numbers, else counted from it."""
    if not isinstance(kind, types.Array):
        return emit.builder.add(value, position)
    data = emit.context.make_array(kind)(emit.context, emit.builder, value).data
    return emit.builder.sext(emit.builder.load(emit.builder.gep(data, [position])), I64)


def row_soon(emit: Emitter, kind: Any, value: Any, position: Any) -> Any:
    """Which row stands ``AHEAD`` positions further in an array of row numbers, or last in it."""
    array = emit.context.make_array(kind)(emit.context, emit.builder, value)
    (count,) = cgutils.unpack_tuple(emit.builder, array.shape)
    ahead, last = emit.plus(position, AHEAD), emit.plus(count, -1)
    inside = emit.builder.icmp_signed("<", ahead, last)
    return row_number(emit, kind, value, emit.builder.select(inside, ahead, last))
