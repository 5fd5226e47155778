"""Better homes for what exchanges activate, and whether they are worth their moves. Pure functions.

A home that is moved has to be read from storage; what that buys is a smaller a_max, the activated experts on the
busiest instance, for which every exchange of the layer waits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.scheduler.window import Seen
from shared.activation import schedule_activations
from shared.changes import LayerPlan
from shared.membership import Member
from shared.messages import Placement
from shared.placement.homes import BadPlacement, Masks, homes_of_slots, moved_replicas, to_masks, to_residents
from shared.placement.replacement import replace
from shared.placement_watch import homes_array

HORIZON_S = 900.0
"""For so long a new placement is expected to fit what is activated; the paper places anew every 15 minutes."""
LEAST_GAIN = 0.01
"""Share of a_max; less is no gain."""
LOAD_RATE = 1e9
"""Bytes per second, while no instance has measured its own."""
JUDGED = 64
"""Exchanges, the latest ones, by which homes are judged."""


@dataclass(frozen=True)
class Costs:
    """What replicas cost, in bytes, bytes per second and seconds per activated expert; 0: unknown."""

    replica_bytes: int = 0
    load_rate: float = 0.0
    expert_s: float = 0.0

    @classmethod
    def of(cls, members: Sequence[Member]) -> "Costs":
        """The largest replicas, the slowest loads and the fastest experts of all instances: no gain is overstated."""
        known = [m.heartbeat.costs for m in members if m.heartbeat.costs]
        return cls(
            max((c.replica_bytes for c in known), default=0),
            min((c.load_rate for c in known if c.load_rate), default=0.0),
            min((c.expert_s for c in known if c.expert_s), default=0.0),
        )


@dataclass(frozen=True)
class Move:
    """New homes for one layer."""

    layer: int
    """Index among the MoE layers."""
    homes: Masks
    """uint64 [E]"""
    moved: int
    before: float | None = None
    """Mean a_max of the latest exchanges; None: there were none."""
    after: float | None = None
    rate: float = 0.0
    """Exchanges per second."""

    def gains(self) -> bool:
        return self.before is not None and self.after is not None and self.after < self.before * (1 - LEAST_GAIN)

    def pays(self, costs: Costs, horizon_s: float = HORIZON_S) -> bool:
        """Whether the time that exchanges save within the horizon exceeds the time that loading takes."""
        if not self.gains() or self.before is None or self.after is None:
            return False
        saved = (self.before - self.after) * costs.expert_s * self.rate * horizon_s
        return saved > self.moved * costs.replica_bytes / (costs.load_rate or LOAD_RATE)

    def plan(self, moe_layers: Sequence[int], costs: Costs) -> LayerPlan:
        size = self.moved * costs.replica_bytes
        layer = moe_layers[self.layer]
        return LayerPlan(layer=layer, moved=self.moved, bytes=size, before=self.before, after=self.after)


def better(placement: Placement, look: Callable[[int], Seen | None], slots: int) -> list[Move]:
    """Homes for every layer of which something was seen and where few moves make a difference.

    Args:
        look: layer (checkpoint index) -> its latest exchanges.
        slots: replicas of a layer per instance.
    """
    count, moves = len(placement.instances), []
    for index, masks in enumerate(homes_array(placement)):
        seen = look(placement.moe_layers[index])
        if seen is not None:
            homes = to_masks(replace(to_residents(masks, count), seen.activity, slots))
            moves.append(_move(index, masks, homes, seen, count))
    return [move for move in moves if move.moved and move.gains()]


def given(
    placement: Placement,
    wanted: Mapping[int, Mapping[str, Sequence[int]]],
    look: Callable[[int], Seen | None],
    slots: int,
) -> list[Move]:
    """Homes as a person gives them: layer (checkpoint index) -> instance -> experts. ``slots``: per layer and instance.

    Raises BadPlacement for an expert without a home, one that does not exist, one that is on an instance twice or does
    not fit; ValueError for unknown layers and instances.
    """
    moves = []
    for layer, instances in sorted(wanted.items()):
        if layer not in placement.moe_layers:
            raise ValueError(f"layer {layer} has no routed experts")
        unknown = sorted(instances.keys() - set(placement.instances))
        if unknown:
            raise ValueError(f"layer {layer}: {', '.join(unknown)} is not among {', '.join(placement.instances)}")
        index = placement.moe_layers.index(layer)
        masks = homes_array(placement)[index]
        homes = _homes(layer, [instances.get(i, ()) for i in placement.instances], placement.experts, slots)
        moves.append(_move(index, masks, homes, look(layer), len(placement.instances)))
    return [move for move in moves if (move.homes != homes_array(placement)[move.layer]).any()]


def applied(placement: Placement, moves: Sequence[Move]) -> Masks:
    """The homes uint64 [MoE layers, E] of a placement after some moves."""
    homes = homes_array(placement).astype(np.uint64)
    for move in moves:
        homes[move.layer] = move.homes
    return homes


def mean_a_max(active: NDArray[np.bool_], homes: Masks, instances: int) -> float:
    """Activated experts on the busiest instance, mean over exchanges bool [exchanges, E]."""
    live = (1 << instances) - 1
    ids = [np.flatnonzero(row).astype(np.int32)[:, None] for row in active]
    return float(np.mean([schedule_activations(column, homes, live).activated.max(initial=0) for column in ids]))


def _move(index: int, before: Masks, after: Masks, seen: Seen | None, instances: int) -> Move:
    moved = moved_replicas(before, after)
    if seen is None or not moved:
        return Move(index, after, moved)
    latest = seen.active[-JUDGED:]
    old, new = (mean_a_max(latest, homes.astype(np.uint64), instances) for homes in (before, after))
    return Move(index, after, moved, old, new, seen.rate)


def _homes(layer: int, experts: Sequence[Sequence[int]], count: int, slots: int) -> Masks:
    """uint64 [E] of what each instance is given."""
    for instance, held in enumerate(experts):
        if len(set(held)) == len(held) > slots:
            limit = f"which holds {slots} replicas per layer and not {len(held)}"
            raise BadPlacement(layer, held[slots], f"does not fit on instance {instance}, {limit}")
    table = np.full((1, len(experts), max(map(len, experts), default=0)), -1, np.int64)
    for row, held in zip(table[0], experts, strict=True):
        row[: len(held)] = held
    return homes_of_slots(table, [layer], count)[0]
