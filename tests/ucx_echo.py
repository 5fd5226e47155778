"""A process that sends every frame back; started by the UCX tests, which kill it.

    python -m tests.ucx_echo [--tls tcp] [--device cuda] [--die]

Prints its address; connects to whoever says HELLO. ``--die``: starts to send a large frame at HELLO and dies.
"""

import argparse
import os
import signal
import sys

import torch

from shared.transport.base import DTYPES, FrameKind, Header, Incoming, Peer
from shared.transport.ucx import UcxTransport

MAX_FRAME = 32 << 20
DYING = 99
"""Sequence of the frame that is half sent."""


def answer(transport: UcxTransport, peer: Peer, frame: Incoming) -> None:
    asked = frame.header
    reply = transport.outgoing(asked.meta_bytes, asked.rows, asked.columns, DTYPES[asked.dtype])
    reply.meta[:] = frame.meta
    reply.rows.copy_(frame.rows)
    frame.release()
    transport.send([peer], Header(FrameKind.COMBINE, asked.mesh, 2, asked.sequence), reply)


def die_halfway(transport: UcxTransport, peer: Peer) -> None:
    frame = transport.outgoing(0, 1, 1 << 20, torch.float32)
    transport.send([peer], Header(FrameKind.COMBINE, 1, 2, DYING), frame)
    # Enough turns to announce the frame, whose bytes nobody fetches meanwhile.
    for _ in range(100):
        transport.receive(0.0)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tls", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--die", action="store_true")
    args = parser.parse_args()
    transport = UcxTransport(MAX_FRAME, torch.device(args.device), args.tls)
    print(transport.address.hex(), flush=True)
    peer: Peer | None = None
    parent = os.getppid()
    while os.getppid() == parent:
        frame = transport.receive(0.1)
        if frame is None:
            continue
        if frame.header.kind == FrameKind.HELLO:
            peer = transport.connect(frame.meta.tobytes())
            frame.release()
            if args.die:
                die_halfway(transport, peer)
        elif peer is None:
            sys.exit("a frame before HELLO")
        else:
            answer(transport, peer, frame)


if __name__ == "__main__":
    main()
