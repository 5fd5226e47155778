"""What predictors have said since the last report, summed up for the scheduler. The fast loop's by-product.

The compute thread adds, the asyncio thread takes, without a lock: what is added to sums that have just been taken may
be lost, which is one exchange a second.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LoadSum:
    """Over the exchanges of one layer."""

    layer: int
    """Index among the layers with experts."""
    exchanges: int
    sums: NDArray[np.float32]
    """[2, experts]: expected rows, and probability of being activated."""
    prefill_exchanges: int
    """How many of them were of steps that compute prompts,"""
    prefill_sums: NDArray[np.float32]
    """and the sums over these."""


class LoadSums:
    """Of all layers, since they were last taken."""

    def __init__(self, layers: int, experts: int) -> None:
        self._shape = 2, layers, 2, experts  # all exchanges, and those of prefill
        self._now = self._fresh()

    def add(self, layer: int, loads: NDArray[np.float32], prefill: bool = False) -> None:
        """Expected rows [experts] of one exchange of a layer, by index; ``prefill``: its step computes prompts."""
        (sums, exchanges), those = self._now, slice(1 + prefill)
        sums[those, layer, 0] += loads
        sums[those, layer, 1] -= np.expm1(-np.maximum(loads, 0))
        exchanges[those, layer] += 1

    def take(self) -> list[LoadSum]:
        """What there is, layers without an exchange left out."""
        (sums, exchanges), self._now = self._now, self._fresh()
        return [
            LoadSum(index, int(exchanges[0, index]), sums[0, index], int(exchanges[1, index]), sums[1, index])
            for index in np.flatnonzero(exchanges[0]).tolist()
        ]

    def _fresh(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return np.zeros(self._shape, np.float32), np.zeros(self._shape[:2], np.int64)
