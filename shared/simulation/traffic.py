"""Requests of a simulation: drawn for a day with a peak, or read from an arrival trace."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.replay.arrivals import read_arrivals


@dataclass(frozen=True)
class Requests:
    """In the order of arrival; [requests] each."""

    times: NDArray[np.float64]
    """Seconds since the simulation began."""
    prompts: NDArray[np.int64]
    """Tokens."""
    outputs: NDArray[np.int64]
    """Tokens."""

    def rates(self, window_s: float, windows: int) -> NDArray[np.float64]:
        """Requests per second in each window."""
        edges = np.arange(windows + 1) * window_s
        return np.diff(np.searchsorted(self.times, edges)) / window_s


def day(peak: float, peak_to_mean: float, hours: float, prompt: float, output: float, seed: int = 0) -> Requests:
    """Poisson arrivals whose rate is a raised sine, once a day, with its peak in the middle.

    Args:
        peak: requests per second.
        peak_to_mean: how many times the day's mean that is, 1 to 20.
        prompt, output: tokens, means of geometric distributions.
    """
    rng = np.random.default_rng(seed)
    exponent = sharpness(peak_to_mean)
    count = rng.poisson(peak * hours * 3600)
    times = np.sort(rng.uniform(0, hours * 3600, count))
    height = np.sin(np.pi * times / (24 * 3600)) ** (2 * exponent)
    times = times[rng.uniform(size=count) < height]
    lengths = [rng.geometric(1 / max(1.0, mean), len(times)).astype(np.int64) for mean in (prompt, output)]
    return Requests(times, *lengths)


def sharpness(peak_to_mean: float) -> float:
    """The exponent p with which sin(x)^(2p) has a peak so many times its mean, by bisection."""
    x = (np.arange(4096) + 0.5) / 4096 * np.pi
    low, high = 0.0, 400.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 / np.mean(np.sin(x) ** (2 * middle)) < peak_to_mean else (low, middle)
    return high


def recorded(path: Path, most_context: int) -> Requests:
    """Arrivals of a CSV file, see shared/replay/arrivals.py. Raises BadArrivals, OSError."""
    arrivals = read_arrivals(path, most_context)
    return Requests(arrivals.times, arrivals.context, arrivals.generated)
