"""What the instances of an elastic pool hold, compiled: who is resident, who is being started, who makes room for whom.

Every instance holds at most ``budget`` replicas, whatever its homes, and starts one expert after the other beside its
computation. A start that the present layer waits for goes before those that wait in line. Worth is that of the live
mesh (shared/elastic/worth.py). What differs: an instance of the mesh knows its own residents only, and has no
replicas that are started for one exchange; here the pool is seen as a whole, so that what another instance holds too
goes first; and of what is worth the same, the layer that comes last goes first.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.elastic.worth import UNKNOWN, worth_of

ABSENT = np.inf
NOBODY = -1
NEEDED = 10.0
"""More than any worth: of what is called before the room is needed."""
NEAR = 0.5
"""What it counts for that a layer comes next rather than last."""


class Pool(NamedTuple):
    """Changed in place."""

    homes: NDArray[np.bool_]
    """[layers, instances, E]"""
    ready: NDArray[np.float64]
    """[layers, instances, E]: from when on a replica can compute; ABSENT: it holds no memory."""
    copies: NDArray[np.int64]
    """[layers, E]: replicas that hold memory."""
    free: NDArray[np.float64]
    """[instances]: when the start that is last in line will have ended."""
    held: NDArray[np.int64]
    """[instances]: replicas that hold memory."""
    budget: NDArray[np.int64]
    """[instances]: most of them."""
    share: NDArray[np.float64]
    """[recorded layers, E]: of recent steps, those that called an expert."""
    starts: NDArray[np.int64]
    """[warm, cold]: how many so far."""
    loaded: NDArray[np.bool_]
    """[layers, E]: has been started before: later starts are warm."""


@njit(cache=True, nogil=True)
def home_of(layer, e, pool):
    """The home that would have started an expert first."""
    best = NOBODY
    for g in range(len(pool.held)):
        if pool.homes[layer, g, e] and (best == NOBODY or pool.free[g] < pool.free[best]):
            best = g
    return best


@njit(cache=True, nogil=True)
def start(now, layer, g, e, pool, times):
    """Start an expert after all others in line; there is room. times: (misc_s, warm_s, cold_s, ...)."""
    pool.free[g] = max(pool.free[g], now) + _seconds(layer, e, pool, times)
    _hold(layer, g, e, pool.free[g], pool)


@njit(cache=True, nogil=True)
def start_now(now, layer, g, e, loads, pool, times):
    """Start an expert that the present layer waits for: next in line, all others after it."""
    if pool.held[g] >= pool.budget[g]:
        v, f = victim(layer, g, layer, loads, pool)
        stop(v, g, f, pool)
    seconds = _seconds(layer, e, pool, times)
    begin = _under_way(now, g, pool)
    for m in range(len(pool.homes)):
        for f in range(pool.homes.shape[2]):
            if begin < pool.ready[m, g, f] < ABSENT:
                pool.ready[m, g, f] += seconds
    pool.free[g] = max(pool.free[g], begin) + seconds
    _hold(layer, g, e, begin + seconds, pool)


@njit(cache=True, nogil=True)
def _under_way(now, g, pool):
    """When the start that is being made now will have ended."""
    ends = ABSENT
    for m in range(len(pool.homes)):
        for f in range(pool.homes.shape[2]):
            if now < pool.ready[m, g, f] < ends:
                ends = pool.ready[m, g, f]
    return ends if ends < ABSENT else now


@njit(cache=True, nogil=True)
def _seconds(layer, e, pool, times):
    """What a start takes, and note it."""
    cold = not pool.loaded[layer, e]
    pool.starts[1 if cold else 0] += 1
    pool.loaded[layer, e] = True
    return times[2] if cold else times[1]


@njit(cache=True, nogil=True)
def _hold(layer, g, e, ready, pool):
    pool.ready[layer, g, e] = ready
    pool.copies[layer, e] += 1
    pool.held[g] += 1


@njit(cache=True, nogil=True)
def stop(layer, g, e, pool):
    """Give a replica's memory back."""
    pool.ready[layer, g, e] = ABSENT
    pool.copies[layer, e] -= 1
    pool.held[g] -= 1


@njit(cache=True, nogil=True)
def make_room(layer, m, g, most, loads, pool):
    """A free slot on ``g`` for an expert of layer m, seen from ``layer``: True if there is one now.

    The only replica of an expert is stopped only if its slot is worth at most ``most``.
    """
    if pool.held[g] < pool.budget[g]:
        return True
    v, f = victim(layer, g, m, loads, pool)
    if (v - layer) % len(pool.homes) <= (m - layer) % len(pool.homes):
        return False
    if pool.copies[v, f] == 1 and worth_of(pool.share[v % len(pool.share), f], UNKNOWN) > most:
        return False
    stop(v, g, f, pool)
    return True


@njit(cache=True, nogil=True)
def victim(layer, g, until, loads, pool):
    """(layer, expert) of the resident on ``g`` that should make room, seen from ``layer``.

    Those of layers ``layer`` to ``until`` are spared as long as there are others, and what the present layer computes
    with, loads [E], even longer.
    """
    layers = len(pool.homes)
    window = (until - layer) % layers
    best_layer, best, least = NOBODY, NOBODY, np.inf
    for m in range(layers):
        ahead = (m - layer) % layers
        for e in range(pool.homes.shape[2]):
            if pool.ready[m, g, e] == ABSENT:
                continue
            worth = worth_of(pool.share[m % len(pool.share), e], UNKNOWN) - NEAR * ahead / layers
            if ahead <= window:
                worth += NEEDED * (2 if m == layer and loads[e] > 0 else 1)
            elif not pool.homes[m, g, e] and pool.copies[m, e] > 1:
                worth -= NEEDED
            if worth < least:
                best_layer, best, least = m, e, worth
    return best_layer, best


@njit(cache=True, nogil=True)
def release(now, layer, rare, pool):
    """Stop replicas of a layer that are away from home, if a home can compute, and experts that are called too rarely.

    rare: the share of steps that must call an expert for it to stay.
    """
    for e in range(pool.homes.shape[2]):
        at_home = False
        for g in range(len(pool.held)):
            at_home |= pool.homes[layer, g, e] and pool.ready[layer, g, e] <= now
        for g in range(len(pool.held)):
            away = at_home and not pool.homes[layer, g, e]
            if pool.ready[layer, g, e] < ABSENT and (away or pool.share[layer % len(pool.share), e] < rare):
                stop(layer, g, e, pool)
