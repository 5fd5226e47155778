"""The least a_max that any choice of replicas can reach, by another way than the kernels: a yardstick, never used live.

Source: METRO (arXiv 2512.09277): search for the smallest capacity with which the activated experts can be matched to
instances.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def least_a_max(ids: NDArray[np.int32], homes: NDArray[np.uint64], live: int) -> int:
    """a_max of the best choice for ids int32 [T, k] and homes uint64 [E]. Every activated expert has a live home."""
    hosts = [bits(int(homes[e]) & live) for e in np.unique(ids)]
    low, high = 0, len(hosts)
    while low < high:
        capacity = (low + high) // 2
        low, high = (low, capacity) if fits(hosts, capacity) else (capacity + 1, high)
    return low


def bits(mask: int) -> list[int]:
    """Indices of the set bits, ascending."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def fits(hosts: Sequence[Sequence[int]], capacity: int) -> bool:
    """Whether every expert can go to one of its hosts, ``capacity`` experts at most on each: Kuhn's matching."""
    residents: dict[int, list[int]] = {i: [] for mine in hosts for i in mine}
    return capacity > 0 and all(_place(e, hosts, residents, capacity, set()) for e in range(len(hosts)))


def _place(
    e: int, hosts: Sequence[Sequence[int]], residents: dict[int, list[int]], capacity: int, tried: set[int]
) -> bool:
    """Find a seat for expert ``e``, moving others on when all are taken."""
    for i in hosts[e]:
        if i in tried:
            continue
        tried.add(i)
        if len(residents[i]) < capacity:
            residents[i].append(e)
            return True
        for seat, other in enumerate(residents[i]):
            if _place(other, hosts, residents, capacity, tried):
                residents[i][seat] = e
                return True
    return False
