"""What the next placement could be, and whose word counts. Pure: proposals are data, the reconciler alone writes.

Later reasons to change the placement are further functions that return a Proposal, with a priority of their own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from services.scheduler.placement import (
    budget,
    carried,
    homes_per_expert,
    mesh_model,
    participants,
    rehouse,
    room,
    round_robin,
)
from shared.membership import Member
from shared.messages import Kind, ModelFacts, Placement, State
from shared.placement.homes import Masks, to_residents
from shared.placement.replacement import Floats
from shared.placement_watch import homes_array
from shared.scheduling.policies import Policy

Activity = Callable[[int], Floats]
"""Layer (checkpoint index) -> [E], the share of exchanges in which an expert is activated."""


class Priority(IntEnum):
    """Lower ones go first."""

    FAILURE = 0
    """An instance is gone."""
    DRAIN = 1
    """An instance is leaving; it still answers."""
    JOIN = 2
    """An instance has come, or the settings are others."""
    HAND = 3
    """A person asked for it."""
    REBALANCE = 4
    """Exchanges activate other experts than before."""
    SCALING = 5
    """Other loads are foreseen for elastic experts."""


@dataclass(frozen=True)
class Proposal:
    """A placement without its version."""

    priority: Priority
    reason: str
    """One line for a person."""
    digest: str
    instances: tuple[str, ...]
    moe_layers: tuple[int, ...]
    homes: Masks
    """uint64 [MoE layers, experts]"""
    policy: Policy
    slots: int
    """Replicas of one layer that fit on each instance."""

    def placement(self, version: int, epoch: int, author: str) -> Placement:
        return Placement(
            version=version,
            epoch=epoch,
            author=author,
            reason=self.reason,
            digest=self.digest,
            instances=self.instances,
            moe_layers=self.moe_layers,
            experts=self.homes.shape[1],
            homes=self.homes.astype("<u8").tobytes(),
            policy=self.policy,
        )


def first(proposals: Iterable[Proposal | None]) -> Proposal | None:
    """The one that goes first; among equals the earliest."""
    return min((p for p in proposals if p), key=lambda p: p.priority, default=None)


def membership(
    current: Placement | None, members: Sequence[Member], homes: int, policy: Policy, activity: Activity
) -> Proposal | None:
    """What follows from who is there. None: nothing has to change, or nobody is READY; the last placement stays then.

    Args:
        current: the committed placement.
        members: everybody, sorted by id.
        homes: the ``--homes`` setting.

    Raises TooFewSlots.
    """
    ready = [m for m in members if m.heartbeat.kind is Kind.EXPERTS and m.ready]
    model = mesh_model(current, ready)
    if model is None:
        return None
    there = participants(current, ready, model.digest)
    names = tuple(m.id for m in there)
    same = current and (current.digest, current.instances, current.policy) == (model.digest, names, policy)
    if same and current and fits(current, room(there, model)):
        return mended(current, there, room(there, model))
    draining = {m.id for m in members if m.heartbeat.state is State.DRAINING}
    table = homes_for(current, there, model, homes, activity)
    why = reason(current, names, draining, policy)
    priority = _priority(current, names, draining)
    return Proposal(priority, why, model.digest, names, model.moe_layers, table, policy, room(there, model))


def homes_for(
    current: Placement | None, members: Sequence[Member], model: ModelFacts, setting: int, activity: Activity
) -> Masks:
    """Homes uint64 [MoE layers, experts] on ``members``; what ``current`` has is kept as far as it fits."""
    count, layers = len(members), len(model.moe_layers)
    homes = homes_per_expert(setting, members)
    slots = budget(members, model, homes)
    known = current is not None and (current.digest, current.moe_layers) == (model.digest, model.moe_layers)
    if slots == model.experts or not known or current is None:
        return round_robin(count, layers, model.experts, min(homes, count * slots // model.experts))
    shares = [activity(layer) for layer in model.moe_layers]
    return rehouse(carried(current, [m.id for m in members]), shares, slots, homes)


def mended(current: Placement, members: Sequence[Member], slots: int) -> Proposal | None:
    """Other homes for experts that cannot be started where they are; a sole home moves to who has the fewest.

    Args:
        members: the instances of ``current``, in its order.
        slots: replicas of one layer that fit on each.
    """
    table, changed = homes_array(current).astype(np.uint64), []
    facts = [m.heartbeat.experts.elastic if m.heartbeat.experts else None for m in members]
    broken = [frozenset(fact.broken) if fact else frozenset() for fact in facts]
    for layer, expert in sorted(frozenset().union(*broken)):
        if layer in current.moe_layers and expert < current.experts:
            closed = [(layer, expert) in those for those in broken]
            if _move_off(table[current.moe_layers.index(layer)], expert, closed, slots):
                names = [m.id for m, shut in zip(members, closed, strict=True) if shut]
                changed.append(f"expert {expert} of layer {layer} on {', '.join(names)}")
    if not changed:
        return None
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    why = f"cannot be started: {'; '.join(changed[:3])}{more}"
    of = current.digest, current.instances, current.moe_layers
    return Proposal(Priority.FAILURE, why, *of, table, current.policy, slots)


def _move_off(masks: Masks, expert: int, closed: Sequence[bool], slots: int) -> bool:
    """Take homes away in masks uint64 [E]; a sole one is moved. False: there is nothing to do, or nowhere to go."""
    bad = np.uint64(sum(1 << i for i, shut in enumerate(closed) if shut))
    if not masks[expert] & bad:
        return False
    if masks[expert] & ~bad:
        masks[expert] &= ~bad
        return True
    held = to_residents(masks, len(closed)).sum(axis=1)
    order = [i for i in np.argsort(held, kind="stable").tolist() if not closed[i] and held[i] < slots]
    if order:
        masks[expert] = np.uint64(1 << order[0])
    return bool(order)


def reason(current: Placement | None, instances: Sequence[str], draining: set[str], policy: Policy) -> str:
    """One line for a person: who joined and who left, or what else is new."""
    before = set(current.instances) if current else set()
    gone = before - set(instances)
    groups = (
        ([i for i in instances if i not in before], "joined"),
        (sorted(gone - draining), "left"),
        (sorted(gone & draining), "draining"),
    )
    parts = [f"{', '.join(ids)} {verb}" for ids, verb in groups if ids]
    if current and current.policy is not policy:
        parts.append(f"homes are chosen by policy {policy}")
    return "; ".join(parts) or "another model, or fewer slots"


def _priority(current: Placement | None, instances: Sequence[str], draining: set[str]) -> Priority:
    gone = set(current.instances) - set(instances) if current else set()
    if gone - draining:
        return Priority.FAILURE
    return Priority.DRAIN if gone else Priority.JOIN


def fits(placement: Placement, slots: int) -> bool:
    """Whether every instance has at most ``slots`` replicas of every layer."""
    if slots >= placement.experts:
        return True
    return all(most_replicas(masks, len(placement.instances)) <= slots for masks in homes_array(placement))


def stage(now: Masks, goal: Masks, instances: int, slots: int) -> Masks:
    """The next version on the way between homes uint64 [layers, E], so that serving goes on meanwhile.

    A layer whose old and new homes fit into the slots together changes at once. Else it first lets go of the homes that
    are not needed any more, as far as every expert keeps one: nothing has to be loaded for that. Where nothing is left
    to let go of, as many new homes are added as there are slots. Without a free slot, homes change places while
    exchanges wait: one layer at a time.
    """
    step, in_place = now.copy(), False
    for before, after, layer in zip(now, goal, step, strict=True):
        if most_replicas(before | after, instances) <= slots:
            layer[:] = after
            continue
        common = before & after
        kept = np.where(common > 0, common, before)
        if (kept != before).any():
            layer[:] = kept
            continue
        layer[:] = _grown(before, after, instances, slots)
        if not in_place and (layer == before).all():
            layer[:], in_place = after, True
    return step


def _grown(before: Masks, after: Masks, instances: int, slots: int) -> Masks:
    """Homes uint64 [E] with the new ones of as many experts as fit beside the old ones, the lowest experts first."""
    grown, free = before.copy(), slots - to_residents(before, instances).sum(axis=1)
    for expert in np.flatnonzero(after & ~before):
        new = to_residents((after & ~before)[expert : expert + 1], instances)[:, 0]
        if (free >= new).all():
            grown[expert] |= after[expert]
            free -= new
    return grown


def most_replicas(masks: Masks, instances: int) -> int:
    """Replicas of one layer, uint64 [E], on the instance that has most."""
    return max(int(np.count_nonzero(masks >> np.uint64(i) & np.uint64(1))) for i in range(instances))
