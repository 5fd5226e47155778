"""Reused buffers of a step, by name, so that no step allocates and every buffer keeps its address."""

import torch
from torch import Tensor


class Scratch:
    """Buffers that grow to the largest step seen. One thread at a time; a buffer is valid until its next use.

    What a larger one has replaced is kept: recorded kernels and CUDA graphs know its address. Sizes are powers of two,
    so that it is less than the larger one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._replaced: list[Tensor] = []
        self._counted = torch.empty(0, dtype=torch.int32)
        self._zeros = torch.empty(0, dtype=torch.int32)

    def rows(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] with undefined values; its address stays until a larger one is asked for by this name."""
        size, buffer = rows * width, self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype is not dtype:
            self._replaced += () if buffer is None else (buffer,)
            room = 1 << (size - 1).bit_length()
            buffer = self._buffers[name] = torch.empty(room, dtype=dtype, device=self._device)
        return buffer[:size].view(rows, width)

    def everyone(self, rows: int) -> tuple[Tensor, Tensor]:
        """(0 .. rows - 1, zeros), int32 [rows] each: every row goes to expert 0."""
        if len(self._counted) < rows:
            self._replaced += (self._counted, self._zeros)
            self._counted = torch.arange(rows, dtype=torch.int32, device=self._device)
            self._zeros = torch.zeros_like(self._counted)
        return self._counted[:rows], self._zeros[:rows]
