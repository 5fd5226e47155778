"""Arrival traces: when requests come, and how many tokens they have. Columns as in the Azure LLM inference traces.

TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
"""

import csv
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import MoemeshError

COLUMNS = ("timestamp", "contexttokens", "generatedtokens")
ALIASES = {"context": "contexttokens", "generated": "generatedtokens"}


class BadArrivals(MoemeshError):
    """An arrival trace that is none: ``line`` is counted from 1."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")
        self.line = line


class Arrivals(NamedTuple):
    """Requests in the order of arrival; [requests] each."""

    times: NDArray[np.float64]
    """Seconds since the first."""
    context: NDArray[np.int64]
    """Tokens of the prompt."""
    generated: NDArray[np.int64]
    """Tokens of the output."""

    def first(self, seconds: float) -> "Arrivals":
        """Those of the first so many seconds; 0: all."""
        count = len(self.times) if seconds <= 0 else int(np.searchsorted(self.times, seconds))
        return Arrivals(self.times[:count], self.context[:count], self.generated[:count])


def read_arrivals(path: Path, most_context: int) -> Arrivals:
    """All requests of a file, contexts cut at ``most_context`` tokens. Raises BadArrivals, OSError."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        order = _columns(path, next(rows, []))
        parsed = [_parse(path, line, row, order) for line, row in enumerate(rows, 2)]
    if not parsed:
        raise BadArrivals(path, 2, "there are no requests")
    stamps, context, generated = zip(*parsed, strict=True)
    times = np.array(stamps, np.float64)
    backwards = np.flatnonzero(np.diff(times) < 0)
    if backwards.size:
        raise BadArrivals(path, int(backwards[0]) + 3, "its time is before that of the line above")
    cut = np.minimum(np.array(context, np.int64), most_context)
    return Arrivals(times - times[0], cut, np.array(generated, np.int64))


def _columns(path: Path, header: list[str]) -> list[int]:
    names = [ALIASES.get(name.strip().lower(), name.strip().lower()) for name in header]
    if sorted(names) != sorted(COLUMNS):
        raise BadArrivals(path, 1, f"columns are {','.join(header)}, expected TIMESTAMP,ContextTokens,GeneratedTokens")
    return [names.index(column) for column in COLUMNS]


def _parse(path: Path, line: int, row: list[str], order: list[int]) -> tuple[float, int, int]:
    """Seconds, context, generated. The fraction of a second is added by hand: datetime takes six digits."""
    if len(row) != 3 or not all(cell.strip() for cell in row):
        raise BadArrivals(path, line, f"{sum(bool(cell.strip()) for cell in row)} values, expected 3")
    try:
        stamp, context, generated = row[order[0]], int(row[order[1]]), int(row[order[2]])
        whole, _, fraction = stamp.strip().partition(".")
        moment = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)  # noqa: UP017
        seconds = moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
    except ValueError as error:
        raise BadArrivals(path, line, str(error)) from error
    if context < 1 or generated < 1:
        raise BadArrivals(path, line, f"{context} and {generated} tokens: a request has at least one of each")
    return seconds, context, generated
