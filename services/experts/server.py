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

from services.experts.compute import answer
from shared.activation import PARTS, Choice, NoLiveHome, layer_homes
from shared.errors import TransportError
from shared.keep_awake import KeepAwake, LetHalt
from shared.messages import Placement
from shared.models.moe import ExpertLayer
from shared.pace import UNPACED, Pace
from shared.scheduling.policies import Policy
from shared.telemetry import NO_TRACE
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Peer, Refusal, Transport

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


@dataclass(frozen=True, slots=True)
class KnownPlacement:
    """A placement whose homes here are loaded, in the form that the compute thread wants."""

    version: int
    instance: int
    """Our index in it; -1 when it does not name us."""
    homes: Mapping[int, NDArray[np.uint64]]
    policy: Policy

    @classmethod
    def of(cls, placement: Placement, instance: str, layers: Container[int] | None = None) -> "KnownPlacement":
        """``layers``: those that can be answered; None: all."""
        ids = placement.instances
        index = ids.index(instance) if instance in ids else -1
        homes = {i: homes for i, homes in layer_homes(placement).items() if layers is None or i in layers}
        return cls(placement.version, index, homes, placement.policy)


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
            elif header.kind == FrameKind.DISPATCH:
                self._dispatch(incoming)
            elif header.kind == FrameKind.HELLO:
                self._hello(header.sender, incoming.meta.tobytes())
            else:
                self.stats.dropped["unexpected"] += 1
        finally:
            incoming.release()
            self.stats.busy_s += time.monotonic() - start

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
        self.stats.frames["dispatch"] += 1
        known = self._peers.get(header.sender)
        if known is None:  # its next attempt starts with a HELLO
            self.stats.dropped["unknown_sender"] += 1
            return
        self.stats.bytes_received += header.row_bytes
        problem = self._wrong_with(header)
        placement = self._placements.get(header.placement)
        if problem:
            self._refuse(known[1], header, Refusal.BAD_REQUEST, problem)
        elif placement is None or header.layer not in placement.homes:
            text = f"placement {header.placement} is not loaded here"
            self._refuse(known[1], header, Refusal.UNKNOWN_PLACEMENT, text)
        else:
            self._answer(known[1], incoming, placement)

    def _wrong_with(self, header: Header) -> str:
        """Why this model cannot answer the frame, whatever the placement; "" when it can."""
        limits = self._limits
        if header.layer not in self._layers:
            return f"layer {header.layer} has no routed experts"
        if header.columns != limits.hidden:
            return f"rows of {header.columns} columns, the model has {limits.hidden}"
        if header.rows > limits.max_rows:
            return f"{header.rows} rows, the limit here is {limits.max_rows} (--max-batched-tokens)"
        return ""

    def _answer(self, peer: Peer, incoming: Incoming, placement: KnownPlacement) -> None:
        header, start, began = incoming.header, time.time_ns(), time.monotonic()
        layer, rows = self._layers[header.layer], incoming.rows.to(self._limits.dtype)
        most = header.rows * self._limits.top_k
        try:
            homes = placement.homes[header.layer]
            frame = self._transport.outgoing(most * PARTS.itemsize, most, self._limits.hidden, torch.float32)
            choice = Choice(homes, header.live, placement.instance, placement.policy)
            parts, digest = answer(layer, rows, choice, frame.meta, frame.rows, self._counts[header.layer])
        except NoLiveHome as error:
            self._refuse(peer, header, Refusal.NO_HOME, str(error))
            return
        frame.keep(parts)
        if self._pace.name:
            self._pace.experts(began, frame.meta.view(PARTS)["expert"][:parts])
        reply = self._reply(FrameKind.COMBINE, header)
        reply.digest = digest
        self._transport.send([peer], reply, frame)
        self.stats.parts += parts
        self.stats.bytes_sent += reply.row_bytes + reply.meta_bytes
        trace = header.trace_id, header.span_id
        if self._record and trace != NO_TRACE:
            self._record(trace, start, time.time_ns(), header.layer, parts)

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
