"""What the meta of an exchange's frames holds beside PARTS: shares of a group, routes, relays, merged replies.

Layouts only, little-endian; both sides of an exchange read and write them here. How frames travel is the transport's.
"""

from enum import IntFlag
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from shared.activation import PARTS
from shared.errors import BadFrame
from shared.scheduling.kernels import INSTANCES
from shared.transport.base import Header, body_offset

Bytes = NDArray[np.uint8]


class Flag(IntFlag):
    """Of DISPATCH and ROUTED frames, in ``Header.flags``: what their meta begins with, in this order, and more."""

    SHARE = 1
    """A Share: these are some rows of a group's exchange."""
    RELAY = 2
    """One uint64: mask of the instances that these rows are for; who gets them passes them on and merges replies."""
    PARTIAL = 4
    """Nothing in the meta. Answer with one weighted sum for each row instead of every part."""
    PREFILL = 8
    """Nothing in the meta. The step computes prompts. For the books alone: no answer depends on it."""


SUMS = 1 << 15
"""In ``Header.flags`` of a COMBINE, beside the number of segments: its rows are weighted sums, one for every row of the
exchange that its PARTS name, in ascending order."""


class Share(NamedTuple):
    """Which of the rows of a group's exchange a frame holds."""

    members: int
    first: int
    """Number of the first of them in the exchange."""
    total: int

    BYTES = 16

    @classmethod
    def read(cls, meta: Bytes) -> Self:
        """Raises BadFrame when ``meta`` holds none."""
        if len(meta) < cls.BYTES:
            raise BadFrame("no share in a frame that claims one")
        members, first, total, _ = meta[: cls.BYTES].view("<u4").tolist()
        return cls(members, first, total)

    def write(self, meta: Bytes) -> None:
        meta[: self.BYTES].view("<u4")[:] = *self, 0


MASK_BYTES = 8


def read_mask(meta: Bytes) -> int:
    """Raises BadFrame when ``meta`` holds none."""
    if len(meta) < MASK_BYTES:
        raise BadFrame("no mask in a frame that is to be passed on")
    return int(meta[:MASK_BYTES].view("<u8")[0])


def write_mask(meta: Bytes, mask: int) -> None:
    meta[:MASK_BYTES].view("<u8")[0] = mask


class Routes(NamedTuple):
    """Choices for R rows, made by the attention side."""

    tokens: NDArray[np.int32]
    """[R]: number of each row in its exchange."""
    ids: NDArray[np.int32]
    """[R, k]: chosen experts."""
    replicas: NDArray[np.int32]
    """[R, k]: the instance that computes each choice."""
    weights: NDArray[np.float32]
    """[R, k]"""

    @staticmethod
    def nbytes(rows: int, top_k: int) -> int:
        return 4 * rows * (1 + 3 * top_k)

    @classmethod
    def read(cls, meta: Bytes, rows: int, top_k: int) -> Self:
        """Views of ``meta``. Raises BadFrame when it has not the size for so many rows."""
        if len(meta) != cls.nbytes(rows, top_k):
            raise BadFrame(f"{len(meta)} bytes of routes for {rows} rows of {top_k} choices")
        words = meta.view("<i4")
        ids, replicas, weights = words[rows:].reshape(3, rows, top_k)
        return cls(words[:rows], ids, replicas, weights.view("<f4"))

    def write(self, meta: Bytes) -> None:
        rows, top_k = self.ids.shape
        words = meta.view("<i4")
        words[:rows] = self.tokens
        table = words[rows:].reshape(3, rows, top_k)
        table[0], table[1], table[2] = self.ids, self.replicas, self.weights.view("<i4")

    def of(self, mask: int) -> "Routes":
        """Those of the rows that any instance of ``mask`` needs."""
        bits = np.uint64(1) << self.replicas.astype(np.uint64)
        needed = np.flatnonzero((bits & np.uint64(mask)).any(axis=1))
        return Routes(self.tokens[needed], self.ids[needed], self.replicas[needed], self.weights[needed])


SEGMENT = np.dtype([("instance", "<u4"), ("parts", "<u4")])
"""A COMBINE whose ``Header.flags`` is n > 0 (but for SUMS) is n replies in one: its meta ends with n of these."""


def write_segments(meta: Bytes, segments: list[tuple[int, int]]) -> None:
    """segments: (bit of an instance, number of its parts), in the order of the parts."""
    meta[-len(segments) * SEGMENT.itemsize :].view(SEGMENT)[:] = segments


def read_segments(header: Header, meta: Bytes, sender: int) -> list[tuple[int, int]]:
    """(bit of an instance, number of its parts) of a COMBINE from the instance with the bit ``sender``.

    Raises BadFrame when they are not as many as the frame has rows, or has PARTS for sums, or name no instance.
    """
    if not header.flags:
        return [(sender, header.rows)]
    size = (header.flags & ~SUMS) * SEGMENT.itemsize
    if not size:
        raise BadFrame("sums without a segment that says of which parts")
    if header.rows * PARTS.itemsize + size > len(meta):
        raise BadFrame("a merged reply is too short for its segments")
    found = [(int(instance), int(parts)) for instance, parts in meta[len(meta) - size :].view(SEGMENT).tolist()]
    parts = (len(meta) - size) // PARTS.itemsize if header.flags & SUMS else header.rows
    if sum(count for _, count in found) != parts:
        raise BadFrame("the segments of a merged reply do not add up to its parts")
    if any(instance >= INSTANCES for instance, _ in found):
        raise BadFrame("a segment of a merged reply names no instance")
    return found


def longest_frame(rows: int, top_k: int, hidden: int) -> int:
    """Bytes of the largest frame of an exchange of ``rows`` rows: a merged reply with every part of every row in fp32,
    or, where rows have one expert each, all of them with their routes."""
    parts = rows * top_k
    reply = body_offset(parts * PARTS.itemsize + INSTANCES * SEGMENT.itemsize) + parts * hidden * 4
    return max(reply, body_offset(MASK_BYTES + Routes.nbytes(rows, top_k)) + rows * hidden * 4)
