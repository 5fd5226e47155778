"""What the requests of a CSV ask of a mesh: the rate of their busiest quarter of an hour, and their mean lengths."""

import sys
from pathlib import Path

import numpy as np

from shared.planning.setting import Demand
from shared.replay.arrivals import Arrivals, read_arrivals

WINDOW_S = 900.0
"""A mesh is planned anew about so often (JANUS, its trace experiment)."""
SHORTEST_S = 1.0


def recorded_demand(path: Path, chunk: float) -> Demand:
    """``chunk``: as in Demand. Raises BadArrivals with the line, OSError."""
    arrivals = read_arrivals(path, sys.maxsize)
    return Demand(busiest_rate(arrivals), float(arrivals.context.mean()), float(arrivals.generated.mean()), chunk)


def busiest_rate(arrivals: Arrivals, window_s: float = WINDOW_S) -> float:
    """Requests per second in the window that has most of them; a shorter trace is one window."""
    times = arrivals.times
    window = max(SHORTEST_S, min(window_s, float(times[-1] - times[0])))
    counts = np.searchsorted(times, times + window, side="right") - np.arange(len(times))
    return float(counts.max() / window)
