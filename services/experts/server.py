"""The compute thread of an expert instance: frames in, parts out.

Keeps no state between exchanges, so any of them may be repeated. Judges frames and answers or refuses them; which
experts are resident is settled in store.py before a placement arrives here, arithmetic is in compute.py.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.experts.assembly import Assemblies, Assembly
from services.experts.compute import answer, answer_routed
from services.experts.relay import Neighbour, Relay
from shared.activation import PARTS, Choice, NoLiveHome, layer_homes
from shared.errors import BadFrame, MoemeshError, TransportError
from shared.exchange_frames import MASK_BYTES, Flag, Routes, Share, read_mask
from shared.keep_awake import KeepAwake, LetHalt
from shared.messages import Placement
from shared.models.moe import ExpertLayer
from shared.pace import UNPACED, Pace
from shared.scheduling.policies import Policy
from shared.telemetry import NO_TRACE
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Outgoing, Peer, Refusal, Transport

Record = Callable[[tuple[bytes, bytes], int, int, int, int], None]
"""Called after a traced exchange: (trace and span id, start ns, end ns, layer, parts)."""
IDLE_S = 0.5
BUSY_S = 1.0  # after a frame, receive sleeps in short slices for so long


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
    parts: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    busy_s: float = 0.0


class ExpertServer:
    """Answers exchanges until ``stop``. Everything but ``run`` may be called from other threads.

    Args:
        layers: by checkpoint index.
        mesh: hash of mesh name and model digest.
        incarnation: of this process.
        record: see ``Record``.
        pace: how long an exchange takes at least.
        awake: held while exchanges arrive.
    """

    def __init__(
        self,
        transport: Transport,
        layers: Mapping[int, ExpertLayer],
        limits: ServerLimits,
        *,
        mesh: int,
        incarnation: int,
        record: Record | None = None,
        pace: Pace = UNPACED,
        awake: KeepAwake | None = None,
    ) -> None:
        self._transport = transport
        self._layers = layers
        self._limits = limits
        self._mesh, self._incarnation = mesh, incarnation
        self._record = record
        self._pace = pace
        self._awake = awake or LetHalt()
        self._relay = Relay(transport, mesh, incarnation)
        self._assemblies = Assemblies(limits.dtype, limits.max_rows)
        self._placements: dict[int, KnownPlacement] = {}  # by version; a new epoch may write it again, unchanged
        self._peers: dict[int, tuple[bytes, Peer]] = {}  # by incarnation
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._last_frame = 0.0
        self.stats = ServerStats(np.zeros((len(layers), 2, limits.experts), np.int64))
        self._counts = dict(zip(sorted(layers), self.stats.by_expert, strict=True))

    # ---- orders from other threads ----------------------------------------------------------------------

    def adopt(self, placements: Iterable[KnownPlacement]) -> Future[None]:
        """Answer exchanges of these placements only; done when no exchange of another one is being computed."""
        table = {known.version: known for known in placements}
        return self._order(lambda: setattr(self, "_placements", table))

    def meet(self, neighbours: Mapping[str, Neighbour]) -> Future[None]:
        """These are the other expert instances of this node, by id."""
        return self._order(lambda: self._relay.meet(neighbours))

    def detach(self, incarnations: Iterable[int]) -> Future[None]:
        """Forget attention instances that are gone."""
        gone = frozenset(incarnations)
        return self._order(lambda: self._detach(gone))

    def idle_for(self) -> float:
        """Seconds since the last frame."""
        return time.monotonic() - self._last_frame

    def stop(self) -> None:
        self._stopped.set()
        self._transport.wake()

    def _order(self, action: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._orders.put((action, done))
        self._transport.wake()
        return done

    def _obey(self) -> None:
        while not self._orders.empty():
            action, done = self._orders.get()
            action()
            done.set_result(None)

    def _detach(self, gone: frozenset[int]) -> None:
        for incarnation in gone & self._peers.keys():
            self._transport.disconnect(self._peers.pop(incarnation)[1])
        for incarnation in gone:
            self._assemblies.forget(incarnation)
            self._relay.forget(incarnation)

    # ---- the loop ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until ``stop``; the caller closes the transport."""
        while not self._stopped.is_set():
            self._obey()
            incoming = self._transport.receive(IDLE_S, busy=self.idle_for() < BUSY_S)
            if incoming is None:
                self._awake.release()
            else:
                self._awake.hold()
                self._take(incoming)
        self._obey()

    def _take(self, incoming: Incoming) -> None:
        header = incoming.header
        self._last_frame = start = time.monotonic()
        try:
            if header.mesh != self._mesh:
                self.stats.dropped["foreign"] += 1
            elif header.kind in (FrameKind.DISPATCH, FrameKind.ROUTED):
                self._dispatch(incoming)
            elif header.kind in (FrameKind.COMBINE, FrameKind.REFUSAL):
                self._drop(self._relay.take(incoming))
            elif header.kind == FrameKind.PING:
                self._pong(header)
            elif header.kind == FrameKind.HELLO:
                self._hello(header.sender, incoming.meta.tobytes())
            else:
                self._drop("unexpected")
        finally:
            incoming.release()
            self.stats.busy_s += time.monotonic() - start

    def _drop(self, reason: str) -> None:
        if reason:
            self.stats.dropped[reason] += 1

    def _pong(self, asked: Header) -> None:
        known = self._peers.get(asked.sender)
        if known:
            empty = self._transport.outgoing(0, 0, 0, DTYPES[0])
            self._transport.send([known[1]], self._reply(FrameKind.PONG, asked), empty)

    def _hello(self, sender: int, address: bytes) -> None:
        """Learn where to reply. The same address again changes nothing; another one replaces it."""
        self.stats.frames["hello"] += 1
        known = self._peers.get(sender)
        if known and known[0] == address and known[1].alive:
            return
        try:
            peer = self._transport.connect(address)
        except TransportError:
            self.stats.dropped["bad_hello"] += 1
            return
        if known:
            self._transport.disconnect(known[1])
        self._peers[sender] = (address, peer)

    def _dispatch(self, incoming: Incoming) -> None:
        header = incoming.header
        self.stats.frames[FrameKind(header.kind).name.lower()] += 1
        known = self._peers.get(header.sender)
        if known is None:  # its next attempt starts with a HELLO
            self.stats.dropped["unknown_sender"] += 1
            return
        self.stats.bytes_received += header.row_bytes
        try:
            self._serve(known[1], incoming, self._judge(header))
        except Refused as refused:
            self._refuse(known[1], header, refused.code, str(refused))
        except BadFrame as error:
            self._refuse(known[1], header, Refusal.BAD_REQUEST, str(error))
        except NoLiveHome as error:
            self._refuse(known[1], header, Refusal.NO_HOME, str(error))

    def _judge(self, header: Header) -> KnownPlacement:
        """The placement that a frame names. Raises Refused, BadFrame when this model can never answer the frame."""
        limits = self._limits
        if header.layer not in self._layers:
            raise BadFrame(f"layer {header.layer} has no routed experts")
        if header.columns != limits.hidden:
            raise BadFrame(f"rows of {header.columns} columns, the model has {limits.hidden}")
        if header.rows > limits.max_rows:
            raise BadFrame(f"{header.rows} rows, the limit here is {limits.max_rows} (--max-batched-tokens)")
        placement = self._placements.get(header.placement)
        if placement is None or header.layer not in placement.homes:
            raise Refused(Refusal.UNKNOWN_PLACEMENT, f"placement {header.placement} is not loaded here")
        if placement.instance < 0 and (header.kind == FrameKind.ROUTED or header.flags):
            raise Refused(Refusal.NO_HOME, f"placement {header.placement} has no homes here")
        return placement

    def _serve(self, peer: Peer, incoming: Incoming, placement: KnownPlacement) -> None:
        """Answer a frame on its own, as a share of a group's exchange, or for this whole node."""
        header, meta = incoming.header, incoming.meta
        if header.flags & Flag.SHARE:
            assembly = self._assemblies.add(header, Share.read(meta), incoming.rows)
            if assembly:
                self._answer_group(assembly, header, placement)
        elif header.flags & Flag.RELAY:
            self._answer_node(peer, incoming, placement)
        else:
            most, begun = header.rows * self._limits.top_k, self._begin()
            frame = self._transport.outgoing(most * PARTS.itemsize, most, self._limits.hidden, torch.float32)
            parts, digest = self._compute(header, incoming.rows, meta, placement, frame.meta, frame.rows)
            self._send(peer, header, frame, parts, digest)
            self._end(begun, header, parts)

    def _answer_group(self, assembly: Assembly, header: Header, placement: KnownPlacement) -> None:
        """Compute for all members at once; each gets the parts of its own rows."""
        most, begun = len(assembly.rows) * self._limits.top_k, self._begin()
        meta = np.empty(most * PARTS.itemsize, np.uint8)
        rows = torch.empty(most, self._limits.hidden, device=assembly.rows.device)
        count, digest = self._compute(header, assembly.rows, meta[:0], placement, meta, rows)
        parts = meta.view(PARTS)[:count]
        for sender, asked in assembly.asked.items():
            known, first = self._peers.get(sender), assembly.firsts[sender]
            if known is None:
                continue
            theirs = np.flatnonzero((parts["token"] >= first) & (parts["token"] < first + asked.rows))
            frame = self._transport.outgoing(len(theirs) * PARTS.itemsize, len(theirs), rows.shape[1], rows.dtype)
            own = frame.meta.view(PARTS)
            own[:] = parts[theirs]
            own["token"] -= first
            torch.index_select(rows, 0, torch.from_numpy(theirs).to(rows.device), out=frame.rows)
            self._send(known[1], asked, frame, len(theirs), digest)
        self._end(begun, header, count)

    def _answer_node(self, peer: Peer, incoming: Incoming, placement: KnownPlacement) -> None:
        """Pass the rows on to other instances of this node, compute our own parts, and let the relay merge."""
        header, mask = incoming.header, read_mask(incoming.meta)
        others = {
            name: bit for bit, name in enumerate(placement.instances) if mask >> bit & 1 and bit != placement.instance
        }
        if not self._relay.knows(others):
            raise Refused(Refusal.NO_RELAY, "an instance of this node is not known here")
        most, begun = header.rows * self._limits.top_k, self._begin()
        relayed = self._relay.forward(incoming, others, (most, self._limits.hidden), peer)
        meta = relayed.frame.meta[: most * PARTS.itemsize]
        routes = incoming.meta[MASK_BYTES:]
        try:
            parts, digest = self._compute(header, incoming.rows, routes, placement, meta, relayed.frame.rows)
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
    ) -> tuple[int, int]:
        """Write our parts to ``meta`` and ``out``; returns their number and the digest of the exchange."""
        layer, counts, began = self._layers[header.layer], self._counts[header.layer], time.monotonic()
        rows, homes = rows.to(self._limits.dtype), placement.homes[header.layer]
        if header.kind == FrameKind.ROUTED:
            given = Routes.read(routes, header.rows, self._limits.top_k)
            parts, digest = (
                answer_routed(layer, rows, given, homes, placement.instance, meta, out, counts),
                header.digest,
            )
        else:
            choice = Choice(homes, header.live, placement.instance, placement.policy)
            parts, digest = answer(layer, rows, choice, meta, out, counts)
        if self._pace.name:
            self._pace.experts(began, meta[: parts * PARTS.itemsize].view(PARTS)["expert"])
        return parts, digest

    def _send(self, peer: Peer, asked: Header, frame: Outgoing, parts: int, digest: int) -> None:
        frame.keep(parts)
        reply = self._reply(FrameKind.COMBINE, asked)
        reply.digest = digest
        self._transport.send([peer], reply, frame)
        self.stats.bytes_sent += reply.row_bytes + reply.meta_bytes

    def _begin(self) -> int:
        return time.time_ns()

    def _end(self, begun: int, header: Header, parts: int) -> None:
        self.stats.parts += parts
        trace = header.trace_id, header.span_id
        if self._record and trace != NO_TRACE:
            self._record(trace, begun, time.time_ns(), header.layer, parts)

    def _refuse(self, peer: Peer, header: Header, code: Refusal, problem: str) -> None:
        self.stats.refused[code.name.lower()] += 1
        meta = bytes([code]) + problem.encode()
        frame = self._transport.outgoing(len(meta), 0, 0, DTYPES[0])
        frame.meta[:] = memoryview(meta)
        self._transport.send([peer], self._reply(FrameKind.REFUSAL, header), frame)

    def _reply(self, kind: FrameKind, asked: Header) -> Header:
        return Header(
            kind, self._mesh, self._incarnation, asked.sequence, asked.attempt, asked.epoch, asked.group,
            asked.placement, asked.live, asked.layer, trace_id=asked.trace_id, span_id=asked.span_id,
        )  # fmt: skip
