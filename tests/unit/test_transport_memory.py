"""The in-process transport: faults are deterministic and counted, cut peers are silent, breaches of discipline show."""

import threading

import pytest
import torch

from shared.errors import TransportError
from shared.transport.base import FrameKind, Header
from shared.transport.faults import Fault, Faults, Rates
from shared.transport.memory import MemoryNetwork, MemoryTransport


def send(transport: MemoryTransport, peer, sequence: int, kind: FrameKind = FrameKind.DISPATCH, rows: int = 1) -> None:
    frame = transport.outgoing(0, rows, 8, torch.float32)
    frame.rows.fill_(sequence)
    transport.send([peer], Header(kind, mesh=1, sender=1, sequence=sequence), frame)


def drain(transport: MemoryTransport, timeout: float = 0.1) -> list[int]:
    seen = []
    while frame := transport.receive(timeout):
        assert frame.rows.eq(frame.header.sequence).all()
        seen.append(frame.header.sequence)
        frame.release()
    return seen


def run(faults: Faults, count: int = 40) -> list[int]:
    network = MemoryNetwork(faults)
    a, b = network.transport(), network.transport()
    peer = a.connect(b.address)
    for sequence in range(count):
        send(a, peer, sequence)
    return drain(b)


def test_every_kind_of_fault_strikes_and_is_counted():
    faults = Faults(seed=3, rates={FrameKind.DISPATCH: Rates(drop=0.2, duplicate=0.2, delay=0.2, reorder=0.2)})
    seen = run(faults)
    counts = {fault: faults.counts[FrameKind.DISPATCH, fault] for fault in Fault}
    assert all(counts.values())
    assert len(set(seen)) == 40 - counts[Fault.DROP]
    assert len(seen) == len(set(seen)) + counts[Fault.DUPLICATE]
    assert seen != sorted(seen)


def test_the_same_seed_strikes_the_same_frames():
    rates = {FrameKind.DISPATCH: Rates(drop=0.3, duplicate=0.3)}
    first, second = Faults(5, rates), Faults(5, rates)
    assert sorted(run(first)) == sorted(run(second))
    assert first.counts == second.counts
    assert sorted(run(Faults(6, rates))) != sorted(run(Faults(5, rates)))


def test_the_fate_of_a_frame_does_not_depend_on_other_kinds():
    rates = {FrameKind.DISPATCH: Rates(drop=0.5), FrameKind.COMBINE: Rates(drop=0.5)}
    alone, mixed = Faults(1, rates), Faults(1, rates)
    fates = [len(alone.strike("a>b", FrameKind.DISPATCH)) for _ in range(50)]
    for fate in fates:
        mixed.strike("a>b", FrameKind.COMBINE)
        assert len(mixed.strike("a>b", FrameKind.DISPATCH)) == fate


def test_a_schedule_strikes_exactly_the_frame_it_names():
    assert run(Faults(schedule={(FrameKind.DISPATCH, 2): Fault.DROP}), count=5) == [0, 1, 3, 4]
    assert run(Faults(schedule={(FrameKind.COMBINE, 2): Fault.DROP}), count=5) == [0, 1, 2, 3, 4]


def test_delay_alone_keeps_the_order():
    assert run(Faults(2, {FrameKind.DISPATCH: Rates(delay=0.5)})) == list(range(40))


def test_a_cut_peer_is_silent_until_it_is_healed():
    network = MemoryNetwork()
    a, b = network.transport(), network.transport()
    peer = a.connect(b.address)
    network.cut(b.address)
    send(a, peer, 1)
    assert peer.alive
    assert drain(b, timeout=0.01) == []
    assert network.lost == 1
    network.heal(b.address)
    send(a, peer, 2)
    assert drain(b, timeout=0.01) == [2]


def test_memory_is_poisoned_once_it_is_sent_or_released():
    network = MemoryNetwork()
    a, b = network.transport(), network.transport()
    frame = a.outgoing(4, 2, 8, torch.float32)
    frame.rows.fill_(1.0)
    a.send([a.connect(b.address)], Header(FrameKind.DISPATCH, 1, 1, 1), frame)
    assert frame.rows.isnan().all()
    received = b.receive(1.0)
    assert received is not None
    rows, meta = received.rows, received.meta
    assert rows.eq(1.0).all()
    received.release()
    assert rows.isnan().all()
    assert (meta == 0xFF).all()


def test_a_closed_transport_is_dead_and_cannot_be_connected_to():
    network = MemoryNetwork()
    a, b = network.transport(), network.transport()
    peer = a.connect(b.address)
    b.close()
    assert not peer.alive
    send(a, peer, 1)
    with pytest.raises(TransportError, match="no transport"):
        a.connect(b.address)


def test_transports_in_different_threads_exchange_frames():
    network = MemoryNetwork()
    a, b = network.transport(), network.transport()

    def echo() -> None:
        peer = b.connect(a.address)
        for _ in range(100):
            frame = b.receive(5.0)
            assert frame is not None
            send(b, peer, frame.header.sequence)
            frame.release()

    thread = threading.Thread(target=echo)
    thread.start()
    peer = a.connect(b.address)
    for sequence in range(100):
        send(a, peer, sequence)
        frame = a.receive(5.0)
        assert frame is not None
        assert frame.header.sequence == sequence
        frame.release()
    thread.join(5.0)
    assert not thread.is_alive()
