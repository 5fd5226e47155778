"""Recorded routing as a replay draws from it: how many rows of a passage chose each expert, by differences of sums."""
# ruff: noqa: ANN001, ANN201 - numba infers the types of compiled functions

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.errors import MoemeshError
from shared.traces.load import load_trace
from shared.traces.native import is_native, read_header
from shared.traces.records import BadTrace, Exchange

Sums = NDArray[np.int32]


class Mismatch(MoemeshError):
    """Traces that do not belong together."""


class Passages:
    """The rows of one domain: sums int32 [rows + 1, layers, experts] of the choices of all rows before."""

    def __init__(self, sums: Sums, layers: Sequence[int], known: NDArray[np.bool_], top_k: int) -> None:
        self.sums = sums
        self.layers = tuple(layers)
        self.known = known
        """[layers]: which ones the trace has rows of."""
        self.top_k = top_k

    @property
    def rows(self) -> int:
        return len(self.sums) - 1

    @property
    def experts(self) -> int:
        return self.sums.shape[2]


def read_passages(path: Path, like: Passages | None = None) -> Passages:
    """All rows of a trace in the order of their steps. ``like``: it must have the same rows, layers and experts.

    Raises BadTrace for a trace whose layers differ in their rows, Mismatch for one that is not like the other, OSError.
    """
    exchanges = load_trace(path)
    if not exchanges:
        raise BadTrace(path, "header", "there are no rows")
    found = sorted({exchange.layer for exchange in exchanges})
    layers = like.layers if like else tuple(found)
    if unknown := sorted(set(found) - set(layers)):
        number = 1 + next(n for n, exchange in enumerate(exchanges) if exchange.layer == unknown[0])
        raise BadTrace(path, f"record {number}", f"layer {unknown[0]} is not in the routing trace: {list(layers)} are")
    experts = _experts(path, exchanges)
    tables = {layer: _table(path, exchanges, layer) for layer in found}
    rows = len(tables[found[0]])
    for layer, ids in tables.items():
        if len(ids) != rows:
            raise BadTrace(path, f"layer {layer}", f"{len(ids)} rows, but layer {found[0]} has {rows}")
    if like and (rows != like.rows or experts != like.experts):
        raise Mismatch(f"{path}: {rows} rows of {experts} experts, but the routing has {like.rows} of {like.experts}")
    sums = np.zeros((rows + 1, len(layers), experts), np.int32)
    for layer, ids in tables.items():
        for column in ids.T:
            np.add.at(sums[:, layers.index(layer)], (np.arange(1, rows + 1), column), 1)
    known = np.array([layer in tables for layer in layers])
    return Passages(np.cumsum(sums, axis=0, dtype=np.int32), layers, known, exchanges[0].ids.shape[1])


def _experts(path: Path, exchanges: Sequence[Exchange]) -> int:
    if is_native(path):
        return read_header(path).experts
    return 1 + max(int(exchange.ids.max(initial=-1)) for exchange in exchanges)


def _table(path: Path, exchanges: Sequence[Exchange], layer: int) -> NDArray[np.int32]:
    """Ids [rows, k] of a layer, by step."""
    mine = sorted((exchange for exchange in exchanges if exchange.layer == layer), key=lambda exchange: exchange.step)
    widths = {exchange.ids.shape[1] for exchange in mine}
    if len(widths) > 1:
        raise BadTrace(path, f"layer {layer}", f"rows choose {min(widths)} to {max(widths)} experts")
    return np.concatenate([exchange.ids for exchange in mine])


@njit(cache=True, nogil=True)
def add_rows(sums, starts, counts, loads):
    """loads [layers, experts] += the choices of passages: ``count`` rows from row ``start`` on, round the end."""
    rows = sums.shape[0] - 1
    for n in range(len(starts)):
        whole, rest = counts[n] // rows, counts[n] % rows
        first = starts[n] % rows
        last = first + rest
        for layer in range(sums.shape[1]):
            for e in range(sums.shape[2]):
                count = sums[min(last, rows), layer, e] - sums[first, layer, e] + whole * sums[rows, layer, e]
                if last > rows:
                    count += sums[last - rows, layer, e]
                loads[layer, e] += count
