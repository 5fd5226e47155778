"""Memory of one's own for a fixed number of experts: weights are read there from the files of the checkpoint.

A slot that is freed gives its pages back to the system. What was read stays in the page cache, the host memory from
which a start is *warm*.
"""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shared.errors import MoemeshError
from shared.kernels.weights import Fp8Blocks, Weight

PAGE, HUGE = mmap.PAGESIZE, 2 << 20
"""Bytes of pages. Slots of large experts lie on huge ones, which are filled several times faster: fewer faults."""
_LINE = 64

Read = Callable[[Tensor, int], bool]
"""As ``Checkpoint.read``: put the bytes of a view of a file at an address, if it is one."""


class SlotsMismatch(MoemeshError):
    """An expert's weights differ in form from those that the slots were made for."""


class Slots(Protocol):
    """Room for a fixed number of experts."""

    @property
    def count(self) -> int: ...

    def take(self, slot: int) -> None:
        """It is going to be filled."""
        ...

    def fill(self, slot: int, weights: Sequence[Weight], read: Read) -> tuple[Weight, ...]:
        """Copy an expert's weights into a slot; returns them there. Raises what ``read`` raises."""
        ...

    def free(self, slot: int) -> None:
        """Nobody reads this slot any more, and nobody has taken it."""
        ...


class DeviceSlots:
    """On a device its allocator keeps the memory: what leaves a table is free for the next expert."""

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self.count = count
        self._device, self._dtype = device, dtype

    def take(self, slot: int) -> None:
        """Nothing to do: see the class."""

    def fill(self, slot: int, weights: Sequence[Weight], read: Read) -> tuple[Weight, ...]:
        """See ``Slots``."""
        return tuple(self._moved(weight, read) for weight in weights)

    def _moved(self, weight: Weight, read: Read) -> Weight:
        if isinstance(weight, Fp8Blocks):
            values, factors = (_in_memory(tensor, read) for tensor in (weight.values, weight.factors))
            return replace(weight, values=values, factors=factors).to(self._device)
        return _in_memory(weight, read).to(self._device, self._dtype)

    def free(self, slot: int) -> None:
        """Nothing to do: see the class."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a slot."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


def tensors_of(weights: Sequence[Weight]) -> list[Tensor]:
    """What the weights of an expert consist of, in a fixed order."""
    parts = ((w.values, w.factors) if isinstance(w, Fp8Blocks) else (w,) for w in weights)
    return [tensor for group in parts for tensor in group]


class HostSlots:
    """Slots in host memory for experts whose weights have the form of ``like``.

    One thread takes and frees; another one may fill, one slot at a time.
    """

    def __init__(self, count: int, like: Sequence[Weight]) -> None:
        self.count = count
        self._like = list(like)
        self._places, end = [], 0
        for tensor in tensors_of(like):
            self._places.append(_Place(end, tensor.shape, tensor.dtype))
            end += -(-tensor.nbytes // _LINE) * _LINE
        self.slot_bytes = -(-end // PAGE) * PAGE
        self._page = HUGE if self.slot_bytes >= HUGE // 2 and hasattr(mmap, "MADV_HUGEPAGE") else PAGE
        size = -(-max(1, count) * self.slot_bytes // self._page) * self._page
        self._map = mmap.mmap(-1, size + self._page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        everything = torch.frombuffer(self._map, dtype=torch.uint8)
        self._skip = -everything.data_ptr() % self._page
        self._memory = everything[self._skip : self._skip + size]
        self._address = self._memory.data_ptr()
        if self._page == HUGE:
            with suppress(OSError):  # a kernel without them: small pages do as well, but slower
                self._map.madvise(mmap.MADV_HUGEPAGE, self._skip, size)
        self._taken = np.zeros(count, np.bool_)
        self._weights = [self._views(slot) for slot in range(count)]

    def take(self, slot: int) -> None:
        """See ``Slots``."""
        self._taken[slot] = True

    def fill(self, slot: int, weights: Sequence[Weight], read: Read) -> tuple[Weight, ...]:
        """See ``Slots``. Raises SlotsMismatch."""
        sources = tensors_of(weights)
        if [(s.shape, s.dtype) for s in sources] != [(p.shape, p.dtype) for p in self._places]:
            raise SlotsMismatch("an expert's weights differ in shape or dtype from the first one's")
        for source, place in zip(sources, self._places, strict=True):
            address = self._address + slot * self.slot_bytes + place.offset
            if not read(source, address):  # a copy without the interpreter's lock and torch's threads
                ctypes.memmove(address, source.data_ptr(), source.nbytes)
        return self._weights[slot]

    def free(self, slot: int) -> None:
        """Give those pages of a slot back that no other slot is on that is taken."""
        self._taken[slot] = False
        start, end = slot * self.slot_bytes, (slot + 1) * self.slot_bytes
        for page in range(start // self._page, -(-end // self._page)):
            first, last = page * self._page // self.slot_bytes, ((page + 1) * self._page - 1) // self.slot_bytes
            if not self._taken[first : last + 1].any():
                self._map.madvise(mmap.MADV_DONTNEED, self._skip + page * self._page, self._page)

    def _views(self, slot: int) -> tuple[Weight, ...]:
        tensors = iter([self._view(slot, place) for place in self._places])
        return tuple(
            Fp8Blocks(next(tensors), next(tensors), w.block) if isinstance(w, Fp8Blocks) else next(tensors)
            for w in self._like
        )

    def _view(self, slot: int, place: _Place) -> Tensor:
        start = slot * self.slot_bytes + place.offset
        size = place.shape.numel() * place.dtype.itemsize
        return self._memory[start : start + size].view(place.dtype).view(place.shape)


def _in_memory(tensor: Tensor, read: Read) -> Tensor:
    """What a view shows, without mapping its file's pages; any other tensor is in memory already."""
    room = torch.empty_like(tensor)
    return room if read(tensor, room.data_ptr()) else tensor
