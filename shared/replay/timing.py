"""How long the routed experts of one layer take, in three forms, compiled. Times in seconds, without T_misc.

* ``devices``, the default: an instance computes its replicas one after the other, and reads the weights of each that
  has rows: max_g sum_r (replica_s + row_s W_r) + 2 link_row_s max_g W_g.
* ``sums``: the paper's formula for GPUs that compute their replicas one after the other, weights costing nothing to
  read: max_g sum_r linear_row_s W_r + 2 link_row_s max_g W_g.
* ``paper`` (MoEless, section 3.3): max_r linear_row_s W_r + 2 link_row_s max_g W_g, as if the replicas on one GPU
  were computed beside each other.

W_r are the rows of a replica, W_g those of an instance.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

from enum import StrEnum

import numpy as np
from numba import njit

from shared.replay.inputs import Inputs

Costs = tuple[float, float, float, bool]
"""Seconds per row, per activated replica, per row and link, and whether replicas are computed beside each other."""


NOBODY = -1
ONLY = 1 << 40
"""More than any rows."""
MOST_MOVES = 32
"""Of rows, out of the busiest instance."""
LEAST_MOVE, SWAP = 1e-4, 0.005
"""Share of the busiest instance's time that a move must take off, and that two of them must take off more than one."""


class Form(StrEnum):
    """Which formula."""

    DEVICES = "devices"
    SUMS = "sums"
    PAPER = "paper"


def costs(inputs: Inputs, form: Form) -> Costs:
    """What the kernels take."""
    if form is Form.DEVICES:
        return inputs.row_s, inputs.replica_s, inputs.link_row_s, False
    return inputs.linear_row_s, 0.0, inputs.link_row_s, form is Form.PAPER


@njit(cache=True, nogil=True)
def even_time(loads, held, waits, costs):
    """Every expert's rows are split evenly over its replicas, as the mesh splits them: whole rows, none for some.

    loads [E]; held int64 [instances, E], replicas that can be used, one at least of every expert with rows;
    waits [instances], before each one can begin.
    """
    row_s, replica_s, link_row_s, papers = costs
    busy, rows, slowest = waits.copy(), np.zeros(len(waits)), 0.0
    for e in range(len(loads)):
        if loads[e] == 0:
            continue
        replicas = held[:, e].sum()
        number = 0
        for g in range(len(held)):
            for _ in range(held[g, e]):
                share = loads[e] // replicas + ((number - e) % replicas < loads[e] % replicas)
                number += 1
                if share > 0:
                    busy[g] += replica_s + row_s * share
                    rows[g] += share
                    slowest = max(slowest, waits[g] + row_s * share)
    return (slowest if papers else busy.max()) + 2 * link_row_s * rows.max()


@njit(cache=True, nogil=True)
def divided_time(loads, usable, homes, waits, costs):
    """Rows are divided by ``divide``, from homes on or from nothing, or evenly where that is faster.

    usable int64 [instances, E], 0 or 1; homes bool [instances, E].
    """
    best = even_time(loads, usable, waits, costs)
    rows, _ = divide(loads, usable, waits, costs, usable)
    best = min(best, _time(rows, waits, costs))
    rows, _ = divide(loads, usable, waits, costs, usable * homes)
    return min(best, _time(rows, waits, costs))


@njit(cache=True, nogil=True)
def divide(loads, usable, waits, costs, first):
    """Who computes how many rows of each expert, int64 [instances, E], and how long each instance is busy.

    Whole experts go to their least busy instances, the longest first, after those that have no choice; ``first``
    int64 [instances, E] says which instances are asked before others. Then the busiest
    instance hands over what helps, an expert or a part of its rows or one for another, until nothing does.
    """
    rows, busy = np.zeros(usable.shape, np.int64), waits.copy()
    for e in _order(loads, usable):
        best = NOBODY
        for g in range(len(busy)):
            if usable[g, e] and (best == NOBODY or (first[g, e], -busy[g]) > (first[best, e], -busy[best])):
                best = g
        rows[best, e] = loads[e]
        busy[best] += costs[1] + costs[0] * loads[e]
    for _ in range(MOST_MOVES):
        top = np.argmax(busy)
        e, h, count, f, busiest = best_move(rows, busy, usable, costs)
        if e == NOBODY or busiest > busy[top] * (1 - LEAST_MOVE):
            break
        carry_out(rows, busy, top, h, e, count, f, costs)
    return rows, busy


