"""The routing of exchanges on its way to recorders: kept within bounds, only while somebody holds a lease.

The compute thread adds, the asyncio thread takes and sends (reports.py). Knows neither NATS nor files.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shared.traces.native import encode_record, id_dtype

MOST_WAITING = 16 << 20
"""Bytes that wait to be sent; what comes on top of it is dropped and counted."""
OVERHEAD = 80
"""Bytes of memory that a record takes beside its own."""
MOST_AT_ONCE = 256 << 10
"""Bytes of one message; a longer record is dropped and counted."""


class Recording:
    """``experts``: per layer; ``clock``: monotonic seconds."""

    def __init__(
        self, experts: int, most_waiting: int = MOST_WAITING, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.on = False
        """Whether ``add`` keeps anything. Changes under the lock, so that nothing is left behind from another time."""
        self.seen = self.dropped = 0
        """Exchanges met while ``on``, since the start; those of them that nobody will get."""
        self._dtype = id_dtype(experts)
        self._most_waiting, self._clock = most_waiting, clock
        self._lock = threading.Lock()
        self._records: deque[bytes] = deque()
        self._waiting = 0
        self._leases: dict[str, float] = {}

    @property
    def passed(self) -> int:
        """How many of the exchanges seen wait no longer."""
        with self._lock:
            return self.seen - len(self._records)

    @property
    def recorders(self) -> int:
        return len(self._leases)

    def lease(self, recorder: str, seconds: float) -> bool:
        """Record for so long from now; 0: no longer. True: it is the first lease of this recorder."""
        new = recorder not in self._leases
        if new and not seconds:
            return False
        self._leases[recorder] = self._clock() + seconds
        with self._lock:
            self.on = True
        return new

    def expire(self) -> tuple[str, ...]:
        """End the leases whose time has come; returns whose they were."""
        now = self._clock()
        ended = tuple(recorder for recorder, end in self._leases.items() if end <= now)
        for recorder in ended:
            del self._leases[recorder]
        with self._lock:
            self.on = bool(self._leases)
        return ended

    def add(self, layer: int, step: int, experts: NDArray[np.uint32]) -> None:
        """Keep the ids [T, k] of an exchange. In the compute thread."""
        record = encode_record(self._dtype, layer, step, experts)
        with self._lock:
            if not self.on:
                return
            self.seen += 1
            if len(record) > MOST_AT_ONCE or self._waiting + len(record) + OVERHEAD > self._most_waiting:
                self.dropped += 1
                return
            self._records.append(record)
            self._waiting += len(record) + OVERHEAD

    def take(self) -> tuple[bytes, int]:
        """Records for one message, empty when none wait; and how many of the exchanges seen wait no longer then."""
        taken: list[bytes] = []
        size = 0
        with self._lock:
            while self._records and size + len(self._records[0]) <= MOST_AT_ONCE:
                taken.append(self._records.popleft())
                size += len(taken[-1])
            self._waiting -= size + OVERHEAD * len(taken)
            return b"".join(taken), self.seen - len(self._records)
