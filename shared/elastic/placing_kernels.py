"""Corrected placement of one layer, compiled: the inner part of ``placing.moemesh``, where it is explained.

One thread, fixed orders, ties to the lowest number.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numba import njit

NOBODY = -1


@njit(cache=True, nogil=True)
def fill_homes(shares, counts, slots, price, rounds, homes):
    """Corrected placement, in place of the homes that there are: see ``placing.moemesh``.

    shares float64 [samples, E]: what one replica adds to its instance; counts [E]; slots [instances];
    homes bool [instances, E]. Returns False when the replicas do not fit.
    """
    carried = _carried(shares, homes)
    scale = _scales(shares, counts, len(homes))
    order = np.argsort(-_mean_share(shares), kind="mergesort")
    for g in range(len(homes)):  # an instance may have lost slots
        while homes[g].sum() > slots[g]:
            _move(shares, homes, carried, _lightest_on(order, homes, g), g, NOBODY)
    for e in order:
        while homes[:, e].sum() > counts[e]:
            _move(shares, homes, carried, e, _best(shares, homes, carried, scale, slots, e, True), NOBODY)
    for e in order:
        while homes[:, e].sum() < counts[e]:
            g = _best(shares, homes, carried, scale, slots, e, False)
            if g == NOBODY:
                g = _make_room(shares, homes, carried, scale, slots, e)
            if g == NOBODY:
                return False
            _move(shares, homes, carried, e, NOBODY, g)
    for _ in range(rounds):
        if not _improve(shares, homes, carried, scale, slots, price):
            break
    for _ in range(rounds * len(homes)):
        if not _relieve(shares, homes, carried, slots, price):
            break
    return True


@njit(cache=True, nogil=True)
def _carried(shares, homes):
    """Load of every instance in every sample, [instances, samples]."""
    carried = np.zeros((len(homes), len(shares)))
    for g in range(len(homes)):
        for e in range(homes.shape[1]):
            if homes[g, e]:
                carried[g] += shares[:, e]
    return carried


@njit(cache=True, nogil=True)
def _scales(shares, counts, instances):
    """1 / even^3 of every sample: fourth powers of loads times it grow like loads do. 0 for a sample without load."""
    scale = np.zeros(len(shares))
    for k in range(len(shares)):
        even = (shares[k] * counts).sum() / instances
        if even > 0:
            scale[k] = 1 / (even * even * even)
    return scale


@njit(cache=True, nogil=True)
def _mean_share(shares):
    mean = np.zeros(shares.shape[1])
    for k in range(len(shares)):
        mean += shares[k]
    return mean / max(1, len(shares))


@njit(cache=True, nogil=True)
def _lightest_on(order, homes, g):
    for n in range(len(order) - 1, -1, -1):
        if homes[g, order[n]]:
            return order[n]
    return NOBODY


@njit(cache=True, nogil=True)
def _move(shares, homes, carried, e, source, target):
    """Take a replica of ``e`` away from an instance, add one to another; either may be NOBODY."""
    if source != NOBODY:
        homes[source, e] = False
        carried[source] -= shares[:, e]
    if target != NOBODY:
        homes[target, e] = True
        carried[target] += shares[:, e]


@njit(cache=True, nogil=True)
def _unevenness(carried, scale, g, shares, plus, minus):
    """What instance ``g`` contributes to the sum of fourth powers, with expert ``plus`` more and ``minus`` less."""
    total = 0.0
    for k in range(len(scale)):
        load = carried[g, k]
        if plus != NOBODY:
            load += shares[k, plus]
        if minus != NOBODY:
            load -= shares[k, minus]
        total += scale[k] * load * load * load * load
    return total


@njit(cache=True, nogil=True)
def _best(shares, homes, carried, scale, slots, e, leaving):
    """The instance that a replica of ``e`` leaves (among its homes) or goes to (with a free slot, without ``e``)."""
    best, least = NOBODY, np.inf
    for g in range(len(homes)):
        if homes[g, e] != leaving or (not leaving and homes[g].sum() >= slots[g]):
            continue
        here = _unevenness(carried, scale, g, shares, NOBODY, NOBODY)
        if leaving:
            change = _unevenness(carried, scale, g, shares, NOBODY, e) - here
        else:
            change = _unevenness(carried, scale, g, shares, e, NOBODY) - here
        if change < least:
            best, least = g, change
    return best


@njit(cache=True, nogil=True)
def _make_room(shares, homes, carried, scale, slots, e):
    """Every instance without ``e`` is full: one of their experts goes to a free slot elsewhere. Returns whose."""
    best, least = (NOBODY, NOBODY, NOBODY), np.inf
    for g in range(len(homes)):
        for h in range(len(homes)):
            if homes[g, e] or slots[g] == 0 or homes[h].sum() >= slots[h]:
                continue
            for f in range(homes.shape[1]):
                if homes[g, f] and not homes[h, f]:
                    change = _unevenness(carried, scale, g, shares, e, f) + _unevenness(
                        carried, scale, h, shares, f, NOBODY
                    )
                    if change < least:
                        best, least = (g, h, f), change
    g, h, f = best
    if g != NOBODY:
        _move(shares, homes, carried, f, g, h)
    return g


@njit(cache=True, nogil=True)
def _improve(shares, homes, carried, scale, slots, price):
    """Carry out the best move or swap out of every instance if it gains more than its starts cost. False: none did."""
    improved = False
    for g in range(len(homes)):
        here = _unevenness(carried, scale, g, shares, NOBODY, NOBODY)
        best, most = (NOBODY, NOBODY, NOBODY), 0.0
        for h in range(len(homes)):
            if h == g:
                continue
            before = here + _unevenness(carried, scale, h, shares, NOBODY, NOBODY)
            free = homes[h].sum() < slots[h]
            for e in range(homes.shape[1]):
                if not homes[g, e] or homes[h, e]:
                    continue
                for f in range(-1, homes.shape[1]):
                    if (f == NOBODY and not free) or (f != NOBODY and (homes[g, f] or not homes[h, f])):
                        continue
                    after = _unevenness(carried, scale, g, shares, f, e) + _unevenness(carried, scale, h, shares, e, f)
                    starts = 1 if f == NOBODY else 2
                    gain = before - after - price * starts * before
                    if gain > most * (1 + 1e-9) + 1e-12:
                        best, most = (h, e, f), gain
        h, e, f = best
        if h != NOBODY:
            _move(shares, homes, carried, e, g, h)
            if f != NOBODY:
                _move(shares, homes, carried, f, h, g)
            improved = True
    return improved


@njit(cache=True, nogil=True)
def _relieve(shares, homes, carried, slots, price):
    """Carry out the move or swap that takes most off the busiest instance, summed over samples. False: none does.

    The price is a share of what the busiest have beyond an even split.
    """
    tops, loads = _busiest(carried)
    before = loads[0].sum()
    start = price * (before - carried.sum() / len(carried))
    best, most = (NOBODY, NOBODY, NOBODY, NOBODY), 0.0
    for g in range(len(homes)):
        for h in range(len(homes)):
            if h == g:
                continue
            rest = _rest(tops, loads, g, h)
            free = homes[h].sum() < slots[h]
            for e in range(homes.shape[1]):
                if not homes[g, e] or homes[h, e]:
                    continue
                for f in range(-1, e):
                    if (f == NOBODY and not free) or (f != NOBODY and (homes[g, f] or not homes[h, f])):
                        continue
                    after = 0.0
                    for k in range(len(rest)):
                        moved = shares[k, e] - (shares[k, f] if f != NOBODY else 0.0)
                        after += max(rest[k], carried[g, k] - moved, carried[h, k] + moved)
                    gain = before - after - start * (1 if f == NOBODY else 2)
                    if gain > most * (1 + 1e-9) + 1e-9 * before:
                        best, most = (g, h, e, f), gain
    g, h, e, f = best
    if g == NOBODY:
        return False
    _move(shares, homes, carried, e, g, h)
    if f != NOBODY:
        _move(shares, homes, carried, f, h, g)
    return True


@njit(cache=True, nogil=True)
def _busiest(carried):
    """The three busiest instances of every sample and their loads, [3, samples] each; NOBODY and 0 for none."""
    tops, loads = np.zeros((3, carried.shape[1]), np.int64), np.zeros((3, carried.shape[1]))
    tops[:] = NOBODY
    for k in range(carried.shape[1]):
        for g in range(len(carried)):
            for place in range(3):
                if tops[place, k] == NOBODY or carried[g, k] > loads[place, k]:
                    for later in range(2, place, -1):
                        tops[later, k], loads[later, k] = tops[later - 1, k], loads[later - 1, k]
                    tops[place, k], loads[place, k] = g, carried[g, k]
                    break
    return tops, loads


@njit(cache=True, nogil=True)
def _rest(tops, loads, g, h):
    """Load of the busiest instance but two, in every sample."""
    rest = np.zeros(tops.shape[1])
    for k in range(len(rest)):
        for place in range(3):
            if tops[place, k] != NOBODY and tops[place, k] != g and tops[place, k] != h:
                rest[k] = loads[place, k]
                break
    return rest
