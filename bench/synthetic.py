"""Exchanges without a model: rows whose experts have a given popularity, and what EPLB would be told of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Exchanges = list[NDArray[np.int32]]


@dataclass(frozen=True)
class Shape:
    """One layer and the instances that serve it."""

    experts: int = 160
    top_k: int = 6
    instances: int = 16
    slots: int = 27
    """Replicas per instance."""


def exchanges(popularity: NDArray[np.float64], top_k: int, tokens: int, count: int, seed: int) -> Exchanges:
    """``count`` times top-k ids int32 [tokens, k]: drawn without putting back, by Gumbel's trick."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(count, tokens, len(popularity))) + np.log(popularity)
    return list(np.argpartition(-scores, top_k, axis=2)[:, :, :top_k].astype(np.int32))


def tokens_per_expert(window: Exchanges, experts: int) -> NDArray[np.float64]:
    """[E], what EPLB balances."""
    return np.bincount(np.concatenate(window).ravel(), minlength=experts).astype(np.float64)
