"""The experts' side, frame by frame: it answers or refuses what it understands and survives everything else."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from services.experts.answers import KnownPlacement
from services.experts.server import ExpertServer
from shared.activation import PARTS
from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Refusal
from shared.transport.memory import MemoryNetwork
from tests.unit.toy_engine import RecordingAwake
from tests.unit.toy_experts import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    LIMITS,
    MESH,
    TOP_K,
    ToyLayer,
    everywhere,
    make_placement,
    random_rows,
    round_robin,
)

ASKER = 900


class Asker:
    """An expert server in a thread and a bare transport that talks to it."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.traced: list[tuple] = []
        self.awake = RecordingAwake()
        self.network = network
        self.far = network.transport(max_frame_bytes=1 << 16)
        self.near = network.transport(max_frame_bytes=1 << 16)
        self.layers = {layer: ToyLayer(layer) for layer in LAYERS}
        self.server = ExpertServer(
            self.far, self.layers, LIMITS, mesh=MESH, incarnation=100, record=lambda *a: self.traced.append(a),
            awake=self.awake,
        )  # fmt: skip
        self.peer = self.near.connect(self.far.address)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.far.close()
        self.near.close()

    def settle(self) -> None:
        """Return when the server has finished what it had begun."""
        self.server.detach([]).result(60)

    def adopt(self, *placements) -> None:
        self.server.adopt([KnownPlacement.of(p, "e0") for p in placements]).result(60)

    def hello(self, address: bytes = b"", sender: int = ASKER) -> None:
        self.send(FrameKind.HELLO, meta=address or self.near.address, sender=sender)

    def send(self, kind: FrameKind, rows: torch.Tensor | None = None, meta: bytes = b"", **header) -> None:
        count, columns = rows.shape if rows is not None else (0, 0)
        frame = self.near.outgoing(len(meta), count, columns, rows.dtype if rows is not None else DTYPES[0])
        frame.meta[:] = memoryview(meta)
        if rows is not None:
            frame.rows.copy_(rows)
        made = Header(kind, MESH, ASKER, 1, epoch=7, placement=1, live=0b11, layer=LAYERS[0])
        for name, value in header.items():
            setattr(made, name, value)
        self.near.send([self.peer], made, frame)

    def reply(self, kind: FrameKind) -> Incoming:
        incoming = self.near.receive(60)
        assert incoming is not None, "no reply"
        assert incoming.header.kind == kind
        return incoming

    def refusal(self) -> tuple[Refusal, str]:
        meta = self.reply(FrameKind.REFUSAL).meta
        return Refusal(int(meta[0])), bytes(meta[1:]).decode()


@pytest.fixture
def asker():
    made = Asker(MemoryNetwork())
    made.adopt(make_placement(round_robin(2), ["e0", "e1"]))
    yield made
    made.close()


def test_parts_come_sorted_with_weights_and_echo_the_question(asker):
    asker.hello()
    rows = random_rows(3, 9)
    trace = {"trace_id": bytes(range(16)), "span_id": bytes(range(8))}
    asker.send(FrameKind.DISPATCH, rows, sequence=41, attempt=2, group=5, layer=LAYERS[1], **trace)
    reply = asker.reply(FrameKind.COMBINE)
    header, parts = reply.header, reply.meta.view(PARTS)[: reply.header.rows]
    assert (header.sender, header.sequence, header.attempt, header.group) == (100, 41, 2, 5)
    assert (header.placement, header.epoch, header.live, header.layer) == (1, 7, 0b11, LAYERS[1])
    assert parts.tolist() == sorted(parts.tolist(), key=lambda p: (p[1], p[0]))
    weights, ids = (t.numpy() for t in asker.layers[LAYERS[1]].gate(rows))
    mine = {(t, e, weights[t, j]) for t in range(9) for j, e in enumerate(ids[t].tolist()) if e % 2 == 0}
    assert set(parts.tolist()) == mine
    for row, (token, expert, _) in zip(reply.rows, parts.tolist(), strict=True):
        assert np.array_equal(row.numpy(), asker.layers[LAYERS[1]].expert(expert, rows[token].numpy()))
    asker.settle()
    stats = asker.server.stats
    assert stats.by_expert[:, 0].sum() == stats.parts == len(parts)
    assert stats.by_expert[1, 1].tolist() == [int(e in parts["expert"]) for e in range(EXPERTS)]
    assert [a[0] for a in asker.traced] == [(bytes(range(16)), bytes(range(8)))]


