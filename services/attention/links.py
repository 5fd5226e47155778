"""What messages to other instances cost, measured when they join: the figures behind the cost table of ways.py."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median

import torch

from services.attention.groups import Group, Observed
from services.attention.targets import Targets
from services.attention.ways import APART, NEAR, SOLO, Link, Node, Shape, Way, Ways, link_of
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Peer, Transport

FIRST_S, PATIENCE_S = 0.05, 0.2
"""A peer that does not answer the first ping, or another one, for so long is not measured."""
SINGLES, BURST, BULKS = 4, 8, 2
BULK_ROWS = 64
MOST_TRIES = 5
"""How often a peer is measured that does not answer: one that has just joined may know us later than we know it."""


class LinkMeter:
    """Measures round trips; in the compute thread, between steps.

    Args:
        max_rows: of a frame.
        pump: takes one frame or waits so many seconds for one; hands answers to ``take``.
    """

    def __init__(
        self, transport: Transport, *, mesh: int, incarnation: int, hidden: int, max_rows: int,
        pump: Callable[[float], bool],
    ) -> None:  # fmt: skip
        self._transport, self._pump = transport, pump
        self._mesh, self._incarnation, self._hidden = mesh, incarnation, hidden
        self._bulk_rows = min(BULK_ROWS, max_rows)
        self._sequence = 0
        self._missing = 0

    def measure(self, peer: Peer) -> Link | None:
        """None when the peer does not answer."""
        if self._round_trip(peer, patience=FIRST_S) is None:  # it opens the connection
            return None
        singles = [self._round_trip(peer) for _ in range(SINGLES)]
        bursts = [(BURST, self._round_trip(peer, BURST)) for _ in range(BULKS)]
        rows = self._bulk_rows
        bulk = [(rows * self._hidden * 4, self._round_trip(peer, 1, rows)) for _ in range(BULKS)]
        times = [*singles, *(t for _, t in bursts), *(t for _, t in bulk)]
        if any(t is None for t in times):
            return None
        return link_of(
            [t for t in singles if t is not None],
            [(n, t) for n, t in bursts if t is not None],
            [(n, t) for n, t in bulk if t is not None],
        )

    def _round_trip(self, peer: Peer, messages: int = 1, rows: int = 0, patience: float = PATIENCE_S) -> float | None:
        """Seconds until the last of so many messages was answered."""
        self._sequence += 1
        self._missing = messages
        start = time.monotonic()
        for _ in range(messages):
            frame = self._transport.outgoing(0, rows, self._hidden if rows else 0, DTYPES[0])
            header = Header(FrameKind.PING, self._mesh, self._incarnation, self._sequence)
            self._transport.send([peer], header, frame)
        while self._missing:
            left = start + patience - time.monotonic()
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
        self._tries: Counter[Peer] = Counter()
        self._silent: set[Peer] = set()
        """Neighbours that did not answer yet."""
        self._grouped = False
        """Whether there have ever been any."""
        self._inside = NEAR
        self._nodes: dict[int, tuple[Node, ...]] = {}
        """By live mask, until the next update."""
        self._shape: Shape | None = None
        self._seconds: list[float] = []
        self._told: dict[Shape, list[float]] = {}
        """What members' exchanges of their own have taken, until all of them have told."""
        self.way = SOLO
        """Of the step that is under way."""

    def update(self, neighbours: Sequence[Peer]) -> None:
        """The targets may have changed, and these of our node are new. Measures where there is something to choose."""
        self._nodes.clear()
        self._silent |= set(neighbours)
        self._grouped = self._grouped or bool(neighbours)
        inside = self._measure(self._silent)
        self._silent = {peer for peer in self._silent - inside.keys() if peer.alive and self._tries[peer] < MOST_TRIES}
        if inside:
            self._inside = _middle(list(inside.values()))
        found = self._measure_experts() if self._grouped or not self._targets.near(self._targets.live) else {}
        if inside or found:
            self.ways.forget()

    def use(self, ways: Ways) -> None:
        """Another cost table from the next step on."""
        self.ways = ways

    def _measure_experts(self) -> dict[Peer, Link]:
        """Those that have not been measured: they may have been here before there was a placement."""
        connected = {*self._targets.peers(-1)}
        self._links = {peer: link for peer, link in self._links.items() if peer in connected}
        self._tries = Counter({peer: n for peer, n in self._tries.items() if peer in connected | self._silent})
        found = self._measure(peer for peer in self._targets.peers(self._targets.live) if peer not in self._links)
        self._links |= found
        return found

    def _measure(self, peers: Iterable[Peer]) -> dict[Peer, Link]:
        """Those that answer."""
        asked = [peer for peer in peers if self._tries[peer] < MOST_TRIES]
        self._tries.update(asked)
        return {peer: link for peer in asked if (link := self._meter.measure(peer))}

    def choose(self, rows: int, members: int) -> Way:
        """The way of a step of so many rows of so many instances."""
        return self.ways.choose(self._shape_of(rows, members))

    def begin(self, group: Group | None, rows: int) -> None:
        """A step of so many rows of our own begins."""
        total, members = (group.total, len(group.members)) if group else (rows, 1)
        self._shape, self._seconds = self._shape_of(total, members), []
        self.way = group.way if group else self.ways.choose(self._shape)

    def exchanged(self, seconds: float) -> None:
        """An exchange of this step took so long."""
        self._seconds.append(seconds)

    def end(self, undisturbed: bool) -> Observed | None:
        """The step is over. Repeats count: their exchanges are few, and the median would not show them."""
        shape, self._shape = self._shape, None
        if shape is None or not self._seconds:
            return None
        seconds = (median if undisturbed else fmean)(self._seconds)
        self._observe(shape, self.way, seconds)
        return Observed(shape.rows, shape.members, self.way, seconds)

    def learn(self, observed: Observed) -> None:
        """A group that met here went without us, or a member's exchanges were its own."""
        self._observe(self._shape_of(observed.rows, observed.members), observed.way, observed.seconds)

    def _observe(self, shape: Shape, way: Way, seconds: float) -> None:
        """Where exchanges are the members' own, the slowest of them is what a step waits for."""
        if way == APART and shape.members > 1:
            told = self._told.setdefault(shape, [])
            told.append(seconds)
            if len(told) < shape.members:
                return
            seconds = max(self._told.pop(shape))
        self.ways.observe(shape, way, seconds)

    def _shape_of(self, rows: int, members: int) -> Shape:
        """Of an exchange that asks all live instances."""
        live = self._targets.live
        nodes = self._nodes.get(live)
        if nodes is None:
            nodes = self._nodes[live] = tuple(self._node(mask) for mask in self._targets.nodes(live).values())
        return Shape(rows, members, nodes, self._hidden, self._top_k, self._inside)

    def _node(self, mask: int) -> Node:
        known = [self._links[peer] for peer in self._targets.peers(mask) if peer in self._links]
        return Node(mask.bit_count(), _middle(known) if known else NEAR, self._targets.near(mask))


def _middle(links: Sequence[Link]) -> Link:
    return Link(*(median(values) for values in zip(*links, strict=True)))


def pong(transport: Transport, peer: Peer, asked: Header, mesh: int, incarnation: int) -> None:
    """Answer a PING."""
    empty = transport.outgoing(0, 0, 0, torch.float32)
    transport.send([peer], Header(FrameKind.PONG, mesh, incarnation, asked.sequence), empty)
