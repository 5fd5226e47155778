"""Exchanges without the interpreter (shared/express.py), from the experts' side: which frames are answered so."""

import time
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import numpy as np
import torch

from services.experts.answers import KnownPlacement, ServerLimits, ServerStats
from shared.activation import PARTS
from shared.express import ANSWERS, BUSY_NS, BYTES_IN, BYTES_OUT, MOST_ROWS, PARTS_MADE, compile_serving, serve
from shared.models.moe import ExpertLayer
from shared.transport.base import Header, Lane, Peer, body_offset
from shared.transport.ucx import BUSY_SLEEP_S

TURN_S = 0.05
"""For so long frames are answered before anything else is looked at."""
RECORDED = 9
"""Numbers of ``Answer.recorded``."""


class Express:
    """Knows frames that were answered the ordinary way once, and answers others like them. For the compute thread.

    Args:
        stats: counted there.
        mesh, incarnation: what frames are signed with.
    """

    def __init__(
        self, lane: Lane, layers: Mapping[int, ExpertLayer], limits: ServerLimits, stats: ServerStats, *,
        mesh: int, incarnation: int,
    ) -> None:  # fmt: skip
        compile_serving()
        self._lane, self._layers, self._limits, self._stats = lane, layers, limits, stats
        self._mesh, self._incarnation = mesh, incarnation
        self._order = sorted(layers)
        self._numbers = np.full(max(layers) + 1, -1, np.int64)
        self._numbers[self._order] = np.arange(len(layers))
        self._tally = np.zeros(5, np.int64)
        self._lines: WeakKeyDictionary[Peer, tuple[int, int, int]] = WeakKeyDictionary()
        """Endpoint, requests and the room that all replies to a peer are sent from: as long as the peer is."""
        self.news = True
        """Something has come that is not for us: a frame, or a wake."""
        self.forget()

    def forget(self) -> None:
        """Placements or senders are not what they were."""
        self._known: KnownPlacement | None = None
        self._kept: dict[tuple[int, int], object] = {}
        self._senders = np.zeros((0, 4), np.int64)
        self._recorded = np.zeros((len(self._layers), MOST_ROWS + 1, RECORDED), np.int64)

    def learn(self, peer: Peer, header: Header, placement: KnownPlacement) -> None:
        """A plain frame of this peer was answered with this placement: more of its kind may come."""
        rows = torch.empty(header.rows, self._limits.hidden)
        answering = self._layers[header.layer].answering(rows) if header.rows <= MOST_ROWS else None
        late = self._known is not None and placement.version < self._known.version
        if answering is None or late:
            return
        if placement is not self._known:
            self.forget()
            self._adopt(placement)
        self._kept[header.layer, header.rows] = answering
        self._recorded[self._numbers[header.layer], header.rows] = answering.recorded
        self._meet(peer, header.sender)

    def settle(self) -> None:
        """Take notice of wakes: for who looks right afterwards at what they are about."""
        self._lane.settle()

    def serve(self) -> int:
        """Answer what comes for a moment; returns how many frames. Afterwards ``news`` says whether there is more."""
        waiting, lane = self._lane.enter() if len(self._senders) else None, self._lane
        self.news = waiting is None
        if waiting is None:
            return 0
        now = time.monotonic_ns()
        strange = serve(
            *waiting, (now, int(BUSY_SLEEP_S * 1e9), now + int(TURN_S * 1e9)), self._facts, self._senders,
            self._numbers, self._recorded, self._homes, self._stats.by_expert, self._tally,
        )  # fmt: skip
        answered = self._count()
        if strange or not answered:
            lane.leave()
        self.news = strange or lane.woken
        return answered

    def _count(self) -> int:
        """How many were answered."""
        tally, stats = self._tally.tolist(), self._stats
        self._tally[:] = 0
        stats.frames["dispatch"] += tally[ANSWERS]
        stats.answers += tally[ANSWERS]
        stats.express += tally[ANSWERS]
        stats.parts += tally[PARTS_MADE]
        stats.bytes_received += tally[BYTES_IN]
        stats.bytes_sent += tally[BYTES_OUT]
        stats.busy_s += tally[BUSY_NS] / 1e9
        return tally[ANSWERS]

    def _adopt(self, placement: KnownPlacement) -> None:
        limits, instance, code = self._limits, placement.instance, placement.policy.code
        ours = np.array([self._mesh, self._incarnation, placement.version], np.uint64).view(np.int64)
        self._facts = np.array([*ours, instance, code, limits.hidden, limits.top_k], np.int64)
        none = np.zeros(limits.experts, np.uint64)
        self._homes = np.stack([placement.homes.get(layer, none) for layer in self._order])
        self._known = placement

    def _meet(self, peer: Peer, sender: int) -> None:
        number = np.uint64(sender).astype(np.int64)
        if number in self._senders[:, 0]:
            return
        if peer not in self._lines:
            most = MOST_ROWS * self._limits.top_k
            room = torch.empty(body_offset(most * PARTS.itemsize) + 4 * most * self._limits.hidden, dtype=torch.uint8)
            self._lines[peer] = *self._lane.line(peer, room), room.data_ptr()
        self._senders = np.vstack([self._senders, np.array([(number, *self._lines[peer])], np.int64)])
