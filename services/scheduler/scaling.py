"""Homes of elastic experts for the loads that are foreseen: MoEless's scaler and placer on a live placement. Pure.

A load counts activated experts, which is what an exchange's time grows with; several homes share it evenly, as the
activation scheduler sees to. Homes cost no time here but memory: there are never more of them than residents fit,
unless every expert has only one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.scheduler.rebalance import Costs, Move
from shared.elastic import placing, scaling
from shared.membership import Member
from shared.messages import Placement
from shared.placement.homes import Residents, moved_replicas, to_masks, to_residents
from shared.placement_watch import homes_array

Loads = NDArray[np.float64]
"""[samples, experts]: activated experts in an exchange of a layer."""

LEAST_GAIN = 0.03
"""Share of the busiest instance's load; foreseen loads vary by about as much from one look to the next."""
HORIZON_S = 60.0
"""For so long foreseen loads are expected to last: they change with the traffic."""
SPARE = 2
"""Homes of a layer that an instance may have beyond its share, so that experts can move instead of changing places."""
LEAST_LOAD = 0.05
"""Activated experts that one more home must take off the others to be worth its memory."""
STAGES = 8
"""Numbers of homes that are tried for a target time."""
FEWER = 0.05
"""Share of all homes; to give up fewer of them is not worth a new placement."""


@dataclass(frozen=True)
class Traffic:
    """Exchanges of a layer: all of them, or those of decode or of prefill."""

    loads: Loads
    rate: float = 1.0
    """Exchanges per second."""
    target: float = 0.0
    """Activated experts on the busiest instance that are few enough; 0: as even as homes can make it."""

    def half(self, first: int) -> "Traffic":
        """Every other sample, from the first or the second on; the only one, if there is no other."""
        return replace(self, loads=self.loads[min(first, len(self.loads) - 1) :: 2])


Look = Callable[[int], Sequence[Traffic]]
"""Layer (checkpoint index) -> its traffic; empty: unknown."""


