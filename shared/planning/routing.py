"""Which experts rows choose, as tables are made from it: rows of traces, or of Zipf's law where there are none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.traces.load import load_trace
from shared.traces.native import is_native, read_header
from shared.traces.records import BadTrace, Exchange

Ids = NDArray[np.int32]
ROWS = 1 << 14
"""Rows that are drawn where nothing was recorded."""
LEAST_ROWS = 64


@dataclass(frozen=True)
class Routing:
    """Rows of some layers."""

    about: str
    experts: int
    layers: tuple[int, ...]
    """Checkpoint indices; empty: one layer that stands for all."""
    rows: tuple[Ids, ...]
    """Of each layer, chosen experts int32 [rows, k]."""


def zipf(experts: int, exponent: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Popularity [E], which sums to 1; which expert has which rank is random."""
    weights = np.arange(1, experts + 1) ** -exponent
    return (weights / weights.sum())[rng.permutation(experts)]


def draw(popularity: NDArray[np.float64], top_k: int, rows: int, rng: np.random.Generator) -> Ids:
    """Top-k ids int32 [rows, k]: drawn without putting back, by Gumbel's trick."""
    with np.errstate(divide="ignore"):  # experts that nobody chooses
        scores = rng.gumbel(size=(rows, len(popularity))) + np.log(popularity)
    return np.argpartition(-scores, top_k, axis=1)[:, :top_k].astype(np.int32)


def synthetic(experts: int, top_k: int, exponent: float, used: float = 1.0, seed: int = 0) -> Routing:
    """Rows by Zipf's law: one layer for all.

    Args:
        exponent: 0: all experts are alike.
        used: share of the experts that are ever chosen.
    """
    rng = np.random.default_rng(seed)
    popularity = zipf(experts, exponent, rng)
    popularity[np.argsort(popularity)[: min(experts - top_k, round((1 - used) * experts))]] = 0
    ids = draw(popularity, top_k, ROWS, rng) if top_k < experts else _everything(experts)
    about = f"Zipf's law, exponent {exponent:g}" + (f", {used:.0%} of the experts in use" if used < 1 else "")
    return Routing(about, experts, (), (ids,))


def _everything(experts: int) -> Ids:
    return np.tile(np.arange(experts, dtype=np.int32), (ROWS, 1))


def recorded(path: Path, experts: int, top_k: int, most: int | None = None) -> Routing:
    """All rows of a trace. Raises BadTrace when it is none of such a model, or when a layer has too few rows.

    Args:
        most: rows of an exchange that counts; those with more are chunks of prompts. None: all count.
    """
    exchanges = [exchange for exchange in load_trace(path) if most is None or len(exchange.ids) <= most]
    if is_native(path) and read_header(path).experts != experts:
        raise BadTrace(path, "header", f"{read_header(path).experts} experts, but the model has {experts}")
    layers = tuple(sorted({exchange.layer for exchange in exchanges}))
    if not layers:
        raise BadTrace(path, "header", "there are no rows")
    rows = tuple(_rows(path, exchanges, layer, experts, top_k) for layer in layers)
    return Routing(f"{path.name}: {len(rows[0])} rows of {len(layers)} layers", experts, layers, rows)


def _rows(path: Path, exchanges: Sequence[Exchange], layer: int, experts: int, top_k: int) -> Ids:
    """Of one layer, in the order of the file."""
    mine = [exchange.ids for exchange in exchanges if exchange.layer == layer]
    wrong = next((ids.shape[1] for ids in mine if ids.shape[1] != top_k), top_k)
    if wrong != top_k:
        raise BadTrace(path, f"layer {layer}", f"rows choose {wrong} experts, in the model {top_k}")
    ids = np.concatenate(mine)
    if len(ids) < LEAST_ROWS:
        raise BadTrace(path, f"layer {layer}", f"{len(ids)} rows: tables need at least {LEAST_ROWS}")
    if ids.max(initial=0) >= experts:
        raise BadTrace(path, f"layer {layer}", f"expert {ids.max()} does not exist: there are {experts}")
    return ids
