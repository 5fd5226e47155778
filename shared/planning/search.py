"""The cheapest candidate that keeps all limits, and why it is that one. Pure.

Source: JANUS (arXiv 2512.13525), section 3.5, algorithm 2: enumerate (n_a, n_e), keep the fewest devices. Here a
candidate is also a number of micro-batches, devices may have prices, and monoliths are candidates too. Slots are not
enumerated: more homes never raise a_max, since the activation scheduler is optimal, so all that fit are used. Pruned
are candidates whose experts do not fit, and, where the rate is given, all that cost more than one that keeps the
limits. The result is the exact optimum of what is enumerated; ``look_at_all`` shows it.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.planning.memory import least_experts
from shared.planning.outlook import LIMITS, PARTS, Outlook, joined, look_ahead, taken
from shared.planning.plan import Plan
from shared.planning.setting import Demand, Mesh, Monolith, Setting, Slo

MICRO_BATCHES = (1, 2)
UNITS = (1, 2, 4, 8, 16, 32, 64)
"""Devices of a monolith."""
BLOCK, GROWTH = 512, 4
"""Candidates that are looked at together at first, and how many times more in every next turn."""
Ints = NDArray[np.int64]


class Space(NamedTuple):
    """Candidates [n]."""

    attention: Ints
    """Instances; of monoliths: units."""
    experts: Ints
    """Instances; of monoliths: devices of a unit."""
    micro_batches: Ints
    """0: a monolith."""

    def at(self, order: Ints) -> "Space":
        return Space(*(array[order] for array in self))

    @property
    def devices(self) -> Ints:
        return np.where(self.micro_batches > 0, self.attention + self.experts, self.attention * self.experts)


@dataclass(frozen=True)
class Found:
    """What a search has found; None where nothing keeps all limits."""

    best: Plan | None
    ranking: tuple[Plan, ...]
    """The best few of those that were looked at; the best goes first."""
    mesh: Plan | None
    """The best of each kind."""
    monolith: Plan | None
    binding: Plan | None
    """Of all that cost less than the best, what comes nearest to keeping the limits; where there is no best, of all
    that break nothing but times, or else of all."""
    looked_at: int
    """Candidates."""
    space: int


def space_of(
    setting: Setting, most: int, micro_batches: tuple[int, ...] = MICRO_BATCHES, monoliths: bool = True
) -> Space:
    """Every candidate with at most ``most`` instances in either pool whose experts fit."""
    least = least_experts(setting.room, setting.sizes)
    most_experts = min(most, setting.tables.most)
    experts = np.arange(least, most_experts + 1) if least else np.arange(0)
    grid = np.meshgrid(micro_batches, np.arange(1, most + 1), experts, indexing="ij")
    micro, attention, n_e = (array.ravel() for array in grid)
    sizes = [u for u in UNITS if u <= 2 * most and setting.units.first <= u <= setting.units.most] if monoliths else []
    pairs = [(count, size) for size in sizes for count in range(1, 2 * most // size + 1)]
    units, devices = (np.array([pair[i] for pair in pairs], np.int64) for i in range(2))
    zeros = np.zeros(len(pairs), np.int64)
    return Space(np.append(attention, units), np.append(n_e, devices), np.append(micro, zeros))


def look_at(setting: Setting, space: Space, demand: Demand, slo: Slo, batch: float | None = None) -> Outlook:
    """The outlook of all candidates, in their order. See ``look_ahead``."""
    orders, outlooks = [], []
    for micro in np.unique(space.micro_batches):
        order = np.flatnonzero(space.micro_batches == micro)
        first, second = space.attention[order].astype(np.float64), space.experts[order].astype(np.float64)
        candidates = Mesh(first, second, int(micro)) if micro else Monolith(first, second)
        orders.append(order)
        outlooks.append(look_ahead(setting, candidates, demand, slo, batch))
    return taken(joined(outlooks), np.argsort(np.concatenate(orders)))


def search(setting: Setting, space: Space, demand: Demand, slo: Slo, batch: float | None = None, top: int = 5) -> Found:
    """The best candidate, by price per token and second, then by TPOT, then as enumerated.

    Args:
        batch: sequences in decode, given instead of a rate.
        top: length of the ranking.
    """
    order = np.argsort(_prices(setting, space), kind="stable")
    space = space.at(order)
    prices, seen, size, blocks, feasible = _prices(setting, space), 0, BLOCK, [], np.zeros(0, np.int64)
    while seen < len(order):
        block = np.arange(seen, min(seen + size, len(order)))
        blocks.append(look_at(setting, space.at(block), demand, slo, batch))
        feasible = np.append(feasible, block[blocks[-1].feasible])
        seen, size = seen + len(block), size * GROWTH
        enough = feasible.size >= top and seen < len(order) and prices[seen] > prices[feasible[0]]
        if batch is None and enough:
            break
    if not blocks:
        return Found(None, (), None, None, None, 0, 0)
    return _found(setting, space.at(np.arange(seen)), joined(blocks), top, len(order))


def look_at_all(setting: Setting, space: Space, demand: Demand, slo: Slo, batch: float | None = None) -> float:
    """The least price per token and second of all that keep the limits, with nothing pruned. Infinite: none."""
    outlook = look_at(setting, space, demand, slo, batch)
    return float(np.min(outlook.cost[outlook.feasible], initial=np.inf))


def _found(setting: Setting, space: Space, outlook: Outlook, top: int, size: int) -> Found:
    ranked = np.lexsort((outlook.tpot, np.round(outlook.cost, 12)))
    good = ranked[outlook.feasible[ranked]]
    mesh, monolith = (good[(space.micro_batches[good] > 0) == is_mesh] for is_mesh in (True, False))

    def plan(at: Ints) -> Plan | None:
        return plan_at(setting, space, outlook, int(at[0])) if at.size else None

    cheaper = outlook.cost < outlook.cost[good[0]] * (1 - 1e-12) if good.size else _served(outlook)
    rivals = np.flatnonzero(cheaper)
    nearest = rivals[np.argsort(outlook.excess[:, rivals].max(axis=0), kind="stable")]
    ranking = tuple(plan_at(setting, space, outlook, int(i)) for i in good[:top])
    return Found(plan(good), ranking, plan(mesh), plan(monolith), plan(nearest), len(ranked), size)


def _served(outlook: Outlook) -> NDArray[np.bool_]:
    """Who needs nothing but more time; everybody, when there is nobody like that."""
    served = np.asarray((outlook.excess[:2] <= 1 + 1e-9).all(axis=0))
    return served if served.any() else np.ones_like(served)


def highest_rate(setting: Setting, space: Space, demand: Demand, slo: Slo) -> float:
    """Requests per second that some candidate serves within all limits, to a percent; 0: none at all."""
    low, high = 0.0, demand.rate
    while high - low > 0.01 * max(low, 1e-3 * demand.rate):
        middle = (low + high) / 2
        kept = look_at(setting, space, replace(demand, rate=middle), slo).feasible.any()
        low, high = (middle, high) if kept else (low, middle)
    return low


def plan_at(setting: Setting, space: Space, outlook: Outlook, i: int) -> Plan:
    """One candidate as plain numbers."""
    is_mesh, experts = bool(space.micro_batches[i]), int(space.experts[i])
    slots = setting.room.slots if is_mesh else -(-setting.sizes.experts // experts)
    way = str(setting.ways[int(outlook.way[i])]) if is_mesh else "all to all" if experts > 1 else "none"
    return Plan(
        kind="mesh" if is_mesh else "monolith",
        attention=int(space.attention[i]),
        experts=experts,
        micro_batches=max(1, int(space.micro_batches[i])),
        slots=slots,
        homes=min(float(experts), slots * experts / setting.sizes.experts) if is_mesh else 1.0,
        devices=int(space.devices[i]),
        price=float(outlook.price[i]),
        batch=float(outlook.batch[i]),
        rows=float(outlook.rows[i]),
        tpot_s=float(outlook.tpot[i]),
        ttft_s=float(outlook.ttft[i]),
        tokens_per_s=float(outlook.throughput[i]),
        a_max=float(outlook.a_max[i]),
        way=way,
        parts={name: float(seconds) for name, seconds in zip(PARTS, outlook.parts[:, i], strict=True)},
        memory=float(outlook.memory[i]),
        excess={name: float(share) for name, share in zip(LIMITS, outlook.excess[:, i], strict=True)},
    )


def _prices(setting: Setting, space: Space) -> NDArray[np.float64]:
    mesh = space.attention * setting.attention_price + space.experts * setting.expert_price
    return np.where(space.micro_batches > 0, mesh, space.devices * (setting.monolith or setting).attention_price)
