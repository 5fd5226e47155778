"""Pictures of replays, as PNG. matplotlib comes with the development dependencies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.pictures import open_pyplot, save_figure
from shared.replay.run import Outcome

POINTS = 240
"""In time."""


def plot_outcomes(outcomes: Sequence[Outcome], title: str, file: Path) -> None:
    """Times of a MoE layer as distributions, and how many experts are resident as time goes on."""
    pyplot = open_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    for outcome in outcomes:
        times = np.quantile(outcome.times, np.linspace(0, 1, POINTS)) * 1e3
        left.plot(times, np.linspace(0, 1, POINTS), label=outcome.policy)
        right.plot(*residents_over_time(outcome), label=outcome.policy, linewidth=1)
    left.set(xlabel="time of a MoE layer, mean of a step [ms]", ylabel="share of steps", title=title)
    right.set(xlabel="time [s]", ylabel="experts in memory", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    save_figure(figure, file)


def residents_over_time(outcome: Outcome) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times, and the mean number of residents since the one before."""
    begins, levels = outcome.trail.T
    ends = np.append(begins[1:], outcome.ended)
    sums = np.concatenate([[0.0], np.cumsum(levels * (ends - begins))])
    grid = np.linspace(begins[0], ends[-1], POINTS + 1)
    return grid[1:], np.diff(np.interp(grid, np.append(begins, ends[-1]), sums)) / np.diff(grid)


def plot_sweeps(sweeps: Mapping[str, Mapping[float, Mapping[str, float]]], label: str, file: Path) -> None:
    """One picture for each sweep: name -> value -> line -> number."""
    pyplot = open_pyplot()
    figure, several = pyplot.subplots(1, len(sweeps), figsize=(12, 3.6), layout="constrained", squeeze=False)
    for axes, (name, rows) in zip(several[0], sweeps.items(), strict=True):
        for line in next(iter(rows.values())):
            axes.plot(list(rows), [row[line] for row in rows.values()], marker="o", markersize=3, label=line)
        axes.set(xlabel=name, ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, file)