def test_cores_are_kept_awake_from_a_frame_until_silence(asker):
    asker.hello()
    asker.settle()
    end = time.monotonic() + 60
    while asker.awake.held and time.monotonic() < end:
        time.sleep(0.01)
    assert asker.awake.history[:2] == [True, False]


def test_time_in_which_a_reply_is_being_sent_is_not_the_experts(asker, monkeypatch):
    """Whom it wakes may have the core meanwhile."""
    send, slow = asker.far.send, 0.2

    def slowly(*args) -> None:
        time.sleep(slow)
        send(*args)

    asker.hello()
    monkeypatch.setattr(asker.far, "send", slowly)
    start = time.monotonic()
    asker.send(FrameKind.DISPATCH, random_rows(3, 2))
    asker.reply(FrameKind.COMBINE).release()
    asker.settle()
    assert 0 < asker.server.stats.busy_s < time.monotonic() - start - slow


def test_rows_of_another_dtype_are_converted(asker):
    """Attention on a GPU may send bfloat16 to experts on a CPU."""
    asker.hello()
    asker.send(FrameKind.DISPATCH, random_rows(3, 2).bfloat16())
    first = asker.reply(FrameKind.COMBINE)
    asker.send(FrameKind.DISPATCH, random_rows(3, 2).bfloat16().float())
    assert first.rows.equal(asker.reply(FrameKind.COMBINE).rows)


def test_a_leader_that_takes_over_changes_the_epoch_of_a_version_and_nothing_else(asker):
    asker.hello()
    asker.send(FrameKind.DISPATCH, random_rows(1, 1), epoch=8)
    asker.reply(FrameKind.COMBINE)


def test_any_exchange_may_be_repeated(asker):
    asker.hello()
    answers = []
    for attempt in range(3):
        asker.send(FrameKind.DISPATCH, random_rows(3, 4), attempt=attempt)
        reply = asker.reply(FrameKind.COMBINE)
        answers.append((reply.header.digest, reply.meta.tobytes(), reply.rows.numpy().tobytes()))
        reply.release()
    assert len(set(answers)) == 1


def test_all_instances_agree_on_the_digest_and_share_the_parts():
    network = MemoryNetwork()
    askers = [Asker(network), Asker(network)]
    placement = make_placement(everywhere(2), ["e0", "e1"])
    digests, parts = set(), 0
    for name, asker in zip(["e0", "e1"], askers, strict=True):
        asker.server.adopt([KnownPlacement.of(placement, name)]).result(60)
        asker.hello()
        asker.send(FrameKind.DISPATCH, random_rows(1, 8))
        header = asker.reply(FrameKind.COMBINE).header
        digests.add(header.digest)
        parts += header.rows
        asker.close()
    assert len(digests) == 1 and parts == 8 * TOP_K


def test_an_instance_without_parts_still_answers(asker):
    """Attention counts answers, and an empty one carries the digest too."""
    asker.adopt(make_placement([[1]] * EXPERTS, ["e0", "e1"]))
    asker.hello()
    asker.send(FrameKind.DISPATCH, random_rows(1, 2))
    header = asker.reply(FrameKind.COMBINE).header
    assert header.rows == 0 and header.columns == HIDDEN and header.digest
    assert asker.layers[LAYERS[0]].forwards == 0


def test_a_probe_without_rows_is_answered(asker):
    asker.hello()
    asker.send(FrameKind.DISPATCH, torch.empty(0, HIDDEN))
    assert asker.reply(FrameKind.COMBINE).header.rows == 0


