"""Predictors beside the baselines on the same batches: as a table for a person, as JSON for a program."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.models.loader import Checkpoint
from shared.predictors.base import Pair, Predictor, target
from shared.predictors.baselines import History, PreviousLayer
from shared.predictors.files import load_predictors
from shared.predictors.gates import untuned_gates
from shared.predictors.metrics import BATCH, Quality, judge
from shared.predictors.recording import Passage

TUNED, UNTUNED, HISTORY, PREVIOUS = "tuned", "untuned", "history", "previous layer"


@dataclass(frozen=True)
class Report:
    """Quality by predictor and pair."""

    model: str
    digest: str
    layers: tuple[int, ...]
    texts: tuple[str, ...]
    nbytes: int
    """Of the tuned predictors, in memory."""
    quality: Mapping[str, Mapping[Pair, Quality]]

    def recalls(self, name: str, distance: int) -> list[float]:
        """Of a predictor, layer by layer."""
        return [quality.recall for (_, d), quality in self.quality[name].items() if d == distance]

    def correlations(self, name: str, distance: int) -> list[float]:
        return [quality.correlation for (_, d), quality in self.quality[name].items() if d == distance]

    @property
    def distances(self) -> list[int]:
        return sorted({distance for _, distance in self.quality[TUNED]})

    def as_json(self) -> dict[str, Any]:
        pairs = [
            {"predictor": name, "layer": la, "distance": d, "target": target(self.layers, la, d), **_rounded(quality)}
            for name, qualities in self.quality.items()
            for (la, d), quality in qualities.items()
        ]
        facts = {"model": self.model, "digest": self.digest, "texts": list(self.texts), "batch": BATCH}
        return {**facts, "nbytes": self.nbytes, "pairs": pairs}


def baselines(checkpoint: Checkpoint, distances: Sequence[int]) -> dict[str, Predictor]:
    """New ones, by name."""
    spec = checkpoint.spec
    layers, router = spec.moe_layers, spec.router
    return {
        UNTUNED: untuned_gates(checkpoint, distances),
        HISTORY: History(layers, distances, router.experts, router.top_k),
        PREVIOUS: PreviousLayer(layers, distances, router.experts),
    }


def evaluate(checkpoint: Checkpoint, predictor: Path, passages: Iterable[Passage], texts: Sequence[Path]) -> Report:
    """The predictors of a directory and the baselines, on the same passages. Raises BadPredictors."""
    _, tuned = load_predictors(predictor, checkpoint.digest)
    distances = sorted({distance for _, distance in tuned.pairs})
    everyone: dict[str, Predictor] = {TUNED: tuned, **baselines(checkpoint, distances)}
    layers = checkpoint.spec.moe_layers
    quality = judge(everyone, passages, layers)
    names = tuple(text.name for text in texts)
    return Report(checkpoint.name, checkpoint.digest, layers, names, tuned.nbytes, quality)


def _rounded(quality: Quality) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(quality).items()}
