"""Which expert instances an exchange may ask: connections, suspicion, and the live mask that follows from both.

Sends nothing but connects; judges instances only by what the exchange reports and by fresh heartbeats in a View.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Container, Mapping

import numpy as np
from numpy.typing import NDArray

from services.attention.exchange import ExpertInstance, View
from shared.activation import layer_homes
from shared.errors import TransportError
from shared.messages import Placement
from shared.transport.base import Peer, Transport

log = logging.getLogger(__name__)


def live_mask(present: int, suspects: list[int], homes: NDArray[np.uint64]) -> int:
    """Instances to ask: all that are present but the suspects, as far as every expert keeps a live home.

    Args:
        present: mask of the instances that are connected.
        suspects: single bits, the newest suspicion first: it is dropped first, so that two homes that fail in turn
            are tried in turn.
        homes: uint64, masks of any shape.

    Returns:
        The mask, or 0 when not even all present instances cover every expert.
    """
    if not covers(present, homes):
        return 0
    for bit in suspects:
        if covers(present & ~bit, homes):
            present &= ~bit
    return present


def covers(mask: int, homes: NDArray[np.uint64]) -> bool:
    """True when every mask in ``homes`` has a bit in ``mask``."""
    return bool(np.all(homes & np.uint64(mask)))


def _shares_our_core(instance: ExpertInstance) -> bool:
    """True: to be told last, for it may begin at once, on the core of the thread that has others to tell."""
    return not instance.cores.isdisjoint(os.sched_getaffinity(0))


class Targets:
    """Connected expert instances, as bits of the current placement."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._view = View()
        self._peers: dict[int, Peer] = {}  # by incarnation
        self._suspected: dict[int, float] = {}  # incarnation -> monotonic time
        self._lost: dict[int, float] = {}  # those that no frame can reach: incarnation -> monotonic time
        self._bits: dict[int, int] = {}  # incarnation -> bit in the placement
        self._nodes: dict[int, str] = {}  # by incarnation
        self._masks: dict[int, int] = {}  # layer -> instances with any home there
        self._table = np.zeros(0, np.uint64)  # homes of all layers
        self.placement: Placement | None = None
        self.homes: dict[int, NDArray[np.uint64]] = {}
        self.live = 0
        """Mask of the instances that take part in new attempts; 0 while some expert has no home."""
        self.failures: Counter[str] = Counter()
        """Addresses that could not be connected, by instance id."""

    def update(self, view: View) -> list[Peer]:
        """Connect newcomers, forget who left, take the placement; in the thread that sends. Returns the new peers."""
        if view is self._view:
            return []
        wanted = {instance.incarnation: instance for instance in view.instances.values()}
        heard_again = {i for i, since in self._lost.items() if i in wanted and wanted[i].last_seen > since}
        for incarnation in (self._peers.keys() - wanted.keys()) | heard_again:
            self._transport.disconnect(self._peers.pop(incarnation))
        self._lost = {i: since for i, since in self._lost.items() if i in self._peers}
        new = [self._connect(i) for i in wanted.values() if i.incarnation not in self._peers]
        self._suspected = {
            i: since for i, since in self._suspected.items() if i in self._peers and wanted[i].last_seen <= since
        }
        if view.placement is not self._view.placement:
            self._adopt(view.placement)
        self._view = view
        self._bits = self._place(view.instances)
        self._nodes = {instance.incarnation: instance.node for instance in view.instances.values()}
        self._refresh()
        return [peer for peer in new if peer is not None]

    def ready(self) -> bool:
        """True when every expert has a home that is connected and not suspected."""
        trusted = sum(bit for i, bit in self._bits.items() if i not in self._suspected and i not in self._lost)
        return self._table.size > 0 and covers(trusted, self._table)

    def asked(self, layer: int, live: int | None = None) -> int:
        """Mask of the live instances that have any home in ``layer``; 0 when they do not cover its experts.

        live: what takes part, when another instance has decided it.
        """
        return (self.live if live is None else live) & self._masks.get(layer, 0)

    def bit(self, incarnation: int) -> int:
        """The bit of an instance, 0 when it is unknown or not in the placement."""
        return self._bits.get(incarnation, 0)

    def incarnations(self, mask: int) -> dict[int, int]:
        """Those of a mask, in the order of ``peers``, with their bits."""
        return {i: bit for i, bit in self._bits.items() if bit & mask}

    def peers(self, mask: int) -> list[Peer]:
        return [self._peers[i] for i, bit in self._bits.items() if bit & mask]

    def nodes(self, mask: int) -> dict[str, int]:
        """Masks of the instances of ``mask`` by node, in a fixed order."""
        found: dict[str, int] = {}
        for incarnation, bit in self._bits.items():
            if bit & mask:
                node = self._nodes.get(incarnation, "")
                found[node] = found.get(node, 0) | bit
        return found

    def near(self, mask: int) -> bool:
        """True when all instances of ``mask`` are on this node."""
        return all(self._nodes.get(i, "") == self._view.node for i, bit in self._bits.items() if bit & mask)

    def names(self, mask: int) -> list[str]:
        """Instance ids of a mask; ids that are in the placement but not connected are named too."""
        ids = self.placement.instances if self.placement else ()
        return [name for index, name in enumerate(ids) if mask >> index & 1]

    def absent(self) -> list[str]:
        """Ids of the placement's instances that are not connected."""
        ids = self.placement.instances if self.placement else ()
        return self.names(((1 << len(ids)) - 1) & ~self._present())

    def suspects(self) -> int:
        """Mask of the suspected instances."""
        return sum(self._bits.get(i, 0) for i in self._suspected)

    def unreachable(self, mask: int, members: Container[int] | None) -> int:
        """Those of ``mask`` that are not lost yet, but whose connection broke or that are not in ``members`` any more.

        Args:
            members: incarnations that the control plane knows now; None: it has not said.
        """
        gone = (i for i in self._bits if not self._peers[i].alive or (members is not None and i not in members))
        return sum(self._bits[i] & mask for i in gone if i not in self._lost)

    def lose(self, mask: int) -> None:
        """No answer can come from them: never asked again, unless a heartbeat shows that they live."""
        now = time.monotonic()
        self._lost |= {i: now for i, bit in self._bits.items() if bit & mask}
        self.suspect(mask)

    def suspect(self, mask: int) -> None:
        """They did not answer in time: left out of the live mask where that is possible."""
        now = time.monotonic()
        self._suspected |= {i: now for i, bit in self._bits.items() if bit & mask}
        self._refresh()

    def trust(self, incarnation: int) -> None:
        """It answered: no suspect any more."""
        if self._suspected.pop(incarnation, None) is not None:
            self._refresh()

    def _connect(self, instance: ExpertInstance) -> Peer | None:
        try:
            peer = self._transport.connect(instance.address)
        except TransportError as error:
            self.failures[instance.id] += 1
            log.warning("cannot connect to expert instance %s: %s", instance.id, error)
            return None
        self._peers[instance.incarnation] = peer
        return peer

    def _adopt(self, placement: Placement | None) -> None:
        try:
            self.homes = layer_homes(placement) if placement else {}
        except ValueError as error:
            log.error("keeping the last placement: %s", error)
            return
        self.placement = placement
        self._masks = {layer: int(np.bitwise_or.reduce(homes)) for layer, homes in self.homes.items()}
        self._table = np.concatenate(list(self.homes.values())) if self.homes else np.zeros(0, np.uint64)

    def _place(self, instances: Mapping[str, ExpertInstance]) -> dict[int, int]:
        ids = self.placement.instances if self.placement else ()
        found = ((index, instances.get(name)) for index, name in enumerate(ids))
        bits = {i: 1 << index for index, i in found if i and i.incarnation in self._peers}
        return {i.incarnation: bits[i] for i in sorted(bits, key=_shares_our_core)}

    def _present(self) -> int:
        return sum(bit for i, bit in self._bits.items() if i not in self._lost)

    def _refresh(self) -> None:
        newest_first = sorted(self._suspected, key=lambda i: -self._suspected[i])
        suspects = [self._bits[i] for i in newest_first if i in self._bits]
        self.live = live_mask(self._present(), suspects, self._table)
