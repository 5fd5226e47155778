"""Coefficients of a model on the machines at hand, fitted to steps that a live mesh has taken. Pure.

JANUS (arXiv 2512.13525, section 3.5) profiles once, offline: attention grows with rows and with the positions that they
attend to, but takes its least time however few they are; experts grow with those that are activated. Added is what
instances of one host cost each other: an activated expert's time depends on how many instances divide the cores and the
memory, rows cost CPUs something on top of reading, members of a group wait for each other, and all tokens go through
one gateway. Predictions are those of perf_model.py: here are only its coefficients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from shared.device_profile import DeviceProfile
from shared.perf_model import Costs, own_rows
from shared.planning.exchange import Measured
from shared.planning.sizes import Sizes

Floats = NDArray[np.float64]
LEAST_POINTS = 4
ROUNDS = 8
"""After so many the division of points does not change any more."""


@dataclass(frozen=True)
class Point:
    """Steps in which a mesh decoded ``batch`` sequences; means, in seconds."""

    attention: int
    """Instances,"""
    experts: int
    """of either pool."""
    batch: int
    """Of all attention instances together."""
    context: float
    """Positions that a row attends to."""
    step_s: float
    """From one token of a sequence to its next."""
    exchange_s: float
    """From dispatch to the last part."""
    expert_s: float
    """What an instance computes in an exchange."""
    activated: float
    """Experts of an exchange on an instance, mean,"""
    a_max: float
    """and on the busiest one."""
    late: float = 0.0
    """Of paced instances: what their work took longer than it should have, as a share of that."""


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` has found, in seconds; see ``Costs`` and ``Measured`` for what each is multiplied with."""

    sizes: Sizes
    paced: str
    """Profile whose times the mesh kept; "": its own."""
    most_attention: int
    """Instances that were measured at most: beyond, nothing is known."""
    most_experts: int
    step_s: float
    """Once per step, whatever its rows,"""
    row_s: float
    """for each row of an attention instance,"""
    token_s: float
    """for each row of all,"""
    member_s: float
    """and for each attention instance beside the first."""
    floor_s: float
    """Attention of one layer: at least (c_a),"""
    attention_row_s: float
    """or per row (alpha)"""
    position_s: float
    """and position (c_kv)."""
    experts_s: float
    """Routed experts of one layer, however few are activated (c_e),"""
    expert_s: Mapping[int, float]
    """per activated expert (beta), by the number of instances,"""
    part_s: float
    """and per row of an expert."""
    exchange: Measured

    def costs(self) -> Costs:
        """For perf_model.py."""
        attention = DeviceProfile(
            "attention", "fitted", attention_floor_s=self.floor_s, attention_row_s=self.attention_row_s,
            attention_position_s=self.position_s, head_s=self.step_s, head_row_s=self.row_s,
        )  # fmt: skip
        return Costs(
            attention, DeviceProfile("experts", "fitted", experts_s=self.experts_s),
            layers=self.sizes.layers, moe_layers=len(self.sizes.moe_layers), prefill_position_s=self.position_s,
            part_s=self.part_s, reading=tuple(sorted(self.expert_s.items())), member_s=self.member_s,
            token_s=self.token_s,
        )  # fmt: skip


def fit(points: Sequence[Point], sizes: Sizes, paced: str = "") -> Fitted:
    """Coefficients, none of them negative, with the least squares of errors, as shares of a step's time.

    Raises ValueError when there are fewer than LEAST_POINTS points.
    """
    if len(points) < LEAST_POINTS:
        raise ValueError(f"{len(points)} points are too few for a fit: measure at least {LEAST_POINTS}")
    table = {name: np.array([getattr(p, name) for p in points], float) for name in Point.__dataclass_fields__}
    moe, steps = len(sizes.moe_layers), table["step_s"]
    experts_s, part_s, betas = _experts(table, sizes.top_k)
    expert_s = dict(zip(sorted({p.experts for p in points}), betas, strict=True))
    busiest = table["expert_s"] + np.array([expert_s[p.experts] * (p.a_max - p.activated) for p in points])
    one, others = np.ones(len(points)), table["attention"] - 1
    exchange = least(table["exchange_s"] - busiest, [one, table["experts"], others, table["batch"]], steps)
    own = own_rows(table["batch"], table["attention"])
    fixed = [one, own, table["batch"], others]
    rest = steps - moe * table["exchange_s"]
    once, (floor_s, attention_row_s, position_s) = _with_floor(rest, fixed, own, table["context"], steps, sizes.layers)
    step_s, row_s, token_s, member_s = once
    return Fitted(
        sizes, paced, int(table["attention"].max()), int(table["experts"].max()), step_s, row_s, token_s, member_s,
        floor_s, attention_row_s, position_s, experts_s, expert_s, part_s, Measured(*exchange),
    )  # fmt: skip


def _experts(table: Mapping[str, Floats], top_k: int) -> tuple[float, float, list[float]]:
    """c_e, seconds per row of an expert, and beta for every number of instances, ascending."""
    instances, one = table["experts"], np.ones(len(table["experts"]))
    reading = [np.where(instances == n, table["activated"], 0.0) for n in np.unique(instances)]
    columns = [one, table["batch"] * top_k / instances, *reading]
    experts_s, part_s, *betas = least(table["expert_s"], columns, table["step_s"])
    return experts_s, part_s, betas


def _with_floor(
    values: Floats, fixed: Sequence[Floats], own: Floats, context: Floats, scale: Floats, layers: int
) -> tuple[list[float], list[float]]:
    """Coefficients of ``fixed`` and (floor, per row, per position) of values = fixed + layers x max(floor, rows ...).

    Linear once it is known which points the floor counts for: those with the least work. Every such division is tried,
    in the order of the work as the last round's coefficients have it.
    """
    work, best, found = own, np.inf, [0.0] * (len(fixed) + 3)
    for _ in range(ROUNDS):
        order, before = np.argsort(work, kind="stable"), best
        for count in range(len(order) + 1):
            low = np.zeros(len(order), np.bool_)
            low[order[:count]] = True
            sloped = [np.where(low, 0.0, own), np.where(low, 0.0, own * context)]
            columns = [*fixed, *(layers * column for column in (low.astype(float), *sloped))]
            tried = least(values, columns, scale)
            *once, floor, row, position = tried
            told = np.stack(fixed, axis=1) @ once + layers * np.maximum(floor, own * (row + position * context))
            error = float(np.sum(((told - values) / scale) ** 2))
            if error < best - 1e-12:
                best, found = error, tried
        if best >= before:
            break
        work = own * (found[-2] + found[-1] * context)
    return found[: len(fixed)], found[len(fixed) :]


def least(values: Floats, columns: Sequence[Floats], scale: Floats) -> list[float]:
    """Coefficients of the columns, none negative, with the least squares of errors / scale: the best of all subsets.

    Of two that are as good the one with fewer columns, so that what tells points no better apart counts nothing.
    """
    scaled, wanted = np.stack(columns, axis=1) / scale[:, None], values / scale
    best, coefficients = np.inf, np.zeros(len(columns))
    for size in range(1, len(columns) + 1):
        for some in map(list, combinations(range(len(columns)), size)):
            found, *_ = np.linalg.lstsq(scaled[:, some], wanted, rcond=None)
            error = float(np.sum((scaled[:, some] @ found - wanted) ** 2))
            if (found >= 0).all() and error < best - 1e-12:
                best, coefficients = error, np.zeros(len(columns))
                coefficients[some] = found
    return coefficients.tolist()
