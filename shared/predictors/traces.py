"""The routing of a text and what predictors say of it, as traces of one form: what ``moemesh replay`` reads.

``routing.trace`` has the true choices; ``predicted-dN.trace`` has, for the same steps, layers and rows, the best k of
each row's scores, as foreseen N layers with experts before. Layers that nobody foresees are not in it.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from shared.predictors.base import Predictor, target
from shared.predictors.recording import Passage
from shared.traces.native import Header, TraceWriter

ROUTING = "routing.trace"


def predicted(distance: int) -> str:
    """Name of the trace of a distance."""
    return f"predicted-d{distance}.trace"


def write_traces(directory: Path, header: Header, predictor: Predictor, steps: Iterable[Passage]) -> int:
    """One step for each of ``steps``. Returns their number; raises FileExistsError: no trace is overwritten."""
    directory.mkdir(parents=True, exist_ok=True)
    distances, count = sorted({distance for _, distance in predictor.pairs}), 0
    with ExitStack() as files:
        routing = files.enter_context(TraceWriter(directory / ROUTING, header))
        foreseen = {d: files.enter_context(TraceWriter(directory / predicted(d), header)) for d in distances}
        for count, step in enumerate(steps, 1):
            for layer, ids in step.ids.items():
                routing.append(layer, count - 1, ids)
            _foresee(foreseen, header, predictor, step, count - 1)
    return count


def _foresee(
    files: Mapping[int, TraceWriter], header: Header, predictor: Predictor, step: Passage, number: int
) -> None:
    for layer, ids in step.ids.items():
        predictor.observe(layer, ids)
        for distance, file in files.items():
            if (layer, distance) in predictor.pairs:
                scores = predictor.scores(layer, distance, step.rows[layer], ids)
                best = np.argsort(-scores, axis=1, kind="stable")[:, : ids.shape[1]]
                file.append(target(header.layers, layer, distance), number, best)
