"""UCX between real processes: bytes arrive whole, killed peers and garbage harm nobody."""

import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from shared.transport.base import FrameKind, Header
from shared.transport.ucp import FRAME_TAG, IN_PROGRESS
from shared.transport.ucx import POSTED_RECEIVES, UcxTransport
from tests.ucx_echo import DYING, MAX_FRAME
from tests.ucx_process import Echo, receive, round_trip

Start = Callable[..., Echo]


@pytest.fixture(params=["", "tcp"])
def tls(request, monkeypatch) -> str:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return request.param


@pytest.fixture
def start(tls: str) -> Iterator[Start]:
    transport = UcxTransport(MAX_FRAME, tls=tls)
    echoes: list[Echo] = []

    def start_one(*arguments: str) -> Echo:
        echoes.append(Echo(transport, "--tls", tls, *arguments))
        if not arguments:
            echoes[-1].connect()
        return echoes[-1]

    yield start_one
    for echo in echoes:
        echo.kill()
    transport.close()


def random_rows(sequence: int, nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sequence)
    return torch.randint(-1000, 1000, (nbytes // 64, 16), generator=generator, dtype=torch.int32).float()


def checksum(rows: torch.Tensor) -> int:
    return zlib.crc32(rows.numpy().tobytes())


def test_frames_up_to_16_mib_come_back_with_the_same_checksum(start: Start):
    echo = start()
    for sequence, shift in enumerate((0, *range(6, 25, 2))):
        rows = random_rows(sequence, 1 << shift)
        assert checksum(round_trip(echo, sequence, rows)) == checksum(rows)


def test_a_killed_peer_is_survived_and_its_successor_served(start: Start):
    old = start()
    round_trip(old, 1, random_rows(1, 1 << 16))
    for sequence in range(4):
        old.send(sequence, random_rows(sequence, 1 << 20))
    old.kill()
    for sequence in range(400):
        old.send(sequence, random_rows(sequence, 1 << (20 if sequence % 100 == 0 else 8)))
        while frame := old.transport.receive(0.0):
            frame.release()
    old.transport.disconnect(old.peer)
    assert not old.peer.alive
    new = start()
    assert new.address != old.address
    for sequence in range(1000, 1010):
        rows = random_rows(sequence, 1 << 18)
        assert checksum(round_trip(new, sequence, rows)) == checksum(rows)


def test_peers_that_die_while_they_send_never_use_up_the_receives(start: Start):
    victims = [start("--die") for _ in range(POSTED_RECEIVES + 1)]
    alive = start()
    round_trip(alive, 1, random_rows(1, 1 << 10))
    for victim in victims:
        victim.connect()
        while victim.process.poll() is None:
            if (frame := alive.transport.receive(0.001)) is not None:
                frame.release()
    for sequence in range(10, 20):
        rows = random_rows(sequence, 1 << 16)
        alive.send(sequence, rows)
        frame = receive(alive.transport)
        while frame is not None and frame.header.sequence == DYING:
            frame.release()
            frame = receive(alive.transport)
        assert frame is not None
        assert checksum(frame.rows) == checksum(rows)
        frame.release()


def test_foreign_bytes_are_dropped_and_counted(start: Start):
    echo = start()
    transport = echo.transport
    raw = UcxTransport(1 << 20)
    endpoint = raw.connect(transport.address)
    good = np.zeros(256, np.uint8)
    Header(FrameKind.COMBINE, 1, 2, 3, rows=1 << 30, columns=1 << 30).pack_into(good)
    garbage = [b"", b"x", b"MOEX", bytes(127), bytes(4096), np.random.default_rng(0).bytes(1 << 20), good.tobytes()]
    too_long = bytes(MAX_FRAME + 4096)
    for message in (*garbage, too_long):
        send_raw(raw, endpoint, message, transport)
    assert transport.dropped == {"malformed": len(garbage), "too_long": 1, "broken": 0}
    rows = random_rows(5, 1 << 16)
    assert checksum(round_trip(echo, 5, rows)) == checksum(rows)
    raw.close()


def send_raw(raw: UcxTransport, peer, message: bytes, target: UcxTransport) -> None:
    """Send bytes that no transport would send, and let the target meet them."""
    ucx = raw._ucx
    before = sum(target.dropped.values())
    memory = torch.frombuffer(bytearray(message or b"-"), dtype=torch.uint8)
    request = ucx.send(peer.handle, memory, len(message), FRAME_TAG)
    for _ in range(2000):
        request = 0 if request and ucx.ended(request) != IN_PROGRESS else request
        if not request and sum(target.dropped.values()) > before:
            return
        raw.receive(0.0)
        assert target.receive(0.001) is None
    raise AssertionError("the bytes were not noticed")
