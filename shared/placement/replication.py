"""How many homes each expert gets, and on which instances: by activation and co-activation. Pure, one layer at a time.

Source: JANUS (arXiv 2512.13525), appendix B, algorithm 3. What it leaves open is decided here: ties go to fewer homes,
then to the lowest expert, resp. to the lowest instance; swaps that improve the finished placement are bounded too.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

from shared.placement.homes import Residents

Floats = NDArray[np.floating]

SWAPS_PER_INSTANCE = 4
"""Bound of the improving swaps; later ones gain little."""


def home_counts(activity: Floats, slots: int, instances: int) -> NDArray[np.int64]:
    """Homes per expert, int64 [E]: one each, and what is left one by one to the largest activity per home.

    Args:
        activity: [E], how often an expert was activated.
        slots: replicas that all ``instances`` hold together. No expert gets more homes than there are instances.

    Raises:
        ValueError: there are fewer slots than experts.
    """
    experts = len(activity)
    if slots < experts:
        raise ValueError(f"{slots} slots cannot hold {experts} experts: add instances or slots")
    counts = np.ones(experts, np.int64)
    heap = [(-float(a), 1, e) for e, a in enumerate(activity)] if instances > 1 else []
    heapq.heapify(heap)
    for _ in range(min(slots, experts * instances) - experts):
        _, count, e = heapq.heappop(heap)
        counts[e] = count + 1
        if counts[e] < instances:
            heapq.heappush(heap, (-float(activity[e]) / (count + 1), count + 1, e))
    return counts


def place(activity: Floats, together: Floats, counts: NDArray[np.int64], instances: int, slots: int) -> Residents:
    """Homes bool [instances, E] with the largest co-activation within an instance kept small.

    Args:
        activity: [E], how often an expert was activated.
        together: [E, E] symmetric, how often two experts were activated in the same exchange; the diagonal is ignored.
        counts: [E], homes per expert, 1 to ``instances``.
        slots: replicas per instance; together they hold all.

    Raises:
        ValueError: the counts do not fit.
    """
    if counts.sum() > instances * slots or counts.min(initial=1) < 1 or counts.max(initial=0) > instances:
        raise ValueError(f"{counts.sum()} homes do not fit into {instances} instances of {slots} slots")
    apart = np.array(together, np.float64)
    np.fill_diagonal(apart, 0)
    residents = np.zeros((instances, len(counts)), np.bool_)
    added = np.zeros((instances, len(counts)))  # co-activation of an expert with what is on an instance
    for e in np.repeat(*_heaviest_first(activity, counts)).tolist():
        g = _best_instance(e, residents, added, slots)
        if g < 0:
            g = _make_room(e, residents, added, apart, slots)
        residents[g, e] = True
        added[g] += apart[e]
    improve(residents, apart, SWAPS_PER_INSTANCE * instances)
    return residents


def _heaviest_first(activity: Floats, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Experts by falling activity per home, and their counts."""
    order = np.argsort(-activity / counts, kind="stable")
    return order, counts[order]


def _best_instance(e: int, residents: Residents, added: Floats, slots: int) -> int:
    """The instance with a free slot and without ``e`` where it adds least; among equals the emptiest. -1: none."""
    held = residents.sum(axis=1)
    feasible = np.flatnonzero((held < slots) & ~residents[:, e])
    return int(min(feasible, key=lambda g: (added[g, e], held[g], g), default=-1))


def _make_room(e: int, residents: Residents, added: Floats, apart: Floats, slots: int) -> int:
    """All free slots are on instances that have ``e``: move an expert f from h to one of them. Returns h.

    There always is one: h is full and lacks ``e``, so it holds an expert that an instance with a free slot lacks.
    """
    free = np.flatnonzero(residents.sum(axis=1) < slots)
    full = np.flatnonzero(~residents[:, e])
    moves = [
        (added[h, e] - added[h, f] - apart[e, f] + added[g, f], g, h, f)
        for g in free for h in full for f in np.flatnonzero(residents[h] & ~residents[g])
    ]  # fmt: skip
    _, g, h, f = min(moves)
    residents[h, f], residents[g, f] = False, True
    added[h] -= apart[f]
    added[g] += apart[f]
    return int(h)


def improve(residents: Residents, apart: Floats, swaps: int) -> None:
    """Swap experts of the instance with the largest co-activation for others' until that helps no more, in place.

    ``apart``: co-activation with a diagonal of zeros. At most ``swaps`` swaps.
    """
    for _ in range(swaps):
        added = residents @ apart
        inner = (added * residents).sum(axis=1) / 2
        worst = int(np.argmax(inner))
        best = min((_best_swap(residents, added, inner, apart, worst, h) for h in range(len(inner)) if h != worst),
                   default=(inner[worst], 0, 0, 0))  # fmt: skip
        if best[0] >= inner[worst] * (1 - 1e-9):
            return
        _, h, e, f = best
        residents[worst, e], residents[worst, f] = False, True
        residents[h, e], residents[h, f] = True, False


def _best_swap(
    residents: Residents, added: Floats, inner: Floats, apart: Floats, g: int, h: int
) -> tuple[float, int, int, int]:
    """(larger co-activation of g and h afterwards, h, e of g, f of h) of the best swap between two instances."""
    mine, other = np.flatnonzero(residents[g] & ~residents[h]), np.flatnonzero(residents[h] & ~residents[g])
    if not (mine.size and other.size):
        return np.inf, h, 0, 0
    shared = apart[np.ix_(mine, other)]
    here = inner[g] - added[g, mine, None] + added[g, other] - shared
    there = inner[h] + added[h, mine, None] - added[h, other] - shared
    larger = np.maximum(here, there)
    at = np.unravel_index(np.argmin(larger), larger.shape)
    return float(larger[at]), h, int(mine[at[0]]), int(other[at[1]])
