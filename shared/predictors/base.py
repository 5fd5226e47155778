"""The seam of load prediction: from a batch at one layer with experts to the loads of a later one.

Whoever holds the rows of an exchange asks: an expert instance after its reply, ``moemesh predictor``, a bench.
Layers are checkpoint indices; distance d leads to the d-th next layer *with experts*. T = rows of the batch, H = hidden
size, E = experts per layer, k = experts per row.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
"""(layer that is known, distance of the layer that is predicted)"""


class Predictor(Protocol):
    """One thread at a time. Results are valid until the next call.

    For every exchange, in the order of layers: ``observe`` what was chosen, then ask. KeyError for a pair that is not
    among ``pairs``.
    """

    @property
    def pairs(self) -> frozenset[Pair]:
        """What may be asked for."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps."""
        ...

    def observe(self, layer: int, ids: NDArray[np.int32]) -> None:
        """Take note of the experts [T, k] that the rows of an exchange chose at ``layer``."""
        ...

    def scores(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """fp32 [T, E], of each row: the larger, the likelier is the expert chosen at the layer ``distance`` further.

        rows fp32 [T, H], contiguous, are what the gate of ``layer`` has read, ids [T, k] what it chose. Scores of
        different rows are not to be compared.
        """
        ...

    def loads(
        self, layer: int, distance: int, rows: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """fp32 [E]: how many of these rows are expected to choose each expert there; sums to T * k."""
        ...


def target(layers: Sequence[int], layer: int, distance: int) -> int:
    """The layer that a pair predicts; ``layers``: ascending indices of the layers with experts. Raises IndexError."""
    return layers[layers.index(layer) + distance]


def possible_pairs(layers: Sequence[int], distances: Iterable[int]) -> tuple[Pair, ...]:
    """All pairs of these distances that stay inside the model, by distance, then by layer."""
    return tuple((layer, d) for d in sorted(set(distances)) for layer in layers[: max(0, len(layers) - d)])
