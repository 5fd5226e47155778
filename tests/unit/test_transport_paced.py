"""The paced transport: frames are seen when the link's time has passed, in order, on an injected clock.

What it has in common with every transport is in test_transport_contract.py.
"""

import threading

import pytest
import torch

from shared.device_profile import DeviceProfile
from shared.transport.base import FrameKind, Header, Peer, Transport
from shared.transport.memory import MemoryNetwork
from shared.transport.paced import PacedTransport

LATENCY = DeviceProfile("latency", link_latency_s=0.005)


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Link:
    """Two senders and a receiver, in one thread and on one clock; ``stamped``: the senders are paced too."""

    def __init__(self, profile: DeviceProfile, stamped: bool = True) -> None:
        network = MemoryNetwork()
        clock = self.clock = Clock()
        self.receiver = PacedTransport(network.transport(), profile, clock, clock.sleep)
        senders = [network.transport(), network.transport()]
        self.senders: list[Transport] = [
            PacedTransport(one, profile, clock, clock.sleep) if stamped else one for one in senders
        ]
        self.peers = [sender.connect(self.receiver.address) for sender in self.senders]

    def send(self, sequence: int, sender: int = 0, rows: int = 1) -> None:
        send(self.senders[sender], [self.peers[sender]], sequence, sender, rows)

    def arrived(self, at: float) -> list[int]:
        """Everything that can be received at a moment of the clock."""
        self.clock.now = at
        seen = []
        while frame := self.receiver.receive(0.0):
            seen.append(frame.header.sequence)
            frame.release()
        assert self.clock.now == at
        return seen


def send(transport: Transport, peers: list[Peer], sequence: int, sender: int = 0, rows: int = 1) -> None:
    frame = transport.outgoing(0, rows, 16, torch.float32)
    frame.rows.fill_(sequence)
    transport.send(peers, Header(FrameKind.DISPATCH, mesh=1, sender=sender, sequence=sequence), frame)


def test_a_frame_is_seen_when_the_latency_has_passed_and_not_before():
    link = Link(LATENCY)
    link.send(1)
    assert link.arrived(100.0) == []
    assert link.arrived(100.0049) == []
    assert link.arrived(100.0051) == [1]


def test_frames_that_wait_together_keep_their_own_times():
    link = Link(LATENCY)
    link.send(1)
    assert link.arrived(100.003) == []
    link.send(2)
    assert link.arrived(100.0051) == [1]
    assert link.arrived(100.0081) == [2]


def test_long_frames_take_longer_but_nothing_overtakes_them_on_their_way_from_the_same_sender():
    link = Link(DeviceProfile("slow", link_bytes_per_s=1e6))
    link.send(1, rows=1000)  # 64,128 bytes
    link.send(2, rows=1)
    link.send(3, sender=1, rows=1)
    assert link.arrived(100.0) == []
    assert link.arrived(100.06) == [3]
    assert link.arrived(100.0642) == [1, 2]


def test_a_frame_that_comes_while_the_device_computes_is_due_from_its_sending():
    link = Link(LATENCY)
    link.send(1)
    link.receiver.wait_until(100.003)
    assert link.arrived(100.0051) == [1]
    link.send(2)
    assert link.arrived(100.02) == [2]


def test_a_frame_that_tells_no_plausible_time_is_due_from_its_arrival():
    unstamped, foreign = Link(LATENCY, stamped=False), Link(LATENCY)
    foreign.clock.now = 5000.0
    for link in (unstamped, foreign):
        link.send(1)
        link.clock.now = 100.0
        assert link.arrived(100.01) == []
        assert link.arrived(100.0151) == [1]


def test_the_time_in_a_header_survives_its_wrap():
    link = Link(LATENCY)
    link.clock.now = wrap = 2**32 * 1e-6
    link.clock.now -= 0.002
    link.send(1)
    assert link.arrived(wrap + 0.0029) == []
    assert link.arrived(wrap + 0.0031) == [1]


def test_sending_occupies_the_sender_for_each_message_and_nothing_else_delays_it():
    network, clock = MemoryNetwork(), Clock()
    profile = DeviceProfile("send", send_s=0.002, link_latency_s=0.5)
    sender = PacedTransport(network.transport(), profile, clock, clock.sleep)
    receivers = [network.transport() for _ in range(3)]
    send(sender, [sender.connect(receiver.address) for receiver in receivers], 1)
    assert clock.now == pytest.approx(100.006)
    assert all(receiver.receive(0.0) for receiver in receivers)


def test_a_receive_ends_when_the_first_held_frame_is_due_or_its_own_time_is_over():
    link = Link(LATENCY)
    link.send(1)
    assert link.arrived(100.0) == []
    assert link.receiver.receive(0.003) is None
    assert link.clock.now == pytest.approx(100.003)
    assert link.receiver.receive(60.0) is not None
    assert link.clock.now == pytest.approx(100.005)


def test_a_long_receive_returns_a_held_frame_when_it_is_due():
    network = MemoryNetwork()
    receiver, sender = PacedTransport(network.transport(), LATENCY), network.transport()
    send(sender, [sender.connect(receiver.address)], 1)
    frame = receiver.receive(60.0)
    assert frame is not None
    assert frame.header.sequence == 1


def test_a_wake_while_the_device_computes_ends_the_next_receive():
    network = MemoryNetwork()
    receiver = PacedTransport(network.transport(), LATENCY)
    thread = threading.Timer(0.005, receiver.wake)
    thread.start()
    receiver.wait_until(receiver._clock() + 0.02)
    thread.join()
    assert receiver.receive(60.0) is None


def test_frames_that_were_held_at_the_end_are_forgotten():
    link = Link(LATENCY)
    link.send(1)
    assert link.arrived(100.0) == []
    link.receiver.close()
    link.receiver.close()
    assert link.arrived(101.0) == []
