"""One step of an elastic pool, compiled: who is resident, what is started and stopped, how long the layers wait.

Every instance holds at most ``budget`` residents, whatever its homes, and starts one expert after the other beside its
computation. A start that the present layer waits for goes before those that wait in line. A resident that has to make
room is the one whose next use is farthest: layers come in turns, and an expert is used in a share of them.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.replay.timing import best_move, divide, divided_time, hand_over

ABSENT = np.inf
NOBODY = -1
FAR = 3
"""Steps without use that the only replica of an expert must expect before a second one of another takes its memory."""
MOST_RELIEFS, LEAST_RELIEF = 8, 0.05
"""Replicas for one exchange, and the share of the busiest instance's time that each must take off."""
SURPLUS = 1e6
"""Added to the distance of a resident that is not at home where it is, and of which there is another."""


class Pool(NamedTuple):
    """What all instances hold. Changed in place."""

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
    usage: NDArray[np.float64]
    """[recorded layers, E]: share of the latest steps in which an expert was used, fading."""
    starts: NDArray[np.int64]
    """[warm, cold]: how many so far."""
    loaded: NDArray[np.bool_]
    """[layers, E]: has been started before: later starts are warm."""


@njit(cache=True, nogil=True)
def elastic_step(now, loads, expected, history, known, distance, pool, costs, times, relief):
    """All layers of one step. Returns (MoE seconds, seconds waited, proxy, resident, experts waited for, end).

    loads, expected, history [recorded layers, E]: of this step, as predicted, and as the step before had them; known
    [recorded layers]: which predictions there are; times: (misc_s, warm_s, cold_s, start_share); relief: whether
    replicas are started for one exchange. Proxy and resident: replica-seconds.
    """
    layers, recorded = len(pool.homes), len(loads)
    misc_s = times[0]
    spent = waited = proxy = resident = last = 0.0
    late = 0
    for layer in range(layers):
        r = layer % recorded
        slowed = times[3] * np.minimum(np.maximum(pool.free - now, 0.0), last)
        waits = np.zeros(len(pool.held))
        usable = np.zeros((len(pool.held), loads.shape[1]), np.int64)
        for e in range(loads.shape[1]):
            if loads[r, e] > 0:
                late += _require(now, layer, e, loads[r], pool, times, waits, usable)
        time = divided_time(loads[r], usable, np.maximum(waits, slowed), costs)
        if waits.max() > 0:
            waited += max(0.0, time - divided_time(loads[r], usable, slowed, costs))
        spent, last = spent + time, time
        proxy += time * pool.copies[layer].sum()
        resident += pool.held.sum() * (time + misc_s)
        now += time
        m = (layer + distance) % layers
        foreseen = layer + distance < layers and known[m % recorded]
        begins = now + misc_s + (distance - 1) * (time + misc_s)
        forecast = expected[m % recorded] if foreseen else history[m % recorded]
        _prefetch(now, begins, layer, m, forecast, pool, costs, times, relief)
        now += misc_s
    for r in range(recorded):
        for e in range(loads.shape[1]):
            pool.usage[r, e] += 0.02 * ((loads[r, e] > 0) - pool.usage[r, e])
    return spent, waited, proxy, resident, late, now


@njit(cache=True, nogil=True)
def _require(now, layer, e, loads, pool, times, waits, usable):
    """Find who can compute expert ``e`` now; if nobody, the first who will, by a start if need be. 1 if late."""
    first, found = NOBODY, False
    for g in range(len(pool.held)):
        if pool.ready[layer, g, e] <= now:
            usable[g, e] = 1
            found = True
        elif pool.ready[layer, g, e] < ABSENT and (
            first == NOBODY or pool.ready[layer, g, e] < pool.ready[layer, first, e]
        ):
            first = g
    if found:
        return 0
    if first == NOBODY:
        first = _home(layer, e, pool)
        _urgent(now, layer, first, e, loads, pool, times)
    waits[first] = max(waits[first], pool.ready[layer, first, e] - now)
    usable[first, e] = 1
    return 1


@njit(cache=True, nogil=True)
def _home(layer, e, pool):
    """The home that would have started an expert first."""
    best = NOBODY
    for g in range(len(pool.held)):
        if pool.homes[layer, g, e] and (best == NOBODY or pool.free[g] < pool.free[best]):
            best = g
    return best


