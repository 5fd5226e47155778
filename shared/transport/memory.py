"""Transport inside one process: the twin of UCX for tests and for a mesh in one process, across threads.

Keeps the discipline of the real one and punishes breaches: a receiver gets a copy, and memory that was sent or
released is overwritten with 0xFF. Faults can be injected; rows live in host memory only.
"""

import heapq
import threading
import time
from collections.abc import Sequence

import torch

from shared.errors import BadFrame, TransportError
from shared.transport.base import Header, Incoming, Lane, Outgoing, Peer
from shared.transport.buffers import Block, Pool
from shared.transport.faults import Delivery, Faults

POISON = 0xFF


class MemoryNetwork:
    """Connects the transports that it makes; thread-safe.

    Args:
        faults: what to do to frames; None leaves them alone.
    """

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults
        self.lost = 0
        """Frames to or from a cut transport, or to a closed one."""
        self._lock = threading.Lock()
        self._transports: dict[bytes, MemoryTransport] = {}
        self._made = 0
        self._cut: set[bytes] = set()
        self._in_order: dict[str, float] = {}

    def transport(self, max_frame_bytes: int = 16 << 20, receive_slots: int = 16) -> "MemoryTransport":
        """A new transport; addresses are numbered in order of creation, so that fault streams repeat."""
        with self._lock:
            made = MemoryTransport(self, b"memory-%d" % self._made, max_frame_bytes, receive_slots)
            self._made += 1
            self._transports[made.address] = made
            return made

    def cut(self, address: bytes) -> None:
        """Lose every frame to and from ``address`` from now on: an unreachable peer, which nobody reports."""
        with self._lock:
            self._cut.add(address)

    def heal(self, address: bytes) -> None:
        """Undo ``cut``."""
        with self._lock:
            self._cut.discard(address)

    def open(self, address: bytes) -> bool:
        with self._lock:
            return address in self._transports

    def forget(self, address: bytes) -> None:
        with self._lock:
            self._transports.pop(address, None)

    def carry(self, source: bytes, target: bytes, kind: int, data: bytes) -> None:
        """Bring one frame to ``target``, subject to cuts and faults; never fails."""
        link = f"{source.decode()}>{target.decode()}"
        with self._lock:
            receiver = self._transports.get(target)
            if receiver is None or self._cut & {source, target}:
                self.lost += 1
                return
            arrivals = self.faults.strike(link, kind) if self.faults else [Delivery(0.0, ordered=True)]
            due = [self._due(link, arrival) for arrival in arrivals]
        for moment in due:
            receiver.deliver(moment, data)

    def _due(self, link: str, arrival: Delivery) -> float:
        moment = time.monotonic() + arrival.delay
        if arrival.ordered:
            moment = self._in_order[link] = max(moment, self._in_order.get(link, 0.0))
        return moment


class MemoryPeer:
    """A transport of the same network, by address."""

    def __init__(self, network: MemoryNetwork, address: bytes) -> None:
        self._network = network
        self.address = address
        self.connected = True

    @property
    def alive(self) -> bool:
        return self.connected and self._network.open(self.address)


class Slot(Block):
    """Memory of one received frame."""

    header: Header

    def __init__(self, transport: "MemoryTransport", capacity: int) -> None:
        super().__init__(capacity)
        self._transport = transport
        self.held = False

    def release(self) -> None:
        if self.held:
            self.held = False
            self._transport.recycle(self)


class MemoryTransport:
    """See ``Transport``; made by ``MemoryNetwork.transport``."""

    def __init__(self, network: MemoryNetwork, address: bytes, max_frame_bytes: int, receive_slots: int) -> None:
        self.address = address
        self.dropped: dict[str, int] = {"malformed": 0, "too_long": 0}
        self.lane: Lane | None = None
        self._network = network
        self._max_frame_bytes = max_frame_bytes
        self._pool = Pool(Block, max_frame_bytes)
        self._free = [Slot(self, max_frame_bytes) for _ in range(receive_slots)]
        self._changed = threading.Condition()
        self._inbox: list[tuple[float, int, bytes]] = []
        self._delivered = 0
        self._woken = False

    def connect(self, address: bytes) -> Peer:
        if not self._network.open(address):
            raise TransportError(f"no transport at {address!r}")
        return MemoryPeer(self._network, address)

    def disconnect(self, peer: Peer) -> None:
        assert isinstance(peer, MemoryPeer)
        peer.connected = False

    def outgoing(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> Outgoing:
        return self._pool.take(meta_bytes, rows, columns, dtype)

    def send(self, peers: Sequence[Peer], header: Header, frame: Outgoing) -> None:
        assert isinstance(frame, Block)
        frame.seal(header)
        data = frame.bytes[: frame.message_bytes].tobytes()
        frame.bytes[: frame.message_bytes] = POISON
        self._pool.give(frame)
        for peer in peers:
            assert isinstance(peer, MemoryPeer)
            if peer.connected:
                self._network.carry(self.address, peer.address, header.kind, data)

    def deliver(self, due: float, data: bytes) -> None:
        """Put one frame in the inbox, to be received at ``due`` (monotonic seconds). Thread-safe."""
        with self._changed:
            self._delivered += 1
            heapq.heappush(self._inbox, (due, self._delivered, data))
            self._changed.notify_all()

    def receive(self, timeout: float, busy: bool = True, together: int = 1) -> Incoming | None:
        deadline = time.monotonic() + timeout
        while True:
            with self._changed:
                data = self._next(deadline)
            if data is None:
                return None
            slot = self._accept(data)
            if slot is not None:
                return slot

    def _next(self, deadline: float) -> bytes | None:
        """The bytes that are due first; waits for them, holding the condition."""
        while True:
            now = time.monotonic()
            due = self._inbox[0][0] if self._inbox and self._free else deadline
            if due <= now and self._inbox and self._free:
                return heapq.heappop(self._inbox)[2]
            if self._woken or now >= deadline:
                self._woken = False
                return None
            self._changed.wait(min(due, deadline) - now)

    def _accept(self, data: bytes) -> Slot | None:
        if len(data) > self._max_frame_bytes:
            self.dropped["too_long"] += 1
            return None
        slot = self._free[-1]
        slot.bytes[: len(data)] = memoryview(data)
        slot.bytes[len(data) : len(data) + 128] = 0
        try:
            slot.header, _ = slot.open()
        except BadFrame:
            self.dropped["malformed"] += 1
            return None
        slot.lay_out_as(slot.header)
        slot.held = True
        return self._free.pop()

    def recycle(self, slot: Slot) -> None:
        """Poison a released slot and use it again."""
        slot.bytes[: slot.message_bytes] = POISON
        self._free.append(slot)

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        self._network.forget(self.address)
        with self._changed:
            self._inbox.clear()
