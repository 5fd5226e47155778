"""How long an idle expert stays resident, and when it is started ahead of its next use: three policies.

All of them note uses, one numpy call per exchange, in arrays [layers, experts] of fixed size; the caller gives the
time. They know nothing of memory: what must go because there is no room is decided elsewhere.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NEVER = np.inf


class Windows(NamedTuple):
    """When an expert that is not used is wanted: until ``stop``, and again from ``warm`` until ``end``. [E] each."""

    stop: Floats
    warm: Floats
    """NEVER: not started ahead."""
    end: Floats

    def wanted(self, now: float) -> NDArray[np.bool_]:
        """[E]: to be resident at this time."""
        return (now <= self.stop) | ((self.warm <= now) & (now <= self.end))


class KeepAlive(Protocol):
    """One policy, for all experts of an instance or of a mesh. Times are seconds of the caller's clock."""

    def observe(self, layer: int, experts: NDArray[np.integer], now: float) -> None:
        """Some experts of a layer (its index, each expert once) are used now."""
        ...

    def windows(self, layer: int) -> Windows:
        """When the experts of a layer are wanted, as far as it is known; experts that were never used are not."""
        ...


class Fixed:
    """An idle expert is kept for so long: the paper's policy."""

    def __init__(self, layers: int, experts: int, seconds: float) -> None:
        self._last = np.full((layers, experts), -NEVER)
        self._seconds = seconds

    def observe(self, layer: int, experts: NDArray[np.integer], now: float) -> None:
        self._last[layer, experts] = now

    def windows(self, layer: int) -> Windows:
        return _once(self._last[layer] + self._seconds)


class Window(Fixed):
    """Knative Serving's defaults: an expert goes when it had no use for a stable window, after a grace period.

    Decisions are made at ticks, so that the window ends at the first tick that sees it empty.
    """

    def __init__(self, layers: int, experts: int, window: float = 60.0, grace: float = 30.0, tick: float = 2.0) -> None:
        super().__init__(layers, experts, window)
        self._grace, self._tick = grace, tick

    def windows(self, layer: int) -> Windows:
        empty = np.ceil((self._last[layer] + self._seconds) / self._tick) * self._tick
        return _once(empty + self._grace)


class Histogram:
    """Idle times of every expert in a histogram: kept until the tail, and started ahead at the head if that is late.

    Source: Shahrad et al., Serverless in the Wild (ATC'20), section 4.2: head and tail are the 5th and 99th percentile.
    Ours: buckets are powers of two, since idle times of experts run from milliseconds to minutes; counts are halved
    now and then, so that old habits fade; an expert of which little is known is kept for a fixed time, as theirs is.
    """

    SHORTEST_S, BUCKETS = 2.0**-10, 24
    """The first bucket ends there, the last begins at 2.3 hours."""
    MOST = 512
    """Idle times per expert, after which all its counts are halved."""

    def __init__(
        self,
        layers: int,
        experts: int,
        fallback: float,
        start_s: float = 0.0,
        worth_s: float = 0.0,
        head: float = 0.05,
        tail: float = 0.99,
        fewest: int = 8,
    ) -> None:
        """
        Args:
            fallback: seconds to keep an expert of which fewer than ``fewest`` idle times are known.
            start_s: what a start takes; it begins so much ahead.
            worth_s: an idle time that is worth a start; experts are kept for it, at least twice ``start_s``.
        """
        self._last = np.full((layers, experts), -NEVER)
        self._counts = np.zeros((layers, experts, self.BUCKETS), np.uint16)
        self._fallback, self._start_s, self._head, self._tail = fallback, start_s, head, tail
        self._fewest, self._worth_s = fewest, max(worth_s, 2 * start_s)

    def observe(self, layer: int, experts: NDArray[np.integer], now: float) -> None:
        experts = experts[now > self._last[layer, experts]]
        idle = now - self._last[layer, experts]
        self._last[layer, experts] = now
        known, idle = experts[np.isfinite(idle)], idle[np.isfinite(idle)]
        counts = self._counts[layer]
        counts[known, self._bucket(idle)] += 1
        full = known[counts[known].sum(axis=1) >= self.MOST]
        counts[full] >>= 1

    def windows(self, layer: int) -> Windows:
        last, counts = self._last[layer], self._counts[layer]
        reached = np.cumsum(counts, axis=1, dtype=np.int64)
        total = reached[:, -1:]
        head = self._lower((reached < self._head * total).sum(axis=1))
        tail = self._lower((reached < self._tail * total).sum(axis=1) + 1)
        few = total[:, 0] < self._fewest
        end = last + np.where(few, self._fallback, np.maximum(tail, self._worth_s))
        away = ~few & (head > self._worth_s) & (head > self.SHORTEST_S)
        warm = np.where(away, last + head - self._start_s, NEVER)
        return Windows(np.where(away, last, end), warm, end)

    def _bucket(self, idle: Floats) -> NDArray[np.int64]:
        exponents = np.floor(np.log2(np.maximum(idle, 1e-9) / self.SHORTEST_S)).astype(np.int64) + 1
        return np.clip(exponents, 0, self.BUCKETS - 1)

    def _lower(self, bucket: NDArray[np.int64]) -> Floats:
        """Where a bucket begins; the end of a bucket is where the next one does."""
        return np.where(bucket > 0, self.SHORTEST_S * np.exp2(bucket - 1.0), 0.0)


def _once(until: Floats) -> Windows:
    """Kept until then, never started ahead."""
    return Windows(until, np.full_like(until, NEVER), until)
