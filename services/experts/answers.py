"""What an expert instance sends back: its parts of a frame's rows, to whoever sent them, to a group, or for a node.

Runs in the compute thread. Whether a frame is answered at all is judged in server.py, arithmetic is in compute.py.
"""

import time
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.experts.assembly import Assembly
from services.experts.compute import Plan, answer, carry_out, plan_parts, plan_routed
from services.experts.relay import Relay
from services.experts.sums import Room, frame_of_sums
from shared.activation import PARTS, Choice, layer_homes
from shared.errors import MoemeshError
from shared.exchange_frames import MASK_BYTES, SUMS, Flag, Routes, read_mask
from shared.messages import Placement
from shared.models.moe import ExpertLayer
from shared.pace import Pace
from shared.scheduling.policies import Policy
from shared.telemetry import NO_TRACE
from shared.transport.base import FrameKind, Header, Incoming, Outgoing, Peer, Refusal, Transport

Record = Callable[[tuple[bytes, bytes], int, int, int, int], None]
"""Called after a traced exchange: (trace and span id, start ns, end ns, layer, parts)."""


@dataclass(frozen=True)
class ServerLimits:
    """What this instance can answer."""

    hidden: int
    dtype: torch.dtype
    """What is computed in; rows of another dtype are converted."""
    max_rows: int
    experts: int
    """Routed experts per layer."""
    top_k: int
    """Experts per row."""


