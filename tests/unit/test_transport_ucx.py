"""What only the UCX transport can get wrong: foreign bytes, senders that hang, settings, waiting."""

from typing import Any

import pytest
import torch

from shared.errors import TransportError
from shared.transport.base import FrameKind, Header
from shared.transport.ucp import FRAME_TAG
from shared.transport.ucx import POSTED_RECEIVES, UcxTransport

MAX_FRAME = 4 << 20


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")


def send(transport: UcxTransport, peer, sequence: int, rows: int) -> None:
    frame = transport.outgoing(0, rows, 64, torch.float32)
    frame.rows.fill_(sequence)
    transport.send([peer], Header(FrameKind.DISPATCH, 1, 1, sequence), frame)


def receive(transport: UcxTransport, sequence: int, *others: UcxTransport) -> None:
    for _ in range(2000):
        for other in others:
            other.receive(0.0)
        frame = transport.receive(0.005)
        if frame is not None:
            assert frame.header.sequence == sequence
            assert frame.rows.eq(sequence).all()
            frame.release()
            return
    raise AssertionError("no frame arrived")


def test_senders_that_hang_halfway_never_use_up_the_receives():
    # Over TCP a large frame needs its sender to take part; these never do again.
    receiver, alive = UcxTransport(MAX_FRAME, tls="tcp"), UcxTransport(MAX_FRAME, tls="tcp")
    hanging = [UcxTransport(MAX_FRAME, tls="tcp") for _ in range(POSTED_RECEIVES + 2)]
    for number, transport in enumerate(hanging):
        peer = transport.connect(receiver.address)
        for _ in range(2):  # until connections are made, nothing large is on its way
            send(transport, peer, number, rows=10_000)
            receive(receiver, number, transport)
        send(transport, peer, 100, rows=10_000)
        assert receiver.receive(0.01) is None
    peer = alive.connect(receiver.address)
    for sequence in range(10, 20):
        send(alive, peer, sequence, rows=1000)
        receive(receiver, sequence, alive)
    for transport in (*hanging, alive, receiver):
        transport.close()


def test_a_short_message_never_revives_the_frame_before_it():
    a, b = UcxTransport(MAX_FRAME, receive_slots=1), UcxTransport(MAX_FRAME)
    peer: Any = b.connect(a.address)
    for sequence in range(5):
        send(b, peer, sequence, rows=4)
        receive(a, sequence, b)
        short = torch.frombuffer(bytearray(b"MOEX"), dtype=torch.uint8)
        assert b._ucx.send(peer.handle, short, len(short), FRAME_TAG) == 0  # so short that it leaves at once
        while a.dropped["malformed"] == sequence:
            b.receive(0.0)
            assert a.receive(0.001) is None
    a.close()
    b.close()


def test_a_frame_over_the_limit_of_the_receiver_is_dropped_and_counted():
    a, b = UcxTransport(1 << 16), UcxTransport(MAX_FRAME)
    peer = b.connect(a.address)
    for rows in (1000, 4000):
        send(b, peer, 1, rows)
    send(b, peer, 2, rows=4)
    receive(a, 2, b)
    assert a.dropped == {"malformed": 0, "too_long": 2, "broken": 0}
    a.close()
    b.close()


def test_frames_with_and_without_rows_apart_mix():
    a, b = UcxTransport(MAX_FRAME, rows_apart=True), UcxTransport(MAX_FRAME)
    there, back = a.connect(b.address), b.connect(a.address)
    for sequence, rows in enumerate((3, 0, 5000, 1, 10_000, 2)):
        send(a, there, sequence, rows)
        receive(b, sequence, a)
        send(b, back, sequence, rows)
        receive(a, sequence, b)
    a.close()
    b.close()


def test_transports_that_do_not_exist_are_refused():
    with pytest.raises(TransportError, match="nonsense"):
        UcxTransport(MAX_FRAME, tls="nonsense")


def test_compiled_code_receives_while_ucx_holds_a_long_frame_but_not_while_another_waits_behind_it():
    a, b = UcxTransport(MAX_FRAME), UcxTransport(MAX_FRAME)
    peer: Any = a.connect(b.address)
    for sequence in range(2):
        send(a, peer, sequence, rows=10_000)
        receive(b, sequence, a)
        while peer.advance():
            assert a.receive(0.0) is b.receive(0.0) is None
    lane = a.lane
    assert lane is not None
    send(a, peer, 2, rows=10_000)
    assert peer.requests.any()  # until the other side takes it
    first = lane.enter()
    send(a, peer, 3, rows=10_000)
    second = lane.enter()
    for sequence in (2, 3):
        receive(b, sequence, a)
    a.close()
    b.close()
    assert first is not None
    assert second is None
