"""Simulated nodes: namespaces on one bridge, with rate limits; and a transport that adds what tc cannot.

A node has its own network and its own IPC namespace: UCX shares memory inside of it, and speaks TCP to others. Needs
root, ``ip``, ``tc`` and ``unshare``. Names carry this process's id; everything is removed when the context ends.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.device_profile import DeviceProfile
from shared.scheduling.policies import Policy
from shared.transport.base import Header, Incoming, Outgoing, Peer, Transport
from shared.transport.paced import PacedTransport


@dataclass(frozen=True)
class Network:
    """What lies between nodes."""

    name: str
    gbit: float
    occupancy_us: float
    """How long a message occupies its sender; messages follow one another."""
    latency_us: float
    """Of a round trip's half, beside the real one."""


@dataclass(frozen=True)
class Setup:
    """What the experts do."""

    policy: Policy = Policy.ACTIVATED
    expert_us: float = 0.0
    """Time of each activated expert, kept by waiting; 0: their own."""
    partial: bool = False
    """They answer with sums."""


@dataclass(frozen=True)
class SimulatedNode:
    name: str
    enter: tuple[str, ...]
    """What a command line begins with to run there."""


@contextmanager
def nodes(count: int, gbit: float) -> Iterator[list[SimulatedNode]]:
    """Nodes ``mm<pid>n<i>``, each with an interface eth0 at 10.77.0.<i+1>/24 of this rate both ways.

    They meet on a bridge in a namespace of its own, where no firewall of the host has a say.
    """
    tag = f"mm{os.getpid() % 100000}"
    switch = f"{tag}s"
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="moemesh-nodes-"))
        _run(stack, f"ip netns add {switch}", f"ip netns del {switch}")
        _run(stack, f"ip -n {switch} link add bridge type bridge")
        _run(stack, f"ip -n {switch} link set bridge up")
        made = []
        limit = f"root tbf rate {gbit * 1000:.0f}mbit burst 256kb latency 100ms"
        for i in range(count):
            name, ipc = f"{tag}n{i}", Path(directory, f"ipc{i}")
            ipc.touch()
            _run(stack, f"unshare --ipc={ipc} true", f"umount {ipc}")
            _run(stack, f"ip netns add {name}", f"ip netns del {name}")
            _run(stack, f"ip -n {switch} link add port{i} type veth peer name eth0 netns {name}")
            _run(stack, f"ip -n {switch} link set port{i} master bridge up")
            _run(stack, f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev eth0")
            _run(stack, f"ip -n {name} link set eth0 up")
            _run(stack, f"ip -n {name} link set lo up")
            _run(stack, f"tc -n {switch} qdisc add dev port{i} {limit}")
            _run(stack, f"tc -n {name} qdisc add dev eth0 {limit}")
            made.append(SimulatedNode(name, ("nsenter", f"--ipc={ipc}", f"--net=/run/netns/{name}")))
        yield made


def _run(stack: ExitStack, command: str, undo: str = "") -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
    if undo:
        stack.callback(subprocess.run, undo.split(), check=False, capture_output=True)


class FarTransport(PacedTransport):
    """Messages to other nodes occupy their sender and take longer; those inside of the node do not.

    Args:
        near: incarnations and addresses of this node's processes.
    """

    def __init__(self, inner: Transport, network: Network, near: Sequence[int | bytes]) -> None:
        profile = DeviceProfile(
            network.name, link_latency_s=network.latency_us * 1e-6, send_s=network.occupancy_us * 1e-6
        )
        super().__init__(inner, profile)
        self._near = set(near)
        self._far: set[Peer] = set()

    def connect(self, address: bytes) -> Peer:
        peer = super().connect(address)
        if address not in self._near:
            self._far.add(peer)
        return peer

    def send(self, peers: Sequence[Peer], header: Header, frame: Outgoing) -> None:
        far = [peer for peer in peers if peer in self._far]
        if far:
            self.wait_until(self._clock() + len(far) * self._profile.send_s)
        header.sent = int(self._clock() * 1e6) % 2**32 if far else 0
        self._inner.send(peers, header, frame)

    def delay(self, frame: Incoming) -> float:
        return 0.0 if frame.header.sender in self._near else super().delay(frame)
