"""What messages to other instances cost, measured when they join: the figures behind the cost table of ways.py."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from services.attention.groups import Group
from services.attention.targets import Targets
from services.attention.ways import NEAR, SOLO, Link, Node, Shape, Way, Ways, link_of
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Peer, Transport

PATIENCE_S = 0.2
"""A peer that does not answer for so long is not measured."""
SINGLES, BURST, BULKS = 4, 8, 2
BULK_ROWS = 64


class LinkMeter:
    """Measures round trips; in the compute thread, between steps.

    Args:
        pump: takes one frame or waits so many seconds for one; hands answers to ``take``.
    """

    def __init__(
        self, transport: Transport, *, mesh: int, incarnation: int, hidden: int, pump: Callable[[float], bool]
    ) -> None:
        self._transport, self._pump = transport, pump
        self._mesh, self._incarnation, self._hidden = mesh, incarnation, hidden
        self._sequence = 0
        self._missing = 0

    def measure(self, peer: Peer) -> Link | None:
        """None when the peer does not answer."""
        if self._round_trip(peer) is None:  # the first one opens the connection
            return None
        singles = [self._round_trip(peer) for _ in range(SINGLES)]
        bursts = [(BURST, self._round_trip(peer, BURST)) for _ in range(BULKS)]
        bulk = [(BULK_ROWS * self._hidden * 4, self._round_trip(peer, 1, BULK_ROWS)) for _ in range(BULKS)]
        times = [*singles, *(t for _, t in bursts), *(t for _, t in bulk)]
        if any(t is None for t in times):
            return None
        return link_of(
            [t for t in singles if t is not None],
            [(n, t) for n, t in bursts if t is not None],
            [(n, t) for n, t in bulk if t is not None],
        )

    def _round_trip(self, peer: Peer, messages: int = 1, rows: int = 0) -> float | None:
        """Seconds until the last of so many messages was answered."""
        self._sequence += 1
        self._missing = messages
        start = time.monotonic()
        for _ in range(messages):
            frame = self._transport.outgoing(0, rows, self._hidden if rows else 0, DTYPES[0])
            header = Header(FrameKind.PING, self._mesh, self._incarnation, self._sequence)
            self._transport.send([peer], header, frame)
        while self._missing:
            left = start + PATIENCE_S - time.monotonic()
            if left <= 0:
                return None
            self._pump(left)
        return time.monotonic() - start

    def take(self, incoming: Incoming) -> str:
        """An answer. Returns why it is dropped, "" when it was counted."""
        if incoming.header.sequence != self._sequence or not self._missing:
            return "late"
        self._missing -= 1
        incoming.release()
        return ""


class WayChoice:
    """The way of each step: asks the cost table, and tells it how long exchanges took."""

    def __init__(self, ways: Ways, targets: Targets, meter: LinkMeter, hidden: int, top_k: int) -> None:
        self.ways = ways
        self._targets, self._meter = targets, meter
        self._hidden, self._top_k = hidden, top_k
        self._links: dict[Peer, Link] = {}
        self._inside = NEAR
        self._shape: Shape | None = None
        self._seconds: list[float] = []
        self.way = SOLO
        """Of the step that is under way."""

    def update(self, experts: Sequence[Peer], neighbours: Sequence[Peer]) -> None:
        """These are new. Measures them where there is something to choose."""
        far = not self._targets.near(self._targets.live)
        if far or neighbours:
            found = {peer: link for peer in experts if (link := self._meter.measure(peer))}
            self._links |= found
        inside = [link for peer in neighbours if (link := self._meter.measure(peer))]
        if inside:
            self._inside = _middle(inside)
        if experts or neighbours:
            self.ways.forget()

    def choose(self, rows: int, members: int) -> Way:
        """The way of a step of so many rows of so many instances."""
        return self.ways.choose(self._shape_of(rows, members))

    def begin(self, group: Group | None, rows: int) -> None:
        """A step of so many rows of our own begins."""
        total, members = (group.total, len(group.members)) if group else (rows, 1)
        self._shape, self._seconds = self._shape_of(total, members), []
        self.way = group.way if group else self.ways.choose(self._shape)

    def exchanged(self, seconds: float) -> None:
        """An exchange of this step took so long, and nothing went wrong."""
        self._seconds.append(seconds)

    def end(self, undisturbed: bool) -> None:
        """The step is over."""
        if self._shape is not None and self._seconds and undisturbed:
            self.ways.observe(self._shape, self.way, median(self._seconds))
        self._shape = None

    def _shape_of(self, rows: int, members: int) -> Shape:
        """Of an exchange that asks all live instances."""
        nodes = []
        for mask in self._targets.nodes(self._targets.live).values():
            known = [self._links[peer] for peer in self._targets.peers(mask) if peer in self._links]
            nodes.append(Node(mask.bit_count(), _middle(known) if known else NEAR, self._targets.near(mask)))
        return Shape(rows, members, tuple(nodes), self._hidden, self._top_k, self._inside)


def _middle(links: Sequence[Link]) -> Link:
    return Link(*(median(values) for values in zip(*links, strict=True)))


def pong(transport: Transport, peer: Peer, asked: Header, mesh: int, incarnation: int) -> None:
    """Answer a PING."""
    empty = transport.outgoing(0, 0, 0, torch.float32)
    transport.send([peer], Header(FrameKind.PONG, mesh, incarnation, asked.sequence), empty)
