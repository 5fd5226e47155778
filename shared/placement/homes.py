"""Tables of homes: their two forms, what makes one valid, and how many replicas a change moves. Pure functions.

Masks, uint64 [..., experts], are what a placement stores. Residents, bool [instances, experts] of one layer, are what
algorithms compute with.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.errors import MoemeshError
from shared.messages import MAX_EXPERT_INSTANCES

Masks = NDArray[np.uint64]
Residents = NDArray[np.bool_]


class BadPlacement(MoemeshError):
    """A placement that must not be used: what is wrong in which layer, and with which expert."""

    def __init__(self, layer: int, expert: int, problem: str) -> None:
        super().__init__(f"layer {layer}, expert {expert}: {problem}")
        self.layer = layer
        self.expert = expert


def to_masks(residents: Residents) -> Masks:
    """bool [instances, E] -> uint64 [E]. At most 64 instances."""
    bits = np.uint64(1) << np.arange(len(residents), dtype=np.uint64)
    return np.bitwise_or.reduce(np.where(residents, bits[:, None], np.uint64(0)), axis=0)


def to_residents(masks: Masks, instances: int) -> Residents:
    """uint64 [E] -> bool [instances, E]."""
    return (masks >> np.arange(instances, dtype=np.uint64)[:, None]) & np.uint64(1) > 0


def moved_replicas(old: Masks, new: Masks) -> int:
    """How many replicas have to be read for a switch: those that are in ``new`` and not in ``old``."""
    return int(np.bitwise_count(new & ~old).sum())


def check_homes(homes: Masks, layers: Sequence[int], instances: int, slots: int) -> None:
    """Refuse homes uint64 [layers, E] that cannot be served by ``instances`` with ``slots`` replicas each per layer.

    ``layers``: checkpoint indices, for the message. Raises BadPlacement for the first layer that leaves an expert
    without a home, names an instance that does not exist, or exceeds the budget of an instance.
    """
    if instances > MAX_EXPERT_INSTANCES:
        raise ValueError(f"{instances} expert instances: a placement takes 1 to {MAX_EXPERT_INSTANCES}")
    for layer, masks in zip(layers, homes, strict=True):
        for expert in np.flatnonzero(masks == 0):
            raise BadPlacement(layer, int(expert), "has no home")
        for expert in np.flatnonzero([int(mask) >> instances for mask in masks]):
            raise BadPlacement(layer, int(expert), f"has a home beyond the {instances} instances")
        placed = np.cumsum(to_residents(masks, instances), axis=1)
        for instance, expert in np.argwhere(placed > slots):
            limit = f"which holds {slots} replicas per layer and not {placed[instance, -1]}"
            raise BadPlacement(layer, int(expert), f"does not fit on instance {instance}, {limit}")


def homes_of_slots(slots: NDArray[np.integer], layers: Sequence[int], experts: int) -> Masks:
    """Homes uint64 [layers, experts] of a table of slots, int [layers, instances, slots]; negative: the slot is empty.

    Raises BadPlacement when an expert is on an instance twice, does not exist, or has no home.
    """
    homes = np.zeros((len(slots), experts), np.uint64)
    for layer, table, masks in zip(layers, slots, homes, strict=True):
        for instance, expert in ((i, int(e)) for i, row in enumerate(table) for e in row if e >= 0):
            if expert >= experts:
                raise BadPlacement(layer, expert, f"does not exist: there are {experts}")
            bit = np.uint64(1 << instance)
            if masks[expert] & bit:
                raise BadPlacement(layer, expert, f"is on instance {instance} twice")
            masks[expert] |= bit
    check_homes(homes, layers, slots.shape[1], slots.shape[2])
    return homes
