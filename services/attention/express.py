"""Exchanges without the interpreter (shared/express.py), from the attention side: when that may be, and with whom."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.attention.exchange import Halt, Score
from services.attention.replies import PART_BYTES
from services.attention.targets import Targets
from shared.express import ADDED, MOST_ROWS, REFUSED, SENT_NOTHING, ask, collect, compile_asking, march
from shared.messages import Placement
from shared.transport.base import HEADER_BYTES, FrameKind, Header, Lane, Peer
from shared.transport.ucx import BUSY_SLEEP_S

PATIENCE = int(BUSY_SLEEP_S * 1e9), 50_000_000
"""Nanoseconds of a sleep, for a wakeup can be lost; and for how long nothing but replies is looked at.

Then Python looks for dead instances, deadlines and news."""


@dataclass(frozen=True)
class Addressed:
    """Everybody who is asked in the layers of a step, as compiled code wants it."""

    placement: Placement
    live: int
    peers: tuple[Peer, ...]
    frame: Tensor
    """uint8: what is sent lies here."""
    headers: dict[int, NDArray[np.uint8]]
    """By layer: all but rows and sequence are filled in."""
    addresses: NDArray[np.int64]
    """Of the headers, by the number of the layer among those with experts."""
    homes: NDArray[np.uint64]
    """[layers, experts]"""
    lines: NDArray[np.int64]
    expected: NDArray[np.int64]


@dataclass(slots=True)
class Sent:
    """A ``Handle``: an open exchange."""

    layer: int
    sequence: int
    rows: Tensor
    started: float
    waited: bool = False
    """Long enough for its replies to be Python's."""


class Marched(NamedTuple):
    """What has come of a ``march``."""

    halt: Halt
    seconds: dict[int, float]
    """Of each exchange that is done, by the number of its layer among those with experts."""


