"""Compiled kernels called one after the other without the interpreter.

The calling convention is numba's own for functions that were compiled with ``jit.kernel``: where the result goes, where
an exception would go, then the arguments with tuples flattened; what is returned is above zero when there was one. On
Linux, on x86-64 and on 64-bit Arm, whole and floating-point numbers are passed in registers of their own, and what is
passed beyond the last argument is not looked at: so one way to call serves all kernels.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from collections.abc import Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import typeof, types
from numba.core import cgutils
from numpy.typing import NDArray

from shared.kernels.jit import I64, intrinsic, kernel, view1

NUMBERS, FRACTIONS = 28, 2
"""Most whole numbers and floating-point numbers that a kernel may take."""
CALL = np.dtype([("function", "<i8"), ("refuses", "<i8"), ("numbers", "<i8", NUMBERS), ("fractions", "<f8", FRACTIONS)])
"""One call: the function's address, whether its result says that it refuses its input, and its arguments."""
FAILED = -(1 << 62)
"""Instead of a result: the kernel raised, for want of memory."""
CALL_BYTES, NUMBERS_AT = CALL.itemsize, 16
_FRACTIONS_AT = NUMBERS_AT + 8 * NUMBERS


def encode(function: Any, arguments: tuple[Any, ...]) -> NDArray[Any]:
    """The call of a kernel with whole numbers, floats and tuples of whole numbers, as one CALL; compiles if need be."""
    kinds = tuple(map(typeof, arguments))
    function.compile(kinds)
    compiled = function.overloads[kinds]
    numbers = [number for argument in arguments for number in _whole(argument)]
    fractions = [argument for argument in arguments if isinstance(argument, float)]
    if len(numbers) > NUMBERS or len(fractions) > FRACTIONS:
        raise ValueError(f"{function.__name__} takes more arguments than a recorded call has")
    call = np.zeros((), CALL)
    call["function"] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    call["refuses"] = compiled.signature.return_type == types.boolean
    call["numbers"][: len(numbers)] = numbers
    call["fractions"][: len(fractions)] = fractions
    return call


def _whole(argument: Any) -> Iterable[int]:
    if isinstance(argument, tuple):
        return argument
    return () if isinstance(argument, float) else (argument,)


@intrinsic
def _call(typing_context, function, numbers, fractions):
    """Call the function at an address with arguments at two others; returns what it wrote as its result, or FAILED."""

    def codegen(context, builder, signature, args):
        integer, double = ir.IntType(64), ir.DoubleType()
        result, trouble = (cgutils.alloca_once(builder, integer) for _ in range(2))
        builder.store(ir.Constant(integer, 0), result)

        def loaded(kind, address, count):
            first = builder.inttoptr(address, kind.as_pointer())
            return [builder.load(builder.gep(first, [ir.Constant(ir.IntType(32), i)])) for i in range(count)]

        values = [result, trouble, *loaded(integer, args[1], NUMBERS), *loaded(double, args[2], FRACTIONS)]
        shape = ir.FunctionType(ir.IntType(32), [value.type for value in values])
        status = builder.call(builder.inttoptr(args[0], shape.as_pointer()), values)
        failed = builder.icmp_signed(">", status, ir.Constant(ir.IntType(32), 0))
        return builder.select(failed, ir.Constant(integer, FAILED), builder.load(result))

    return types.int64(types.int64, types.int64, types.int64), codegen


@kernel
def play(calls, count):
    """Carry out ``count`` calls (CALL, at an address); returns the number of the one that refused its input, or -1."""
    for i in range(count):
        at = calls + i * CALL_BYTES
        header = view1(at, 2, I64)
        result = _call(header[0], at + NUMBERS_AT, at + _FRACTIONS_AT)
        if result == FAILED or (header[1] and not result & 255):
            return i
    return -1