@pytest.mark.parametrize(
    ("code", "words", "rows", "header"),
    [
        (Refusal.UNKNOWN_PLACEMENT, "placement 2 is not loaded", random_rows(1, 1), {"placement": 2}),
        (Refusal.NO_HOME, "no live home", random_rows(1, 8), {"live": 0b01}),
        (Refusal.BAD_REQUEST, "layer 2 has no routed experts", random_rows(1, 1), {"layer": 2}),
        (Refusal.BAD_REQUEST, "rows of 5 columns", torch.zeros(1, 5), {}),
        (Refusal.BAD_REQUEST, "limit here is 64", torch.zeros(65, HIDDEN), {}),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_the_reason(asker, code, words, rows, header):
    asker.hello()
    asker.send(FrameKind.DISPATCH, rows, **header)
    got, message = asker.refusal()
    assert got is code and words in message
    assert asker.server.stats.refused == Counter({code.name.lower(): 1})
    asker.send(FrameKind.DISPATCH, random_rows(1, 1))
    asker.reply(FrameKind.COMBINE)


@pytest.mark.parametrize(
    ("reason", "send"),
    [
        ("unknown_sender", lambda a: a.send(FrameKind.DISPATCH, random_rows(1, 1), sender=77)),
        ("foreign", lambda a: a.send(FrameKind.DISPATCH, random_rows(1, 1), mesh=1)),
        ("foreign", lambda a: a.send(FrameKind.HELLO, meta=b"x", mesh=1)),
        ("bad_hello", lambda a: a.hello(b"no such address", sender=77)),
        ("late", lambda a: a.send(FrameKind.COMBINE, random_rows(1, 1))),
        ("late", lambda a: a.send(FrameKind.REFUSAL, meta=b"\1")),
        ("unexpected", lambda a: a.send(FrameKind.SUM, random_rows(1, 1))),
    ],
)  # fmt: skip
def test_what_deserves_no_answer_is_dropped_and_counted(asker, reason, send):
    asker.hello()
    send(asker)
    asker.send(FrameKind.DISPATCH, random_rows(1, 1))
    asker.reply(FrameKind.COMBINE)
    assert asker.server.stats.dropped == Counter({reason: 1})


def test_hello_with_a_new_address_moves_the_replies(asker):
    """The same incarnation behind another transport; a repeated HELLO changes nothing."""
    asker.hello()
    asker.hello()
    old, asker.near = asker.near, asker.network.transport(max_frame_bytes=1 << 16)
    asker.peer = asker.near.connect(asker.far.address)
    asker.hello()
    asker.send(FrameKind.DISPATCH, random_rows(1, 1))
    asker.reply(FrameKind.COMBINE)
    assert old.receive(0) is None


def test_a_detached_sender_must_say_hello_again(asker):
    asker.hello()
    asker.send(FrameKind.DISPATCH, random_rows(1, 1))
    asker.reply(FrameKind.COMBINE)
    asker.server.detach([ASKER, 12345]).result(60)
    asker.send(FrameKind.DISPATCH, random_rows(1, 1))
    asker.hello()
    asker.send(FrameKind.DISPATCH, random_rows(1, 1))
    asker.reply(FrameKind.COMBINE)
    assert asker.server.stats.dropped == Counter(unknown_sender=1)


def test_two_versions_are_answered_and_a_third_ends_the_first(asker):
    versions = [make_placement(round_robin(2), ["e0", "e1"], version=v) for v in (1, 2, 3)]
    asker.hello()
    asker.adopt(*versions[:2])
    for version in (1, 2):
        asker.send(FrameKind.DISPATCH, random_rows(1, 1), placement=version)
        asker.reply(FrameKind.COMBINE).release()
    asker.adopt(*versions[1:])
    asker.send(FrameKind.DISPATCH, random_rows(1, 1), placement=1)
    assert asker.refusal()[0] is Refusal.UNKNOWN_PLACEMENT


def test_a_placement_that_does_not_name_us_gives_us_no_parts(asker):
    asker.server.adopt([KnownPlacement.of(make_placement(round_robin(2), ["a", "b"]), "e0")]).result(60)
    asker.hello()
    asker.send(FrameKind.DISPATCH, random_rows(1, 4))
    assert asker.reply(FrameKind.COMBINE).header.rows == 0
