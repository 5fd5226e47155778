"""Where experts live: who takes part, how many homes there may be, and homes for the instances that are there.

Pure functions, no I/O. Activity matters only for what is given up first; better homes for it are rebalance.py's.
"""

from collections.abc import Sequence

import numpy as np

from shared.errors import MoemeshError
from shared.membership import Member
from shared.messages import MAX_EXPERT_INSTANCES, ModelFacts, Placement
from shared.placement.homes import Masks, Residents, to_masks, to_residents
from shared.placement.replacement import Floats, replace
from shared.placement_watch import homes_array


class TooFewSlots(MoemeshError):
    """The expert instances that are there cannot hold every expert."""


def round_robin(instances: int, moe_layers: int, experts: int, homes_per_expert: int) -> Masks:
    """Homes of every expert: uint64 [moe_layers, experts].

    Expert e of the l-th MoE layer gets ``homes_per_expert`` consecutive instances (all, when there are fewer),
    beginning with number e + l: the layers begin at different instances, so that remainders spread. Raises ValueError
    when an expert would be left without a home, or when there are more instances than bits.
    """
    if not 1 <= instances <= MAX_EXPERT_INSTANCES:
        raise ValueError(f"{instances} expert instances: a placement takes 1 to {MAX_EXPERT_INSTANCES}")
    if homes_per_expert < 1:
        raise ValueError(f"{homes_per_expert} homes per expert would leave experts without one")
    first = np.arange(moe_layers)[:, None] + np.arange(experts)[None, :]
    offsets = np.arange(min(homes_per_expert, instances))
    bits = np.uint64(1) << ((first[..., None] + offsets) % instances).astype(np.uint64)
    return np.bitwise_or.reduce(bits, axis=-1)


def homes_per_expert(setting: int, members: Sequence[Member]) -> int:
    """The ``--homes`` setting; 0 = every instance when replicas cost no memory, else one.

    Never more than there are instances.
    """
    wanted = setting if setting > 0 else len(members) if all(map(_shares, members)) else 1
    return min(wanted, len(members))


def _shares(member: Member) -> bool:
    """Whether an instance reads weights where all of its host map them."""
    facts = member.heartbeat.experts
    return member.heartbeat.device == "cpu" and (facts is None or facts.elastic is None)


def room(members: Sequence[Member], model: ModelFacts) -> int:
    """Replicas of one layer that fit on each instance: the least ``--slots`` divided by the layers, at most all."""
    slots = [m.heartbeat.experts.slots for m in members if m.heartbeat.experts and m.heartbeat.experts.slots]
    return min([model.experts, *(limit // max(1, len(model.moe_layers)) for limit in slots)])


def budget(members: Sequence[Member], model: ModelFacts, homes: int) -> int:
    """Replicas of one layer that each instance should hold at most, for ``homes`` homes per expert on average.

    Raises TooFewSlots when they cannot hold every expert.
    """
    count, fits = len(members), room(members, model)
    if count * fits < model.experts:
        raise TooFewSlots(
            f"{count} expert instances with {fits} slots per layer cannot hold {model.experts} experts: "
            "add instances or slots"
        )
    return min(fits, -(-model.experts * homes // count))


def mesh_model(current: Placement | None, ready: Sequence[Member]) -> ModelFacts | None:
    """The model to place: the current placement's while anybody READY serves it, else that of the lowest id."""
    models = [m.heartbeat.model for m in ready if m.heartbeat.model]
    same = [model for model in models if current and model.digest == current.digest]
    return next(iter(same or models), None)


def participants(current: Placement | None, ready: Sequence[Member], digest: str) -> list[Member]:
    """The expert instances that take part, sorted; those that already do go before newcomers at the limit."""
    same = [m for m in ready if m.heartbeat.model and m.heartbeat.model.digest == digest]
    placed = set(current.instances) if current else set()
    return sorted(sorted(same, key=lambda m: (m.id not in placed, m.id))[:MAX_EXPERT_INSTANCES], key=lambda m: m.id)


def carried(old: Placement, instances: Sequence[str]) -> list[Residents]:
    """What is left of a placement's homes on other instances: bool [instances, experts] of every layer."""
    before = {name: index for index, name in enumerate(old.instances)}
    rows = [before.get(name, len(before)) for name in instances]
    nobody = np.zeros((1, old.experts), np.bool_)
    return [np.concatenate([to_residents(masks, len(before)), nobody])[rows] for masks in homes_array(old)]


def rehouse(old: Sequence[Residents], activity: Sequence[Floats], slots: int, least: int) -> Masks:
    """Homes uint64 [layers, E] with few replicas moved: who has none gets one, and free slots bring all to ``least``.

    Args:
        old: what is left, bool [instances, E] of every layer.
        activity: [E] of every layer.
        slots: replicas of a layer per instance; see ``budget``.
    """
    housed = [replace(layer, shares, slots, most=0) for layer, shares in zip(old, activity, strict=True)]
    for residents, shares in zip(housed, activity, strict=True):
        _fill(residents, shares, slots, least)
    return np.stack([to_masks(residents) for residents in housed]).reshape(len(housed), -1)


def _fill(residents: Residents, activity: Floats, slots: int, least: int) -> None:
    """Give experts with fewer than ``least`` homes more, on free slots only; the most active per home first."""
    for homes in range(1, min(least, len(residents))):
        few = np.flatnonzero(residents.sum(axis=0) == homes)
        for e in few[np.argsort(-activity[few], kind="stable")]:
            held = residents.sum(axis=1)
            if held.min() >= slots:
                return
            open_to = np.flatnonzero((held < slots) & ~residents[:, e])
            if open_to.size:
                residents[open_to[np.argmin(held[open_to])], e] = True
