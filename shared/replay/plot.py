"""Pictures of replays, as PNG. matplotlib comes with the development dependencies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shared.pictures import open_pyplot as _pyplot
from shared.pictures import save_figure as _save
from shared.replay.run import Outcome


def plot_outcomes(outcomes: Sequence[Outcome], title: str, file: Path) -> None:
    """Times of a MoE layer as distributions, and the forms of cost beside static expert parallelism."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for outcome in outcomes:
        times = np.sort(outcome.times) * 1e3
        left.plot(times, np.arange(1, len(times) + 1) / len(times), label=outcome.policy)
    left.set(xlabel="time of a MoE layer, mean of a step [ms]", ylabel="share of steps", title=title)
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower right")
    static = next(outcome for outcome in outcomes if outcome.policy == "static")
    forms = ("proxy", "resident", "provisioned")
    for number, outcome in enumerate(outcomes):
        ratios = [getattr(outcome, form) / getattr(static, form) for form in forms]
        right.bar(np.arange(3) + number / (len(outcomes) + 1), ratios, 0.8 / len(outcomes), label=outcome.policy)
    right.set(ylabel="cost beside static", xticks=np.arange(3) + 0.35, xticklabels=forms)
    _save(figure, file)


def plot_sweep(
    values: Sequence[float], lines: Mapping[str, Sequence[float]], labels: tuple[str, str], file: Path
) -> None:
    """One line for each policy or form. labels: of the axes."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, numbers in lines.items():
        axes.plot(values, numbers, marker="o", markersize=3, label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, file)
