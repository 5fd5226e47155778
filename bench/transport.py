"""Round trip over the data plane: one frame to every peer process, one frame back from each.

    python bench/transport.py [--peers 2] [--tls tcp] [--spin-us 100] [--compute-us 200]

Prints one line per payload (latency in microseconds) and the CPU that an idle receiver takes; the last line is JSON.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import torch
from common import report

from shared.transport.base import FrameKind, Header, Incoming, Peer
from shared.transport.ucx import UcxTransport

PAYLOADS = (1 << 10, 16 << 10, 64 << 10, 1 << 20, 8 << 20)
IDLE_S = 2.0
SILENCE_S = 10.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=int, default=1, help="processes that answer")
    parser.add_argument("--tls", default="", help="UCX transports")
    parser.add_argument("--spin-us", type=float, default=100.0, help="microseconds of polling before a sleep")
    parser.add_argument("--compute-us", type=float, default=0.0, help="microseconds of work per frame at each peer")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each payload")
    parser.add_argument("--answer", metavar="ADDRESS", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(args: argparse.Namespace) -> UcxTransport:
    return UcxTransport(2 * PAYLOADS[-1], tls=args.tls, spin_us=args.spin_us)


def await_frame(transport: UcxTransport) -> Incoming | None:
    """The next frame, or None after a long silence."""
    give_up = time.monotonic() + SILENCE_S
    while time.monotonic() < give_up:
        frame = transport.receive(0.1)
        if frame is not None:
            return frame
    return None


def send(transport: UcxTransport, peers: list[Peer], payload: int, sequence: int) -> None:
    frame = transport.outgoing(0, 1, payload // 4, torch.float32)
    transport.send(peers, Header(FrameKind.DISPATCH, 0, 0, sequence), frame)


def answer(args: argparse.Namespace) -> None:
    """A peer: announces its address on standard output, then sends every frame back until silence."""
    transport = start(args)
    print(transport.address.hex(), flush=True)
    asker = transport.connect(bytes.fromhex(args.answer))
    while frame := await_frame(transport):
        payload, sequence = frame.header.row_bytes, frame.header.sequence
        frame.release()
        if payload == 0:
            break
        busy_until = time.perf_counter() + args.compute_us * 1e-6
        while time.perf_counter() < busy_until:
            pass
        send(transport, [asker], payload, sequence)
    transport.close()


def round_trips(transport: UcxTransport, peers: list[Peer], payload: int, seconds: float) -> list[float]:
    """Sorted round trip times in microseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        send(transport, peers, payload, len(times))
        for _ in peers:
            frame = await_frame(transport)
            if frame is None:
                sys.exit("a peer does not answer")
            frame.release()
        times.append((time.perf_counter() - began) * 1e6)
    return sorted(times[len(times) // 10 :])


def idle_cpu(transport: UcxTransport) -> float:
    """Share of one core that a receiver with nothing to do takes."""
    began = time.process_time()
    transport.receive(IDLE_S, busy=False)
    return (time.process_time() - began) / IDLE_S


def ask(args: argparse.Namespace) -> None:
    transport = start(args)
    command = [sys.executable, *sys.argv, "--answer", transport.address.hex()]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(args.peers)]
    result: dict[str, Any] = {"peers": args.peers, "tls": args.tls, "spin_us": args.spin_us, "cores": os.cpu_count()}
    try:
        lines = [child.stdout.readline() for child in children if child.stdout]
        peers = [transport.connect(bytes.fromhex(line)) for line in lines]
        for payload in PAYLOADS:
            times = round_trips(transport, peers, payload, args.seconds)
            p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
            print(f"{payload:>8} bytes  p50 {p50:7.0f} us  p99 {p99:7.0f} us  ({len(times)} round trips)")
            result[str(payload)] = {"p50_us": round(p50, 1), "p99_us": round(p99, 1)}
        send(transport, peers, 0, 0)
        result["idle_cpu"] = round(idle_cpu(transport), 4)
        print(f"idle receiver: {result['idle_cpu']:.2%} of a core")
    finally:
        for child in children:
            try:
                child.wait(SILENCE_S)
            except subprocess.TimeoutExpired:
                child.kill()
    transport.close()
    report("transport", result)


if __name__ == "__main__":
    arguments = parse()
    answer(arguments) if arguments.answer else ask(arguments)
