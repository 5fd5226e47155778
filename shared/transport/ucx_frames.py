"""The parts that the UCX transport is made of: the binding, send buffers, receive slots and peers.

Everything that UCX may still touch is referenced from here until its request has completed.
"""

import itertools
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.transport import ucp
from shared.transport.base import HEADER_BYTES, Header
from shared.transport.buffers import Block, size_class
from shared.transport.ucp import FRAME_TAG


class Ucx:
    """The low-level binding, imported when the first transport needs it; requests are those of ucp.py."""

    def __init__(self) -> None:
        # ucxx sets this itself, but only after it has loaded UCX: too late to count, and UCX warns about it.
        os.environ.setdefault("UCX_MEMTYPE_CACHE", "n")
        from ucxx._lib import libucxx

        self.api: Any = libucxx
        self.error: type[Exception] = libucxx.UCXError
        self._functions = ucp.Functions()
        self.functions = self._functions.table
        ucp.compile_functions()

    def send(self, endpoint: int, memory: torch.Tensor, nbytes: int, tag: int) -> int:
        """Start sending the first bytes of a tensor on any device; it must stay alive until the request has ended."""
        return ucp.send(self.functions, endpoint, memory.data_ptr(), nbytes, tag)

    def receive(self, worker: int, memory: torch.Tensor, nbytes: int, tag: int) -> int:
        """Start receiving into a tensor on any device, likewise."""
        return ucp.receive(self.functions, worker, memory.data_ptr(), nbytes, tag)

    def ended(self, request: int) -> int:
        return ucp.ended(self.functions, request)


def rows_tags() -> Iterator[int]:
    """Tags for rows apart: 30 random bits tell senders apart, 32 bits count."""
    base = 1 << 62 | secrets.randbits(30) << 32
    return (base | number & 0xFFFFFFFF for number in itertools.count())


class Fence:
    """A point in the device's work that the host can wait for; nothing to wait for on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def mark(self) -> None:
        """Set the point behind everything that this thread has queued so far."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class SendBuffer(Block):
    """Memory of one outgoing frame; goes back to its pool when the last user lets go."""

    def __init__(self, ucx: Ucx, capacity: int, give_back: Callable[["SendBuffer"], None]) -> None:
        self._ucx = ucx
        self._give_back = give_back
        self.users = 0
        super().__init__(capacity)

    def start(self, endpoint: int, requests: NDArray[np.int64]) -> None:
        """Hand the frame to UCX: one request per message."""
        requests[0] = self._ucx.send(endpoint, self.memory, self.message_bytes, FRAME_TAG)
        if self.apart is not None and self.row_bytes:
            requests[1] = self._ucx.send(endpoint, self.apart, self.row_bytes, int(self.rows_tag[0]))

    def let_go(self) -> None:
        self.users -= 1
        if not self.users:
            self._give_back(self)


class UcxPeer:
    """One endpoint and the frames on their way to it, one at a time so that they arrive in order."""

    def __init__(self, ucx: Ucx, endpoint: Any) -> None:
        self._ucx = ucx
        self._endpoint = endpoint
        self.handle: int = endpoint.handle
        self._closed = False
        self._broken = False
        self._queue: deque[SendBuffer] = deque()
        self._flying: SendBuffer | None = None
        self.requests = np.zeros(2, np.int64)
        """Of the frame that UCX holds, also when compiled code has sent it; 0: none."""
        self.kept: list[object] = []
        """What compiled code sends from, for as long as UCX may read it."""

    @property
    def alive(self) -> bool:
        return not (self._closed or self._broken) and self._endpoint.alive

    @property
    def waits(self) -> bool:
        """There are frames behind the one that UCX holds."""
        return bool(self._queue)

    def push(self, frame: SendBuffer) -> None:
        frame.users += 1
        self._queue.append(frame)

    def advance(self) -> bool:
        """Start what can be started. True while UCX holds a frame; frames to a dead peer vanish."""
        while not self._busy():
            if self._flying is not None:
                self._flying.let_go()
            self._flying = self._queue.popleft() if self._queue else None
            if self._flying is None:
                return False
            if self.alive:
                self._flying.start(self.handle, self.requests)
        return True

    def _busy(self) -> bool:
        for i, request in enumerate(self.requests.tolist()):
            status = self._ucx.ended(request)
            self._broken |= status < 0
            if status != ucp.IN_PROGRESS:
                self.requests[i] = 0
        return bool(self.requests.any())

    def close(self) -> bool:
        """Forget what is queued, close the endpoint. True while UCX still holds a frame.

        The close is started, not awaited. ucxx crashes when an endpoint is closed that has failed or was closed.
        """
        if not self._closed:
            self._closed = True
            if self._endpoint.alive:
                self._endpoint.close()
        return self.advance()


