"""What an exchange costs between two pools on GPUs, by its way. Pure; numbers or arrays of candidates.

The ways are those of services/attention/ways.py, and so is the form: latency, occupancy of the sender, bytes. It
differs in what GPU hosts have: adapters of every device, sums instead of parts on the way back, reductions inside of
nodes (JANUS, arXiv 2512.13525, section 3.3). The paper gives no figures for its cost table; hardware.toml has ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.planning.hardware import Link

Floats = NDArray[np.float64]
ROUTE_BYTES = 8
"""Of one choice: expert and weight."""


class Way(NamedTuple):
    """``phase``: one, direct (two-phase, case 1) or relay (case 2). ``gate``: the side that gates."""

    phase: str
    gate: str

    def __str__(self) -> str:
        return f"{self.phase}/{self.gate}"


OURS = (
    Way("one", "experts"), Way("direct", "experts"), Way("relay", "experts"), Way("direct", "attention"),
    Way("relay", "attention"),
)  # fmt: skip
"""What a mesh chooses from. In one phase with the gate of attention nobody sees the rows of all members, and replica
choices diverge: left out."""
ALL_TO_ALL = (Way("one", "attention"),)
"""What other systems do: every sender packs rows for every receiver."""
CHOSEN = (Way("auto", "auto"),)
"""Where exchanges were measured as the mesh itself sends them."""


class Fabric(NamedTuple):
    """How devices are connected."""

    inside: Link
    """Between devices of a node."""
    between: Link
    per_node: int
    share: float
    """Of a link's bytes per second that is reached."""
    routes_s: float
    """Where attention gates: packing, per exchange."""
    apart: bool = False
    """True: the pools never share a node (as in the paper), also when both fit on one."""


class Measured(NamedTuple):
    """Seconds of an exchange beside the experts' own time, where it was measured, by whichever way."""

    exchange_s: float
    instance_s: float
    """For each expert instance,"""
    member_s: float
    """for each attention instance beside the first,"""
    row_s: float
    """and for each row of all of them."""

    def seconds(self, attention: Floats, experts: Floats, rows: Floats) -> Floats:
        """[n], of so many instances and rows [n]."""
        return self.exchange_s + self.instance_s * experts + self.member_s * (attention - 1) + self.row_s * rows


class Traffic(NamedTuple):
    """What one exchange moves."""

    rows: Floats
    """[n], of all attention instances."""
    top_k: int
    row_bytes: float
    """Of a row on its way to experts."""
    sum_bytes: float
    """Of a row's sum on its way back."""


class _Hop(NamedTuple):
    latency: Floats
    send: Floats
    per_byte: Floats

    def seconds(self, messages: Floats, nbytes: Floats) -> Floats:
        """Until the last of so many messages, of so many bytes together, has arrived."""
        return self.latency + messages * self.send + nbytes * self.per_byte


class _Pools(NamedTuple):
    """Who is where; [n] each."""

    attention: Floats
    experts: Floats
    attention_nodes: Floats
    expert_nodes: Floats
    members: Floats
    """Attention instances of a node that has most."""
    neighbours: Floats
    """Expert instances of a node that has most."""
    senders: Floats
    """Adapters of such an attention node."""
    receivers: Floats
    """And of such an expert node."""


def cheapest(
    fabric: Fabric, attention: Floats, experts: Floats, traffic: Traffic, ways: Sequence[Way] = OURS
) -> tuple[Floats, NDArray[np.int64]]:
    """Seconds of an exchange by the cheapest of some ways [n], and which one it is [n].

    Args:
        attention, experts: instances of either pool, [n].
    """
    costs = np.stack([seconds(way, fabric, attention, experts, traffic) for way in ways])
    best = np.argmin(costs, axis=0)
    return np.take_along_axis(costs, best[None], axis=0)[0], best


def seconds(way: Way, fabric: Fabric, attention: Floats, experts: Floats, traffic: Traffic) -> Floats:
    """One exchange there and back beside the experts' own time, [n]."""
    pools = _pools(fabric, attention, experts)
    far, near = _far(fabric, pools), _hop(fabric, fabric.inside)
    row = traffic.row_bytes + (ROUTE_BYTES * traffic.top_k if way.gate == "attention" else 0)
    packing = fabric.routes_s if way.gate == "attention" else 0.0
    shape = {"one": _one, "direct": _direct, "relay": _relay}[way.phase]
    return packing + shape(way, pools, far, near, traffic._replace(row_bytes=row))


