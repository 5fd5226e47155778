"""The data plane's seam: frames, and what every transport promises.

A frame is a fixed binary header, a few host bytes of ``meta`` and a matrix of ``rows``. A transport moves frames and
knows nothing of layers. It is driven by the thread that computes: only ``wake`` may be called from another thread.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import BadFrame

MAGIC = b"MOEX"
WIRE_VERSION = 3
HEADER_BYTES = 128


class FrameKind(IntEnum):
    HELLO = 1
    """to experts: meta holds the sender's worker address; sent before the first dispatch and every repeat."""
    DISPATCH = 2
    """attention -> experts: rows [tokens, hidden], normed hidden states of one micro-batch at one layer, to be gated
    there. To a group's leader: a member's rows."""
    COMBINE = 3
    """experts -> attention: rows [parts, hidden] fp32; meta begins with as many PARTS (shared/activation.py)."""
    REFUSAL = 4
    """experts -> attention: meta holds a Refusal code (one byte) and a UTF-8 message."""
    ROUTED = 5
    """attention -> experts: those rows that are needed there, and the routes of each (shared/exchange_frames.py)."""
    SUM = 6
    """leader -> member: rows [tokens, hidden] fp32, the experts' sum for each of its rows."""
    JOIN = 7
    """attention -> attention of its node: a step of so many rows is about to begin (services/attention/groups.py)."""
    GROUP = 8
    """The answer: who runs the step together, and how."""
    LEAVE = 9
    """member -> members: go on alone."""
    PING = 10
    """To measure a link; meta and rows of any size."""
    PONG = 11
    """The answer, empty."""


class Refusal(IntEnum):
    UNKNOWN_PLACEMENT = 1
    """This version is not loaded here (yet): repeat."""
    NO_HOME = 2
    """The live mask leaves a chosen expert without a home."""
    BAD_REQUEST = 3
    """The frame is well-formed but wrong for this model."""
    NO_RELAY = 4
    """It cannot be passed on to all instances of this node: ask each of them."""
    NOT_STARTED = 5
    """An expert that was chosen cannot be started here."""


DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
"""Row dtypes on the wire; a header carries the index."""


HEADER = np.dtype(
    [("magic", "<u4"), ("version", "<u2"), ("kind", "<u2"), ("mesh", "<u8"), ("sender", "<u8"), ("sequence", "<u8"),
     ("attempt", "<u4"), ("layer", "<u4"), ("epoch", "<u8"), ("group", "<u8"), ("placement", "<u8"), ("live", "<u8"),
     ("rows", "<u4"), ("columns", "<u4"), ("flags", "<u4"), ("dtype", "<u2"), ("", "<u2"), ("meta_bytes", "<u4"),
     ("sent", "<u4"), ("digest", "<u8"), ("trace", "<u8", 3)]
)  # fmt: skip
"""A header as compiled code reads it; ``trace``: trace_id and span_id."""


@dataclass(slots=True)
class Header:
    """Everything a receiver needs to judge a frame before it looks at the rows. 128 bytes, little-endian."""

    kind: int
    mesh: int
    """64-bit hash of mesh name and model digest: frames of another mesh or model are dropped and counted."""
    sender: int
    """Incarnation of the sending process."""
    sequence: int
    """Number of the exchange, rising per attention incarnation; a repeat keeps it."""
    attempt: int = 0
    epoch: int = 0
    group: int = 0
    """Group whose rows these are; the attention incarnation itself where no other instance's rows belong to them."""
    placement: int = 0
    live: int = 0
    """Bit i set: placement.instances[i] takes part in this attempt."""
    layer: int = 0
    """Checkpoint index of the layer."""
    rows: int = 0
    columns: int = 0
    dtype: int = 0
    flags: int = 0
    meta_bytes: int = 0
    digest: int = 0
    """COMBINE: digest of top-k ids and replica choice of the whole exchange."""
    trace_id: bytes = bytes(16)
    span_id: bytes = bytes(8)
    sent: int = 0
    """When it was sent, by a paced transport: microseconds of the host's monotonic clock modulo 2**32; 0: not told."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<4sHHQQQIIQQQQIIIHHIIQ16s8s")

    def pack_into(self, buffer: np.ndarray) -> None:
        """Write the header to the first HEADER_BYTES of ``buffer`` (uint8)."""
        self.LAYOUT.pack_into(
            buffer.data, 0, MAGIC, WIRE_VERSION, self.kind, self.mesh, self.sender, self.sequence, self.attempt,
            self.layer, self.epoch, self.group, self.placement, self.live, self.rows, self.columns, self.flags,
            self.dtype, 0, self.meta_bytes, self.sent, self.digest, self.trace_id, self.span_id,
        )  # fmt: skip

    @classmethod
    def unpack_from(cls, buffer: np.ndarray) -> Self:
        """Read a header. Raises BadFrame when the buffer is short or not ours."""
        if len(buffer) < HEADER_BYTES:
            raise BadFrame(f"frame of {len(buffer)} bytes is shorter than its header")
        (
            magic, version, kind, mesh, sender, sequence, attempt, layer, epoch, group, placement, live, rows, columns,
            flags, dtype, _, meta_bytes, sent, digest, trace_id, span_id,
        ) = cls.LAYOUT.unpack_from(buffer.data)  # fmt: skip
        if magic != MAGIC or version != WIRE_VERSION:
            raise BadFrame(f"magic {magic!r} version {version}: expected {MAGIC!r} version {WIRE_VERSION}")
        if dtype >= len(DTYPES):
            raise BadFrame(f"unknown row dtype code {dtype}")
        return cls(
            kind, mesh, sender, sequence, attempt, epoch, group, placement, live, layer, rows, columns, dtype, flags,
            meta_bytes, digest, trace_id, span_id, sent,
        )  # fmt: skip

    @property
    def row_bytes(self) -> int:
        return self.rows * self.columns * DTYPES[self.dtype].itemsize

    @property
    def frame_bytes(self) -> int:
        """Size of the whole frame when it travels as one message."""
        return body_offset(self.meta_bytes) + self.row_bytes


def body_offset(meta_bytes: int) -> int:
    """Offset of the rows in a one-message frame: header and meta, rounded up to 64 bytes."""
    return (HEADER_BYTES + meta_bytes + 63) // 64 * 64


class Peer(Protocol):
    """Where frames can be sent; made by ``Transport.connect``."""

    @property
    def alive(self) -> bool:
        """False once the transport knows that the peer is gone. True promises nothing."""
        ...


class Outgoing(Protocol):
    """A reused send buffer. Fill ``meta`` and ``rows``, then ``Transport.send`` it once (to one or many peers)."""

    meta: np.ndarray
    """uint8 [meta_bytes], host memory."""
    rows: torch.Tensor
    """[rows, columns] on the transport's device."""

    def keep(self, rows: int) -> None:
        """Send only the first ``rows`` rows, and all of ``meta``."""
        ...