@njit(cache=True, nogil=True)
def _seconds(layer, e, pool, times):
    """What a start takes, and note it."""
    cold = not pool.loaded[layer, e]
    pool.starts[1 if cold else 0] += 1
    pool.loaded[layer, e] = True
    return times[2] if cold else times[1]


@njit(cache=True, nogil=True)
def _urgent(now, layer, g, e, loads, pool, times):
    """Start an expert that the present layer waits for: next in line, all others after it."""
    if pool.held[g] >= pool.budget[g]:
        _stop(*_victim(layer, g, layer, loads, pool), pool)
    seconds = _seconds(layer, e, pool, times)
    running = ABSENT  # the end of the start under way
    for m in range(len(pool.homes)):
        for f in range(pool.homes.shape[2]):
            if now < pool.ready[m, g, f] < running:
                running = pool.ready[m, g, f]
    begin = running if running < ABSENT else now
    for m in range(len(pool.homes)):
        for f in range(pool.homes.shape[2]):
            if begin < pool.ready[m, g, f] < ABSENT:
                pool.ready[m, g, f] += seconds
    pool.ready[layer, g, e] = begin + seconds
    pool.copies[layer, e] += 1
    pool.free[g] = max(pool.free[g], begin) + seconds
    pool.held[g] += 1


@njit(cache=True, nogil=True)
def start(now, layer, g, e, pool, times):
    """Start an expert after all others in line; there is room."""
    pool.free[g] = max(pool.free[g], now) + _seconds(layer, e, pool, times)
    pool.ready[layer, g, e] = pool.free[g]
    pool.copies[layer, e] += 1
    pool.held[g] += 1


@njit(cache=True, nogil=True)
def _stop(m, g, e, pool):
    pool.ready[m, g, e] = ABSENT
    pool.copies[m, e] -= 1
    pool.held[g] -= 1


@njit(cache=True, nogil=True)
def _victim(layer, g, until, loads, pool):
    """(layer, g, expert) of the resident whose next use is farthest, seen from ``layer``.

    Those of layers ``layer`` to ``until`` are spared as long as there are others. loads [E]: of the present layer.
    """
    layers = len(pool.homes)
    window = (until - layer) % layers
    best_layer, best, farthest = NOBODY, NOBODY, -np.inf
    for m in range(layers):
        ahead = (m - layer) % layers
        for e in range(pool.homes.shape[2]):
            if pool.ready[m, g, e] == ABSENT:
                continue
            far = _distance(layer, m, e, pool)
            if ahead <= window:
                far -= SURPLUS * (2 if m == layer and loads[e] > 0 else 1)
            elif not pool.homes[m, g, e] and pool.copies[m, e] > 1:
                far += SURPLUS
            if far > farthest:
                best_layer, best, farthest = m, e, far
    return best_layer, g, best


@njit(cache=True, nogil=True)
def _distance(layer, m, e, pool):
    """Layers until the next use of an expert of layer m, on average."""
    layers = len(pool.homes)
    return (m - layer) % layers + layers * (1 / max(pool.usage[m % len(pool.usage), e], 1e-4) - 1)


@njit(cache=True, nogil=True)
def _make_room(layer, m, g, least, expected, pool):
    """A free slot for an expert of layer m: True if there is one now. No resident nearer than ``least`` is stopped."""
    if pool.held[g] < pool.budget[g]:
        return True
    v, _, f = _victim(layer, g, m, expected, pool)
    if (v - layer) % len(pool.homes) <= (m - layer) % len(pool.homes):
        return False
    if _distance(layer, v, f, pool) < least and pool.copies[v, f] == 1:
        return False
    _stop(v, g, f, pool)
    return True


@njit(cache=True, nogil=True)
def _prefetch(now, begins, layer, m, expected, pool, costs, times, relief):
    """Start what layer ``m``, which begins then, is expected to need; replicas too, where one helps and is in time."""
    alive = np.zeros((len(pool.held), len(expected)), np.int64)
    for e in range(len(expected)):
        for g in range(len(pool.held)):
            alive[g, e] = pool.ready[m, g, e] < ABSENT
        if alive[:, e].any() or (expected[e] == 0 and pool.usage[m % len(pool.usage), e] < 0.5):
            continue
        g = _home(m, e, pool)
        if _make_room(layer, m, g, 0.0, expected, pool):
            start(now, m, g, e, pool, times)
            alive[g, e] = 1
    if relief:
        _relieve(now, begins, layer, m, expected, alive, pool, costs, times)


