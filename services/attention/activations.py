"""Which experts the latest exchanges have activated: one bit mask for each, in a ring for every layer.

The compute thread writes after every exchange, at the cost of one compiled call; another thread reads now and then.
Telling others is in reports.py.
"""
# ruff: noqa: ANN001, ANN202 - numba infers the types

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

KEPT = 256
"""Exchanges of a layer that are remembered, if their masks fit in MOST_BYTES."""
MOST_BYTES = 384 << 10
"""Of one layer's masks: they travel in one message."""
WORD = 64
_TIME, _ROWS, _MASK = 0, 1, 2
"""Where an entry has its monotonic time (ns), its number of rows, and its mask."""


class Activations(NamedTuple):
    """Exchanges of one layer, oldest first."""

    masks: NDArray[np.uint64]
    """[exchanges, words]: bit e % 64 of word e // 64 is expert e."""
    rows: int
    """Of all of them together."""
    since: float
    """``time.monotonic()`` of the first one."""


class ActivationRing:
    """``mark`` belongs to the compute thread, ``take`` to one other thread; making it compiles ``mark``."""

    def __init__(self, layers: Sequence[int], experts: int, kept: int = KEPT) -> None:
        """``layers``: checkpoint indices; ``experts``: of each of them."""
        words = -(-experts // WORD)
        self.layers = tuple(layers)
        self._kept = max(1, min(kept, MOST_BYTES // (8 * words)))
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._entries = np.zeros((len(layers), self._kept, _MASK + words), np.uint64)
        self._counts = np.zeros(len(layers), np.int64)
        self._taken = [0] * len(layers)
        self.mark(layers[0], np.zeros((1, 1), np.uint32))
        self._counts[:] = 0

    def mark(self, layer: int, experts: NDArray[np.uint32]) -> None:
        """Remember an exchange of ``layer`` whose rows have chosen ``experts`` [T, k]."""
        _mark(self._entries, self._counts, self._index[layer], time.monotonic_ns(), experts)

    def take(self, layer: int) -> Activations | None:
        """The exchanges since the last call, the latest of them when there were many; None: there were none."""
        index = self._index[layer]
        before, end = self._taken[index], int(self._counts[index])
        if before == end:
            return None
        order = np.arange(max(before, end - self._kept), end)
        entries = self._entries[index, order % self._kept]
        entries = entries[order >= self._counts[index] - self._kept]  # the others were written over meanwhile
        self._taken[index] = end
        if not len(entries):  # all of them
            return None
        rows, since = int(entries[:, _ROWS].sum()), int(entries[0, _TIME]) / 1e9
        return Activations(np.ascontiguousarray(entries[:, _MASK:]), rows, since)


@njit(cache=True, error_model="numpy")
def _mark(entries, counts, layer, now, experts):
    """Holds the interpreter's lock: no reader sees half an entry, and nobody takes the core for so short a call."""
    entry = entries[layer, counts[layer] % entries.shape[1]]
    entry[:] = 0
    entry[_TIME], entry[_ROWS] = now, len(experts)
    for t in range(experts.shape[0]):
        for j in range(experts.shape[1]):
            word, bit = experts[t, j] // WORD, experts[t, j] % WORD
            if word < len(entry) - _MASK:  # always, unless a caller is wrong: numba checks no bounds
                entry[_MASK + word] |= np.uint64(1) << np.uint64(bit)
    counts[layer] += 1
