"""What a routing trace consists of, whatever file it comes from, and what is wrong with traces in public.

Reading and writing files is elsewhere (native.py, foreign.py); `open_trace` of load.py picks the reader.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import MoemeshError

DOMINANT_SHARE, DOMINANT_RATIO, DOMINANT_ROWS = 0.1, 4, 50
"""Rows that all chose the same experts are taken for warm-up passes with dummy tokens when they are that share of a
layer, that many times the next most frequent ones, and at least that many."""

RowCounts = Counter[tuple[int, ...]]
"""How often rows chose the same set of experts, ascending."""


class BadTrace(MoemeshError):
    """A trace is truncated, or not one: ``where`` is a line or a record, counted from 1."""

    def __init__(self, path: Path, where: str, problem: str) -> None:
        super().__init__(f"{path}, {where}: {problem}")
        self.path = path
        self.where = where
        self.problem = problem


@dataclass(frozen=True, eq=False)
class Exchange:
    """The rows of one step at one layer."""

    layer: int
    """Checkpoint index."""
    step: int
    ids: NDArray[np.int32]
    """Top-k experts [rows, k]."""


def check_ids(ids: NDArray[np.integer], experts: int | None = None) -> str:
    """What is wrong with the ids [rows, k] of an exchange; empty: nothing. ``experts``: of the layer, if known."""
    if ids.ndim != 2:
        return f"top-k ids have {ids.ndim} dimensions, expected rows x k"
    if ids.size and ids.min() < 0:
        return f"expert {ids.min()} does not exist"
    if experts is not None and ids.size and ids.max() >= experts:
        return f"expert {ids.max()} does not exist: there are {experts}"
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return "a row names an expert twice"
    return ""


def dominant_row(exchanges: Iterable[Exchange]) -> str:
    """A warning when identical rows make up much of a layer, empty otherwise: such a trace shows no real routing."""
    counts: dict[int, RowCounts] = {}
    for exchange in exchanges:
        count_rows(exchange, counts.setdefault(exchange.layer, Counter()))
    return dominant_of(counts)


def count_rows(exchange: Exchange, counts: RowCounts) -> None:
    """Add the rows of an exchange to those of its layer."""
    counts.update(map(tuple, np.sort(exchange.ids, axis=1).tolist()))


def dominant_of(counts: Mapping[int, RowCounts]) -> str:
    """The warning of ``dominant_row``, from the rows of every layer."""
    for layer, rows in sorted(counts.items()):
        (row, times), (_, next_times) = [*rows.most_common(2), ((), 0), ((), 0)][:2]
        if times >= max(DOMINANT_ROWS, DOMINANT_SHARE * rows.total(), DOMINANT_RATIO * next_times):
            return (
                f"{times} of {rows.total()} rows of layer {layer} chose the same experts {list(row)}: probably warm-up "
                "passes with dummy tokens; leave them out before drawing conclusions"
            )
    return ""


def expert_counts(exchanges: Iterable[Exchange], layers: Sequence[int], experts: int) -> NDArray[np.int64]:
    """Rows that chose each expert, int64 [layers, experts]: what EPLB takes."""
    counts = np.zeros((len(layers), experts), np.int64)
    for exchange in exchanges:
        counts[layers.index(exchange.layer)] += np.bincount(exchange.ids.ravel(), minlength=experts)
    return counts
