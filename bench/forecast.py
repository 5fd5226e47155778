"""Which forecast of the arrival rate leaves the fewest requests unserved for the least that is paid for nothing?

    python bench/forecast.py --arrivals CSV [--arrivals CSV] [--window 10] --json

Every method foresees the rate of each window from those before it. What it says is raised by a margin, the least (in
mean rates) with which at most MOST_UNDER of all requests come beyond what was foreseen; its cost is what was foreseen
beyond what came, as a share of all requests. `share` is what comes beyond the forecast without a margin. Besides the
traces there are four simulated days in windows of 15 minutes, for what is seasonal. Exponential smoothing is
statsmodels' (`pip install statsmodels`), fitted anew for each window; it is left out where that is not installed.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import report
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from shared.planning.deciding import QUANTILE, WINDOWS, moving_quantile
from shared.replay.arrivals import read_arrivals
from shared.simulation.decisions import forecast
from shared.simulation.traffic import day

Floats = NDArray[np.float64]
Method = Callable[[Floats], float]
"""Rates of the windows so far, oldest first -> of the next one."""
MOST_UNDER = 0.02
FIRST = 8
"""Windows that are known before anything is foreseen."""
DAYS, DAY_WINDOW_S = 4, 900.0


def line(rates: Floats) -> float:
    """The simulator's rule: a line through the last two where it leads higher than the last."""
    return float(forecast(np.append(rates[-3:], 0.0), 1.0)[-1])


def smoothing(trend: bool, season: int = 0) -> Method:
    """Exponential smoothing, with a damped trend and a season of so many windows."""

    def next_rate(rates: Floats) -> float:
        from statsmodels.tsa.holtwinters import ExponentialSmoothing  # pyright: ignore[reportMissingImports]

        if season and len(rates) < 2 * season:
            return line(rates)
        how: dict[str, Any] = {"trend": "add", "damped_trend": True} if trend else {}
        how |= {"seasonal": "add", "seasonal_periods": season} if season else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that did not converge: they count as they are
            model = ExponentialSmoothing(rates, initialization_method="estimated", **how)
            told = float(model.fit().forecast(1)[0])
        return max(0.0, float(np.nan_to_num(told)))

    return next_rate


def methods(season: int) -> dict[str, Method]:
    """All that are compared. ``season``: windows of a day, 0 where the series is shorter than two."""
    found: dict[str, Method] = {"last": lambda rates: float(rates[-1]), "line": line}
    for w, q in ((3, 1.0), (6, 0.9), (6, 1.0)):
        found[f"line or quantile {q:g} of {w}"] = lambda r, w=w, q=q: max(line(r), moving_quantile(r, w, q))
    for windows in (3, 6, 12):
        for quantile in (0.8, 0.9, 1.0):
            found[f"quantile {quantile:g} of {windows}"] = lambda r, w=windows, q=quantile: moving_quantile(r, w, q)
    if importlib.util.find_spec("statsmodels"):
        found |= {"smoothing": smoothing(False), "smoothing, trend": smoothing(True)}
        found |= {"smoothing, season": smoothing(False, season)} if season else {}
    return found


def foreseen(method: Method, rates: Floats) -> Floats:
    """What a method says of each window from FIRST on."""
    return np.array([method(rates[:window]) for window in range(FIRST, len(rates))])


def under(told: Floats, came: Floats) -> float:
    """Share of the requests that come beyond what was foreseen."""
    return float(np.maximum(came - told, 0).sum() / came.sum())


def judged(told: Floats, came: Floats) -> dict[str, float]:
    """The least margin that is enough, in mean rates, and what it costs."""
    low, high, mean = 0.0, float(came.max() / came.mean()), came.mean()
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if under(told + middle * mean, came) <= MOST_UNDER else (middle, high)
    beyond = np.maximum(told + high * mean - came, 0).sum() / came.sum()
    return {"share": round(under(told, came), 4), "margin": round(high, 3), "cost": round(float(beyond), 4)}


def series(args: argparse.Namespace) -> dict[str, tuple[Floats, int]]:
    """Name -> rates of windows, and windows of a season."""
    found = {}
    for path in map(Path, args.arrivals):
        times = read_arrivals(path, 1 << 30).times
        edges = np.arange(int(times[-1] // args.window) + 1) * args.window
        found[path.stem] = np.diff(np.searchsorted(times, edges)) / args.window, 0
    days = [day(5.0, 7.5, 24, 100, 100, seed) for seed in range(DAYS)]
    windows = int(24 * 3600 // DAY_WINDOW_S)
    rates = np.concatenate([one.rates(DAY_WINDOW_S, windows) for one in days])
    return found | {f"{DAYS} simulated days": (rates, windows)}


def show(name: str, results: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(name, "beyond, no margin", "margin", "cost", box=None)
    for method, found in sorted(results.items(), key=lambda item: item[1]["cost"]):
        table.add_row(method, f"{found['share']:.1%}", f"{found['margin']:.2f}", f"{found['cost']:.1%}")
    Console().print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arrivals", action="append", default=[], help="CSV of arrivals (docs/operations.md); repeatable")
    p.add_argument("--window", type=float, default=10.0, help="seconds of a window of the traces")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    result = {}
    for name, (rates, season) in series(args).items():
        came = rates[FIRST:]
        result[name] = {method: judged(foreseen(how, rates), came) for method, how in methods(season).items()}
        show(name, result[name])
    ours = f"quantile {QUANTILE:g} of {WINDOWS}"
    report("forecast", {"ours": ours, **result})


if __name__ == "__main__":
    main()
