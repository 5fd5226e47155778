"""Routing without a model: rows whose experts follow Zipf's law, what a window of them tells a scheduler, and a_max."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.activation import schedule_activations
from shared.placement.homes import Masks
from shared.scheduling.policies import Policy

Exchanges = list[NDArray[np.int32]]


@dataclass(frozen=True)
class Shape:
    """One layer and the instances that serve it."""

    experts: int = 160
    top_k: int = 6
    instances: int = 16
    slots: int = 27
    """Replicas per instance."""


def zipf(experts: int, exponent: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Popularity [E], which sums to 1; which expert has which rank is random."""
    weights = np.arange(1, experts + 1) ** -exponent
    return (weights / weights.sum())[rng.permutation(experts)]


def exchanges(popularity: NDArray[np.float64], top_k: int, tokens: int, count: int, seed: int) -> Exchanges:
    """``count`` times top-k ids int32 [tokens, k]: drawn without putting back, by Gumbel's trick."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(count, tokens, len(popularity))) + np.log(popularity)
    return list(np.argpartition(-scores, top_k, axis=2)[:, :, :top_k].astype(np.int32))


def observe(window: Exchanges, experts: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a window of exchanges tells: activity [E] and co-activation [E, E], as shares of the exchanges."""
    active = np.zeros((len(window), experts))
    for row, ids in zip(active, window, strict=True):
        row[ids.ravel()] = 1
    together = active.T @ active / len(window)
    return active.mean(axis=0), together


def tokens_per_expert(window: Exchanges, experts: int) -> NDArray[np.float64]:
    """[E], what EPLB balances."""
    return np.bincount(np.concatenate(window).ravel(), minlength=experts).astype(np.float64)


def mean_a_max(window: Exchanges, homes: Masks, instances: int, policy: Policy = Policy.ACTIVATED) -> float:
    """Mean of the largest number of distinct experts that any instance activates."""
    live = (1 << instances) - 1
    return float(np.mean([schedule_activations(ids, homes, live, policy).activated.max() for ids in window]))
