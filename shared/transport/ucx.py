"""Transport over UCX (``ucxx``, low-level tag API), driven by the thread that computes.

Shared memory and CMA on one host, TCP or RDMA between hosts. A frame is one message; with device rows it is two,
so that tensors travel by pointer. Receives are long-lived and never cancelled, since that loses messages.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shared.errors import BadFrame, TransportError
from shared.transport import ucp
from shared.transport.address import seal, unseal
from shared.transport.base import Header, Incoming, Lane, Outgoing, Peer
from shared.transport.buffers import ROWS_TAG_BYTES, Pool
from shared.transport.ucp import FRAME_TAG
from shared.transport.ucx_frames import Fence, Receives, ReceiveSlot, SendBuffer, Ucx, UcxPeer, rows_tags
from shared.transport.ucx_lane import UcxLane

SURVIVE_DEAD_PEERS = {"SYSV_ERROR_HANDLING": "y", "POSIX_ERROR_HANDLING": "y", "CMA_MEMORY_INVALIDATE": "y"}
"""Lets endpoints with error handling use shared memory and CMA. Without error handling UCX aborts the process when it
reads the memory of a peer that has just died."""
POSTED_RECEIVES = 4
SPIN_US = 100.0
BUSY_SLEEP_S = 0.005
"""Bounds the sleeps of a busy ``receive``. Each turn takes time of a core on which an expert instance may compute."""
IDLE_SLEEP_S = 0.5
NO_SENDS = np.zeros(0, np.int64)
CLOSING_ROUNDS = 20
"""Turns of progress in which living peers learn that an endpoint is closed."""


class UcxTransport:
    """See ``Transport``.

    Args:
        max_frame_bytes: longest frame that is sent or accepted; memory is touched only as frames need it.
        device: where rows live.
        tls: UCX transports, e.g. ``tcp``; empty: UCX chooses.
        receive_slots: most frames that may be held at once, plus one for each peer that died while sending.
        spin_us: microseconds of polling before a busy ``receive`` sleeps. Every turn yields the core; yet where
            services share cores, one that polls for long takes whole slices from those that compute.
        nap_s: bounds the sleeps of a ``receive`` that is not busy: twice that after a frame, up to half a second.
        rows_apart: send rows as a message of their own; None: when the device is not a CPU.

    Raises TransportError when UCX cannot start with these settings.
    """

    def __init__(
        self,
        max_frame_bytes: int,
        device: torch.device | None = None,
        tls: str = "",
        receive_slots: int = 256,
        spin_us: float = SPIN_US,
        nap_s: float = BUSY_SLEEP_S,
        rows_apart: bool | None = None,
    ) -> None:
        self.dropped: dict[str, int] = {"malformed": 0, "too_long": 0, "broken": 0}
        self._ucx = Ucx()
        self._device = device or torch.device("cpu")
        self._spin = spin_us * 1e-6
        self._nap = self._first_nap = nap_s
        self._closed = False
        self._start_worker(tls)
        self._start_waiting()
        self._rows_apart = self._device.type != "cpu" if rows_apart is None else rows_apart
        self._rows_tags = rows_tags()
        self._fence = Fence(self._device)
        self._pool = Pool(self._new_buffer, max_frame_bytes)
        self._peers: set[UcxPeer] = set()
        self._sending: list[UcxPeer] = []
        self._quarantine: list[UcxPeer] = []
        self._slot_bytes = max_frame_bytes + ROWS_TAG_BYTES
        self._slots_left = receive_slots
        self._window = POSTED_RECEIVES
        self._free: list[ReceiveSlot] = []
        self._receives = Receives(receive_slots)
        self._ready: deque[ReceiveSlot] = deque()
        """Frames that came together with one that was delivered."""
        self._post_receives()
        self.lane: Lane | None = self._make_lane() if self._device.type == "cpu" and not self._rows_apart else None

    def _make_lane(self) -> UcxLane:
        def ready(together: int) -> bool:
            self._window = max(self._window, together)
            self._post_receives()
            self._nap = self._first_nap
            self._sending = [peer for peer in self._sending if peer.advance()]
            return not (self._ready or any(peer.waits for peer in self._sending))

        def leave() -> None:
            self._take_ended()
            self._replace_stuck_receives()

        return UcxLane(
            self._ucx.functions, self._handle, self._files, self._woken,
            receives=self._receives, capacity=self._slot_bytes, ready=ready, leave=leave, settle=self._settle,
        )  # fmt: skip

    def _start_worker(self, tls: str) -> None:
        api = self._ucx.api
        settings = SURVIVE_DEAD_PEERS | ({"TLS": tls} if tls else {})
        features = (api.Feature.TAG, api.Feature.WAKEUP)
        try:
            self._context = api.UCXContext(settings, feature_flags=features)
            self._worker: Any = api.UCXWorker(self._context, False, False)
            self._worker.init_blocking_progress_mode()
            self._handle: int = self._worker.handle
        except self._ucx.error as error:
            raise TransportError(f"UCX cannot start with transports {tls or 'of its choice'}: {error}") from error
        self.address: bytes = seal(self._worker.address.tobytes())

    def _start_waiting(self) -> None:
        self._wake_lock = threading.Lock()
        self._woken = np.zeros(1, np.int64)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._files = ucp.files(self._worker.epoll_file_descriptor, self._wake_fd)

    # ---- peers and sending ----------------------------------------------------------------------------------

    def connect(self, address: bytes) -> Peer:
        worker = unseal(address)
        api = self._ucx.api
        try:
            there = api.UCXAddress.create_from_buffer(worker)
            endpoint = api.UCXEndpoint.create_from_worker_address(self._worker, there, True)
        except self._ucx.error as error:
            raise TransportError(f"UCX cannot reach that address: {error}") from error
        peer = UcxPeer(self._ucx, endpoint)
        self._peers.add(peer)
        return peer

    def disconnect(self, peer: Peer) -> None:
        assert isinstance(peer, UcxPeer)
        self._peers.discard(peer)
        self._sending = [other for other in self._sending if other is not peer]
        self._quarantine = [other for other in self._quarantine if other.advance()]
        if peer.close():
            self._quarantine.append(peer)

    def outgoing(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> Outgoing:
        return self._pool.take(meta_bytes, rows, columns, dtype)

    def _new_buffer(self, capacity: int) -> SendBuffer:
        buffer = SendBuffer(self._ucx, capacity, self._pool.give)
        if self._rows_apart:
            buffer.keep_rows(torch.empty(capacity, dtype=torch.uint8, device=self._device))
        return buffer

    def send(self, peers: Sequence[Peer], header: Header, frame: Outgoing) -> None:
        assert isinstance(frame, SendBuffer)
        self._nap = self._first_nap  # who sends expects an answer
        frame.seal(header)
        if self._rows_apart:
            frame.rows_tag[0] = next(self._rows_tags)
            self._fence.mark()
            self._fence.wait()
        frame.users = 1
        for peer in peers:
            assert isinstance(peer, UcxPeer)
            peer.push(frame)
            if peer.advance() and peer not in self._sending:
                self._sending.append(peer)
        frame.let_go()

    # ---- receiving ------------------------------------------------------------------------------------------

    def receive(self, timeout: float, busy: bool = True, together: int = 1) -> Incoming | None:
        if self._ready:
            return self._ready.popleft()
        deadline = time.monotonic() + timeout
        while True:
            self._post_receives()
            frame = self._wait(deadline, busy, together)
            if frame is not None:
                self._nap = self._first_nap
                return frame
            if self._woken[0] or time.monotonic() >= deadline:
                self._settle()
                return None
            self._nap = min(self._nap * 2, IDLE_SLEEP_S)

    def _wait(self, deadline: float, busy: bool, together: int) -> ReceiveSlot | None:
        """A frame as soon as there are so many; what there is, if anything, after a nap: a wakeup can be lost."""
        polled, nap = time.monotonic() + self._spin * busy, BUSY_SLEEP_S if busy else self._nap
        times = int(polled * 1e9), int(nap * 1e9), int(min(deadline, polled + nap) * 1e9)
        while True:
            receives, sends = self._receives, [peer.requests for peer in self._sending]
            # Rows apart are asked for when their header is there: then nobody waits for other headers.
            wanted = 1 if self._rows_apart else min(together, receives.count)
            what = ucp.wait(
                self._ucx.functions, self._handle, self._files, receives.table, receives.count,
                np.concatenate(sends) if sends else NO_SENDS, self._woken, wanted, times,
            )  # fmt: skip
            if what < wanted:
                self._replace_stuck_receives()
            if what == ucp.NOTHING:
                return None
            if what == ucp.SENT:
                self._sending = [peer for peer in self._sending if peer.advance()]
                continue
            self._take_ended()
            if self._ready:
                return self._ready.popleft()
            self._post_receives()

    def _take_ended(self) -> None:
        for slot, status in self._receives.take_ended():
            frame = self._accept(slot, status)
            if frame is not None:
                self._ready.append(frame)

    def _settle(self) -> None:
        """Take notice of a ``wake``."""
        with self._wake_lock:  # else a ``wake`` between the two would leave the descriptor readable for good
            if self._woken[0]:
                self._woken[0] = 0
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                self._woken[0] = 1
                os.eventfd_write(self._wake_fd, 1)

    def _accept(self, slot: ReceiveSlot, status: int) -> ReceiveSlot | None:
        """Judge a finished receive: a frame to deliver, or None when it is dropped or its rows are still to come."""
        if status:
            return self._drop(slot, "too_long" if status == ucp.TRUNCATED else "broken")
        if slot.expects_rows:
            return self._deliver(slot)
        try:
            slot.header, apart = slot.open()
        except BadFrame:
            return self._drop(slot, "malformed")
        if apart and slot.header.row_bytes:
            self._receives.add(slot, slot.post_rows(self._handle))
            return None
        slot.show_rows()
        return self._deliver(slot)

    def _drop(self, slot: ReceiveSlot, reason: str) -> None:
        self.dropped[reason] += 1
        self._free.append(slot)

    def _deliver(self, slot: ReceiveSlot) -> ReceiveSlot:
        slot.held = True
        return slot

    def _recycle(self, slot: ReceiveSlot) -> None:
        if not self._closed:
            self._free.append(slot)

    def _post_receives(self) -> None:
        """Post what is missing from the window. While every slot is held, messages wait inside UCX."""
        receives = self._receives
        while receives.count - receives.apart < self._window and (self._free or self._slots_left):
            if not self._free:
                self._slots_left -= 1
                shape = self._slots_left, self._slot_bytes, self._device
                self._free.append(ReceiveSlot(self._ucx, *shape, self._recycle))
            slot = self._free.pop()
            receives.add(slot, slot.post(self._handle))

    def _replace_stuck_receives(self) -> None:
        """Post one more receive when a message waits although some are posted.

        Those are matched with messages whose senders died halfway: UCX never completes them.
        """
        if self._receives.count - self._receives.apart >= self._window:
            api = self._ucx.api
            if self._worker.tag_probe(api.UCXXTag(FRAME_TAG), api.UCXXTagMaskFull).matched:
                self._window += 1
                self._post_receives()

    # ---- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_fd)
        for peer in self._peers:
            peer.close()
        waiting = [request for request in self._receives.requests() if request > 0]
        for request in waiting:
            ucp.cancel(self._ucx.functions, self._handle, request)
        for _ in range(CLOSING_ROUNDS):
            waiting = [request for request in waiting if self._ucx.ended(request) == ucp.IN_PROGRESS]
            self._worker.progress()
            os.sched_yield()
        api = self._ucx.api
        if self._worker.tag_probe(api.UCXXTag(0), api.UCXXTagMask(0)).matched:
            # The worker's destructor would fetch that message, and wait for ever when its sender is dead.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._worker))
        self._worker = None
