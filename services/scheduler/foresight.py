"""Loads of layers as expert instances foresee them: a sliding window for every layer, and phase if wanted. Pure.

The caller gives the time. Of decode and prefill the latest seconds of each count, for prompts come in bursts.

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
SILENT_S = 60.0
"""A phase without an exchange for so long is over: homes should not come and go with every prompt."""
ROW = 0.02
"""What a row adds to the time of an activated expert whose weights have to be read (bench/premise.py)."""

Report = tuple[float, int, NDArray[np.float64]]
"""(when it came, exchanges, [experts] activated experts in all of them)"""


class Foresight:
    """Made of ``Foreseen`` messages. ``apart``: prefill is looked at by itself; else all exchanges are alike."""

    def __init__(self, apart: bool = False) -> None:
        self._apart, self._silent_s = apart, SILENT_S if apart else OLDEST_S
        self._reports: dict[tuple[int, bool, str], deque[Report]] = {}
        """By layer, phase (True: prefill) and instance."""

    def add(self, message: Foreseen, now: float) -> None:
        """Take in a report. Raises BadMessage for sums of a wrong size, or that are no loads."""
        count, loads = message.exchanges, _loads(message.sums, message.experts)
        if self._apart and message.prefill_exchanges:
            prefill = _loads(message.prefill_sums, message.experts)
            self._keep(message, True, (now, message.prefill_exchanges, prefill))
            count, loads = count - message.prefill_exchanges, np.maximum(loads - prefill, 0)
        if count > 0:
            self._keep(message, False, (now, count, loads))

    def _keep(self, message: Foreseen, prefill: bool, report: Report) -> None:
        reports = self._reports.setdefault((message.layer, prefill, message.instance), deque())
        if reports and len(reports[0][2]) != message.experts:  # it has come back with another model
            reports.clear()
        reports.append(report)
        while report[0] - reports[0][0] > OLDEST_S:
            reports.popleft()

    def seen(
        self, layer: int, experts: int, now: float, prefill: bool = False
    ) -> tuple[NDArray[np.float64], float] | None:
        """Loads [reports, experts] of a layer's exchange, in activated experts, and exchanges per second.

        None: nothing was foreseen lately. ``layer``: checkpoint index.
        """
        for name in [name for name, reports in self._reports.items() if now - reports[-1][0] > self._silent_s]:
            del self._reports[name]
        known = [
            reports for (of, phase, _), reports in self._reports.items()
            if (of, phase, len(reports[0][2])) == (layer, prefill, experts)
        ]  # fmt: skip
        if not known:
            return None
        since = max(reports[-1][0] for reports in known) - OLDEST_S
        lately = [[report for report in reports if report[0] >= since] for reports in known]
        best = max(lately, key=lambda reports: sum(count for _, count, _ in reports))
        exchanges = sum(count for _, count, _ in best)
        return np.stack([loads / count for _, count, loads in best]), exchanges / OLDEST_S


def _loads(sums: bytes, experts: int) -> NDArray[np.float64]:
    """[experts], in activated experts. Raises BadMessage."""
    if not experts or len(sums) != 8 * experts:
        raise BadMessage("Foreseen", f"{len(sums)} bytes of sums for {experts} experts")
    rows, activated = np.frombuffer(sums, "<f4").reshape(2, -1).astype(np.float64)
    loads = activated + ROW * rows
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise BadMessage("Foreseen", "a load is negative or not a finite number")
    return loads