@njit(cache=True, nogil=True)
def _order(loads, usable):
    """Experts with rows: those that only one instance has, then the others, the longest first. By insertion."""
    order, keys, count = np.zeros(len(loads), np.int64), np.zeros(len(loads), np.int64), 0
    for e in range(len(loads)):
        instances = 0
        for g in range(len(usable)):
            instances += usable[g, e]
        key, place = loads[e] + (ONLY if instances == 1 else 0), count
        if loads[e] == 0:
            continue
        while place > 0 and keys[place - 1] < key:
            keys[place], order[place] = keys[place - 1], order[place - 1]
            place -= 1
        keys[place], order[place] = key, e
        count += 1
    return order[:count]


@njit(cache=True, nogil=True)
def best_move(rows, busy, usable, costs):
    """What the busiest instance should hand to whom, against what: (expert, instance, rows, other expert, time).

    An expert or a part of its rows, perhaps in exchange for all rows of another one, else NOBODY; and how long the
    busier of both is busy afterwards.
    """
    row_s, replica_s = costs[0], costs[1]
    top = np.argmax(busy)
    best_e, best_h, moved, best_f, least = NOBODY, NOBODY, 0, NOBODY, busy[top]
    for e in range(rows.shape[1]):
        mine = rows[top, e]
        if mine == 0:
            continue
        for h in range(len(busy)):
            if h == top or not usable[h, e]:
                continue
            extra = 0.0 if rows[h, e] else replica_s
            part = np.int64((busy[top] - busy[h] - extra) / (2 * row_s))
            for count in (mine, part):
                if 0 < count <= mine:
                    here = busy[top] - row_s * count - (replica_s if count == mine else 0.0)
                    busier = max(here, busy[h] + extra + row_s * count)
                    if busier < least:
                        best_e, best_h, moved, best_f, least = e, h, count, NOBODY, busier
            for f in range(rows.shape[1]):
                if rows[h, f] == 0 or f == e or not usable[top, f]:
                    continue
                back = row_s * rows[h, f]
                here = busy[top] - replica_s - row_s * mine + back + (0.0 if rows[top, f] else replica_s)
                busier = max(here, busy[h] + extra + row_s * mine - replica_s - back)
                if busier < least * (1 - SWAP):
                    best_e, best_h, moved, best_f, least = e, h, mine, f, busier
    return best_e, best_h, moved, best_f, least


@njit(cache=True, nogil=True)
def carry_out(rows, busy, top, h, e, count, f, costs):
    """The move that ``best_move`` has found."""
    _hand_over(rows, busy, top, h, e, count, costs)
    if f != NOBODY:
        _hand_over(rows, busy, h, top, f, rows[h, f], costs)


@njit(cache=True, nogil=True)
def _hand_over(rows, busy, g, h, e, count, costs):
    busy[h] += costs[0] * count + (0.0 if rows[h, e] else costs[1])
    rows[h, e] += count
    rows[g, e] -= count
    busy[g] -= costs[0] * count + (0.0 if rows[g, e] else costs[1])


@njit(cache=True, nogil=True)
def _time(rows, waits, costs):
    """Time of a layer whose instances compute rows int64 [instances, E] of each expert."""
    row_s, replica_s, link_row_s, papers = costs
    busiest = most = 0.0
    for g in range(len(waits)):
        active, count, largest = 0, 0, 0
        for e in range(rows.shape[1]):
            active += rows[g, e] > 0
            count += rows[g, e]
            largest = max(largest, rows[g, e])
        if active:
            busiest = max(busiest, waits[g] + (row_s * largest if papers else replica_s * active + row_s * count))
        most = max(most, count)
    return busiest + 2 * link_row_s * most


@njit(cache=True, nogil=True)
def balanced_time(loads, instances, costs):
    """Perfect balance: less is impossible for anybody who computes what the gate chose, in the form ``devices``.

    The rows are shared out evenly, and so are the activated experts, each of which is read once, by one instance. In
    the paper's form every expert has the same load.
    """
    row_s, replica_s, link_row_s, papers = costs
    total, activated = 0, 0
    for e in range(len(loads)):
        total += loads[e]
        activated += loads[e] > 0
    link = 2 * link_row_s * total / instances
    if papers:
        return row_s * total / len(loads) + link
    read = -(-activated // instances) * (replica_s + row_s)
    return max(read, (replica_s * activated + row_s * total) / instances) + link
