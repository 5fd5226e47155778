"""A transport whose frames take a device profile's time to arrive.

Wraps any other transport: its sends tell the time, its receives hold a frame back until the link's time has passed
since then, in order per sender. Sending is asynchronous, but for the time that each message occupies its sender.
For instances of one host, which share a clock; a frame that tells no plausible time counts as sent when it arrives.
"""

import heapq
import time
from collections.abc import Callable, Sequence

import torch

from shared.device_profile import DeviceProfile, link_seconds
from shared.transport.base import Header, Incoming, Lane, Outgoing, Peer, Transport

SERVE_S = 0.02
"""How often the link is served while its thread sleeps, for frames so long that both sides have to work on them."""
OLDEST_S = 1.0
"""A frame that claims to be older was stamped by another host's clock, or somebody was stopped."""


class PacedTransport:
    """See ``Transport``. ``wait_until`` is how its thread passes the time while a modelled device would compute.

    While frames are held and while a device computes, a ``wake`` takes effect only when that time is over. Sleeps are
    plain ones: those that listen take several times as much of a core, and many instances share few.
    """

    def __init__(
        self,
        inner: Transport,
        profile: DeviceProfile,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = inner.address
        self.dropped = inner.dropped
        self.lane: Lane | None = None
        self._inner = inner
        self._profile = profile
        self._clock = clock
        self._sleep = sleep
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
        header.sent = int(self._clock() * 1e6) % 2**32
        self._inner.send(peers, header, frame)

    def wait_until(self, moment: float) -> None:
        """Returns at ``moment`` of the clock."""
        self._take_in(0.0)
        while (left := moment - self._clock()) > 0:
            self._sleep(min(left, SERVE_S))
            self._take_in(0.0)

    def receive(self, timeout: float, busy: bool = True, together: int = 1) -> Incoming | None:
        """Sleeps as an idle transport does, whatever ``busy`` says."""
        deadline = self._clock() + timeout
        while True:
            if self._held:
                self.wait_until(min(deadline, self._held[0][0]))
            else:
                self._take_in(0.0 if self._woken else max(0.0, deadline - self._clock()))
            now = self._clock()
            if self._held and self._held[0][0] <= now:
                return heapq.heappop(self._held)[2]
            if self._woken or now >= deadline:
                self._woken = False
                return None

    def _take_in(self, timeout: float) -> None:
        """Hold whatever arrives first and with it; returns early then, or at a ``wake``."""
        while (frame := self._inner.receive(timeout, busy=False)) is not None:
            self._hold(frame)
            timeout = 0.0

    def _hold(self, frame: Incoming) -> None:
        now = self._clock()
        age = (int(now * 1e6) - frame.header.sent) % 2**32 * 1e-6
        sent = now - age if frame.header.sent and age < OLDEST_S else now
        due = sent + self.delay(frame)
        before = (at for at, _, other in self._held if other.header.sender == frame.header.sender)
        self._number += 1
        heapq.heappush(self._held, (max([due, *before]), self._number, frame))

    def delay(self, frame: Incoming) -> float:
        """Seconds from the moment it was sent until it may be seen."""
        return link_seconds(self._profile, frame.header.frame_bytes)

    def wake(self) -> None:
        self._woken = True
        self._inner.wake()

    def close(self) -> None:
        self._held.clear()
        self._inner.close()
