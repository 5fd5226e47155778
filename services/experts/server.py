"""The compute thread of an expert instance: frames in, parts out.

Keeps no state between exchanges, so any of them may be repeated. Judges frames and answers or refuses them; which
experts are resident is settled in store.py before a placement arrives here, arithmetic is in compute.py.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

import torch

from services.experts.answers import Answers, KnownPlacement, Record, Refused, ServerLimits
from services.experts.assembly import Assemblies
from services.experts.elastic import Elastic
from services.experts.express import Express
from services.experts.relay import Neighbour, Relay
from services.experts.waiting import Question, Waiting
from shared.activation import NoLiveHome
from shared.errors import BadFrame, TransportError
from shared.exchange_frames import Flag, Share
from shared.keep_awake import KeepAwake, LetHalt
from shared.models.moe import ExpertLayer
from shared.pace import UNPACED, Pace
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Peer, Refusal, Transport

IDLE_S = 0.5
BUSY_S = 1.0  # after a frame, receive sleeps in short slices for so long


class ExpertServer:
    """Answers exchanges until ``stop``. Everything but ``run`` may be called from other threads.

    Args:
        layers: by checkpoint index.
        mesh: hash of mesh name and model digest.
        incarnation: of this process.
        record: see ``Record``.
        pace: how long an exchange takes at least.
        awake: held while exchanges arrive.
        elastic: experts that come and go; None: all homes are resident.
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
        elastic: Elastic | None = None,
    ) -> None:
        self._transport = transport
        self._layers = layers
        self._limits = limits
        self._mesh, self._incarnation = mesh, incarnation
        self._awake = awake or LetHalt()
        self._relay = Relay(transport, mesh, incarnation)
        signed = {"mesh": mesh, "incarnation": incarnation}
        self._answers = Answers(transport, layers, limits, self._relay, record=record, pace=pace, **signed)
        self._assemblies = Assemblies(limits.dtype, limits.max_rows)
        self._placements: dict[int, KnownPlacement] = {}  # by version; a new epoch may write it again, unchanged
        self._peers: dict[int, tuple[bytes, Peer]] = {}  # by incarnation
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._elastic = elastic
        self._waiting = Waiting(elastic, self._answers) if elastic else None
        self._stopped = threading.Event()
        self._last_frame = 0.0
        self.stats = self._answers.stats
        plain = elastic is None and not pace.name and limits.dtype is torch.float32
        lane = transport.lane if plain else None
        self._express = Express(lane, layers, limits, self.stats, **signed) if lane else None

    # ---- orders from other threads ----------------------------------------------------------------------

    def adopt(self, placements: Iterable[KnownPlacement]) -> Future[None]:
        """Answer exchanges of these placements only; done when no exchange of another one is being computed."""
        table = {known.version: known for known in placements}
        return self._order(lambda: self._adopt(table))

    def house(self, homes: Mapping[int, frozenset[int]]) -> Future[None]:
        """Layer -> experts that have a home here from now on: others that are resident are stopped. If elastic."""
        return self._order(lambda: self._elastic.adopt(homes) if self._elastic else None)

    def meet(self, neighbours: Mapping[str, Neighbour]) -> Future[None]:
        """These are the other expert instances of this node, by id."""
        return self._order(lambda: self._relay.meet(neighbours))

    def detach(self, incarnations: Iterable[int]) -> Future[None]:
        """Forget attention instances that are gone."""
        gone = frozenset(incarnations)
        return self._order(lambda: self._detach(gone))

    def idle_for(self) -> float:
        """Seconds since the last frame; 0 while one waits for experts."""
        if self._waiting and self._waiting.anybody:
            return 0.0
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

    def _adopt(self, placements: dict[int, KnownPlacement]) -> None:
        self._placements = placements
        self._forget_lines()

    def _forget_lines(self) -> None:
        if self._express:
            self._express.forget()

    def _detach(self, gone: frozenset[int]) -> None:
        if gone & self._peers.keys():
            self._forget_lines()
        if self._waiting:
            self._waiting.forget(gone)
        for incarnation in gone & self._peers.keys():
            self._transport.disconnect(self._peers.pop(incarnation)[1])
        for incarnation in gone:
            self._assemblies.forget(incarnation)
            self._relay.forget(incarnation)

    # ---- the loop ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until ``stop``; the caller closes the transport."""
        while self._look():
            self._go_on()
            if self._express and self.idle_for() < BUSY_S and self._turn(self._express):
                continue
            incoming = self._transport.receive(IDLE_S, busy=self.idle_for() < BUSY_S)
            if incoming is not None:
                self._awake.hold()
                self._go_on()  # what has been started meanwhile is there for this frame
                self._take(incoming)
            elif self.idle_for() > IDLE_S:
                self._awake.release()

    def _look(self) -> bool:
        """Take notice of wakes, and then of what they are about. False: it is the end."""
        if self._express:
            self._express.settle()
        self._obey()
        return not self._stopped.is_set()

    def _turn(self, express: Express) -> bool:
        """Answer frames for a moment; False: ``receive`` has to look at what has come."""
        if express.serve():
            self._awake.hold()
            self._last_frame = time.monotonic()
        elif self.idle_for() > IDLE_S:
            self._awake.release()
        return not express.news

    def _take(self, incoming: Incoming) -> None:
        header, kept = incoming.header, False
        self._last_frame = time.monotonic()
        try:
            if header.mesh != self._mesh:
                self.stats.dropped["foreign"] += 1
            elif header.kind in (FrameKind.DISPATCH, FrameKind.ROUTED):
                kept = self._dispatch(incoming)
            elif header.kind in (FrameKind.COMBINE, FrameKind.REFUSAL):
                self._drop(self._relay.take(incoming))
            elif header.kind == FrameKind.PING:
                self._pong(header)
            elif header.kind == FrameKind.HELLO:
                self._hello(header.sender, incoming.meta.tobytes())
            else:
                self._drop("unexpected")
        finally:
            if not kept:
                incoming.release()

    def _drop(self, reason: str) -> None:
        if reason:
            self.stats.dropped[reason] += 1

    def _pong(self, asked: Header) -> None:
        known = self._peers.get(asked.sender)
        if known:
            empty = self._transport.outgoing(0, 0, 0, DTYPES[0])
            self._transport.send([known[1]], self._answers.reply(FrameKind.PONG, asked), empty)

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
            self._forget_lines()
        self._peers[sender] = (address, peer)

    def _dispatch(self, incoming: Incoming) -> bool:
        """Answer or refuse. True: the frame is kept until its experts are there."""
        header = incoming.header
        self.stats.frames[FrameKind(header.kind).name.lower()] += 1
        known = self._peers.get(header.sender)
        if known is None:  # its next attempt starts with a HELLO
            self.stats.dropped["unknown_sender"] += 1
            return False
        self.stats.bytes_received += header.row_bytes
        return not self._settle(Question(known[1], incoming))

    def _go_on(self) -> None:
        """Answer those whose experts are there by now; the others go on waiting."""
        for question in self._waiting.due() if self._waiting else ():
            if self._settle(question):
                question.incoming.release()

    def _settle(self, question: Question) -> bool:
        """Answer a frame or refuse it. False: it waits."""
        header, start, sending = question.incoming.header, time.monotonic(), self._answers.sending_s
        try:
            return self._serve(question, self._judge(header))
        except Refused as refused:
            self._refuse(question.peer, header, refused.code, str(refused))
        except BadFrame as error:
            self._refuse(question.peer, header, Refusal.BAD_REQUEST, str(error))
        except NoLiveHome as error:
            self._refuse(question.peer, header, Refusal.NO_HOME, str(error))
        finally:
            self.stats.busy_s += time.monotonic() - start - (self._answers.sending_s - sending)
        return True

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
        if placement.instance < 0 and (header.kind == FrameKind.ROUTED or header.flags & ~Flag.PREFILL):
            raise Refused(Refusal.NO_HOME, f"placement {header.placement} has no homes here")
        return placement

    def _serve(self, question: Question, placement: KnownPlacement) -> bool:
        """Answer a frame on its own, as a share of a group's exchange, or for this whole node. False: it waits."""
        peer, incoming = question.peer, question.incoming
        header = incoming.header
        if header.flags & Flag.SHARE and question.assembly is None:
            question.assembly = self._assemblies.add(header, Share.read(incoming.meta), incoming.rows)
            if question.assembly is None:
                return True
        if self._waiting and not self._waiting.ready(question, placement):
            return False
        if question.assembly:
            self._answers.group(question.assembly, header, placement, self._peers, question.prepared)
        elif header.flags & Flag.RELAY:
            self._answers.node(peer, incoming, placement, question.prepared)
        else:
            self._answers.alone(peer, incoming, placement, question.prepared)
            if self._express and header.kind == FrameKind.DISPATCH and not header.flags:
                self._express.learn(peer, header, placement)
        if self._waiting:
            self._waiting.answered(question)
        return True

    def _refuse(self, peer: Peer, header: Header, code: Refusal, problem: str) -> None:
        self.stats.refused[code.name.lower()] += 1
        meta = bytes([code]) + problem.encode()
        frame = self._transport.outgoing(len(meta), 0, 0, DTYPES[0])
        frame.meta[:] = memoryview(meta)
        self._transport.send([peer], self._answers.reply(FrameKind.REFUSAL, header), frame)
