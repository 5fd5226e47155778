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


class LoadSums:
    """Of all layers, since they were last taken."""

    def __init__(self, layers: int, experts: int) -> None:
        self._shape = layers, 2, experts
        self._now = self._fresh()

    def add(self, layer: int, loads: NDArray[np.float32]) -> None:
        """Expected rows [experts] of one exchange of a layer, by index."""
        sums, exchanges = self._now
        sums[layer, 0] += loads
        sums[layer, 1] -= np.expm1(-np.maximum(loads, 0))
        exchanges[layer] += 1

    def take(self) -> list[LoadSum]:
        """What there is, layers without an exchange left out."""
        (sums, exchanges), self._now = self._now, self._fresh()
        return [LoadSum(int(index), int(exchanges[index]), sums[index]) for index in np.flatnonzero(exchanges)]

    def _fresh(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return np.zeros(self._shape, np.float32), np.zeros(self._shape[0], np.int64)
