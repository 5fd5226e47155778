"""Ping-pong micro-batches: how a step is cut in two, and whether that pays. Pure; the caller measures.

While the experts of one micro-batch compute, the attention side works on the other one (MegaScale-Infer, section 4;
JANUS relies on the same overlap). It pays where devices or links keep each other waiting, and costs where both sides
share cores or experts read their weights twice: so it is measured, and off unless it wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.attention.batching import Chunk

MOST = 2
UNDISTURBED = 8
"""Steps of a size before its first trial."""
PAIRS = 4
"""Pairs of steps, one as a whole and one split, in a trial."""
TRIAL_EVERY = 256
WINS = 0.95
"""Splitting must take at most this share of the time of a whole step."""


def split(chunks: Sequence[Chunk], count: int) -> list[list[Chunk]]:
    """Cut a step into ``count`` parts of nearly the same number of rows, in order; a chunk may end up in several.

    Fewer parts when there are fewer rows. Rows of one sequence stay in order, so that each part finds in the cache what
    the parts before it wrote.
    """
    rows = sum(chunk.count for chunk in chunks)
    ends = [rows * (part + 1) // count for part in range(count)]
    parts: list[list[Chunk]] = [[] for _ in ends]
    at = 0
    for chunk in chunks:
        for part, end in zip(parts, ends, strict=True):
            taken = min(end - at, chunk.count)
            if taken > 0:
                part.append(Chunk(chunk.sequence, chunk.start, taken))
                chunk = Chunk(chunk.sequence, chunk.start + taken, chunk.count - taken)
                at += taken
    return [part for part in parts if part]


@dataclass
class _Size:
    """What is known of steps of about the same number of rows."""

    steps: int = 0
    whole: list[float] = field(default_factory=list)
    halves: list[float] = field(default_factory=list)
    pays: bool = False


class MicroBatching:
    """How many micro-batches a step has: fixed, or chosen for each power of two of rows by trials.

    A trial alternates between whole and split steps, so that what slows down a host meets both alike.

    Args:
        fixed: 1 or 2; 0: chosen by measured times.
    """

    def __init__(self, fixed: int = 0) -> None:
        self._fixed = fixed
        self._sizes: dict[int, _Size] = {}

    def count(self, rows: int) -> int:
        """Micro-batches of a step with so many rows."""
        if rows < MOST:
            return 1
        if self._fixed:
            return self._fixed
        size = self._size(rows)
        if self._in_trial(size):
            return 1 + len(size.whole) - len(size.halves)
        return MOST if size.pays else 1

    def observe(self, rows: int, count: int, seconds: float) -> None:
        """A step with so many rows and micro-batches took so long."""
        if self._fixed or rows < MOST:
            return
        size = self._size(rows)
        if not self._in_trial(size):
            size.steps += 1
        elif count == 1 + len(size.whole) - len(size.halves):
            (size.whole if count == 1 else size.halves).append(seconds)
            if len(size.halves) == PAIRS + 1:
                self._decide(size)

    def _size(self, rows: int) -> _Size:
        return self._sizes.setdefault(rows.bit_length(), _Size())

    @staticmethod
    def _in_trial(size: _Size) -> bool:
        return size.steps >= UNDISTURBED

    @staticmethod
    def _decide(size: _Size) -> None:
        """The first pair does not count: its steps are the first of their shape. Most pairs must agree."""
        ratios = sorted(half / whole for half, whole in zip(size.halves[1:], size.whole[1:], strict=True))
        size.pays = ratios[(len(ratios) - 1) * 3 // 4] < WINS
        size.steps = UNDISTURBED - TRIAL_EVERY
        size.whole, size.halves = [], []
