"""Weights as kernels take them: plain tensors, or FP8 values whose blocks share a factor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fp8Blocks:
    """A matrix [N, K] at one byte per weight: E4M3 times the fp32 factor of its block (DeepSeek-V3, arXiv 2412.19437).

    Raises ValueError for tensors that do not fit together.
    """

    values: Tensor
    """float8_e4m3fn [N, K]"""
    factors: Tensor
    """fp32 [N / block[0], K / block[1]], rounded up."""
    block: tuple[int, int]

    def __post_init__(self) -> None:
        blocks = tuple(-(-size // block) for size, block in zip(self.shape, self.block, strict=True))
        dtypes = self.values.dtype, self.factors.dtype
        fits = self.factors.shape == blocks and dtypes == (torch.float8_e4m3fn, torch.float32)
        if not (fits and self.values.is_contiguous() and self.factors.is_contiguous()):
            raise ValueError(f"FP8 values {tuple(self.shape)} want contiguous fp32 factors {blocks} of their blocks")

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.factors.nbytes

    @cached_property
    def where(self) -> Tensor:
        """int64 [4]: addresses of values and factors, sizes of a block. CPU kernels find all of it by its address."""
        return torch.tensor([self.values.data_ptr(), self.factors.data_ptr(), *self.block])

    def to(self, device: torch.device) -> "Fp8Blocks":
        return Fp8Blocks(self.values.to(device), self.factors.to(device), self.block)

    def unpacked(self) -> Tensor:
        """fp32 [N, K]"""
        return unpack(self.values, self.factors, self.block)


def unpack(values: Tensor, factors: Tensor, block: tuple[int, int]) -> Tensor:
    """E4M3 values [..., N, K] times the factors [..., n, k] of their blocks, fp32."""
    (rows, cols), (high, wide) = values.shape[-2:], block
    tall = factors.repeat_interleave(high, -2)[..., :rows, :]
    return values.float() * tall.repeat_interleave(wide, -1)[..., :cols]


Weight = Tensor | Fp8Blocks


def unpacked(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight itself; FP8 as ``dtype``."""
    return weight.unpacked().to(dtype) if isinstance(weight, Fp8Blocks) else weight


def expert_bytes(experts: Mapping[int, Sequence[Weight]]) -> int:
    """Bytes of the weights of some experts."""
    return sum(weight.nbytes for weights in experts.values() for weight in weights)
