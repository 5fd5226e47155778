"""Random exchanges for tests of replica choice."""

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st


@st.composite
def exchanges(draw):
    """ids [T, k] without repeats in a row, homes with a live bit everywhere, live mask."""
    instances = draw(st.integers(1, 6))
    experts = draw(st.integers(1, 12))
    k = draw(st.integers(1, min(4, experts)))
    live = draw(st.integers(1, (1 << instances) - 1))
    bits = [1 << i for i in range(instances) if live >> i & 1]
    masks = [draw(st.integers(0, (1 << instances) - 1)) | draw(st.sampled_from(bits)) for _ in range(experts)]
    rows = draw(st.lists(st.permutations(range(experts)), min_size=1, max_size=9))
    ids = np.array([row[:k] for row in rows], np.int32)
    return ids, np.array(masks, np.uint64), live


def hosts_of(ids: np.ndarray, homes: np.ndarray, live: int) -> dict[int, list[int]]:
    """Activated expert -> its live homes, ascending."""
    return {e: [i for i in range(64) if (int(homes[e]) & live) >> i & 1] for e in sorted(set(ids.ravel().tolist()))}


def plain_choice(hosts: dict[int, list[int]]) -> dict[int, int]:
    """The policy "activated", written for reading: expert -> instance."""
    load = dict.fromkeys(range(64), 0)
    chosen: dict[int, int] = {}
    for e in sorted(hosts, key=lambda e: (len(hosts[e]), e)):
        chosen[e] = min(hosts[e], key=lambda i: (load[i], i))
        load[chosen[e]] += 1
    while chain := plain_chain(hosts, chosen, load):
        for source, target in reversed(list(pairwise(chain))):
            moved = min(e for e in hosts if chosen[e] == source and target in hosts[e])
            chosen[moved] = target
        load[chain[0]] -= 1
        load[chain[-1]] += 1
    return chosen


def plain_chain(hosts: dict[int, list[int]], chosen: dict[int, int], load: dict[int, int]) -> list[int]:
    """The shortest chain of instances out of the most loaded one to one with two experts fewer, or nothing."""
    top = max(load, key=lambda i: (load[i], -i))
    chains, seen = [[top]], {top}
    for chain in chains:
        for i in sorted({i for e in hosts if chosen[e] == chain[-1] for i in hosts[e]} - seen):
            if load[i] <= load[top] - 2:
                return [*chain, i]
            seen.add(i)
            chains.append([*chain, i])
    return []