class ReceiveSlot(Block):
    """Memory of one received frame, posted to UCX while nobody holds it."""

    header: Header

    def __init__(
        self, ucx: Ucx, number: int, capacity: int, device: torch.device, recycle: Callable[["ReceiveSlot"], None]
    ) -> None:
        """``number``: no other slot of this transport has it."""
        super().__init__(capacity)
        self._ucx, self.number = ucx, number
        self._device = device
        self._recycle = recycle
        self._fence = Fence(device)
        self._spare = torch.empty(0, dtype=torch.uint8, device=device)
        self.expects_rows = False
        """The request is that for rows apart."""
        self.held = False

    def post(self, worker: int) -> int:
        """Receive the next frame into this slot; returns a request."""
        # A message shorter than a header must not revive the one that was here before.
        self.bytes[:HEADER_BYTES] = 0
        self.expects_rows = False
        return self._ucx.receive(worker, self.memory, self.capacity, FRAME_TAG)

    def post_rows(self, worker: int) -> int:
        """Receive the rows that follow the header apart, into memory of the device; returns a request."""
        nbytes, self.expects_rows = self.header.row_bytes, True
        if nbytes > len(self._spare):
            self._spare = torch.empty(size_class(nbytes), dtype=torch.uint8, device=self._device)
        # Kernels that read the last rows may still run, long after release().
        self._fence.wait()
        self.keep_rows(self._spare)
        self.lay_out_as(self.header)
        return self._ucx.receive(worker, self._spare, nbytes, int(self.rows_tag[0]))

    def show_rows(self) -> None:
        """Lay out rows that came in one message with their header."""
        self.keep_rows(None)
        self.lay_out_as(self.header)
        if self._device.type != "cpu":
            self.rows = self.rows.to(self._device)
            self._shape = None

    def release(self) -> None:
        if self.held:
            self.held = False
            self._fence.mark()
            self._recycle(self)


class Receives:
    """The receives that UCX holds, with the slots that they fill; those for rows, of which headers are there, first."""

    def __init__(self, most: int) -> None:
        self.table = np.zeros((most, 4), np.int64)
        """See ucp.py."""
        self.count = 0
        self.apart = 0
        """How many are for rows."""
        self._slots: dict[int, ReceiveSlot] = {}

    def add(self, slot: ReceiveSlot, request: int) -> None:
        place = self.apart if slot.expects_rows else self.count
        self.table[place + 1 : self.count + 1] = self.table[place : self.count]
        self.table[place] = request, ucp.IN_PROGRESS, slot.memory.data_ptr(), slot.number
        self._slots[slot.number] = slot
        self.apart += slot.expects_rows
        self.count += 1

    def take_ended(self) -> list[tuple[ReceiveSlot, int]]:
        """Those that have ended, with their status, in the order in which they began to arrive."""
        rows = self.table[: self.count]
        over = rows[:, ucp.STATUS] != ucp.IN_PROGRESS
        ended = [(self._slots[number], status) for _, status, _, number in rows[over].tolist()]
        left = rows[~over]
        self.table[: len(left)] = left
        self.count -= len(ended)
        self.apart -= sum(slot.expects_rows for slot, _ in ended)
        return ended

    def requests(self) -> list[int]:
        return self.table[: self.count, ucp.REQUEST].tolist()
