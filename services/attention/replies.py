"""Checks the parts of all replies to one exchange, arranges and adds them.

Pure arithmetic on arrays that are reused from exchange to exchange; knows neither time nor transport.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import INCOMPLETE, PARTS, PROBLEMS, place_parts
from shared.exchange_frames import SUMS
from shared.kernels.base import Kernels
from shared.transport.base import Incoming

PART_BYTES = PARTS.itemsize


class Reply(NamedTuple):
    """A COMBINE frame, and whose parts are in it one after the other."""

    frame: Incoming
    segments: list[tuple[int, int]]
    """(bit of an instance, number of its parts)"""

    @property
    def sums(self) -> bool:
        """Whether its rows are weighted sums instead of parts."""
        return bool(self.frame.header.flags & SUMS)

    def parts(self) -> NDArray[np.void]:
        """PARTS of all segments."""
        count = sum(parts for _, parts in self.segments)
        return self.frame.meta[: count * PART_BYTES].view(PARTS)

    def table(self) -> Iterator[tuple[int, int, int, int]]:
        """As ``Kernels.gather`` wants it."""
        frame = self.frame
        meta, rows, width = frame.meta_address, frame.rows.data_ptr(), 4 * frame.header.columns
        for bit, parts in self.segments:
            yield bit, meta, rows, parts
            meta, rows = meta + parts * PART_BYTES, rows + parts * width

    def metas(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(bit, PARTS) of each segment."""
        first = 0
        for bit, parts in self.segments:
            yield bit, self.frame.meta[first * PART_BYTES : (first + parts) * PART_BYTES]
            first += parts

    def pieces(self) -> Iterator[tuple[int, NDArray[np.uint8], Tensor]]:
        """(bit, PARTS, rows) of each segment; rows are those of its parts."""
        rows = self.frame.rows.split([parts for _, parts in self.segments])
        for (bit, meta), some in zip(self.metas(), rows, strict=True):
            yield bit, meta, some


class Sum:
    """Adds replies to the residual stream: in one call where the kernels have one, else step by step."""

    def __init__(self, kernels: Kernels, top_k: int) -> None:
        self._kernels = kernels
        self._top_k = top_k
        self._arrangement = Arrangement(top_k)
        self.chosen = self._arrangement.experts(1)
        """uint32 [T, k], ascending: the experts of the rows that were added last; valid until the next ``add``."""

    def add(self, replies: Sequence[Reply], homes: NDArray[np.uint64], x: Tensor) -> str:
        """x [T, H] += the weighted parts of all replies, in ascending expert order; sums in the order of instances.

        homes: uint64 [experts], where an expert may have been computed. Returns what is wrong, "" when it is done.
        """
        if any(reply.sums for reply in replies):
            return self._add_sums(sorted(replies, key=lambda reply: reply.segments[0]), homes, x)
        table = [row for reply in replies for row in reply.table()]
        self.chosen = self._arrangement.experts(len(x))
        code = self._kernels.gather(x, np.array(table, np.int64).reshape(-1, 4), homes, self.chosen)
        if code is not None:
            return PROBLEMS[code]
        pieces = [piece for reply in replies for piece in reply.pieces()]
        metas = [(bit, meta) for bit, meta, _ in pieces]
        return self._arrange(x, metas, [rows for _, _, rows in pieces], homes)

    def _add_sums(self, replies: Sequence[Reply], homes: NDArray[np.uint64], x: Tensor) -> str:
        """The same where rows are sums. No part may be missing or doubled here either."""
        if not all(reply.sums for reply in replies):
            return "some instances have answered with sums and some with parts"
        self.chosen = self._arrangement.experts(len(x))
        problem = self._arrangement.fill(len(x), [meta for reply in replies for meta in reply.metas()], homes)
        tokens = [np.unique(reply.parts()["token"]).astype(np.int64) for reply in replies]
        if not problem and any(len(t) != len(r.frame.rows) for t, r in zip(tokens, replies, strict=True)):
            problem = PROBLEMS[INCOMPLETE]
        if problem:
            return problem
        for where, reply in zip(tokens, replies, strict=True):
            x.index_add_(0, torch.from_numpy(where).to(x.device), reply.frame.rows.to(x.dtype))
        return ""

    def warm_up(self, x: Tensor) -> None:
        """Compile what ``add`` runs, on x [1, H], which it does not change."""
        parts, homes = np.zeros(self._top_k, PARTS), np.ones(self._top_k, np.uint64)
        parts["expert"] = np.arange(self._top_k)
        rows = torch.zeros(self._top_k, x.shape[1], device=x.device)
        table = np.array([(0, parts.ctypes.data, rows.data_ptr(), self._top_k)], np.int64)
        if self._kernels.gather(x, table, homes, self.chosen) is None:
            self._arrange(x, [(0, parts.view(np.uint8))], [rows], homes)

    def _arrange(
        self, x: Tensor, metas: Iterable[tuple[int, NDArray[np.uint8]]], rows: list[Tensor], homes: NDArray[np.uint64]
    ) -> str:
        problem = self._arrangement.fill(len(x), metas, homes)
        if not problem:
            self._kernels.combine(x, rows, *self._arrangement.tensors(x.device))
        return problem


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
            code = place_parts(table, table.view(np.float32), source, instance, homes, *self._views)
            if code:
                return PROBLEMS[code]
            parts += len(table)
        return PROBLEMS[0 if parts == rows * self._top_k else INCOMPLETE]

    def experts(self, rows: int) -> NDArray[np.uint32]:
        """Room for the experts [rows, k] that ``fill`` arranges; valid until there are other rows."""
        self._slice(rows)
        return self._arrays[0][:rows]

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