@njit(cache=True, nogil=True)
def _relieve(now, begins, layer, m, expected, alive, pool, costs, times):
    """Second replicas for one exchange, where the busiest instance is expected to gain more than a start disturbs."""
    wanted = expected * (alive.sum(axis=0) > 0)
    rows, busy = divide(wanted, alive, np.zeros(len(pool.held)), costs)
    for _ in range(MOST_RELIEFS):
        could = np.zeros_like(alive)
        for g in range(len(alive)):
            if max(pool.free[g], now) + times[1] <= begins:
                could[g] = 1 - alive[g]
        top = np.argmax(busy)
        e, h, count, busiest = best_move(rows, busy, could, costs)
        if e == NOBODY or busiest > busy[top] * (1 - LEAST_RELIEF):
            return
        if not _make_room(layer, m, h, FAR * len(pool.homes), expected, pool):
            return
        start(now, m, h, e, pool, times)
        alive[h, e] = 1
        hand_over(rows, busy, top, h, e, count, costs)


@njit(cache=True, nogil=True)
def fill(now, least, pool, times):
    """Start absent experts where memory is free, layer by layer: those used in at least a share of the steps."""
    for layer in range(len(pool.homes)):
        for e in range(pool.homes.shape[2]):
            if pool.usage[layer % len(pool.usage), e] < least or pool.copies[layer, e] > 0:
                continue
            g = _home(layer, e, pool)
            if g != NOBODY and pool.held[g] < pool.budget[g]:
                start(now, layer, g, e, pool, times)


@njit(cache=True, nogil=True)
def move_homes(now, homes, pool, times):
    """New homes: replicas at old ones compute until they make room; new ones are started at once, in place of them."""
    pool.homes[:] = homes
    for layer in range(len(homes)):
        for g in range(homes.shape[1]):
            for e in range(homes.shape[2]):
                if homes[layer, g, e] and pool.ready[layer, g, e] == ABSENT:
                    if pool.held[g] >= pool.budget[g]:
                        v, _, f = _victim(layer, g, layer, np.zeros(homes.shape[2], np.int64), pool)
                        if _distance(layer, v, f, pool) < 2 * len(homes) and pool.homes[v, g, f]:
                            continue
                        _stop(v, g, f, pool)
                    start(now, layer, g, e, pool, times)
    drop_surplus(pool)


@njit(cache=True, nogil=True)
def drop_surplus(pool):
    """Stop replicas that are not at home where they are, if a home has one."""
    for layer in range(len(pool.homes)):
        for e in range(pool.homes.shape[2]):
            at_home = False
            for g in range(len(pool.held)):
                at_home |= pool.homes[layer, g, e] and pool.ready[layer, g, e] < ABSENT
            for g in range(len(pool.held)):
                if at_home and not pool.homes[layer, g, e] and pool.ready[layer, g, e] < ABSENT:
                    _stop(layer, g, e, pool)


@njit(cache=True, nogil=True)
def idle(begin, end, stop, warm, last, pool, times):
    """Nothing to do from ``begin`` to ``end``: residents stop and start when their keep-alive says. Replica-seconds.

    stop, warm, last [recorded layers, E]: kept until stop, wanted again from warm until last.
    """
    resident = 0.0
    for layer in range(len(pool.homes)):
        r = layer % len(stop)
        for e in range(pool.homes.shape[2]):
            for g in range(len(pool.held)):
                if pool.ready[layer, g, e] == ABSENT:
                    continue
                until = min(max(stop[r, e], begin), end)
                resident += until - begin
                if until < end:
                    _stop(layer, g, e, pool)
            since = max(warm[r, e], begin)
            if since < end and pool.copies[layer, e] == 0:
                g = _home(layer, e, pool)
                if pool.held[g] < pool.budget[g]:
                    start(since, layer, g, e, pool, times)
                    until = min(max(last[r, e], since), end)
                    resident += until - since
                    if until < end:
                        _stop(layer, g, e, pool)
    return resident
