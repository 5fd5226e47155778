"""Scaling of one layer, and the paper's placing, compiled: what scaling.py and placing.py explain.

The replay calls the paper's for every layer of every step. One thread, fixed orders, ties to the lowest number.
"""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numpy as np
from numba import njit

NOBODY = -1
ROUNDING = 1e-12
"""What is left of equal squares in float64."""


@njit(cache=True, nogil=True)
def squared_cv(loads, counts, active_only):
    """Squared coefficient of variation of the replicas' loads when every expert's load is split evenly; 0 without load.

    With n replicas, total S and the sum of squares Q = sum of w_e^2 / R_e it is n Q / S^2 - 1.
    """
    replicas, total, squares = 0, 0.0, 0.0
    for e in range(len(loads)):
        if loads[e] > 0 or not active_only:
            replicas += counts[e]
            total += loads[e]
            squares += loads[e] * loads[e] / counts[e]
    return replicas * squares / (total * total) - 1 if total > 0 else 0.0


@njit(cache=True, nogil=True)
def most_loaded(loads, counts, most):
    """The expert with the largest load per replica among those with fewer than ``most`` replicas, or NOBODY."""
    best, largest = NOBODY, 0.0
    for e in range(len(loads)):
        if counts[e] < most and loads[e] / counts[e] > largest:
            best, largest = e, loads[e] / counts[e]
    return best


@njit(cache=True, nogil=True)
def fill_paper_counts(loads, most_extra, threshold, counts):
    """Algorithm 1: see ``scaling.paper``."""
    counts[:] = 1
    for _ in range(most_extra):
        if squared_cv(loads, counts, False) <= threshold * threshold + ROUNDING:
            return
        counts[most_loaded(loads, counts, np.int64(1) << 62)] += 1


@njit(cache=True, nogil=True)
def fill_counts(loads, previous, slots, instances, rules, counts):
    """Algorithm 1, corrected: see ``scaling.moemesh``. rules: (threshold, replica_rows, target_rows, slack)."""
    threshold, replica_rows, target_rows, slack = rules
    counts[:] = 1
    left = slots - len(loads)
    while left > 0:
        e = most_loaded(loads, counts, instances)
        if e == NOBODY or _even_enough(loads, counts, e, threshold, target_rows):
            break
        if loads[e] / counts[e] - loads[e] / (counts[e] + 1) <= replica_rows:
            break
        counts[e] += 1
        left -= 1
    _keep(loads, previous, instances, slack, left, counts)


@njit(cache=True, nogil=True)
def _even_enough(loads, counts, e, threshold, target_rows):
    """Whether the most loaded replica, one of expert ``e``, need not be relieved."""
    if target_rows > 0:
        return loads[e] / counts[e] <= target_rows
    return squared_cv(loads, counts, True) <= threshold * threshold + ROUNDING


@njit(cache=True, nogil=True)
def _keep(loads, previous, instances, slack, left, counts):
    """Hysteresis: while slots are left, replicas stay whose experts would be nearly the most loaded without them."""
    top = most_loaded(loads, counts, np.int64(1) << 62)
    if top == NOBODY:
        return
    near = (1 - slack) * loads[top] / counts[top]
    for e in range(len(loads)):
        while left > 0 and counts[e] < min(previous[e], instances) and loads[e] / counts[e] > near:
            counts[e] += 1
            left -= 1


@njit(cache=True, nogil=True)
def fill_paper_homes(loads, counts, last, held):
    """Algorithm 2: see ``placing.paper``. last, held int64 [instances, E]: replicas of each expert."""
    held[:] = 0
    carried = np.zeros(len(held))
    for e in np.argsort(-loads / counts, kind="mergesort"):
        share = loads[e] / counts[e]
        for _ in range(counts[e]):
            g = _last_place(last, held, e, carried)
            if g == NOBODY:
                g = np.argmin(carried)
            held[g, e] += 1
            carried[g] += share


@njit(cache=True, nogil=True)
def _last_place(last, held, e, carried):
    """Among several the one with the least load."""
    best = NOBODY
    for g in range(len(held)):
        if held[g, e] < last[g, e] and (best == NOBODY or carried[g] < carried[best]):
            best = g
    return best