class Express:
    """One exchange at a time, with all instances alike, whose gate chooses. Belongs to the compute thread.

    ``mesh``, ``incarnation``: what frames are signed with.
    """

    def __init__(self, lane: Lane, targets: Targets, *, mesh: int, incarnation: int, hidden: int, top_k: int) -> None:
        compile_asking()
        self._lane, self._targets = lane, targets
        self._mesh, self._incarnation, self._hidden, self._top_k = mesh, incarnation, hidden, top_k
        self._to: Addressed | None = None
        self._on = False
        self.choices = np.zeros((0, 0, top_k), np.uint32)
        """[layers, T, k]: the same of all layers of the last ``march``."""
        self._room = np.zeros((MOST_ROWS, top_k), np.uint32)
        self.open: Sent | None = None
        self.chosen = self._room[:0]
        """uint32 [T, k], ascending: the experts of the rows that were added last; valid until the next exchange."""

    def begin(self, allowed: bool) -> None:
        """A step begins; ``allowed``: nothing else forbids it."""
        placement, live = self._targets.placement, self._targets.live
        self._on = allowed and placement is not None and live != 0 and not self._targets.suspects()
        if not self._on or placement is None:
            return
        peers, old = tuple(self._targets.peers(live)), self._to
        if old is None or old.placement is not placement or old.live != live or old.peers != peers:
            self._to = self._address(placement, live, peers)
            self._on = self._to is not None

    def _address(self, placement: Placement, live: int, peers: tuple[Peer, ...]) -> Addressed | None:
        """None: layers do not ask the same instances."""
        if any(self._targets.asked(layer) != live for layer in placement.moe_layers):
            return None
        frame = torch.empty(HEADER_BYTES + 4 * MOST_ROWS * self._hidden, dtype=torch.uint8)
        headers = {layer: self._header(placement, live, layer) for layer in placement.moe_layers}
        lines = np.array([self._lane.line(peer, frame) for peer in peers], np.int64)
        bits = self._targets.incarnations(live)
        expected = np.array([(i, bit.bit_length() - 1) for i, bit in bits.items()], np.uint64).view(np.int64)
        addresses = np.array([headers[layer].ctypes.data for layer in placement.moe_layers], np.int64)
        homes = np.stack([self._targets.homes[layer] for layer in placement.moe_layers])
        return Addressed(placement, live, peers, frame, headers, addresses, homes, lines, expected)

    def _header(self, placement: Placement, live: int, layer: int) -> NDArray[np.uint8]:
        written = np.zeros(HEADER_BYTES, np.uint8)
        us, version = self._incarnation, placement.version
        header = Header(FrameKind.DISPATCH, self._mesh, us, 0, 0, placement.epoch, us, version, live, layer)
        header.columns = self._hidden
        header.pack_into(written)
        return written

    def dispatch(self, layer: int, rows: Tensor, sequence: int) -> Sent | None:
        """Send rows [T, hidden]; None: they have to go another way."""
        to, lane, started = self._whom(rows), self._lane, time.monotonic()
        if to is None or lane.enter(len(to.lines)) is None:
            return None
        addresses = to.frame.data_ptr(), to.headers[layer].ctypes.data, rows.data_ptr()
        if ask(lane.functions, to.lines, *addresses, *rows.shape, sequence):
            self.open = Sent(layer, sequence, rows, started)
        return self.open

    def _whom(self, rows: Tensor) -> Addressed | None:
        """Who is to be asked now; None: these rows have to go another way."""
        to = self._to if self._on and not self.open else None
        fits = 0 < len(rows) <= MOST_ROWS and rows.dtype is torch.float32 and rows.is_contiguous()
        return to if to and fits and to.live == self._targets.live else None

    def combine(self, sent: Sent, x: Tensor) -> bool:
        """x [T, hidden] += the weighted parts of all replies. False: what has come is for Python to take."""
        lane, to, self.open = self._lane, self._to, None
        waiting = lane.enter(len(to.lines)) if to and not sent.waited and x.is_contiguous() else None
        if to is None or waiting is None:
            return False
        self.chosen = self._room[: len(x)]
        (nap, patience), now = PATIENCE, time.monotonic_ns()
        homes, times = self._targets.homes[sent.layer], (now, nap, now + patience)
        result = collect(*waiting, times, to.frame.data_ptr(), to.expected, homes, self.chosen, x.data_ptr())
        if result != ADDED:
            lane.leave()
        return result == ADDED

    def march(self, score: Score, first: int, rows: Tensor, x: Tensor, sequence: int) -> Marched | None:
        """See ``Exchange``; ``sequence``: of the first exchange. ``choices``: what rows have chosen in each layer."""
        lane, to = self._lane, self._whom(rows)
        waiting = lane.enter(len(to.lines)) if to and tuple(to.headers) == score.layers else None
        if to is None or waiting is None:
            return None
        self.choices = np.empty((len(score.layers), len(rows), self._top_k), np.uint32)
        taken = np.zeros(len(score.layers), np.int64)
        entry, result, began = march(
            *waiting, PATIENCE, score.entries, first, to.lines, to.expected, to.frame.data_ptr(), to.addresses,
            x.data_ptr(), rows.data_ptr(), self._hidden, sequence, to.homes, self.choices, taken,
        )  # fmt: skip
        if result != ADDED:
            lane.leave()
        if result == REFUSED:
            raise ValueError("a kernel of this step refused its input (an index is out of range) or had no memory")
        done = {number: seconds / 1e9 for number, seconds in enumerate(taken.tolist()) if seconds}
        if result == ADDED:
            return Marched(Halt(entry, None), done)
        if result != SENT_NOTHING:
            layer = score.layers[int(score.entries[entry, 3])]
            self.open = Sent(layer, sequence + len(done), rows, began / 1e9, waited=True)
        return Marched(Halt(entry + 1, self.open), done)

    def sent_bytes(self, rows: int) -> int:
        """Of the rows of one exchange."""
        return 4 * rows * self._hidden * len(self._to.lines if self._to else ())

    def received_bytes(self, rows: int) -> int:
        """Of the replies to one exchange."""
        parts = rows * self._top_k
        return parts * 4 * self._hidden + len(self._to.lines if self._to else ()) * parts * PART_BYTES