class Refused(MoemeshError):
    """An exchange that is not answered now."""

    def __init__(self, code: Refusal, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class KnownPlacement:
    """A placement whose homes here are loaded, in the form that the compute thread wants."""

    version: int
    instance: int
    """Our index in it; -1 when it does not name us."""
    homes: Mapping[int, NDArray[np.uint64]]
    policy: Policy
    instances: tuple[str, ...] = ()
    """Ids, by their bits."""

    @classmethod
    def of(cls, placement: Placement, instance: str, layers: Container[int] | None = None) -> "KnownPlacement":
        """``layers``: those that can be answered; None: all."""
        ids = placement.instances
        index = ids.index(instance) if instance in ids else -1
        homes = {i: homes for i, homes in layer_homes(placement).items() if layers is None or i in layers}
        return cls(placement.version, index, homes, placement.policy, ids)


@dataclass
class ServerStats:
    """Counters since the start, written by the compute thread and read by anyone."""

    by_expert: NDArray[np.int64]
    """[layers, 2, experts]: parts computed here, and exchanges that activated the expert; layers in ascending order."""
    frames: Counter[str] = field(default_factory=Counter)
    """By kind."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Frames without an answer: foreign, unknown_sender, bad_hello, unexpected."""
    refused: Counter[str] = field(default_factory=Counter)
    """By name of the refusal."""
    express: int = 0
    """Frames that were answered without the interpreter."""
    answers: int = 0
    """Exchanges for which parts were computed, those of a group once."""
    parts: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    busy_s: float = 0.0
    """Without ``Answers.sending_s``."""


@dataclass(frozen=True)
class Prepared:
    """What was done before an answer is begun."""

    plan: Plan
    done: Tensor | None = None
    """fp32 [P, H]: parts that are computed already."""


class Answers:
    """Computes and sends. ``relay``: merges the replies of this node's instances; the others as in ``ExpertServer``."""

    def __init__(
        self,
        transport: Transport,
        layers: Mapping[int, ExpertLayer],
        limits: ServerLimits,
        relay: Relay,
        *,
        mesh: int,
        incarnation: int,
        record: Record | None,
        pace: Pace,
    ) -> None:
        self._transport, self._layers, self._limits, self._relay = transport, layers, limits, relay
        self._mesh, self._incarnation = mesh, incarnation
        self._record, self._pace = record, pace
        self.sending_s = 0.0
        """Spent on sending replies so far: whom one wakes may have the core before the call that sends returns."""
        self.stats = ServerStats(np.zeros((len(layers), 2, limits.experts), np.int64))
        self._counts = dict(zip(sorted(layers), self.stats.by_expert, strict=True))

    def converted(self, rows: Tensor) -> Tensor:
        """In the dtype that is computed in."""
        return rows.to(self._limits.dtype)

    def plan(self, header: Header, rows: Tensor, meta: NDArray[np.uint8], placement: KnownPlacement) -> Plan:
        """Which parts of ``rows`` (converted) are ours; stays valid. Raises NoLiveHome, BadFrame."""
        layer, homes = self._layers[header.layer], placement.homes[header.layer]
        if header.kind == FrameKind.ROUTED:
            routes = meta[MASK_BYTES:] if header.flags & Flag.RELAY else meta
            given = Routes.read(routes, header.rows, self._limits.top_k)
            plan = plan_routed(layer, given, homes, placement.instance, header.digest)
        else:
            plan = plan_parts(layer, rows, Choice(homes, header.live, placement.instance, placement.policy))
        return replace(plan, ids=plan.ids.copy())

    def alone(
        self, peer: Peer, incoming: Incoming, placement: KnownPlacement, prepared: Prepared | None = None
    ) -> None:
        """Compute the parts of a frame's rows that are ours, and send them back."""
        header, begun = incoming.header, time.time_ns()
        most = header.rows * self._limits.top_k
        if header.flags & Flag.PARTIAL:
            room = Room(most, self._limits.hidden, incoming.rows.device)
        else:
            room = self._transport.outgoing(most * PARTS.itemsize, most, self._limits.hidden, torch.float32)
        given = header, incoming.rows, incoming.meta, placement
        parts, digest = self._compute(*given, room.meta, room.rows, prepared)
        if isinstance(room, Room):
            self._send_sums(peer, header, room.parts(parts), room.rows[:parts], placement.instance, digest)
        else:
            room.keep(parts)
            self._send(peer, header, room, digest)
        self._end(begun, header, parts)

    def group(
        self,
        assembly: Assembly,
        header: Header,
        placement: KnownPlacement,
        peers: Mapping[int, tuple[bytes, Peer]],
        prepared: Prepared | None = None,
    ) -> None:
        """Compute for all members at once; each gets the parts of its own rows."""
        most, begun = len(assembly.rows) * self._limits.top_k, time.time_ns()
        meta = np.empty(most * PARTS.itemsize, np.uint8)
        rows = torch.empty(most, self._limits.hidden, device=assembly.rows.device)
        count, digest = self._compute(header, assembly.rows, meta[:0], placement, meta, rows, prepared)
        parts = meta.view(PARTS)[:count]
        for sender, asked in assembly.asked.items():
            known, first = peers.get(sender), assembly.firsts[sender]
            if known is None:
                continue
            theirs = np.flatnonzero((parts["token"] >= first) & (parts["token"] < first + asked.rows))
            own, chosen = parts[theirs], torch.from_numpy(theirs).to(rows.device)
            own["token"] -= first
            if asked.flags & Flag.PARTIAL:
                self._send_sums(known[1], asked, own, rows.index_select(0, chosen), placement.instance, digest)
                continue
            frame = self._transport.outgoing(own.nbytes, len(own), rows.shape[1], rows.dtype)
            frame.meta.view(PARTS)[:] = own
            torch.index_select(rows, 0, chosen, out=frame.rows)
            self._send(known[1], asked, frame, digest)
        self._end(begun, header, count)

    def node(self, peer: Peer, incoming: Incoming, placement: KnownPlacement, prepared: Prepared | None = None) -> None:
        """Pass the rows on to other instances of this node, compute our own parts, and let the relay merge."""
        header, mask = incoming.header, read_mask(incoming.meta)
        others = {
            name: bit for bit, name in enumerate(placement.instances) if mask >> bit & 1 and bit != placement.instance
        }
        if not self._relay.knows(others):
            raise Refused(Refusal.NO_RELAY, "an instance of this node is not known here")
        most, begun = header.rows * self._limits.top_k, time.time_ns()
        relayed = self._relay.forward(incoming, others, (most, self._limits.hidden), peer)
        meta = relayed.frame.meta[: most * PARTS.itemsize]
        routes = incoming.meta[MASK_BYTES:]
        try:
            room = meta, relayed.frame.rows
            parts, digest = self._compute(header, incoming.rows, routes, placement, *room, prepared)
        except MoemeshError:
            self._relay.drop(relayed)
            raise
        self._relay.add_own(relayed, placement.instance, parts, digest)
        self._end(begun, header, parts)

    def _compute(
        self,
        header: Header,
        rows: Tensor,
        routes: NDArray[np.uint8],
        placement: KnownPlacement,
        meta: NDArray[np.uint8],
        out: Tensor,
        prepared: Prepared | None,
    ) -> tuple[int, int]:
        """Write our parts to ``meta`` and ``out``; returns their number and the digest of the exchange."""
        layer, counts, began = self._layers[header.layer], self._counts[header.layer], time.monotonic()
        rows, homes = self.converted(rows), placement.homes[header.layer]
        if prepared is None and header.kind == FrameKind.ROUTED:
            given = Routes.read(routes, header.rows, self._limits.top_k)
            prepared = Prepared(plan_routed(layer, given, homes, placement.instance, header.digest))
        if prepared:
            parts, digest = carry_out(prepared.plan, layer, rows, meta, out, counts, prepared.done)
        else:
            choice = Choice(homes, header.live, placement.instance, placement.policy)
            parts, digest = answer(layer, rows, choice, meta, out, counts)
        if self._pace.name:
            self._pace.experts(began, meta[: parts * PARTS.itemsize].view(PARTS)["expert"])
        return parts, digest

    def _send_sums(
        self, peer: Peer, asked: Header, parts: NDArray[np.void], rows: Tensor, instance: int, digest: int
    ) -> None:
        frame = frame_of_sums(self._transport, parts, rows, [(instance, len(parts))])
        self._send(peer, asked, frame, digest, SUMS | 1)

    def _send(self, peer: Peer, asked: Header, frame: Outgoing, digest: int, flags: int = 0) -> None:
        reply = self.reply(FrameKind.COMBINE, asked)
        reply.digest, reply.flags = digest, flags
        began = time.monotonic()
        self._transport.send([peer], reply, frame)
        self.sending_s += time.monotonic() - began
        self.stats.bytes_sent += reply.row_bytes + reply.meta_bytes

    def _end(self, begun: int, header: Header, parts: int) -> None:
        self.stats.answers += 1
        self.stats.parts += parts
        trace = header.trace_id, header.span_id
        if self._record and trace != NO_TRACE:
            self._record(trace, begun, time.time_ns(), header.layer, parts)

    def reply(self, kind: FrameKind, asked: Header) -> Header:
        """The header of an answer."""
        return Header(
            kind, self._mesh, self._incarnation, asked.sequence, asked.attempt, asked.epoch, asked.group,
            asked.placement, asked.live, asked.layer, trace_id=asked.trace_id, span_id=asked.span_id,
        )  # fmt: skip
