"""A picture of a simulated day, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.pictures import open_pyplot, save_figure
from shared.simulation.run import Day, Simulated


def plot_day(day: Day, outcomes: Sequence[Simulated], file: Path) -> None:
    """Requests per second, and the devices of every system."""
    pyplot = open_pyplot()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    window_s = day.scenario.scaling.window_s
    hours = np.arange(day.windows) * window_s / 3600
    above.plot(hours, day.requests.rates(window_s, day.windows))
    above.set(ylabel="requests/s")
    for outcome in outcomes:
        label = f"{outcome.system}: {outcome.gpu_hours:.0f} device-hours, {outcome.attainment:.1%} in time"
        below.step(hours, outcome.devices, where="post", label=label)
    above.set_title(f"{day.scenario.about} (simulated)", fontsize=9)
    below.set(xlabel="hour", ylabel="devices", ylim=(0, None))
    below.grid(alpha=0.3)
    below.legend(fontsize=8)
    save_figure(figure, file)
