"""What an exchange sends to expert instances, whichever way it goes: all rows or routed ones, directly or by relays.

Knows no replies and no deadlines; those are mesh_exchange.py's.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.attention.pending import ExchangeStats, Pending
from services.attention.targets import Targets
from services.attention.ways import Phase
from shared.activation import exchange_digest, schedule_activations
from shared.exchange_frames import MASK_BYTES, Flag, Routes, Share, write_mask
from shared.models.moe import ExpertLayer
from shared.transport.base import DTYPES, FrameKind, Header, Peer, Transport


class Sender:
    """Belongs to the compute thread.

    Args:
        gates: of every layer, for ways with the gate on this side.
        mesh, incarnation: what frames are signed with.
        partial: ask for sums instead of parts.
    """

    def __init__(
        self, transport: Transport, targets: Targets, gates: Mapping[int, ExpertLayer], stats: ExchangeStats, *,
        mesh: int, incarnation: int, dtype: torch.dtype, partial: bool = False,
    ) -> None:  # fmt: skip
        self._always = Flag.PARTIAL if partial else Flag(0)
        self._transport, self._targets, self._gates, self._stats = transport, targets, gates, stats
        self._mesh, self._incarnation, self._dtype = mesh, incarnation, dtype

    def route(self, pending: Pending) -> None:
        """Gate the rows here and choose replicas among the live ones; asks only those that compute something.

        Raises NoLiveHome.
        """
        weights, ids = self._gate(pending.layer, pending.rows)
        placement = self._targets.placement
        assert placement is not None
        homes = self._targets.homes[pending.layer]
        replicas = schedule_activations(ids, homes, pending.live, placement.policy).replicas
        numbers = np.arange(len(ids), dtype=np.int32)
        pending.routes = Routes(numbers, ids.copy(), replicas, weights.copy())
        pending.digest = exchange_digest(ids, replicas)
        pending.asked = int(np.bitwise_or.reduce(np.uint64(1) << np.unique(replicas).astype(np.uint64)))

    def warm_up(self, layer: int, rows: Tensor) -> None:
        """Compile what ``route`` runs, on rows [1, H]: the first exchange that goes this way must not wait for it."""
        if layer in self._gates:
            _, ids = self._gate(layer, rows)
            homes = np.ones(int(ids.max()) + 1, np.uint64)
            exchange_digest(ids, schedule_activations(ids, homes, 1).replicas)

    def _gate(self, layer: int, rows: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Weights and ids [T, k], valid until the next call."""
        weights, ids = self._gates[layer].gate(rows.to(self._dtype))
        return weights.numpy(force=True), ids.numpy(force=True)

    def send(self, pending: Pending, mask: int) -> None:
        """Ask the instances of ``mask``."""
        if pending.way.phase is Phase.RELAY:
            for targets in self._targets.nodes(mask).values():
                self._send_to_node(pending, targets)
        elif pending.routes is not None:
            for bit in _bits(mask):
                self._send_routed(pending, self._targets.peers(bit), bit)
        elif pending.group is not None and pending.way.phase is Phase.ONE:
            group = pending.group
            share = Share(len(group.members), group.first(self._incarnation), group.total)
            self._send_rows(pending, self._targets.peers(mask), pending.rows, Flag.SHARE, share)
        else:
            self._send_rows(pending, self._targets.peers(mask), pending.rows)

    def hello(self, peers: Sequence[Peer]) -> None:
        """Tell experts where to reply: they may be new, have restarted, or have lost the first one."""
        address = self._transport.address
        frame = self._transport.outgoing(len(address), 0, 0, DTYPES[0])
        frame.meta[:] = memoryview(address)
        self._transport.send(peers, Header(FrameKind.HELLO, self._mesh, self._incarnation, 0), frame)

    def _send_to_node(self, pending: Pending, mask: int) -> None:
        """Through a relay, the instance with the lowest bit, where there are several and the node is not ours."""
        relay = mask & -mask
        if mask == relay or self._targets.near(mask):
            self.send(pending.straight(), mask)
        elif pending.routes is None:
            self._send_rows(pending, self._targets.peers(relay), pending.rows, Flag.RELAY, mask)
        else:
            self._send_routed(pending, self._targets.peers(relay), mask, Flag.RELAY)

    def _send_rows(
        self, pending: Pending, peers: list[Peer], rows: Tensor, flag: int = 0, extra: Share | int | None = None
    ) -> None:
        size = 0 if extra is None else Share.BYTES if isinstance(extra, Share) else MASK_BYTES
        frame = self._transport.outgoing(size, len(rows), rows.shape[1], self._dtype)
        frame.rows.copy_(rows)
        if isinstance(extra, Share):
            extra.write(frame.meta)
        elif extra is not None:
            write_mask(frame.meta, extra)
        header = self._header(FrameKind.DISPATCH, pending, flag)
        self._stats.bytes_sent += len(peers) * frame.rows.nbytes
        self._transport.send(peers, header, frame)

    def _send_routed(self, pending: Pending, peers: list[Peer], mask: int, flag: int = 0) -> None:
        """The rows that the instances of ``mask`` need, with their routes."""
        assert pending.routes is not None
        routes = pending.routes.of(mask)
        skip = MASK_BYTES if flag else 0
        size = skip + Routes.nbytes(*routes.ids.shape)
        frame = self._transport.outgoing(size, len(routes.tokens), pending.rows.shape[1], self._dtype)
        rows = pending.rows.index_select(0, torch.from_numpy(routes.tokens).to(pending.rows.device))
        frame.rows.copy_(rows)
        if flag:
            write_mask(frame.meta, mask)
        routes.write(frame.meta[skip:])
        header = self._header(FrameKind.ROUTED, pending, flag)
        header.digest = pending.digest
        self._stats.bytes_sent += len(peers) * (frame.rows.nbytes + size)
        self._transport.send(peers, header, frame)

    def _header(self, kind: FrameKind, pending: Pending, flags: int) -> Header:
        placement = self._targets.placement
        assert placement is not None  # nobody is asked without one
        group = pending.group.number if pending.group is not None else self._incarnation
        flags |= self._always | (Flag.PREFILL if pending.prefill else 0)
        return Header(
            kind, self._mesh, self._incarnation, pending.sequence, pending.attempt, placement.epoch, group,
            placement.version, pending.live, pending.layer, flags=flags,
            trace_id=pending.trace[0], span_id=pending.trace[1],
        )  # fmt: skip


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield mask & -mask
        mask &= mask - 1
