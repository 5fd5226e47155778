"""Which instances hold the replicas of a layer, by two policies. Pure: arrays in, arrays out.

``paper`` is MoEless (arXiv 2603.06350), Algorithm 2, as written: no capacity, two replicas of an expert may share an
instance, and a warm replica is used again whatever that does to the balance. ``moemesh`` places for the exchanges that
there were, not for their mean: it keeps the sum over exchanges and instances of fourth powers of loads small, which
follows the busiest instance of each exchange. It begins with the homes that there are and moves what is worth it.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.elastic import scaling
from shared.elastic.kernels import fill_paper_homes
from shared.elastic.placing_kernels import fill_homes
from shared.elastic.scaling import Counts

PRICE = 0.02
"""Share of the busiest instances' unevenness that must be gained by each start."""
ROUNDS = 8
"""Of improving moves, one out of every instance; later ones gain little."""


def paper(loads: ArrayLike, counts: ArrayLike, last: ArrayLike) -> Counts:
    """Replicas of each expert on each instance, int64 [instances, E]: Algorithm 2 as written.

    The most loaded replica first: where one was placed last time that nobody has taken yet (of several, the paper does
    not say which: the instance with the least load), else on the instance with the least load of all.

    Args:
        loads: [E], rows, split evenly over an expert's replicas.
        counts: [E], replicas per expert.
        last: [instances, E], the last placement, as far as it is alive.
    """
    alive = np.asarray(last, np.int64)
    held = np.zeros(alive.shape, np.int64)
    fill_paper_homes(np.asarray(loads, np.float64), np.asarray(counts, np.int64), alive, held)
    return held


def moemesh(
    loads: ArrayLike,
    counts: ArrayLike,
    slots: ArrayLike,
    warm: ArrayLike,
    replica_rows: float = 0.0,
    price: float = PRICE,
) -> NDArray[np.bool_]:
    """Homes bool [instances, E]: no two replicas of an expert on one instance, no instance with more than its slots.

    Args:
        loads: [exchanges, E] or [E], rows.
        counts: [E], replicas per expert, 1 to the number of instances.
        slots: [instances], replicas of this layer that each can hold.
        warm: [instances, E], the homes that there are: what stays costs nothing.
        replica_rows: rows that take as long as reading an expert's weights; see ``scaling.Rules``.
        price: see PRICE; 0 moves for any gain.

    Raises:
        ValueError: the counts do not fit.
    """
    samples = np.atleast_2d(np.asarray(loads, np.float64))
    wanted, room = np.asarray(counts, np.int64), np.asarray(slots, np.int64)
    if wanted.min(initial=1) < 1 or wanted.max(initial=0) > len(room) or wanted.sum() > room.sum():
        raise ValueError(f"{wanted.sum()} replicas do not fit into {len(room)} instances of {room.tolist()} slots")
    shares = (samples + replica_rows * (samples > 0)) / wanted
    homes = np.array(warm, np.bool_)
    if not fill_homes(np.ascontiguousarray(shares), wanted, room, float(price), ROUNDS, homes):
        raise ValueError(f"{wanted.max()} replicas of one expert do not fit into slots {room.tolist()}")
    return homes


def compile_placing() -> None:
    """Compile scaling and placing, or load them from the cache, so that the first real call takes no seconds."""
    counts = scaling.moemesh([2.0, 0.0], [1, 1], scaling.Rules(slots=3, instances=2))
    moemesh([[2.0, 0.0]], counts, [2, 2], np.zeros((2, 2), np.bool_))
