"""What every transport promises, checked on all of them: order, reuse, isolation, waiting, wake, close."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from shared.device_profile import DeviceProfile
from shared.errors import TransportError
from shared.transport.base import FrameKind, Header, Transport
from shared.transport.memory import MemoryNetwork
from shared.transport.paced import PacedTransport
from shared.transport.ucx import UcxTransport

MAX_FRAME = 8 << 20
SLOTS = 6
LINK = DeviceProfile("link", link_latency_s=1e-3, link_bytes_per_s=1e9, send_s=1e-4)
Make = Callable[[], Transport]


@pytest.fixture(params=["memory", "memory paced", "ucx", "ucx rows apart", "ucx tcp", "ucx paced"])
def make(request, monkeypatch) -> Iterator[Make]:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    network = MemoryNetwork()
    made: list[Transport] = []

    def make_one() -> Transport:
        if "memory" in request.param:
            one: Transport = network.transport(MAX_FRAME, SLOTS)
        else:
            tls, apart = "tcp" if "tcp" in request.param else "", "apart" in request.param
            one = UcxTransport(MAX_FRAME, tls=tls, receive_slots=SLOTS, rows_apart=apart)
        made.append(PacedTransport(one, LINK) if "paced" in request.param else one)
        return made[-1]

    yield make_one
    for transport in made:
        transport.close()


def header(sequence: int, kind: FrameKind = FrameKind.DISPATCH) -> Header:
    return Header(kind, mesh=7, sender=11, sequence=sequence)


def send(transport: Transport, peers: list, sequence: int, rows: int = 2, columns: int = 16, meta: int = 3) -> None:
    frame = transport.outgoing(meta, rows, columns, torch.float32)
    frame.rows.fill_(sequence)
    frame.meta[:] = sequence % 251
    transport.send(peers, header(sequence), frame)


def receive(transport: Transport, *others: Transport):
    """The next frame; other transports of this thread are driven too, as large sends need both sides."""
    for _ in range(2000):
        for other in others:
            assert other.receive(0.0) is None
        frame = transport.receive(0.005)
        if frame is not None:
            return frame
    raise AssertionError("no frame arrived")


def check(frame, sequence: int, rows: int = 2, columns: int = 16, meta: int = 3) -> None:
    assert frame.header.sequence == sequence
    assert (frame.header.mesh, frame.header.sender, frame.header.flags) == (7, 11, 0)
    assert frame.rows.shape == (rows, columns)
    assert frame.rows.dtype == torch.float32
    assert frame.rows.eq(sequence).all()
    assert frame.meta.shape == (meta,)
    assert (frame.meta == sequence % 251).all()


def test_a_frame_arrives_as_it_was_sent(make: Make):
    a, b = make(), make()
    frame = a.outgoing(5, 3, 4, torch.bfloat16)
    frame.meta[:] = np.arange(5)
    frame.rows.copy_(torch.arange(12).view(3, 4))
    sent = Header(
        FrameKind.COMBINE, 1, 2, 3, 4, 5, 6, 7, 8, 9, flags=3, digest=10, trace_id=b"t" * 16, span_id=b"s" * 8
    )
    a.send([a.connect(b.address)], sent, frame)
    got = receive(b, a)
    assert got.header == sent
    assert (got.header.rows, got.header.columns, got.header.meta_bytes) == (3, 4, 5)
    assert got.meta.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(got.rows, torch.arange(12, dtype=torch.bfloat16).view(3, 4))
    got.release()


def test_frames_of_any_size_arrive_in_order(make: Make):
    a, b = make(), make()
    peer = a.connect(b.address)
    sizes = [1000, 0, 1, 30, 4000, 1, 300, 0, 20000, 1, 5, 60, 2]
    for sequence, rows in enumerate(sizes):
        send(a, [peer], sequence, rows=rows, columns=64)
    for sequence, rows in enumerate(sizes):
        frame = receive(b, a)
        check(frame, sequence, rows=rows, columns=64)
        frame.release()


def test_buffers_are_reused_without_mixing_frames(make: Make):
    a, b = make(), make()
    there, back = a.connect(b.address), b.connect(a.address)
    for sequence in range(300):
        rows = sequence % 7 * 40
        send(a, [there], sequence, rows=rows)
        frame = receive(b, a)
        check(frame, sequence, rows=rows)
        send(b, [back], sequence + 1000, rows=rows)
        frame.release()
        frame = receive(a, b)
        check(frame, sequence + 1000, rows=rows)
        frame.release()


def test_one_frame_reaches_many_peers(make: Make):
    a, *others = [make() for _ in range(5)]
    peers = [a.connect(other.address) for other in others]
    for sequence, rows in enumerate((1, 5000, 2)):
        send(a, peers, sequence, rows=rows)
        for other in others:
            frame = receive(other, a)
            check(frame, sequence, rows=rows)
            frame.release()


def test_many_peers_send_to_one(make: Make):
    a, *others = [make() for _ in range(5)]
    peers = [other.connect(a.address) for other in others]
    for number, (other, peer) in enumerate(zip(others, peers, strict=True)):
        for sequence in range(20):
            send(other, [peer], number * 100 + sequence, rows=sequence * 50)
    seen: list[list[int]] = [[] for _ in others]
    for _ in range(80):
        frame = receive(a, *others)
        number, sequence = divmod(frame.header.sequence, 100)
        check(frame, frame.header.sequence, rows=sequence * 50)
        seen[number].append(sequence)
        frame.release()
    assert seen == [list(range(20))] * 4


def test_frames_wait_while_all_slots_are_held(make: Make):
    a, b = make(), make()
    peer = a.connect(b.address)
    for sequence in range(4 * SLOTS):
        send(a, [peer], sequence, rows=sequence * 100)
    held = [receive(b, a) for _ in range(SLOTS)]
    assert b.receive(0.01) is None
    for sequence in range(4 * SLOTS):
        frame = held.pop(0)
        check(frame, sequence, rows=sequence * 100)
        frame.release()
        frame.release()
        if sequence + SLOTS < 4 * SLOTS:
            held.append(receive(b, a))
    assert b.receive(0.0) is None


def test_a_frame_can_be_sent_once(make: Make):
    a, b = make(), make()
    peer = a.connect(b.address)
    frame = a.outgoing(0, 1, 1, torch.float32)
    a.send([peer], header(1), frame)
    with pytest.raises(TransportError, match="once"):
        a.send([peer], header(1), frame)


def test_a_frame_to_nobody_gives_its_buffer_back(make: Make):
    a = make()
    first = a.outgoing(0, 1, 1, torch.float32)
    a.send([], header(1), first)
    assert a.outgoing(0, 1, 1, torch.float32) is first


def test_a_frame_over_the_limit_is_refused_before_it_is_filled(make: Make):
    a = make()
    with pytest.raises(TransportError, match="limit"):
        a.outgoing(0, MAX_FRAME // 4, 1, torch.float32)
    with pytest.raises(TransportError, match="float64"):
        a.outgoing(0, 1, 1, torch.float64)


def test_an_address_that_is_none_is_refused(make: Make):
    a = make()
    for address in (b"", b"nobody", bytes(200), a.address[:-1], a.address[:-1] + bytes([a.address[-1] ^ 1])):
        with pytest.raises(TransportError):
            a.connect(address)


def test_a_disconnected_peer_gets_nothing_and_can_be_connected_again(make: Make):
    a, b = make(), make()
    peer = a.connect(b.address)
    send(a, [peer], 1)
    receive(b, a).release()
    a.disconnect(peer)
    assert not peer.alive
    send(a, [peer], 2)
    again = a.connect(b.address)
    assert again.alive
    send(a, [again], 3, rows=4000)
    frame = receive(b, a)
    check(frame, 3, rows=4000)
    frame.release()


def test_receive_returns_none_when_nothing_comes(make: Make):
    a = make()
    assert a.receive(0.0) is None
    assert a.receive(0.01, busy=True) is None
    assert a.receive(0.01, busy=False) is None


def test_wake_ends_a_long_receive_from_another_thread(make: Make):
    a = make()
    for busy in (True, False):
        thread = threading.Timer(0.02, a.wake)
        thread.start()
        assert a.receive(60.0, busy) is None
        thread.join()


def test_wakes_before_a_receive_are_kept_and_count_as_one(make: Make):
    a, b = make(), make()
    for _ in range(3):
        a.wake()
    assert a.receive(60.0) is None
    send(b, [b.connect(a.address)], 1)
    check(receive(a, b), 1)


def test_close_is_idempotent_and_wake_after_it_is_harmless(make: Make):
    a, b = make(), make()
    peer = a.connect(b.address)
    send(a, [peer], 1)
    frame = receive(b, a)
    b.close()
    b.close()
    b.wake()
    frame.release()
    send(a, [peer], 2)
    a.disconnect(peer)
    a.close()
