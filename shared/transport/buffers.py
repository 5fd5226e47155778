"""Reused memory of frames: blocks [header | meta | padding to 64 | rows] in host memory, and a pool of them.

Rows on a device lie apart, in memory of their own; then the block ends with the tag that their message travels under.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import torch

from shared.errors import BadFrame, TransportError
from shared.transport.base import DTYPES, HEADER_BYTES, Header, body_offset

SMALLEST_BLOCK = 4096
ROWS_APART = 1 << 31
"""Bit of ``Header.flags`` on the wire: the rows follow as a second message. Owned by the transport."""
ROWS_TAG_BYTES = 8


def size_class(nbytes: int) -> int:
    """The power of two that holds ``nbytes``, at least SMALLEST_BLOCK."""
    return max(SMALLEST_BLOCK, 1 << (nbytes - 1).bit_length())


class Block:
    """Reused memory of one frame, to be sent (an ``Outgoing``) or received.

    ``meta`` and ``rows`` are views, made anew only when the shape differs from the last one.
    """

    meta: np.ndarray
    rows: torch.Tensor
    row_bytes: int
    message_bytes: int
    """Length of the (first) message."""
    rows_tag: np.ndarray
    """uint64 [1] at the end of the message, when the rows lie apart."""

    def __init__(self, capacity: int) -> None:
        self.memory = torch.empty(capacity, dtype=torch.uint8)
        self.bytes: np.ndarray = self.memory.numpy()
        self.meta_address = self.memory.data_ptr() + HEADER_BYTES
        self.capacity = capacity
        self.sent = False
        self.kept = 0
        """How many of the rows are sent."""
        self.apart: torch.Tensor | None = None
        """uint8 memory of rows that travel as a message of their own."""
        self._shape: tuple[int, int, int, torch.dtype] | None = None
        self.lay_out(0, 0, 0, DTYPES[0])

    def keep_rows(self, apart: torch.Tensor | None) -> None:
        """Lay rows out in ``apart`` (uint8 memory on any device) from now on, or in the block itself."""
        if apart is not self.apart:
            self.apart = apart
            self._shape = None

    def lay_out(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        """Point ``meta`` (uint8 [meta_bytes]) and ``rows`` ([rows, columns]) into memory, which must fit them."""
        shape = (meta_bytes, rows, columns, dtype)
        if shape == self._shape and rows == self.kept:
            return
        body, nbytes = body_offset(meta_bytes), rows * columns * dtype.itemsize
        if self.apart is None:
            flat = self.memory[body : body + nbytes]
            self.message_bytes = body + nbytes
        else:
            flat = self.apart[:nbytes]
            self.message_bytes = body + ROWS_TAG_BYTES
            self.rows_tag = self.bytes[body : self.message_bytes].view(np.uint64)
        self.meta = self.bytes[HEADER_BYTES : HEADER_BYTES + meta_bytes]
        self.rows = flat.view(dtype).view(rows, columns)
        self.row_bytes = nbytes
        self.kept = rows
        self._shape = shape

    def keep(self, rows: int) -> None:
        """Send only the first ``rows`` rows."""
        assert self._shape is not None
        _, count, columns, dtype = self._shape
        assert 0 <= rows <= count
        self.kept, spared = rows, self.row_bytes
        self.row_bytes = rows * columns * dtype.itemsize
        if self.apart is None:
            self.message_bytes -= spared - self.row_bytes

    def lay_out_as(self, header: Header) -> None:
        """Point ``meta`` and ``rows`` at what a received header describes."""
        self.lay_out(header.meta_bytes, header.rows, header.columns, DTYPES[header.dtype])

    def seal(self, header: Header) -> None:
        """Fill in the header's sizes and write it in front. Raises TransportError on a second send."""
        if self.sent or self._shape is None:
            raise TransportError("a frame can be sent once: ask for a new buffer with outgoing()")
        header.meta_bytes, _, header.columns, dtype = self._shape
        header.rows = self.kept
        header.dtype = DTYPES.index(dtype)
        flags = header.flags & ~ROWS_APART
        header.flags = flags if self.apart is None else flags | ROWS_APART
        header.pack_into(self.bytes)
        header.flags = flags
        self.sent = True

    def open(self) -> tuple[Header, bool]:
        """Judge received bytes: their header, and whether the rows follow apart.

        Raises BadFrame when they are no frame, or one whose sizes the block cannot hold.
        """
        header = Header.unpack_from(self.bytes)
        apart = bool(header.flags & ROWS_APART)
        header.flags &= ~ROWS_APART
        if header.frame_bytes + ROWS_TAG_BYTES * apart > self.capacity:
            raise BadFrame(f"header claims {header.frame_bytes} bytes, the buffer holds {self.capacity}")
        return header, apart


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
        nbytes = body_offset(meta_bytes) + rows * columns * dtype.itemsize
        if nbytes > self._max_frame_bytes:
            raise TransportError(f"a frame of {nbytes} bytes passes the limit of {self._max_frame_bytes}")
        capacity = size_class(nbytes + ROWS_TAG_BYTES)
        free = self._free.setdefault(capacity, [])
        block = free.pop() if free else self._make(capacity)
        block.sent = False
        block.lay_out(meta_bytes, rows, columns, dtype)
        return block

    def give(self, block: B) -> None:
        """Take a block back; the caller promises that nothing reads or writes it any more."""
        self._free.setdefault(block.capacity, []).append(block)
