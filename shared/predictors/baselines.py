"""Predictors that look at no rows: what has been chosen before, and what an earlier layer chooses. To be beaten."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.predictors.base import Pair, possible_pairs, target

HALF_LIFE = 2048.0
"""Rows after which what was chosen counts half."""


class History:
    """``Predictor``: a layer's loads are what they were, as a moving average over the rows of earlier batches."""

    def __init__(
        self, layers: Sequence[int], distances: Iterable[int], experts: int, top_k: int, half_life: float = HALF_LIFE
    ) -> None:
        """``half_life`` in rows."""
        self.pairs: frozenset[Pair] = frozenset(possible_pairs(layers, distances))
        self._layers, self._top_k, self._half_life = tuple(layers), top_k, half_life
        self._shares = {layer: np.full(experts, 1 / experts) for layer in layers}
        self._seen = dict.fromkeys(layers, 0.0)
        """Weight of what a layer's shares are made of, in rows."""

    @property
    def nbytes(self) -> int:
        return sum(shares.nbytes for shares in self._shares.values())

    def observe(self, layer: int, ids: NDArray[np.int32]) -> None:
        if not len(ids):
            return
        shares, kept = self._shares[layer], self._seen[layer] * 0.5 ** (len(ids) / self._half_life)
        now = np.bincount(ids.ravel(), minlength=len(shares)) / ids.size
        shares += (now - shares) * len(ids) / (kept + len(ids))
        self._seen[layer] = kept + len(ids)

    def scores(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        shares = self._shares[target(self._layers, layer, distance)]
        return np.tile(shares.astype(np.float32), (len(ids), 1))

    def loads(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        shares = self._shares[target(self._layers, layer, distance)]
        return (shares * len(ids) * self._top_k).astype(np.float32)


class PreviousLayer:
    """``Predictor``: every row chooses at the later layer what it has chosen at this one."""

    nbytes = 0

    def __init__(self, layers: Sequence[int], distances: Iterable[int], experts: int) -> None:
        self.pairs: frozenset[Pair] = frozenset(possible_pairs(layers, distances))
        self._experts = experts

    def observe(self, layer: int, ids: NDArray[np.int32]) -> None:
        """Nothing: a batch stands for itself."""

    def scores(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        scores = np.zeros((len(ids), self._experts), np.float32)
        np.put_along_axis(scores, ids, 1.0, axis=1)
        return scores

    def loads(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        return np.bincount(ids.ravel(), minlength=self._experts).astype(np.float32)
