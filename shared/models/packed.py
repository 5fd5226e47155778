"""Weights that a checkpoint stores in fewer than 16 bits: their names, and how to unpack what kernels do not read.

FP8 (DeepSeek-V3): E4M3, and one fp32 factor per block of a matrix; kernels read it as it is (kernels/weights.py). MXFP4
(OCP Microscaling Formats 1.0): E2M1, two to a byte, low half first, and one power of two per 32 values; unpacked when
it is loaded, into private memory of who loads it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FP8 = "F8_E4M3"
"""As safetensors writes it."""
SCALE_SUFFIX = "_scale_inv"
"""Behind the name of an FP8 tensor: that of its blocks' factors."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_mxfp4(blocks: "Tensor", scales: "Tensor") -> "Tensor":
    """bf16 [N, K], in which every value is exact, out of uint8 blocks [N, K / 32, 16] and scales [N, K / 32]."""
    import torch  # the gateway reads names from this file and has no use for torch

    values = torch.tensor(_E2M1 + tuple(-v for v in _E2M1))
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    exact = torch.ldexp(values[pairs], scales.int()[..., None] - 127)
    return exact.bfloat16().flatten(-2)
