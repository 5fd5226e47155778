"""How many replicas every expert of a layer gets for a load, by two policies. Pure: arrays in, arrays out.

``paper`` is MoEless (arXiv 2603.06350), Algorithm 1, as written. ``moemesh`` is what we make of it: idle experts keep
its coefficient of variation up, so that it shreds hot experts to the level of cold ones; it may exceed its memory by
a replica; and it splits experts of a few rows, although every further replica has to read the expert's weights too.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.elastic.kernels import fill_counts, fill_paper_counts

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """When ``moemesh`` gives an expert another replica."""

    slots: int
    """Replicas of the layer in all, a hard cap."""
    instances: int
    """No expert gets more replicas: two on one instance would share its time."""
    threshold: float = 0.2
    """Coefficient of variation over the replicas of active experts that is even enough."""
    replica_rows: float = 0.0
    """Rows that take as long as one more replica costs, which reads its expert's weights once more: what it takes off
    the most loaded replica must be more."""
    target_rows: float = 0.0
    """Rows of a replica that meet the target time of a layer (the paper, section 3.2); 0: the threshold decides."""
    slack: float = 0.2
    """A replica is kept while its expert would, without it, be within this share of the most loaded one."""


def paper(loads: ArrayLike, cap_bytes: float, expert_bytes: float, threshold: float = 0.2) -> Counts:
    """Replicas per expert, int64 [E]: Algorithm 1 as written, with a load split evenly over all replicas of its expert.

    One each; then, until the coefficient of variation over all replicas is at most ``threshold`` or the memory of what
    was added reaches ``cap_bytes``, one more for the most loaded. Memory is looked at before a replica is added, as in
    the paper: the last one may exceed it. Without any load the coefficient is taken for zero.

    Args:
        loads: [E], rows.
        cap_bytes: memory for replicas beyond the first, of this layer.

    Raises:
        ValueError: loads are negative or not finite, or the cap is.
    """
    rows = _rows(loads)
    if not (np.isfinite(cap_bytes) and cap_bytes >= 0 and expert_bytes > 0):
        raise ValueError(f"a cap of {cap_bytes} bytes for experts of {expert_bytes}: give finite, positive sizes")
    counts = np.ones(len(rows), np.int64)
    fill_paper_counts(rows, int(np.ceil(cap_bytes / expert_bytes)), float(threshold), counts)
    return counts


def moemesh(loads: ArrayLike, previous: ArrayLike, rules: Rules) -> Counts:
    """Replicas per expert, int64 [E]: one each, more for those that hold the layer up, where a replica pays.

    Args:
        loads: [E], rows of an exchange.
        previous: [E], the counts so far; ones for none.

    Raises:
        ValueError: loads are negative or not finite, or there are fewer slots than experts.
    """
    rows = _rows(loads)
    if rules.slots < len(rows):
        raise ValueError(f"{rules.slots} slots cannot hold {len(rows)} experts: add instances or slots")
    counts = np.ones(len(rows), np.int64)
    numbers = (float(rules.threshold), float(rules.replica_rows), float(rules.target_rows), float(rules.slack))
    fill_counts(rows, np.asarray(previous, np.int64), rules.slots, rules.instances, numbers, counts)
    return counts


def rows_within(seconds: float, row_s: float, replica_s: float) -> float:
    """The ``target_rows`` that one replica computes in a layer's target time; at least one row.

    ``row_s``, ``replica_s``: seconds for each row, and for reading a replica's weights.
    """
    return max(1.0, (seconds - replica_s) / row_s)


def _rows(loads: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(loads, np.float64)
    if not np.isfinite(rows).all() or (rows < 0).any():
        raise ValueError("the load of an expert is negative or not a finite number")
    return rows
