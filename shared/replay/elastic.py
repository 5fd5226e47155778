"""One step of an elastic pool, compiled: how long the layers take and wait, and what is started and stopped meanwhile.

While a layer is computed, a later one is foreseen: its absent experts are started, and replicas for its one exchange
where they take enough off the busiest instance. When the exchange is over they go again.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numba import njit

from shared.elastic.kernels import squared_cv
from shared.elastic.worth import WORTH, chance_of, note_calls
from shared.replay.pool import ABSENT, NOBODY, home_of, make_room, release, start, start_now
from shared.replay.timing import best_move, carry_out, divide, divided_time

HABITUAL = 0.5
"""Experts that so many of the steps call are started ahead although the forecast has no row of them: recorded
predictions are the likeliest choices, not probabilities as in the live mesh."""
SELDOM = 0.3
"""Worth up to which the only replica of an expert makes room for a second one of another."""
MOST_RELIEFS, LEAST_RELIEF = 24, 0.005
"""Moves for one exchange, and the share of the busiest instance's time that each must take off."""
EVEN = 0.025
"""Of the coefficient of variation that is even enough between replicas: that between instances."""


@njit(cache=True, nogil=True)
def elastic_step(now, loads, expected, history, known, rules, pool, costs, times):
    """All layers of one step. Returns (MoE seconds, seconds waited, proxy, resident, experts waited for, end).

    loads, expected, history [recorded layers, E]: of this step, as predicted, and as the step before had them; known
    [recorded layers]: which predictions there are; rules: (distance, relief, early, rare), the last but two: whether
    replicas are started for one exchange, and whether starts begin with the layer in which they are decided, or after
    it; rare: see ``pool.release``, negative: nothing is stopped; times: (misc_s, warm_s, cold_s, start_share). Proxy
    and resident: replica-seconds.
    """
    distance, _, early, rare, _ = rules
    layers, recorded, misc_s = len(pool.homes), len(loads), times[0]
    spent = waited = proxy = resident = last = 0.0
    late = 0
    for layer in range(layers):
        r, m = layer % recorded, (layer + distance) % layers
        foreseen = layer + distance < layers and known[m % recorded]
        forecast = expected[m % recorded] if foreseen else history[m % recorded]
        if early:
            _foresee(now, now + distance * (last + misc_s), layer, m, forecast, rules, pool, costs, times)
        time, more, called = _compute(now, layer, loads[r], last, pool, costs, times)
        spent, waited, late, last = spent + time, waited + more, late + called, time
        proxy += time * pool.copies[layer].sum()
        resident += pool.held.sum() * time
        now += time
        if rare >= 0:
            release(now, layer, rare, pool)
        if not early:
            _foresee(now, now + misc_s, layer, m, forecast, rules, pool, costs, times)
        resident += pool.held.sum() * misc_s
        now += misc_s
    for r in range(recorded):
        note_calls(pool.share[r], loads[r] > 0)
    return spent, waited, proxy, resident, late, now


@njit(cache=True, nogil=True)
def _compute(now, layer, loads, last, pool, costs, times):
    """(seconds of a layer, those that it waited for starts, experts that it waited for)."""
    slowed, waits = np.zeros(len(pool.held)), np.zeros(len(pool.held))
    for g in range(len(slowed)):
        slowed[g] = times[3] * min(max(pool.free[g] - now, 0.0), last)
    usable = np.zeros((len(pool.held), len(loads)), np.int64)
    late = 0
    for e in range(len(loads)):
        if loads[e] > 0:
            late += _require(now, layer, e, loads, pool, times, waits, usable)
    unhindered = divided_time(loads, usable, pool.homes[layer], slowed, costs)
    if late == 0:
        return unhindered, 0.0, late
    for g in range(len(slowed)):
        waits[g] = max(waits[g], slowed[g])
    time = divided_time(loads, usable, pool.homes[layer], waits, costs)
    return time, max(0.0, time - unhindered), late


