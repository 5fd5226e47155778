"""Exchanges without the interpreter: the same sums, and whatever is unusual is left to those who have the rules."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from services.attention.exchange import ExpertInstance, View
from services.attention.mesh_exchange import MeshExchange
from services.experts.answers import KnownPlacement, ServerLimits, ServerStats
from services.experts.express import RECORDED
from services.experts.express import Express as ExpertExpress
from shared.activation import PARTS
from shared.kernels.base import select_kernels
from shared.messages import Placement, Policy
from shared.transport.base import FrameKind, Header, Incoming, Peer
from shared.transport.ucx import UcxTransport

CPU, HIDDEN, MESH, US = torch.device("cpu"), 32, 7, (1 << 63) + 5
FRAME = 1 << 18
Trick = Callable[["Expert", "Reply"], None]


@dataclass
class Reply:
    """What an expert is about to send."""

    header: Header
    parts: np.ndarray
    rows: torch.Tensor


class Expert(threading.Thread):
    """Answers with the row itself times (1 + expert) for its only expert; ``trick`` may send something else before."""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self.number, self.incarnation = number, (1 << 63) + 100 + number
        self.transport = UcxTransport(FRAME)
        self.trick: Callable[[Expert, Reply], None] = lambda expert, reply: None
        self.ended = False
        self._peer: Peer | None = None

    def run(self) -> None:
        while not self.ended:
            incoming = self.transport.receive(0.05)
            if incoming is not None:
                self._take(incoming)
                incoming.release()

    def _take(self, incoming: Incoming) -> None:
        asked = incoming.header
        if asked.kind == FrameKind.HELLO:
            self._peer = self.transport.connect(incoming.meta.tobytes())
            return
        if asked.kind == FrameKind.PING:
            pong = replace(asked, kind=FrameKind.PONG, sender=self.incarnation)
            self.send(Reply(pong, np.zeros(0, PARTS), torch.empty(0, HIDDEN)))
        if asked.kind != FrameKind.DISPATCH:
            return
        parts = np.zeros(asked.rows, PARTS)
        parts["token"], parts["expert"], parts["weight"] = np.arange(asked.rows), self.number, 0.5
        header = replace(asked, kind=FrameKind.COMBINE, sender=self.incarnation, digest=1)
        reply = Reply(header, parts, incoming.rows * (1 + self.number))
        self.trick(self, reply)
        self.send(reply)

    def send(self, reply: Reply) -> None:
        assert self._peer is not None
        frame = self.transport.outgoing(reply.parts.nbytes, len(reply.rows), HIDDEN, torch.float32)
        frame.meta[:] = reply.parts.view(np.uint8)
        frame.rows.copy_(reply.rows)
        self.transport.send([self._peer], replace(reply.header), frame)


class Pool:
    """Expert instances, each with one of the experts that every row chooses, and the attention side."""

    def __init__(self, count: int = 2) -> None:
        self.experts = [Expert(number) for number in range(count)]
        self.transport = UcxTransport(FRAME)
        self.exchange = MeshExchange(
            self.transport, select_kernels(CPU, 1), hidden=HIDDEN, dtype=torch.float32, top_k=count, mesh=MESH,
            incarnation=US, deadline=5.0,
        )  # fmt: skip
        homes = (1 << np.arange(count, dtype="<u8")).tobytes()
        names = tuple(f"e{number}" for number in range(count))
        facts = {"digest": "d", "author": "t", "reason": "t", "moe_layers": (0,), "experts": count}
        placement = Placement(version=1, epoch=1, instances=names, homes=homes, **facts)
        instances = {
            f"e{e.number}": ExpertInstance(f"e{e.number}", e.incarnation, e.transport.address, 0.0)
            for e in self.experts
        }
        for expert in self.experts:
            expert.start()
        self.exchange.update(View(placement, instances))

    def check(self, rows: int) -> None:
        """One step of one layer gives the sums that it should."""
        hidden = torch.randn(rows, HIDDEN)
        x = torch.zeros(rows, HIDDEN)
        self.exchange.begin(rows)
        self.exchange.combine(self.exchange.dispatch(0, hidden), x)
        self.exchange.end()
        torch.testing.assert_close(x, sum(0.5 * (1 + expert.number) * hidden for expert in self.experts))

    @property
    def express(self) -> int:
        return self.exchange.stats().express

    def close(self) -> None:
        for expert in self.experts:
            expert.ended = True
            expert.join(10)
            expert.transport.close()
        self.exchange.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool()
    made.check(2)  # links are measured, senders known
    made.check(2)
    yield made
    made.close()


def test_plain_exchanges_go_without_the_interpreter(pool: Pool):
    before = pool.express
    for rows in (1, 3, 64):
        pool.check(rows)
    stats = pool.exchange.stats()
    assert stats.express == before + 3
    assert not stats.repeats
    assert not stats.dropped


def test_more_rows_than_are_recorded_go_the_ordinary_way(pool: Pool):
    before = pool.express
    pool.check(65)
    assert pool.express == before


def late(expert: Expert, reply: Reply) -> None:
    expert.send(replace(reply, header=replace(reply.header, sequence=reply.header.sequence - 1)))


def foreign(expert: Expert, reply: Reply) -> None:
    expert.send(replace(reply, header=replace(reply.header, sender=12345)))


def doubled(expert: Expert, reply: Reply) -> None:
    expert.send(reply)


@pytest.mark.parametrize(("trick", "reason"), [(late, "late"), (foreign, "foreign"), (doubled, "duplicate")])
def test_a_reply_that_nobody_awaits_is_dropped_and_counted_in_python(pool: Pool, trick: Trick, reason: str):
    pool.experts[1].trick = trick
    pool.check(4)
    pool.experts[1].trick = lambda expert, reply: None
    pool.check(4)
    pool.check(4)
    stats = pool.exchange.stats()
    assert stats.dropped[reason] or (reason == "duplicate" and stats.dropped["late"])
    assert not stats.repeats


def test_experts_that_disagree_are_asked_again(pool: Pool):
    wrong = iter((2,))
    pool.experts[0].trick = lambda expert, reply: setattr(reply.header, "digest", next(wrong, 1))
    before = pool.express
    pool.check(4)
    stats = pool.exchange.stats()
    assert stats.repeats["digest"] == 1
    assert stats.express == before


def test_parts_of_an_expert_that_has_no_home_there_are_never_added(pool: Pool):
    wrong = iter((0,))

    def trick(expert: Expert, reply: Reply) -> None:
        reply.parts["expert"] = next(wrong, 1)

    pool.experts[1].trick = trick
    pool.check(4)
    assert pool.exchange.stats().repeats["parts"] == 1


def test_a_wake_in_the_middle_of_an_exchange_loses_nothing(pool: Pool):
    pool.experts[0].trick = lambda expert, reply: pool.exchange.wake()
    for rows in (1, 2, 3):
        pool.check(rows)
    assert not pool.exchange.stats().repeats


def test_more_instances_than_receives_that_are_posted_at_first_are_awaited_together():
    pool = Pool(6)
    try:
        for _ in range(4):
            pool.check(3)
        before = pool.express
        pool.check(3)
        assert pool.express == before + 1
    finally:
        pool.close()


def test_an_instance_that_is_silent_is_left_to_deadlines_and_asked_again(pool: Pool):
    """Nobody else has its expert: it is asked again, and its answer is the one that counts."""
    silent = iter((True,))
    expert = pool.experts[0]
    send = expert.send
    expert.send = lambda reply: None if next(silent, False) else send(reply)  # type: ignore[method-assign]
    pool.exchange._attempts._deadline = pool.exchange._deadline = 0.2
    pool.check(2)
    assert pool.exchange.stats().repeats["deadline"] >= 1
    pool.check(2)


class Line:
    """Of a lane only what a sender's line is made of; counts the rooms that it is given to keep."""

    def __init__(self) -> None:
        self.rooms = 0

    def line(self, peer: object, kept: object) -> tuple[int, int]:
        self.rooms += 1
        return 1, 2


class Sender:
    """A peer."""


def test_a_peer_is_answered_from_one_room_however_often_placements_change():
    lane, peer = Line(), Sender()
    layers: Any = {0: SimpleNamespace(answering=lambda rows: SimpleNamespace(recorded=(0,) * RECORDED))}
    stats = ServerStats(np.zeros((1, 2, 4), np.int64))
    express = ExpertExpress(
        cast(Any, lane), layers, ServerLimits(HIDDEN, torch.float32, 8, 4, 2), stats, mesh=MESH, incarnation=US
    )
    question = Header(FrameKind.DISPATCH, MESH, US, 1, rows=2)
    for version in range(1, 5):
        known = KnownPlacement(version, 0, {0: np.ones(4, np.uint64)}, Policy.ACTIVATED)
        express.learn(cast(Any, peer), question, known)
        express.forget()
    assert lane.rooms == 1