@dataclass(frozen=True)
class Room:
    """What a layer may have."""

    slots: tuple[int, ...]
    """Residents of all layers on each instance."""
    layers: int
    broken: tuple[tuple[tuple[int, int], ...], ...] = ()
    """(Layer, expert) that cannot be started, of each instance."""

    @classmethod
    def of(cls, members: Sequence[Member], layers: int) -> "Room":
        facts = [m.heartbeat.experts.elastic if m.heartbeat.experts else None for m in members]
        slots = tuple(fact.slots if fact else 0 for fact in facts)
        return cls(slots, layers, tuple(fact.broken if fact else () for fact in facts))

    def homes(self, experts: int) -> int:
        """Of one layer, all instances together."""
        return max(experts, sum(self.slots) // self.layers)

    def of_instances(self, homes: int) -> NDArray[np.int64]:
        """Of one layer on each instance, when there are so many."""
        shares = np.asarray(self.slots) / max(1, sum(self.slots))
        return np.ceil(homes * shares).astype(np.int64) + SPARE


def elastic(members: Sequence[Member]) -> bool:
    """Whether experts come and go on all of them."""
    return bool(members) and all(m.heartbeat.experts and m.heartbeat.experts.elastic for m in members)


def followed(placement: Placement, look: Look, room: Room, costs: Costs) -> list[Move]:
    """New homes for every layer where they gain more than they cost, or serve as well with less memory.

    They are made for every other sample and judged by the rest: what is fitted to noise gains nothing there.
    """
    count, moves, fewer = len(placement.instances), [], []
    for index, masks in enumerate(homes_array(placement).astype(np.uint64)):
        traffic = look(placement.moe_layers[index])
        if not traffic:
            continue
        before = to_residents(masks, count)
        after = layer_homes([phase.half(0) for phase in traffic], before, room)
        if (after & ~before & closed_to(placement.moe_layers[index], room, after.shape)).any():
            continue  # who cannot start an expert is no home for it
        homes, judged = to_masks(after), [phase.half(1) for phase in traffic]
        deciding = _deciding(judged, before)
        busy = _mean(deciding, before), _mean(deciding, after)
        move = Move(index, homes, moved_replicas(masks, homes), *busy, sum(phase.rate for phase in deciding))
        if busy[1] < busy[0] * (1 - LEAST_GAIN) and move.pays(costs, HORIZON_S):
            moves.append(move)
        elif after.sum() < before.sum() and all(_serves(phase, before, after) for phase in judged):
            fewer.append((int(before.sum() - after.sum()), move))
    given_up = sum(number for number, _ in fewer)
    if given_up > FEWER * int(np.bitwise_count(homes_array(placement)).sum()):
        moves += [move for _, move in fewer]
    return moves


def closed_to(layer: int, room: Room, shape: tuple[int, ...]) -> Residents:
    """bool [instances, E]: which experts of a layer (checkpoint index) cannot be started where."""
    closed = np.zeros(shape, np.bool_)
    for instance, broken in enumerate(room.broken):
        closed[instance, [expert for of, expert in broken if of == layer and expert < shape[1]]] = True
    return closed


def layer_homes(traffic: Sequence[Traffic], before: Residents, room: Room) -> Residents:
    """Homes bool [instances, E], beginning with those that there are: the fewest that meet the target of every phase.

    As even as memory allows, if one has no target.
    """
    experts, loads = before.shape[1], _together(traffic)
    most = room.homes(experts)
    if not _aimed(traffic):
        return _placed(loads, before, room, most)
    totals = np.unique(np.linspace(experts, most, STAGES + 1).astype(int)).tolist()
    if _met(traffic, before):
        totals = [total for total in totals if total < before.sum() * (1 - FEWER)]
    tried = before
    for total in totals:
        tried = _placed(loads, before, room, total)
        if _met(traffic, tried):
            return tried
    return before if _met(traffic, before) else tried


def _aimed(traffic: Sequence[Traffic]) -> bool:
    return all(phase.target for phase in traffic)


def _met(traffic: Sequence[Traffic], homes: Residents) -> bool:
    return all(busiest(phase.loads, homes) <= phase.target for phase in traffic)


def _together(traffic: Sequence[Traffic]) -> Loads:
    """Samples of all phases, which count by their exchanges, or by how little their targets allow."""
    weights = np.array([1 / phase.target if _aimed(traffic) else phase.rate for phase in traffic])
    counts = np.array([len(phase.loads) for phase in traffic])
    shares = weights / weights.sum() * counts.sum() / counts
    return np.concatenate([phase.loads * share for phase, share in zip(traffic, shares, strict=True)])


def _deciding(traffic: Sequence[Traffic], homes: Residents) -> Sequence[Traffic]:
    """Whose times say whether a change pays: all of them, or whoever is furthest beyond its target."""
    if not _aimed(traffic):
        return traffic
    return [max(traffic, key=lambda phase: busiest(phase.loads, homes) / phase.target)]


def _mean(traffic: Sequence[Traffic], homes: Residents) -> float:
    """Activated experts on the busiest instance, mean over exchanges."""
    loads, rates = zip(*((busiest(phase.loads, homes), phase.rate) for phase in traffic), strict=True)
    return float(np.average(loads, weights=rates))


def _serves(phase: Traffic, before: Residents, after: Residents) -> bool:
    """Whether other homes meet its target, or are as good as those before."""
    busy = busiest(phase.loads, before), busiest(phase.loads, after)
    return busy[1] <= max(busy[0] * (1 + LEAST_GAIN), phase.target)


def _placed(loads: Loads, before: Residents, room: Room, most: int) -> Residents:
    """At most so many homes: more for the experts that hold the layer up, then places for all."""
    count = len(before)
    rules = scaling.Rules(slots=most, instances=count, replica_rows=LEAST_LOAD)
    counts = scaling.moemesh(loads.mean(axis=0), before.sum(axis=0), rules)
    while True:
        free = np.minimum(room.of_instances(int(counts.sum())), loads.shape[1])
        try:
            return placing.moemesh(loads, counts, free, before)
        except ValueError:  # some instances are so small that not every expert finds as many as it should have
            if counts.max() == 1:
                return before
            counts = np.minimum(counts, counts.max() - 1)


def busiest(loads: Loads, homes: Residents) -> float:
    """Activated experts on the busiest instance, mean over samples."""
    shares = loads / homes.sum(axis=0)
    return float((shares @ homes.T.astype(np.float64)).max(axis=1).mean())
