"""Reused host memory of frames: contiguous blocks [header | meta | padding to 64 | rows], and a pool of them.

Covers host memory only; rows on a device live in tensors of their own (shared/transport/ucx.py).
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import torch

from shared.errors import BadFrame, TransportError
from shared.transport.base import DTYPES, HEADER_BYTES, Header, body_offset

SMALLEST_BLOCK = 4096


def size_class(nbytes: int) -> int:
    """The power of two that holds ``nbytes``, at least SMALLEST_BLOCK."""
    return max(SMALLEST_BLOCK, 1 << (nbytes - 1).bit_length())


def row_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return rows * columns * dtype.itemsize


class Block:
    """Reused memory of one frame, to be sent (an ``Outgoing``) or received.

    ``meta`` and ``rows`` are views, made anew only when the shape differs from the last one.
    """

    def __init__(self, capacity: int) -> None:
        self.memory = torch.empty(capacity, dtype=torch.uint8)
        self.bytes: np.ndarray = self.memory.numpy()
        self.capacity = capacity
        self.sent = False
        self.lay_out(0, 0, 0, DTYPES[0])

    def lay_out(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        """Point ``meta`` (uint8 [meta_bytes]) and ``rows`` ([rows, columns]) into the block, which must fit them."""
        shape = (meta_bytes, rows, columns, dtype)
        if shape == getattr(self, "_shape", None):
            return
        start = body_offset(meta_bytes)
        self.frame_bytes = start + row_bytes(rows, columns, dtype)
        self.meta = self.bytes[HEADER_BYTES : HEADER_BYTES + meta_bytes]
        self.rows = self.memory[start : self.frame_bytes].view(dtype).view(rows, columns)
        self._shape = shape

    def seal(self, header: Header) -> None:
        """Fill in the header's sizes and write it in front. Raises TransportError on a second send."""
        if self.sent:
            raise TransportError("a frame can be sent once: ask for a new buffer with outgoing()")
        meta_bytes, header.rows, header.columns, dtype = self._shape
        header.meta_bytes, header.dtype = meta_bytes, DTYPES.index(dtype)
        header.pack_into(self.bytes)
        self.sent = True

    def open(self) -> Header:
        """Judge received bytes and lay out their views. Raises BadFrame when they are no frame that fits."""
        header = Header.unpack_from(self.bytes)
        if header.frame_bytes > self.capacity:
            raise BadFrame(f"header claims {header.frame_bytes} bytes, the buffer holds {self.capacity}")
        self.lay_out(header.meta_bytes, header.rows, header.columns, DTYPES[header.dtype])
        return header


B = TypeVar("B", bound=Block)


class Pool(Generic[B]):
    """Free blocks by size class; ``make`` builds one of the given capacity."""

    def __init__(self, make: Callable[[int], B], max_frame_bytes: int) -> None:
        self._make = make
        self._max_frame_bytes = max_frame_bytes
        self._free: dict[int, list[B]] = {}

    def take(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> B:
        """A free block laid out for that shape. Raises TransportError when the frame would be too long."""
        if dtype not in DTYPES:
            raise TransportError(f"rows of {dtype} cannot travel: use one of {', '.join(map(str, DTYPES))}")
        nbytes = body_offset(meta_bytes) + row_bytes(rows, columns, dtype)
        if nbytes > self._max_frame_bytes:
            raise TransportError(f"a frame of {nbytes} bytes passes the limit of {self._max_frame_bytes}")
        capacity = size_class(nbytes)
        free = self._free.setdefault(capacity, [])
        block = free.pop() if free else self._make(capacity)
        block.sent = False
        block.lay_out(meta_bytes, rows, columns, dtype)
        return block

    def give(self, block: B) -> None:
        """Take a block back; the caller promises that nothing reads or writes it any more."""
        self._free.setdefault(block.capacity, []).append(block)
