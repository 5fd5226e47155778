"""How our numba kernels are compiled, and how threads share their work.

Kernels take addresses and sizes as int64: one signature each, so that a call costs a few microseconds and two processes
that fill the on-disk cache at the same moment write the same thing. ``view1`` to ``view3`` turn an address into an
array. A *routine* is the expensive inner part of kernels: a C function that they call by its address, compiled only
once. There is no fastmath anywhere: LLVM may vectorise, but never reorder or fuse.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

# Element types of views; bf16, fp16 and fp8 have none in numba, integers of their size stand for them.
BF16, FP16, FP32, FP8 = np.int16, np.uint16, np.float32, np.uint8
I32, I64, U32 = np.int32, np.int64, np.uint32
# How a kernel is told the dtype of weights at an address; of FP8 it is the address of ``Fp8Blocks.where``.
KIND_FP32, KIND_BF16, KIND_FP16, KIND_FP8 = 0, 1, 2, 3

intrinsic: Any = numba_intrinsic
"""Untyped: the first parameter of an intrinsic is not one that its callers give."""

_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy"}
_AUTOMATIC = ("comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil")
"""What numba would make parallel besides ``prange``; even ``np.zeros(1)`` would start all threads."""
_carray: Any = numba.carray  # type: ignore[attr-defined]


def helper(function: Callable[..., Any]) -> Any:
    """A function that only other compiled functions call; compiled and cached as a part of them."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on the first call, or load from the cache."""
    return numba.njit(nogil=True, **_OPTIONS)(function)


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """Like ``kernel``, for functions with a ``prange`` over threads; nothing else in them becomes parallel."""
    parallel: Any = dict.fromkeys(_AUTOMATIC, False)
    return numba.njit(nogil=True, parallel=parallel, **_OPTIONS)(function)


def routine(signature: str, function: Callable[..., Any]) -> Any:
    """Compile a C function now, or load it from the cache; it lives as long as the result, and must not raise."""
    return numba.cfunc(signature, **_OPTIONS)(function)


@intrinsic
def call(typing_context, address, args):
    """Call the routine at an address with a tuple of arguments; arrays are passed as their address, and kept alive."""

    def codegen(context, builder, signature, values):
        def plain(kind: Any, value: Any) -> Any:
            if not isinstance(kind, types.Array):
                return value
            return builder.ptrtoint(context.make_array(kind)(context, builder, value).data, ir.IntType(64))

        elements = zip(args.types, cgutils.unpack_tuple(builder, values[1]), strict=True)
        plains = [plain(kind, value) for kind, value in elements]
        shape = ir.FunctionType(ir.VoidType(), [value.type for value in plains])
        builder.call(builder.inttoptr(values[0], shape.as_pointer()), plains)
        return context.get_dummy_value()

    return types.void(types.int64, args), codegen


@intrinsic
def call_native(typing_context, address, args):
    """Call a C function of whole numbers by its address; returns what is in the result register, as int64."""

    def codegen(context, builder, signature, values):
        integer = ir.IntType(64)
        kinds = zip(args.types, cgutils.unpack_tuple(builder, values[1]), strict=True)
        numbers = [context.cast(builder, value, kind, types.int64) for kind, value in kinds]
        shape = ir.FunctionType(integer, [integer] * len(numbers))
        return builder.call(builder.inttoptr(values[0], shape.as_pointer()), numbers)

    return types.int64(types.int64, args), codegen


@intrinsic
def _pointer(typing_context, address, dtype):
    result = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, dtype), codegen


@intrinsic
def take_next(typing_context, counter):
    """Atomically return counter[0] and add one: the next work item of a parallel kernel."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.Array(types.int64, 1, "C")), codegen


@numba.njit(inline="always")
def view1(address, n, dtype):
    """Array of n elements at an address."""
    return _carray(_pointer(address, dtype), (n,))


@numba.njit(inline="always")
def view2(address, n, m, dtype):
    """Array [n, m] at an address."""
    return _carray(_pointer(address, dtype), (n, m))


@numba.njit(inline="always")
def view3(address, n, m, k, dtype):
    """Array [n, m, k] at an address."""
    return _carray(_pointer(address, dtype), (n, m, k))
