"""DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB), written anew: the baseline of our placements.

Balances tokens, not activated experts. Hierarchical when groups of experts can be dealt to nodes, else global. Like the
original it may put two replicas of one expert on one GPU.
"""

import numpy as np
from numpy.typing import NDArray

Masks = NDArray[np.uint64]
Ints = NDArray[np.int64]


def rebalance_experts(weight: NDArray[np.floating], replicas: int, groups: int, nodes: int, gpus: int) -> Ints:
    """The logical expert in every slot, int64 [layers, replicas]; GPU g has slots g * replicas / gpus onwards.

    Args:
        weight: [layers, E], tokens that each expert has computed.
        replicas: slots of all GPUs; a multiple of ``gpus``, at least E.
        groups: groups that E divides into; dealt to nodes as a whole when ``nodes`` divides their number.

    Raises:
        ValueError: the numbers do not divide.
    """
    if groups % nodes:
        groups = nodes = 1
    experts = weight.shape[1]
    if experts % groups or gpus % nodes or replicas % gpus or replicas < experts:
        raise ValueError(
            f"{experts} experts, {groups} groups, {nodes} nodes, {gpus} GPUs, {replicas} slots: do not divide"
        )
    return np.stack([_layer(np.asarray(loads, np.float64), replicas, groups, nodes, gpus) for loads in weight])


def homes_of_replicas(table: Ints, gpus: int, experts: int) -> Masks:
    """Homes uint64 [layers, experts] of what ``rebalance_experts`` returns; of several replicas on a GPU one counts."""
    homes = np.zeros((len(table), experts), np.uint64)
    bits = np.uint64(1) << np.repeat(np.arange(gpus, dtype=np.uint64), table.shape[1] // gpus)
    for masks, slots in zip(homes, table, strict=True):
        np.bitwise_or.at(masks, slots, bits)
    return homes


def _layer(loads: NDArray[np.float64], replicas: int, groups: int, nodes: int, gpus: int) -> Ints:
    """Groups to nodes, replicas within each node, those to its GPUs."""
    members = np.arange(len(loads)).reshape(groups, -1)
    slots = []
    for dealt in pack(loads[members].sum(axis=1), nodes):
        experts = members[dealt].ravel()
        copies = experts[replicate(loads[experts], replicas // nodes)]
        counts = np.bincount(copies, minlength=len(loads))
        slots += [copies[pile] for pile in pack(loads[copies] / counts[copies], gpus // nodes)]
    return np.concatenate(slots)


def pack(weights: NDArray[np.float64], packs: int) -> list[Ints]:
    """Indices of the items in each pack, in the order of arrival: heaviest first, to the lightest pack with room."""
    room = len(weights) // packs
    if room == 1:
        return list(np.arange(packs)[:, None])
    piles: list[list[int]] = [[] for _ in range(packs)]
    loads = [0.0] * packs
    for item in np.argsort(-weights, kind="stable"):
        lightest = min((p for p in range(packs) if len(piles[p]) < room), key=loads.__getitem__)
        piles[lightest].append(int(item))
        loads[lightest] += float(weights[item])
    return [np.array(pile, np.int64) for pile in piles]


def replicate(weights: NDArray[np.float64], replicas: int) -> Ints:
    """The item of every replica: each once, then again and again the one with the most weight per replica."""
    counts = np.ones(len(weights), np.int64)
    items = list(range(len(weights)))
    for _ in range(replicas - len(weights)):
        items.append(int(np.argmax(weights / counts)))
        counts[items[-1]] += 1
    return np.array(items, np.int64)