def _one(way: Way, pools: _Pools, far: _Hop, _near: _Hop, traffic: Traffic) -> Floats:
    """Every member to every instance; the fuller side of the links decides."""
    mine = traffic.rows / pools.attention_nodes
    rows = np.maximum(pools.experts * mine / pools.senders, pools.neighbours * traffic.rows / pools.receivers)
    rows = rows * _needed(way, traffic, 1 / pools.experts)
    there = far.seconds(pools.experts, rows * traffic.row_bytes)
    return there + far.seconds(pools.attention, rows * traffic.sum_bytes)


def _direct(way: Way, pools: _Pools, far: _Hop, near: _Hop, traffic: Traffic) -> Floats:
    """The leader of each attention node sends to every instance, and hands out the sums."""
    mine = traffic.rows / pools.attention_nodes
    rows = np.maximum(pools.experts * mine, pools.neighbours * traffic.rows / pools.receivers)
    rows = rows * _needed(way, traffic, 1 / pools.experts)
    there = far.seconds(pools.experts, rows * traffic.row_bytes)
    back = far.seconds(pools.attention_nodes, rows * traffic.sum_bytes)
    return _gathered(pools, near, mine, traffic) + there + back


def _relay(way: Way, pools: _Pools, far: _Hop, near: _Hop, traffic: Traffic) -> Floats:
    """One transfer from node to node, divided among their adapters; multicast there, and sums reduced on the way back.

    Multicast and reduction are pipelined or done by the switch: bytes count once.
    """
    mine = traffic.rows / pools.attention_nodes
    needed = _needed(way, traffic, np.minimum(1.0, pools.neighbours / pools.experts))
    rows = needed * np.maximum(pools.expert_nodes * mine / pools.senders, traffic.rows / pools.receivers)
    there = far.seconds(pools.expert_nodes, rows * traffic.row_bytes)
    back = far.seconds(pools.attention_nodes, rows * traffic.sum_bytes)
    others, inner = pools.neighbours - 1, traffic.rows * needed
    passed = near.seconds(others, inner * traffic.row_bytes) + near.seconds(others, inner * traffic.sum_bytes)
    return _gathered(pools, near, mine, traffic) + there + back + np.where(others > 0, passed, 0.0)


def _gathered(pools: _Pools, near: _Hop, mine: Floats, traffic: Traffic) -> Floats:
    """A node's members give their rows to the leader and get sums back."""
    others = pools.members - 1
    rows = mine * others / pools.members
    both = near.seconds(others, rows * traffic.row_bytes) + near.seconds(others, rows * traffic.sum_bytes)
    return np.where(others > 0, both, 0.0)


def _needed(way: Way, traffic: Traffic, share: Floats) -> Floats:
    """Which part of the rows a receiver with such a share of the instances gets."""
    return 1 - (1 - share) ** traffic.top_k if way.gate == "attention" else np.ones_like(share)


def _pools(fabric: Fabric, attention: Floats, experts: Floats) -> _Pools:
    members, neighbours = np.minimum(attention, fabric.per_node), np.minimum(experts, fabric.per_node)
    own = fabric.between.per_device | _together(fabric, attention, experts)
    return _Pools(
        attention, experts, np.ceil(attention / fabric.per_node), np.ceil(experts / fabric.per_node),
        members, neighbours, np.where(own, members, 1.0), np.where(own, neighbours, 1.0),
    )  # fmt: skip


def _together(fabric: Fabric, attention: Floats, experts: Floats) -> NDArray[np.bool_]:
    """Whether both pools fit on one node, [n]."""
    return (attention + experts <= fabric.per_node) & (not fabric.apart)


def _hop(fabric: Fabric, link: Link) -> _Hop:
    return _Hop(*map(np.asarray, (link.latency_s, link.send_s, 1 / (link.bytes_per_s * fabric.share))))


def _far(fabric: Fabric, pools: _Pools) -> _Hop:
    """Between the pools: the link inside of a node where both fit on one."""
    together = _together(fabric, pools.attention, pools.experts)
    near, far = _hop(fabric, fabric.inside), _hop(fabric, fabric.between)
    return _Hop(*(np.where(together, *both) for both in zip(near, far, strict=True)))
