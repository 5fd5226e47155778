"""Replica choice on CPU: one compiled kernel for every policy.

All of it works on sets: ``hosts[e]`` is the mask of live homes of expert e when the exchange activates it, else 0.
Integers only, one thread, fixed orders: the result is the same on every machine.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numba import njit

from shared.scheduling.bits import count_bits, lowest_bit, without_lowest

ACTIVATED, TOKENS, RANDOM, FIRST = 0, 1, 2, 3
DONE, BAD_ID = -1, -2
INSTANCES = 64
_NOBODY = -1
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True, nogil=True)
def choose(policy, ids, homes, live, replicas, load):
    """Fill ``replicas`` and ``load`` by a policy.

    ids, replicas int32 [T, k] in C order; homes uint64 [E]; live uint64; load int32 [64], the distinct experts that
    each instance activates. Returns DONE, BAD_ID, or the lowest activated expert that has no live home.
    """
    flat, out = ids.ravel(), replicas.ravel()
    hosts = np.zeros(len(homes), np.uint64)
    code = _live_hosts(flat, homes, live, hosts)
    load[:] = 0
    if code != DONE:
        return code
    if policy == TOKENS:
        _split_tokens(flat, hosts, out, load)
        return DONE
    chosen = np.full(len(homes), _NOBODY, np.int32)
    if policy == ACTIVATED:
        _spread(hosts, chosen, load)
        _relieve(hosts, chosen, load)
    elif policy == RANDOM:
        _draw(hosts, _seed(flat), chosen, load)
    else:
        _take_first(hosts, chosen, load)
    for i in range(flat.size):
        out[i] = chosen[np.uint32(flat[i])]
    return DONE


@njit(cache=True, nogil=True)
def _live_hosts(flat, homes, live, hosts):
    """The union of the activated experts; loops without branches, which the compiler turns into vectors."""
    largest = np.uint32(0)
    for i in range(flat.size):
        largest = max(largest, np.uint32(flat[i]))
    if largest >= len(homes) and flat.size:
        return BAD_ID
    marks = np.zeros(len(homes), np.uint8)
    for i in range(flat.size):
        marks[np.uint32(flat[i])] = 1
    for e in range(len(homes)):
        if marks[e]:
            hosts[e] = homes[e] & live
            if hosts[e] == 0:
                return e
    return DONE


@njit(cache=True, nogil=True)
def _spread(hosts, chosen, load):
    """The greedy: experts with the fewest hosts first, then the lowest id, each to its least loaded host."""
    order = _fewest_first(hosts)
    for n in range(len(order)):
        e = order[n]
        chosen[e] = _least_loaded(hosts[e], load)
        load[chosen[e]] += 1


@njit(cache=True, nogil=True)
def _fewest_first(hosts):
    """Activated experts sorted by (number of hosts, id): a counting sort."""
    starts = np.zeros(INSTANCES + 2, np.int64)
    for e in range(len(hosts)):
        starts[count_bits(hosts[e]) + 1] += 1
    idle = starts[1]  # of experts that are not activated: they have no hosts
    starts[1] = 0
    for n in range(1, INSTANCES + 2):
        starts[n] += starts[n - 1]
    order = np.empty(len(hosts) - idle, np.int64)
    for e in range(len(hosts)):
        n = count_bits(hosts[e])
        if n:
            order[starts[n]] = e
            starts[n] += 1
    return order


@njit(cache=True, nogil=True)
def _least_loaded(mask, load):
    """Ties go to the lowest instance."""
    best = lowest_bit(mask)
    mask = without_lowest(mask)
    while mask:
        i = lowest_bit(mask)
        mask = without_lowest(mask)
        if load[i] < load[best]:
            best = i
    return best


@njit(cache=True, nogil=True)
def _relieve(hosts, chosen, load):
    """Chains of moves out of the most loaded instance, each ending where at least two experts fewer are active.

    When the first of the most loaded instances has no such chain, its a_max is the optimum: all instances that its
    experts could reach have at least a_max - 1 already, and their experts have no other hosts.
    """
    came_from = np.empty(INSTANCES, np.int64)
    while True:
        top = np.argmax(load)
        end = _find_chain(_reachable(hosts, chosen), load, top, came_from)
        if end == _NOBODY:
            return
        load[top] -= 1
        load[end] += 1
        while end != top:
            chosen[_first_movable(hosts, chosen, came_from[end], end)] = end
            end = came_from[end]


@njit(cache=True, nogil=True)
def _reachable(hosts, chosen):
    """For every instance: where the experts that it computes could be instead, uint64 [64]."""
    reach = np.zeros(INSTANCES, np.uint64)
    for e in range(len(hosts)):
        if hosts[e]:
            reach[chosen[e]] |= hosts[e]
    return reach


@njit(cache=True, nogil=True)
def _find_chain(reach, load, top, came_from):
    """Breadth first, neighbours in ascending order; the instance at the end of the chain, or _NOBODY."""
    queue = np.empty(INSTANCES, np.int64)
    queue[0], waiting, n = top, 1, 0
    seen = np.uint64(1) << np.uint64(top)
    while n < waiting:
        fresh = reach[queue[n]] & ~seen
        seen |= fresh
        while fresh:
            i = lowest_bit(fresh)
            fresh = without_lowest(fresh)
            came_from[i] = queue[n]
            if load[i] <= load[top] - 2:
                return i
            queue[waiting] = i
            waiting += 1
        n += 1
    return _NOBODY


@njit(cache=True, nogil=True)
def _first_movable(hosts, chosen, source, target):
    """The lowest expert on ``source`` that ``target`` hosts too. There is one."""
    e = 0
    while chosen[e] != source or not (hosts[e] >> np.uint64(target)) & np.uint64(1):
        e += 1
    return e


@njit(cache=True, nogil=True)
def _split_tokens(flat, hosts, out, load):
    """Each expert's choices go round its hosts, in the order of rows; expert e begins at host number e."""
    left, used = hosts.copy(), np.zeros(len(hosts), np.uint64)
    for e in range(len(hosts)):
        if hosts[e]:
            for _ in range(e % count_bits(hosts[e])):
                left[e] = without_lowest(left[e])
    for i in range(flat.size):
        e = np.uint32(flat[i])
        if left[e] == 0:
            left[e] = hosts[e]
        out[i] = lowest_bit(left[e])
        used[e] |= left[e] & (~left[e] + np.uint64(1))
        left[e] = without_lowest(left[e])
    for e in range(len(used)):
        mask = used[e]
        while mask:
            load[lowest_bit(mask)] += 1
            mask = without_lowest(mask)


@njit(cache=True, nogil=True)
def _seed(flat):
    """64 bits that depend on every id and its place."""
    seed = np.uint64(flat.size)
    for i in range(flat.size):
        seed = (seed ^ np.uint64(flat[i])) * _MIX_1
        seed ^= seed >> np.uint64(29)
    return seed


@njit(cache=True, nogil=True)
def _draw(hosts, seed, chosen, load):
    """Every expert to one host, drawn by SplitMix64 of the seed and the expert."""
    for e in range(len(hosts)):
        if hosts[e]:
            x = seed + _GOLDEN * np.uint64(e + 1)
            x = (x ^ (x >> np.uint64(30))) * _MIX_1
            x = (x ^ (x >> np.uint64(27))) * _MIX_2
            x ^= x >> np.uint64(31)
            mask = hosts[e]
            for _ in range(np.int64(x >> np.uint64(1)) % count_bits(mask)):
                mask = without_lowest(mask)
            chosen[e] = lowest_bit(mask)
            load[chosen[e]] += 1


@njit(cache=True, nogil=True)
def _take_first(hosts, chosen, load):
    for e in range(len(hosts)):
        if hosts[e]:
            chosen[e] = lowest_bit(hosts[e])
            load[chosen[e]] += 1
