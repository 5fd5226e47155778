"""Loads of layers as expert instances foresee them: a sliding window for every layer. Pure; the caller gives the time.

With the gate on their side all instances see all rows and foresee the same; else each sees what is routed to it. So
reports are not added up: the one with most exchanges stands for the layer.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from shared.errors import BadMessage
from shared.load_messages import Foreseen

OLDEST_S = 5.0
"""What traffic was before does not hold back what follows it."""
ROW = 0.02
"""What a row adds to the time of an activated expert whose weights have to be read (bench/premise.py)."""

Report = tuple[float, int, NDArray[np.float64]]
"""(when it came, exchanges, [experts] activated experts in all of them)"""


class Foresight:
    """Made of ``Foreseen`` messages."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, str], deque[Report]] = {}

    def add(self, message: Foreseen, now: float) -> None:
        """Take in a report. Raises BadMessage for sums of a wrong size, or that are no loads."""
        if not message.experts or len(message.sums) != 8 * message.experts:
            raise BadMessage("Foreseen", f"{len(message.sums)} bytes of sums for {message.experts} experts")
        rows, activated = np.frombuffer(message.sums, "<f4").reshape(2, -1).astype(np.float64)
        loads = activated + ROW * rows
        if not np.isfinite(loads).all() or (loads < 0).any():
            raise BadMessage("Foreseen", "a load is negative or not a finite number")
        reports = self._reports.setdefault((message.layer, message.instance), deque())
        if reports and len(reports[0][2]) != message.experts:  # it has come back with another model
            reports.clear()
        reports.append((now, message.exchanges, loads))
        _forget(reports, now)

    def seen(self, layer: int, experts: int, now: float) -> tuple[NDArray[np.float64], float] | None:
        """Loads [reports, experts] of a layer's exchange, in activated experts, and exchanges per second.

        None: nothing was foreseen lately. ``layer``: checkpoint index.
        """
        best: deque[Report] = deque()
        for name, reports in list(self._reports.items()):
            of, _ = name
            _forget(reports, now)
            if not reports:
                del self._reports[name]
            same = of == layer and reports and len(reports[0][2]) == experts
            if same and sum(r[1] for r in reports) > sum(r[1] for r in best):
                best = reports
        if not best:
            return None
        exchanges = sum(count for _, count, _ in best)
        return np.stack([loads / count for _, count, loads in best]), exchanges / OLDEST_S


def _forget(reports: deque[Report], now: float) -> None:
    while reports and now - reports[0][0] > OLDEST_S:
        reports.popleft()
