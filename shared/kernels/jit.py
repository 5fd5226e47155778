"""How our numba kernels are compiled, and how threads share their work.

Kernels take addresses and sizes as int64 and nothing else: one signature each, so that a call costs about a microsecond
and two processes that fill the on-disk cache at the same time write the same thing. ``view1`` to ``view3`` turn an address
into an array inside a kernel. There is no fastmath anywhere: LLVM may vectorise, but never reorder or fuse.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# How weights look inside a kernel; the dtype of the view says how to widen it.
BF16, FP16, FP32 = np.int16, np.uint16, np.float32
I32, I64 = np.int32, np.int64

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on the first call, or load from the cache."""
    return numba.njit(**_OPTIONS)(function)


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """Like ``kernel``, for functions with a ``prange`` over threads."""
    return numba.njit(parallel=True, **_OPTIONS)(function)


@intrinsic
def _pointer(typing_context, address, dtype):  # noqa: ANN001, ANN202
    result = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, dtype), codegen


@intrinsic
def take_next(typing_context, counter):  # noqa: ANN001, ANN202
    """Atomically return counter[0] and add one: the next work item of a parallel kernel."""

    def codegen(context, builder, signature, args):  # noqa: ANN001, ANN202
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.Array(types.int64, 1, "C")), codegen


@numba.njit(inline="always")
def view1(address, n, dtype):  # noqa: ANN001, ANN201
    """Array of n elements at an address."""
    return numba.carray(_pointer(address, dtype), (n,))


@numba.njit(inline="always")
def view2(address, n, m, dtype):  # noqa: ANN001, ANN201
    """Array [n, m] at an address."""
    return numba.carray(_pointer(address, dtype), (n, m))


@numba.njit(inline="always")
def view3(address, n, m, k, dtype):  # noqa: ANN001, ANN201
    """Array [n, m, k] at an address."""
    return numba.carray(_pointer(address, dtype), (n, m, k))