@njit(cache=True, nogil=True)
def _require(now, layer, e, loads, pool, times, waits, usable):
    """Find who can compute expert ``e`` now; if nobody, the first who will, by a start if need be. 1 if late."""
    first, found = NOBODY, False
    for g in range(len(pool.held)):
        ready = pool.ready[layer, g, e]
        if ready <= now:
            usable[g, e] = 1
            found = True
        elif ready < ABSENT and (first == NOBODY or ready < pool.ready[layer, first, e]):
            first = g
    if found:
        return 0
    if first == NOBODY:
        first = home_of(layer, e, pool)
        start_now(now, layer, first, e, loads, pool, times)
    waits[first] = max(waits[first], pool.ready[layer, first, e] - now)
    usable[first, e] = 1
    return 1


@njit(cache=True, nogil=True)
def _foresee(now, ends, layer, m, expected, rules, pool, costs, times):
    """Start what layer ``m`` is expected to need; replicas too, where one helps and is started by ``ends``.

    That is when the layer begins, or, where a start takes the time of computing, when the next layer does.
    """
    alive = np.zeros((len(pool.held), len(expected)), np.int64)
    for e in range(len(expected)):
        for g in range(len(pool.held)):
            alive[g, e] = pool.ready[m, g, e] < ABSENT
        wanted = chance_of(expected[e]) >= WORTH or pool.share[m % len(pool.share), e] >= HABITUAL
        if not wanted or _holders(e, alive) > 0:
            continue
        g = home_of(m, e, pool)
        if make_room(layer, m, g, ABSENT, expected, pool):
            start(now, m, g, e, pool, times)
            alive[g, e] = 1
    if rules[1]:
        _relieve(now, ends, layer, m, expected, alive, rules, pool, costs, times)


@njit(cache=True, nogil=True)
def _relieve(now, ends, layer, m, expected, alive, rules, pool, costs, times):
    """Second replicas for one exchange, where the busiest instance is expected to gain more than a start disturbs."""
    wanted, ones = expected.copy(), np.ones(len(alive), np.int64)
    for e in range(len(expected)):
        if _holders(e, alive) == 0:
            wanted[e] = 0
    rows, busy = divide(wanted, alive, np.zeros(len(pool.held)), costs, alive)
    price = times[1] * times[3] if rules[2] else 0.0
    for _ in range(MOST_RELIEFS):
        usable = alive.copy()
        for g in range(len(alive)):
            usable[g] |= max(pool.free[g], now) + times[1] <= ends
        top = np.argmax(busy)
        e, h, count, f, busiest = best_move(rows, busy, usable, costs)
        if e == NOBODY or busy[top] - busiest < max(LEAST_RELIEF * busy[top], price):
            break
        if squared_cv(busy, ones, False) <= (EVEN * rules[4]) ** 2:
            break
        if not (
            _second(now, layer, m, h, e, expected, alive, pool, times)
            and _second(now, layer, m, top, f, expected, alive, pool, times)
        ):
            break
        carry_out(rows, busy, top, h, e, count, f, costs)
    if not rules[2]:
        _insure(now, ends, layer, m, expected, alive, pool, times)


@njit(cache=True, nogil=True)
def _holders(e, alive):
    holders = 0
    for g in range(len(alive)):
        holders += alive[g, e]
    return holders


@njit(cache=True, nogil=True)
def _second(now, layer, m, g, e, expected, alive, pool, times):
    """A replica of ``e`` on ``g``, if it is none yet and not NOBODY. False: there is no room."""
    if e == NOBODY or alive[g, e]:
        return True
    if not make_room(layer, m, g, SELDOM, expected, pool):
        return False
    start(now, m, g, e, pool, times)
    alive[g, e] = 1
    return True


@njit(cache=True, nogil=True)
def _insure(now, ends, layer, m, expected, alive, pool, times):
    """Further replicas while nothing else is to be done: predictions err, and small experts make up for that best."""
    for g in range(len(alive)):
        while max(pool.free[g], now) + times[1] <= ends:
            e = _least_expected(g, expected, alive)
            if e == NOBODY or not _second(now, layer, m, g, e, expected, alive, pool, times):
                break


@njit(cache=True, nogil=True)
def _least_expected(g, expected, alive):
    """Of the experts that one other instance has, and ``g`` has not."""
    best = NOBODY
    for e in range(len(expected)):
        single = expected[e] > 0 and not alive[g, e] and _holders(e, alive) == 1
        if single and (best == NOBODY or expected[e] < expected[best]):
            best = e
    return best
