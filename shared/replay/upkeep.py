"""What an elastic pool does beside its steps, compiled: new homes, free memory, pauses."""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numba import njit

from shared.elastic.worth import HABIT
from shared.replay.pool import ABSENT, home_of, make_room, release, start, stop

SELDOM = 0.5 * (1 + HABIT)
"""Worth of an expert that half of the steps call: of those that are called less a new home may take the slot."""


@njit(cache=True, nogil=True)
def fill(now, least, pool, times):
    """Start absent experts where memory is free, layer by layer: those that at least a share of the steps call."""
    for layer in range(len(pool.homes)):
        for e in range(pool.homes.shape[2]):
            if pool.share[layer % len(pool.share), e] < least or pool.copies[layer, e] > 0:
                continue
            g = home_of(layer, e, pool)
            if pool.held[g] < pool.budget[g]:
                start(now, layer, g, e, pool, times)


@njit(cache=True, nogil=True)
def move_homes(now, homes, pool, times):
    """New homes: replicas at old ones compute until they make room; new ones are started at once, in place of them."""
    pool.homes[:] = homes
    nobody = np.zeros(homes.shape[2], np.int64)
    for layer in range(len(homes)):
        for g in range(homes.shape[1]):
            for e in range(homes.shape[2]):
                absent = homes[layer, g, e] and pool.ready[layer, g, e] == ABSENT
                if absent and make_room(layer, layer, g, SELDOM, nobody, pool):
                    start(now, layer, g, e, pool, times)
    for layer in range(len(homes)):
        release(now, layer, 0.0, pool)


@njit(cache=True, nogil=True)
def idle(begin, end, stops, warm, last, pool, times):
    """Nothing to do from ``begin`` to ``end``: residents stop and start when their keep-alive says. Replica-seconds.

    stops, warm, last [recorded layers, E]: kept until ``stops``, wanted again from ``warm`` until ``last``.
    """
    resident = 0.0
    for layer in range(len(pool.homes)):
        r = layer % len(stops)
        for e in range(pool.homes.shape[2]):
            for g in range(len(pool.held)):
                if pool.ready[layer, g, e] < ABSENT:
                    resident += _keep(begin, end, layer, g, e, stops[r, e], pool)
            since = max(warm[r, e], begin)
            if since < end and pool.copies[layer, e] == 0:
                g = home_of(layer, e, pool)
                if pool.held[g] < pool.budget[g]:
                    start(since, layer, g, e, pool, times)
                    resident += _keep(since, end, layer, g, e, last[r, e], pool)
    return resident


@njit(cache=True, nogil=True)
def _keep(since, end, layer, g, e, until, pool):
    """A replica holds memory from ``since`` until then, or until the pause is over. Replica-seconds."""
    until = min(max(until, since), end)
    if until < end:
        stop(layer, g, e, pool)
    return until - since
