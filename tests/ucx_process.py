"""Starts echo processes for the UCX tests and talks to them with deadlines."""

import subprocess
import sys
import time

import numpy as np
import torch

from shared.transport.base import FrameKind, Header, Incoming, Peer
from shared.transport.ucx import UcxTransport

DEADLINE_S = 60.0


class Echo:
    """One echo process, as the transport of the test sees it."""

    def __init__(self, transport: UcxTransport, *arguments: str) -> None:
        self.transport = transport
        command = [sys.executable, "-m", "tests.ucx_echo", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def connect(self) -> None:
        """Wait for the process's address, connect and say HELLO."""
        assert self.process.stdout is not None
        self.address = bytes.fromhex(self.process.stdout.readline())
        self.peer: Peer = self.transport.connect(self.address)
        frame = self.transport.outgoing(len(self.transport.address), 0, 0, torch.float32)
        frame.meta[:] = np.frombuffer(self.transport.address, np.uint8)
        self.transport.send([self.peer], Header(FrameKind.HELLO, 1, 1, 0), frame)

    def send(self, sequence: int, rows: torch.Tensor) -> None:
        frame = self.transport.outgoing(8, rows.shape[0], rows.shape[1], rows.dtype)
        frame.meta[:] = sequence % 251
        frame.rows.copy_(rows)
        self.transport.send([self.peer], Header(FrameKind.DISPATCH, 1, 1, sequence), frame)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def receive(transport: UcxTransport, seconds: float = DEADLINE_S) -> Incoming | None:
    """The next frame within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        frame = transport.receive(0.05)
        if frame is not None:
            return frame
    return None


def round_trip(echo: Echo, sequence: int, rows: torch.Tensor) -> torch.Tensor:
    """A copy of the rows that come back."""
    echo.send(sequence, rows)
    frame = receive(echo.transport)
    assert frame is not None, "no answer"
    assert (frame.header.kind, frame.header.sequence) == (FrameKind.COMBINE, sequence)
    assert (frame.meta == sequence % 251).all()
    back = frame.rows.clone()
    frame.release()
    return back