class Incoming(Protocol):
    """A received frame; its memory is valid until ``release``."""

    header: Header
    meta: np.ndarray
    """uint8 [header.meta_bytes], host memory."""
    meta_address: int
    """Of ``meta``."""
    rows: torch.Tensor
    """[header.rows, header.columns] of DTYPES[header.dtype] on the transport's device."""

    def release(self) -> None:
        """Give the memory back for another receive; idempotent."""
        ...


Waiting = tuple[NDArray[np.int64], int, NDArray[np.int64], NDArray[np.int64], int, int, NDArray[np.int64]]
"""What compiled code takes that receives: functions, worker, files, the table of receives, how many they are, bytes of
each, and woken; see shared/transport/ucp.py."""


class Lane(Protocol):
    """A transport as compiled code uses it (shared/express.py). For the thread of the transport, between receives."""

    functions: NDArray[np.int64]
    """As in ``Waiting``."""

    @property
    def woken(self) -> bool:
        """There was a ``wake`` of which nobody has taken notice."""
        ...

    def enter(self, together: int = 1) -> Waiting | None:
        """To wait for ``together`` frames at once. None: ``receive`` has frames to deliver first, or to send."""
        ...

    def leave(self) -> None:
        """Compiled code did not get what it waited for: frames that it did not take are for ``receive``."""
        ...

    def settle(self) -> None:
        """Take notice of a ``wake``."""
        ...

    def line(self, peer: "Peer", kept: object) -> tuple[int, int]:
        """Endpoint of a peer, and address of its requests. ``kept``: what will be sent from lives until it is sent."""
        ...


class Transport(Protocol):
    """Moves frames between processes. At most once, in order per peer unless faults are injected, no acknowledgement.

    All methods but ``wake`` belong to one thread. No method raises because a peer died: deadlines above decide.
    """

    address: bytes
    """Opaque; what a peer passes to ``connect``."""
    dropped: dict[str, int]
    """Frames thrown away, by reason (``malformed``, ``too_long``)."""
    lane: Lane | None
    """None: frames pass through here only."""

    def connect(self, address: bytes) -> Peer:
        """Raises TransportError when the address is not usable from here."""
        ...

    def disconnect(self, peer: Peer) -> None:
        """Forget a peer; buffers of unfinished sends stay quarantined until UCX lets go of them."""
        ...

    def outgoing(self, meta_bytes: int, rows: int, columns: int, dtype: torch.dtype) -> Outgoing:
        """A free send buffer of that shape; memory is reused once earlier sends have completed."""
        ...

    def send(self, peers: Sequence[Peer], header: Header, frame: Outgoing) -> None:
        """Start sending one frame to every peer. Fills rows, columns, dtype and meta_bytes of ``header``."""
        ...

    def receive(self, timeout: float, busy: bool = True, together: int = 1) -> Incoming | None:
        """The next frame, or None after ``timeout`` seconds or a ``wake``.

        ``together``: the caller needs so many; it may be left asleep until they are there or the time is over.

        Spins briefly, then sleeps on the transport's descriptor; while ``busy`` (a request is open somewhere) single
        sleeps are bounded to about 5 ms because a wakeup can be lost, when idle they back off to half a second.
        """
        ...

    def wake(self) -> None:
        """Make a sleeping ``receive`` return early. Thread-safe."""
        ...

    def close(self) -> None:
        """Release everything; idempotent."""
        ...
