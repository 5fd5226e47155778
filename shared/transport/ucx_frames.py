"""The parts that the UCX transport is made of: the binding, send buffers, receive slots and peers.

Everything that UCX may still touch is referenced from here until its request has completed.
"""

import itertools
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shared.transport.base import HEADER_BYTES, Header
from shared.transport.buffers import Block, size_class

FRAME_TAG = 1
"""Every frame travels under this tag; rows apart under one of their own, with the top bit set."""


class Ucx:
    """The low-level binding (worker, endpoints, tags), imported when the first transport needs it."""

    def __init__(self) -> None:
        # ucxx sets this itself, but only after it has loaded UCX: too late to count, and UCX warns about it.
        os.environ.setdefault("UCX_MEMTYPE_CACHE", "n")
        from ucxx._lib import arr, libucxx

        self.api: Any = libucxx
        self.error: type[Exception] = libucxx.UCXError
        self.array: Any = arr.Array
        self.frame_tag = libucxx.UCXXTag(FRAME_TAG)
        self.exact = libucxx.UCXXTagMaskFull

    def view(self, memory: torch.Tensor) -> Any:
        """What UCX sends from or receives into: device tensors by pointer, host tensors by buffer."""
        return self.array(memory if memory.is_cuda else memory.numpy())

    def tag(self, value: int) -> Any:
        return self.api.UCXXTag(value)


def rows_tags() -> Iterator[int]:
    """Tags for rows apart: 31 random bits tell senders apart, 32 bits count."""
    base = 1 << 63 | secrets.randbits(31) << 32
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

    def lay_out(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        before = self._shape
        super().lay_out(meta_bytes, rows, columns, dtype)
        if self._shape is not before:
            self._message = self._ucx.view(self.memory[: self.message_bytes])
            self._rows = None if self.apart is None else self._ucx.view(self.apart[: self.row_bytes])

    def start(self, endpoint: Any) -> Iterator[Any]:
        """Hand the frame to UCX: yields one request per message."""
        yield endpoint.tag_send(self._message, self._ucx.frame_tag)
        if self._rows is not None and self.row_bytes:
            yield endpoint.tag_send(self._rows, self._ucx.tag(int(self.rows_tag[0])))

    def let_go(self) -> None:
        self.users -= 1
        if not self.users:
            self._give_back(self)


class UcxPeer:
    """One endpoint and the frames on their way to it, one at a time so that they arrive in order."""

    def __init__(self, ucx: Ucx, endpoint: Any) -> None:
        self._error = ucx.error
        self._endpoint = endpoint
        self._closed = False
        self._broken = False
        self._queue: deque[SendBuffer] = deque()
        self._flying: SendBuffer | None = None
        self._requests: list[Any] = []

    @property
    def alive(self) -> bool:
        return not (self._closed or self._broken) and self._endpoint.alive

    def push(self, frame: SendBuffer) -> None:
        frame.users += 1
        self._queue.append(frame)

    def advance(self) -> bool:
        """Start what can be started. True while UCX holds a frame; frames to a dead peer vanish."""
        while True:
            if self._flying is not None:
                if not all(request.completed for request in self._requests):
                    return True
                self._flying.let_go()
            self._requests.clear()
            self._flying = self._queue.popleft() if self._queue else None
            if self._flying is None:
                return False
            self._start(self._flying)

    def _start(self, frame: SendBuffer) -> None:
        if not self.alive:
            return
        try:
            for request in frame.start(self._endpoint):
                self._requests.append(request)
        except self._error:
            self._broken = True

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
    request: Any

    def __init__(self, ucx: Ucx, capacity: int, device: torch.device, recycle: Callable[["ReceiveSlot"], None]) -> None:
        super().__init__(capacity)
        self._ucx = ucx
        self._device = device
        self._recycle = recycle
        self._message = ucx.view(self.memory)
        self._fence = Fence(device)
        self._spare = torch.empty(0, dtype=torch.uint8, device=device)
        self.held = False

    def post(self, worker: Any) -> None:
        """Receive the next frame into this slot."""
        # A message shorter than a header must not revive the one that was here before.
        self.bytes[:HEADER_BYTES] = 0
        self.request = worker.tag_recv(self._message, self._ucx.frame_tag, self._ucx.exact)

    def post_rows(self, worker: Any) -> None:
        """Receive the rows that follow the header apart, into memory of the device."""
        nbytes = self.header.row_bytes
        if nbytes > len(self._spare):
            self._spare = torch.empty(size_class(nbytes), dtype=torch.uint8, device=self._device)
        # Kernels that read the last rows may still run, long after release().
        self._fence.wait()
        self.keep_rows(self._spare)
        self.lay_out_as(self.header)
        tag = self._ucx.tag(int(self.rows_tag[0]))
        self.request = worker.tag_recv(self._ucx.view(self._spare[:nbytes]), tag, self._ucx.exact)

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
