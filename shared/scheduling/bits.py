"""Sets of instances as 64-bit masks inside compiled code: how many, and which is the first."""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from llvmlite import ir
from numba import njit, types

from shared.kernels.jit import intrinsic


@intrinsic
def count_bits(typing_context, mask):
    """Set bits of a uint64, as int64."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@intrinsic
def lowest_bit(typing_context, mask):
    """Index of the lowest set bit of a uint64 that is not 0, as int64."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


@njit(cache=True, nogil=True)
def without_lowest(mask):
    """A uint64 with its ``lowest_bit`` cleared."""
    return mask & (mask - np.uint64(1))
