"""Pictures as PNG, where matplotlib is installed: it comes with the development dependencies."""

from pathlib import Path
from typing import Any

from shared.errors import ConfigError


def open_pyplot() -> Any:
    """matplotlib.pyplot without a display. Raises ConfigError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot", "needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure; its directory is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
