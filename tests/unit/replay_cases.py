"""Small traces, arrivals and inputs for tests of the replay."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from shared.replay.arrivals import Arrivals
from shared.replay.inputs import Inputs, load_inputs
from shared.replay.routing import Passages
from shared.replay.run import static_clock
from shared.replay.timing import Form
from shared.replay.work import Work, form_work
from shared.traces.native import Header, TraceWriter

EXPERTS, LAYERS, TOP_K = 8, 3, 2


def inputs(**changes: float) -> Inputs:
    """Two instances, few layers, memory for all experts twice."""
    base = load_inputs("local")
    small = {"instances": 2, "instance_bytes": 24 * base.expert_bytes, "eplb_extra": 1}
    return replace(base, **{**small, **changes})


def choices(rows: int, seed: int) -> np.ndarray:
    """Skewed top-k ids int32 [rows, layers, k]; experts of a row differ."""
    scores = np.random.default_rng(seed).gumbel(size=(rows, LAYERS, EXPERTS)) - np.log(1 + np.arange(EXPERTS))
    return np.argsort(-scores, axis=2)[:, :, :TOP_K].astype(np.int32)


def passages(rows: int = 200, seed: int = 0, known: tuple[bool, ...] = (True,) * LAYERS) -> Passages:
    sums = np.zeros((rows + 1, LAYERS, EXPERTS), np.int32)
    ids = choices(rows, seed)
    np.add.at(sums, (np.arange(1, rows + 1)[:, None, None], np.arange(LAYERS)[:, None], ids), 1)
    sums[:, ~np.array(known)] = 0
    return Passages(np.cumsum(sums, axis=0, dtype=np.int32), range(LAYERS), np.array(known), TOP_K)


def arrivals(count: int = 30, seed: int = 0, gap: float = 0.3) -> Arrivals:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(gap, count))
    return Arrivals(times - times[0], rng.integers(5, 700, count), rng.integers(1, 30, count))


def work(given: Inputs, form: Form = Form.DEVICES, seed: int = 0, a_second: bool = False) -> Work:
    domains = [(passages(seed=n), passages(seed=n, known=(False, True, True))) for n in (1, 2)]
    clock = static_clock(given, LAYERS, EXPERTS, form)
    return form_work(domains, arrivals(), given, clock, a_second, seed)


def write_trace(path: Path, ids: np.ndarray, layers: tuple[int, ...], step_rows: int = 20) -> Path:
    """ids [rows, layers, k] as a trace of steps."""
    with TraceWriter(path, Header("toy", "", EXPERTS, layers)) as writer:
        for step, start in enumerate(range(0, len(ids), step_rows)):
            for index, layer in enumerate(layers):
                writer.append(layer, step, ids[start : start + step_rows, index])
    return path
