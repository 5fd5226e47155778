"""From an old placement to a better one with few replicas moved. Pure functions of one layer.

The paper leaves the cost of re-placement open; this search is ours. It judges homes by two sums of squares. The first
is of the *fluid loads*: how many activated experts each instance has when an expert's activity can be divided among its
homes at will, which the activation scheduler approaches. The second is of the shares that an even division leaves at
each home: active experts with few homes cannot evade an instance that chance has filled. Changes that gain most per
replica moved come first, until they are no longer worth the price.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.placement.homes import Residents
from shared.placement.replication import home_counts, place

Floats = NDArray[np.floating]

ROUNDS = 24
"""Iterations of the fluid loads; later ones change them by less than one expert in a hundred."""
BUSY, IDLE, LIGHT, PAIRS = 2, 4, 2, 4
"""How many experts in need of homes, replicas to give up, emptiest instances and pairs to swap are tried at once."""
PRICE = 0.03
"""Gain in squared experts that is worth moving a replica."""
NOBODY = -1


class Change(NamedTuple):
    """``e`` takes the slot of expert ``f`` on instance ``h``; ``f`` takes that of ``e`` on ``g``, or nothing."""

    e: int
    f: int
    """NOBODY: a free slot."""
    h: int
    g: int = NOBODY
    """NOBODY: ``f`` takes nothing."""


def fresh(activity: Floats, together: Floats, instances: int, slots: int) -> Residents:
    """The best homes that we know, bool [instances, E], whatever they cost to move.

    See ``replication`` for the arguments; activity and co-activation are shares of the exchanges.
    """
    homes = place(activity, together, home_counts(activity, instances * slots, instances), instances, slots)
    return replace(homes, activity, slots, price=0.0)


def replace(old: Residents, activity: Floats, slots: int, price: float = PRICE, most: int | None = None) -> Residents:
    """Homes bool [instances, E] for a new activity, beginning with ``old``.

    Args:
        old: homes; an instance that joins has none, and experts may have lost theirs.
        activity: [E], the share of exchanges in which an expert is activated.
        slots: replicas per instance.
        price: see PRICE.
        most: replicas that may be moved for the gain alone, beside what experts without a home need.

    Raises:
        ValueError: there are fewer slots than experts, or an activity is no finite number.
    """
    if not np.isfinite(activity).all():
        raise ValueError("the activity of an expert is not a finite number")
    residents = _house(old, activity, slots)
    moved = 0
    while most is None or moved + 2 <= most:
        tried = list(_changes(residents, activity, slots))
        if not tried:
            break
        after = np.stack([_apply(residents, change) for change in tried])
        costs = 1 + (np.array([change.g for change in tried]) != NOBODY)
        gains = (unevenness(residents, activity) - unevenness(after, activity)) / costs
        best = int(np.argmax(gains))
        if gains[best] <= max(price, 1e-3):
            break
        residents, moved = after[best], moved + int(costs[best])
    return residents


def unevenness(residents: Residents, activity: Floats) -> Floats:
    """[...]: what a change of homes bool [..., instances, E] should lower, in squared experts."""
    even = np.sum(activity**2 / residents.sum(axis=-2), axis=-1)
    return np.sum(fluid_loads(residents, activity) ** 2, axis=-1) + even


def fluid_loads(residents: Residents, activity: Floats) -> Floats:
    """Loads [..., instances] when every expert's activity is divided among its homes so that they even out.

    ``residents``: bool [..., instances, E], every expert with a home. Every instance has a pull that all of its experts
    feel alike; the pull of the fuller ones is lowered, again and again.
    """
    held = residents.astype(np.float64)
    pull = np.ones(held.shape[:-1])
    loads = even = activity.sum() / held.shape[-2] + 1e-9
    for _ in range(ROUNDS):
        shares = activity / np.einsum("...g,...ge->...e", pull, held)
        loads = pull * np.einsum("...ge,...e->...g", held, shares)
        pull *= even / np.maximum(loads, 1e-9)
        pull = np.maximum(pull / pull.max(axis=-1, keepdims=True), 1e-6)
    return np.asarray(loads)


def _house(old: Residents, activity: Floats, slots: int) -> Residents:
    """Give every expert a home: on a free slot, else in place of the replica that is needed least. Nobody has more
    replicas than slots: those needed least are dropped first."""
    residents = old.copy()
    if residents.shape[1] > len(residents) * slots:
        raise ValueError(f"{len(residents) * slots} slots cannot hold {residents.shape[1]} experts")
    for g in np.flatnonzero(residents.sum(axis=1) > slots):
        held = np.flatnonzero(residents[g])
        needed = activity[held] / residents.sum(axis=0)[held]
        residents[g, held[np.argsort(needed, kind="stable")[: len(held) - slots]]] = False
    homeless = np.flatnonzero(~residents.any(axis=0))
    for e in homeless[np.argsort(-activity[homeless], kind="stable")]:
        held = residents.sum(axis=1)
        if held.min() < slots:
            residents[np.argmin(held), e] = True
        else:
            f = _idlest(residents, activity)[0]
            residents[_lightest(np.flatnonzero(residents[:, f]), held)[0], [e, f]] = True, False
    return residents


def _changes(residents: Residents, activity: Floats, slots: int) -> Iterator[Change]:
    """Promising changes: more homes for busy experts, and swaps between the fullest and the emptiest instances."""
    loads = fluid_loads(residents, activity)
    homes = residents.sum(axis=0)
    open_to = np.flatnonzero((homes < len(residents)) & (activity > 0))
    busy = open_to[np.argsort(-(activity**2 / (homes * (homes + 1)))[open_to], kind="stable")]
    free = np.flatnonzero(residents.sum(axis=1) < slots)
    for e in busy[:BUSY]:
        yield from (Change(e, NOBODY, h) for h in _lightest(free[~residents[free, e]], loads))
        for f in _idlest(residents, activity)[:IDLE]:
            yield from (Change(e, f, h) for h in _lightest(np.flatnonzero(residents[:, f] & ~residents[:, e]), loads))
    g = int(np.argmax(loads))
    for h in _lightest(np.delete(np.arange(len(loads)), g), loads):
        yield from _swaps(residents, activity / homes, loads, g, h)


def _swaps(residents: Residents, share: Floats, loads: Floats, g: int, h: int) -> Iterator[Change]:
    """Those that would even out two instances best if activity were divided evenly."""
    mine, others = np.flatnonzero(residents[g] & ~residents[h]), np.flatnonzero(residents[h] & ~residents[g])
    off = abs(share[mine, None] - share[others] - (loads[g] - loads[h]) / 2)
    for at in np.argsort(off, axis=None, kind="stable")[:PAIRS]:
        e, f = np.unravel_index(at, off.shape)
        yield Change(int(mine[e]), int(others[f]), h, g)


def _idlest(residents: Residents, activity: Floats) -> NDArray[np.int64]:
    """Experts with several homes, those first that would miss one the least."""
    homes = residents.sum(axis=0)
    several = np.flatnonzero(homes > 1)
    return several[np.argsort((activity[several] ** 2) / (homes[several] * (homes[several] - 1)), kind="stable")]


def _lightest(instances: NDArray[np.int64], loads: Floats) -> NDArray[np.int64]:
    """The LIGHT emptiest of some instances."""
    return instances[np.argsort(loads[instances], kind="stable")][:LIGHT]


def _apply(residents: Residents, change: Change) -> Residents:
    new = residents.copy()
    new[change.h, change.e] = True
    if change.f != NOBODY:
        new[change.h, change.f] = False
    if change.g != NOBODY:
        new[change.g, [change.e, change.f]] = False, True
    return new
