"""What every call into the CPU kernels checks before addresses are passed on: nothing outside a tensor is touched."""

import torch
from torch import Tensor

from shared.kernels.jit import KIND_BF16, KIND_FP8, KIND_FP16, KIND_FP32
from shared.kernels.weights import Fp8Blocks, Weight

_KINDS = {torch.float32: KIND_FP32, torch.bfloat16: KIND_BF16, torch.float16: KIND_FP16}


def expect(condition: bool, problem: str, *values: object) -> None:
    """Raise ValueError with ``problem`` (a format string: nothing is formatted while all is well)."""
    if not condition:
        raise ValueError(problem.format(*values))


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_contiguous()


def plain(x: Tensor) -> Tensor:
    """``x`` as contiguous fp32; itself when it is that already."""
    return x if is_plain(x, torch.float32) else x.float().contiguous()


def output(out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """``out`` checked, or a new fp32 tensor."""
    if out is None:
        return torch.empty(shape)
    expect(is_plain(out, torch.float32) and out.shape == shape, "out must be contiguous fp32 {}", shape)
    return out


def row_stride(x: Tensor) -> int:
    """Elements from one row (last dimension) of fp32 ``x`` to the next; more than a row when x is a 2-D view."""
    if is_plain(x, torch.float32):
        return x.shape[-1]
    fits = x.dtype is torch.float32 and x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    expect(fits, "rows must be fp32 and contiguous, each")
    return x.stride(0)


def head_strides(x: Tensor) -> tuple[int, int]:
    """Elements from one row, and from one head, of fp32 x [T, heads, D] to the next; x may be a view."""
    fits = x.dtype is torch.float32 and x.dim() == 3 and x.stride(2) == 1 and x.stride(1) >= x.shape[2]
    expect(fits and (len(x) < 2 or x.stride(0) >= x.shape[1] * x.stride(1)), "heads must be fp32 and contiguous, each")
    return x.stride(0), x.stride(1)


def weight_kind(weight: Tensor) -> int:
    """How kernels are told the dtype. Raises TypeError for one that they do not take."""
    if weight.dtype not in _KINDS:
        raise TypeError(f"weights must be fp32, bf16 or fp16, not {weight.dtype}")
    return _KINDS[weight.dtype]


def located(weight: Weight) -> tuple[int, int]:
    """(address, kind) of a matrix, as kernels are told it. Raises ValueError when it is not contiguous, TypeError."""
    if isinstance(weight, Fp8Blocks):
        return weight.where.data_ptr(), KIND_FP8
    expect(weight.is_contiguous(), "weights must be contiguous")
    return weight.data_ptr(), weight_kind(weight)
