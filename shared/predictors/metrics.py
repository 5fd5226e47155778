"""How good a prediction is, in three numbers for each layer and distance.

* **recall**: the share of what a row chose that is among as many best scores of it: |best k and chosen| / k, mean over
  rows.
* **correlation**: Pearson's, over all (batch, expert), between predicted and true loads of batches.
* **error**: the share of a batch's choices that were expected of a wrong expert: the sum over experts of
  |predicted - true| / (2 * rows * k), mean over batches; 0 to 1.

A batch is BATCH rows that follow each other in a text. The paper (arXiv 2603.06350) defines none of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.predictors.base import Pair, Predictor, target
from shared.predictors.recording import Passage, batches

BATCH = 64


@dataclass(frozen=True)
class Quality:
    """See above."""

    recall: float
    correlation: float
    error: float


@dataclass
class Tally:
    """What quality is made of, batch by batch."""

    hits: int = 0
    choices: int = 0
    predicted: list[NDArray[np.float32]] = field(default_factory=list)
    """[E] of each batch."""
    true: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, scores: NDArray[np.float32], loads: NDArray[np.float32], chosen: NDArray[np.int32]) -> None:
        """One batch: scores [T, E], loads [E], and what was chosen in truth [T, k]."""
        self.hits += hits(scores, chosen)
        self.choices += chosen.size
        self.predicted.append(loads.copy())
        self.true.append(np.bincount(chosen.ravel(), minlength=len(loads)).astype(np.float32))

    def quality(self) -> Quality:
        """Raises ValueError when there was no batch."""
        if not self.true:
            raise ValueError("nothing to judge by: no whole batch")
        predicted, true = np.array(self.predicted, np.float64), np.array(self.true, np.float64)
        error = np.abs(predicted - true).sum(axis=1) / (2 * true.sum(axis=1))
        return Quality(self.hits / self.choices, pearson(predicted.ravel(), true.ravel()), float(error.mean()))


def hits(scores: NDArray[np.float32], chosen: NDArray[np.int32]) -> int:
    """How many of the chosen [T, k] are among the k best of scores [T, E]; ties go to the lowest id."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, : chosen.shape[1]]
    return int((best[:, :, None] == chosen[:, None, :]).sum())


def pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Correlation of two series; 0 when one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else 0.0


def judge(
    predictors: Mapping[str, Predictor], passages: Iterable[Passage], layers: tuple[int, ...], size: int = BATCH
) -> dict[str, dict[Pair, Quality]]:
    """Every predictor on the same batches, by name and pair. Raises ValueError when there is no whole batch."""
    tallies = {name: {pair: Tally() for pair in sorted(p.pairs)} for name, p in predictors.items()}
    for batch in batches(passages, size):
        for layer in layers:
            for name, predictor in predictors.items():
                predictor.observe(layer, batch.ids[layer])
                ours = {pair: tally for pair, tally in tallies[name].items() if pair[0] == layer}
                for pair, tally in ours.items():
                    _add(tally, predictor, pair, batch, batch.ids[target(layers, *pair)])
    return {name: {pair: tally.quality() for pair, tally in ours.items()} for name, ours in tallies.items()}


def _add(tally: Tally, predictor: Predictor, pair: Pair, batch: Passage, chosen: NDArray[np.int32]) -> None:
    known = batch.rows[pair[0]], batch.ids[pair[0]]
    tally.add(predictor.scores(*pair, *known), predictor.loads(*pair, *known), chosen)
