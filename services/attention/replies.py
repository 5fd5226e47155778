"""Checks the parts of all replies to one exchange and arranges them for ``Kernels.combine``.

Pure arithmetic on arrays that are reused from exchange to exchange; knows neither time nor transport.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import PARTS

PROBLEMS = ("", "a part names a row or expert that does not exist", "an expert was computed where it has no home",
            "a row has more parts than chosen experts", "a part came twice")  # fmt: skip


class Arrangement:
    """Where the parts of every row lie: ``source``, ``index`` int32 [T, k] and ``weights`` fp32 [T, k].

    Along k the parts are in ascending order of expert id: the order of the sum, whoever computed them.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._grow(1)
        self._slice(1)

    def fill(self, rows: int, replies: Iterable[tuple[int, NDArray[np.uint8]]], homes: NDArray[np.uint64]) -> str:
        """Arrange replies (instance index, meta with PARTS), numbered as sources in the order given.

        Args:
            rows: T of the exchange.
            homes: uint64 [experts], where an expert may have been computed.

        Returns:
            What is wrong with the replies, "" when every row has exactly k parts. The arrays are valid only then.
        """
        self._slice(rows)
        self._counts[:rows] = 0
        parts = 0
        for source, (instance, meta) in enumerate(replies):
            table = meta.view(np.uint32).reshape(-1, 3)
            code = _place(table, table.view(np.float32), source, instance, homes, *self._views)
            if code:
                return PROBLEMS[code]
            parts += len(table)
        return "" if parts == rows * self._top_k else f"{parts} parts for {rows} rows of {self._top_k}"

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """source, index, weights for ``Kernels.combine``; valid until the next ``fill``."""
        if device.type == "cpu":
            return self._tensors
        source, index, weights = self._tensors
        return source.to(device), index.to(device), weights.to(device)

    def _grow(self, rows: int) -> None:
        self._capacity = 1 << (rows - 1).bit_length()
        shape = (self._capacity, self._top_k)
        self._counts = np.zeros(self._capacity, np.int32)
        self._arrays = (
            np.empty(shape, np.uint32),
            np.empty(shape, np.int32),
            np.empty(shape, np.int32),
            np.empty(shape, np.float32),
        )
        self._rows = 0

    def _slice(self, rows: int) -> None:
        if rows == self._rows:
            return
        if rows > self._capacity:
            self._grow(rows)
        self._rows = rows
        arrays = [array[:rows] for array in self._arrays]
        self._views = (self._counts[:rows], *arrays)
        source, index, weights = (torch.from_numpy(array) for array in arrays[1:])
        self._tensors = source, index, weights


@njit(cache=True, nogil=True)
def _place(parts, part_weights, reply, instance, homes, counts, experts, source, index, weights):  # noqa: ANN001, ANN202
    """Insert one reply's parts in expert order; returns an index into PROBLEMS."""
    for p in range(len(parts)):
        t, e = parts[p, 0], parts[p, 1]
        if t >= len(counts) or e >= len(homes):
            return 1
        if not (homes[e] >> np.uint64(instance)) & np.uint64(1):
            return 2
        j = counts[t]
        if j == experts.shape[1]:
            return 3
        while j > 0 and experts[t, j - 1] > e:
            experts[t, j], source[t, j] = experts[t, j - 1], source[t, j - 1]
            index[t, j], weights[t, j] = index[t, j - 1], weights[t, j - 1]
            j -= 1
        if j > 0 and experts[t, j - 1] == e:
            return 4
        experts[t, j], source[t, j], index[t, j], weights[t, j] = e, reply, p, part_weights[p, 2]
        counts[t] += 1
    return 0


PART_BYTES = PARTS.itemsize
