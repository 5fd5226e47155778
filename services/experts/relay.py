"""Two-phase exchanges, case 2: one instance per node gets the rows, passes them on inside and merges the replies.

The relay asks the others as an attention instance would. A refusal of one of them is the relay's own; a reply that does
not come is not waited for here: the sender's deadline passes. Its repeat goes to every instance directly.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from services.experts.sums import Room, frame_of_sums
from shared.activation import PARTS
from shared.errors import TransportError
from shared.exchange_frames import MASK_BYTES, SEGMENT, SUMS, Flag, write_segments
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Outgoing, Peer, Refusal, Transport

MOST_OPEN = 32
MICRO_BATCHES = 2
"""Most exchanges that one sender has open at a time."""


class Neighbour(NamedTuple):
    """Another expert instance of this node."""

    incarnation: int
    address: bytes


@dataclass
class Relayed:
    """One exchange that was passed on: what is merged so far, and who is missing."""

    number: int
    asked: Header
    peer: Peer
    """Who asked."""
    frame: Outgoing | Room
    """What will be sent; or, if sums of it will be, room for the parts."""
    missing: dict[int, int]
    """Incarnation -> bit."""
    parts: int = 0
    digest: int | None = None
    segments: list[tuple[int, int]] = field(default_factory=list)


class Relay:
    """Belongs to the compute thread. ``mesh``, ``incarnation``: what its frames are signed with."""

    def __init__(self, transport: Transport, mesh: int, incarnation: int) -> None:
        self._transport = transport
        self._mesh, self._incarnation = mesh, incarnation
        self._peers: dict[str, tuple[Neighbour, Peer]] = {}
        self._open: OrderedDict[int, Relayed] = OrderedDict()
        self._sequence = 0

    def meet(self, neighbours: Mapping[str, Neighbour]) -> None:
        """These are the other expert instances of the node now, by id; an address that cannot be used is left out."""
        for name in [n for n, (known, _) in self._peers.items() if neighbours.get(n) != known]:
            self._transport.disconnect(self._peers.pop(name)[1])
        for name, neighbour in neighbours.items():
            if name not in self._peers:
                try:
                    self._peers[name] = neighbour, self._transport.connect(neighbour.address)
                except TransportError:
                    continue
                self._hello([self._peers[name][1]])

    def knows(self, names: Iterable[str]) -> bool:
        return all(name in self._peers for name in names)

    def forward(self, incoming: Incoming, others: Mapping[str, int], room: tuple[int, int], peer: Peer) -> Relayed:
        """Pass a frame on to ``others`` (id -> bit), whom ``knows`` must know.

        Args:
            room: most parts of the merged reply, and columns of its rows.
            peer: who gets it.
        """
        self._sequence += 1
        header, meta = incoming.header, incoming.meta[MASK_BYTES:]
        self._forget_old(header)
        frame = self._transport.outgoing(len(meta), header.rows, header.columns, DTYPES[header.dtype])
        frame.meta[:] = meta
        frame.rows.copy_(incoming.rows)
        flags = header.flags & ~(Flag.RELAY | Flag.PARTIAL)  # all parts come here; how they leave is decided at the end
        asked = replace(header, sender=self._incarnation, sequence=self._sequence, attempt=0, flags=flags)
        self._transport.send([self._peers[name][1] for name in others], asked, frame)
        most, columns = room
        spare = (1 + len(others)) * SEGMENT.itemsize
        if header.flags & Flag.PARTIAL:
            merged = Room(most, columns, incoming.rows.device)
        else:
            merged = self._transport.outgoing(most * PARTS.itemsize + spare, most, columns, torch.float32)
        missing = {self._peers[name][0].incarnation: bit for name, bit in others.items()}
        relayed = self._open[self._sequence] = Relayed(self._sequence, header, peer, merged, missing)
        return relayed

    def drop(self, relayed: Relayed) -> None:
        """There will be no reply to it."""
        self._open.pop(relayed.number, None)

    def forget(self, sender: int) -> None:
        """Who asked is gone."""
        for number in [number for number, relayed in self._open.items() if relayed.asked.sender == sender]:
            del self._open[number]

    def add_own(self, relayed: Relayed, bit: int, parts: int, digest: int) -> None:
        """What this instance has computed; its parts lie at the beginning of ``relayed.frame`` already."""
        relayed.segments.append((bit, parts))
        relayed.parts, relayed.digest = parts, digest
        self._finish(relayed)

    def take(self, incoming: Incoming) -> str:
        """A neighbour's reply. Returns why it is of no use, "" when it was taken."""
        header = incoming.header
        relayed = self._open.get(header.sequence)
        bit = relayed.missing.pop(header.sender, None) if relayed else None
        if relayed is None or bit is None:
            return "late"
        end = relayed.parts + header.rows
        odd = header.kind != FrameKind.COMBINE or header.digest != relayed.digest or bool(header.flags)
        room = end <= len(relayed.frame.rows) and header.columns == relayed.frame.rows.shape[1]
        if odd or not room or header.meta_bytes < header.rows * PARTS.itemsize:
            del self._open[header.sequence]
            self._refuse(relayed)
            return "not merged"
        rows, parts = slice(relayed.parts, end), slice(relayed.parts * PARTS.itemsize, end * PARTS.itemsize)
        relayed.frame.rows[rows] = incoming.rows
        relayed.frame.meta[parts] = incoming.meta[: header.rows * PARTS.itemsize]
        relayed.segments.append((bit, header.rows))
        relayed.parts = end
        self._finish(relayed)
        return ""

    def _finish(self, relayed: Relayed) -> None:
        """Send the merged reply when nobody is missing."""
        if relayed.missing or relayed.digest is None:
            return
        self._open.pop(relayed.number, None)
        header, frame = self._reply(FrameKind.COMBINE, relayed.asked), relayed.frame
        header.flags, header.digest = len(relayed.segments), relayed.digest
        if isinstance(frame, Room):
            header.flags |= SUMS
            parts, rows = frame.parts(relayed.parts), frame.rows[: relayed.parts]
            frame = frame_of_sums(self._transport, parts, rows, relayed.segments)
        else:
            write_segments(frame.meta, relayed.segments)
            frame.keep(relayed.parts)
        self._transport.send([relayed.peer], header, frame)

    def _refuse(self, relayed: Relayed) -> None:
        """Whoever asked had better ask again, each instance directly."""
        meta = bytes([Refusal.NO_RELAY]) + b"an instance of this node did not answer as it should"
        frame = self._transport.outgoing(len(meta), 0, 0, DTYPES[0])
        frame.meta[:] = memoryview(meta)
        self._transport.send([relayed.peer], self._reply(FrameKind.REFUSAL, relayed.asked), frame)

    def _reply(self, kind: FrameKind, asked: Header) -> Header:
        return Header(
            kind, self._mesh, self._incarnation, asked.sequence, asked.attempt, asked.epoch, asked.group,
            asked.placement, asked.live, asked.layer, trace_id=asked.trace_id, span_id=asked.span_id,
        )  # fmt: skip

    def _forget_old(self, header: Header) -> None:
        """Make room for an exchange: its sender has given up all but the last ones before it.

        Who did not answer may have forgotten where to: tell them.
        """
        old = [
            number for number, relayed in self._open.items()
            if relayed.asked.sender == header.sender and abs(header.sequence - relayed.asked.sequence) >= MICRO_BATCHES
        ]  # fmt: skip
        if not old and len(self._open) >= MOST_OPEN:
            old = [next(iter(self._open))]
        for number in old:
            relayed = self._open.pop(number)
            self._hello([peer for known, peer in self._peers.values() if known.incarnation in relayed.missing])

    def _hello(self, peers: list[Peer]) -> None:
        address = self._transport.address
        frame = self._transport.outgoing(len(address), 0, 0, DTYPES[0])
        frame.meta[:] = np.frombuffer(address, np.uint8)
        self._transport.send(peers, Header(FrameKind.HELLO, self._mesh, self._incarnation, 0), frame)
