"""A transport whose frames take a device profile's time to arrive.

Wraps any other transport on both sides and changes nothing on the wire: a frame is held back for the link's time after
its arrival, in order per sender. Sending is asynchronous, but for the time that each message occupies its sender.
"""

import heapq
import time
from collections.abc import Callable, Sequence

import torch

from shared.device_profile import DeviceProfile, link_seconds
from shared.transport.base import Header, Incoming, Outgoing, Peer, Transport


class PacedTransport:
    """See ``Transport``. ``wait_until`` is how its thread passes the time while a modelled device would compute."""

    def __init__(self, inner: Transport, profile: DeviceProfile, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = inner.address
        self.dropped = inner.dropped
        self._inner = inner
        self._profile = profile
        self._clock = clock
        self._held: list[tuple[float, int, Incoming]] = []
        """Heap of (due, number, frame)."""
        self._number = 0
        self._woken = False

    def connect(self, address: bytes) -> Peer:
        return self._inner.connect(address)

    def disconnect(self, peer: Peer) -> None:
        self._inner.disconnect(peer)

    def outgoing(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> Outgoing:
        return self._inner.outgoing(meta_bytes, rows, columns, dtype)

    def send(self, peers: Sequence[Peer], header: Header, frame: Outgoing) -> None:
        self.wait_until(self._clock() + len(peers) * self._profile.send_s)  # nobody is done before the last message
        self._inner.send(peers, header, frame)

    def wait_until(self, moment: float) -> None:
        """Returns at ``moment`` of the clock; until then frames arrive as they would while a device computes."""
        while (left := moment - self._clock()) > 0:
            self._listen(left)

    def receive(self, timeout: float, busy: bool = True) -> Incoming | None:
        """Sleeps as an idle transport does, whatever ``busy`` says: many instances share few cores."""
        deadline = self._clock() + timeout
        while True:
            until = min(deadline, self._held[0][0]) if self._held else deadline
            self._listen(0.0 if self._woken else max(0.0, until - self._clock()))
            now = self._clock()
            if self._held and self._held[0][0] <= now:
                return heapq.heappop(self._held)[2]
            if self._woken or now >= deadline:
                self._woken = False
                return None

    def _listen(self, timeout: float) -> None:
        """Take in whatever arrives first and with it; returns early then, or at a ``wake``."""
        while (frame := self._inner.receive(timeout, busy=False)) is not None:
            self._hold(frame)
            timeout = 0.0

    def _hold(self, frame: Incoming) -> None:
        due = self._clock() + link_seconds(self._profile, frame.header.frame_bytes)
        before = (at for at, _, other in self._held if other.header.sender == frame.header.sender)
        self._number += 1
        heapq.heappush(self._held, (max([due, *before]), self._number, frame))

    def wake(self) -> None:
        self._woken = True
        self._inner.wake()

    def close(self) -> None:
        self._held.clear()
        self._inner.close()
