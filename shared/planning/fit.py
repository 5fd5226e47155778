"""Coefficients of a model on the machines at hand, fitted to steps that a live mesh has taken. Pure.

JANUS (arXiv 2512.13525, section 3.5) profiles once, offline: attention grows with rows and with the positions that they
attend to, experts with those that are activated. Two things are added for instances that share a host: what an
activated expert costs depends on how many instances divide the cores and read memory at the same time, and rows cost
CPUs something on top of reading. What does not grow with rows is counted once per step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """Steps in which one attention instance decoded ``batch`` sequences; means, in seconds."""

    experts: int
    """Instances."""
    batch: int
    context: float
    """Positions that a row attends to."""
    step_s: float
    """From one token of a sequence to its next."""
    exchange_s: float
    """From dispatch to the last part."""
    expert_s: float
    """What an instance computes in an exchange."""
    activated: float
    """Experts of an exchange on an instance."""


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` has found, in seconds."""

    layers: int
    moe_layers: int
    top_k: int
    step_s: float
    """Once per step, whatever its rows,"""
    step_row_s: float
    """and for each row: attention of all layers, and the head."""
    position_s: float
    """Per row and position, one layer."""
    experts_s: float
    """Routed experts of one layer, however few are activated (c_e),"""
    expert_s: Mapping[int, float]
    """per activated expert (beta), by the number of instances,"""
    part_s: float
    """and per row of an expert."""
    exchange_s: float
    """An exchange beside the experts' time,"""
    instance_s: float
    """for each instance,"""
    exchange_row_s: float
    """and for each row."""

    def experts(self, instances: int, batch: float, a_max: float) -> float:
        """T_moe of one layer."""
        return self.experts_s + self.beta(instances) * a_max + self.part_s * batch * self.top_k / instances

    def beta(self, instances: int) -> float:
        """Between numbers of instances that were measured on a line; beyond, as at the nearest."""
        known = sorted(self.expert_s)
        return float(np.interp(instances, known, [self.expert_s[n] for n in known]))

    def tpot(self, instances: int, batch: float, context: float, a_max: float) -> float:
        """Of ``batch`` sequences on one attention instance. ``a_max``: mean over layers."""
        attention = self.step_s + batch * (self.step_row_s + self.layers * self.position_s * context)
        exchange = self.exchange_s + self.instance_s * instances + self.exchange_row_s * batch
        return attention + self.moe_layers * (exchange + self.experts(instances, batch, a_max))


def fit(points: Sequence[Point], layers: int, moe_layers: int, top_k: int) -> Fitted:
    """Coefficients, none of them negative, with the least squares of errors, as shares of a step's time.

    Raises ValueError when there are fewer than four points.
    """
    if len(points) < 4:
        raise ValueError(f"{len(points)} points are too few for a fit: measure at least 4")
    batch = np.array([p.batch for p in points], float)
    instances = np.array([p.experts for p in points], float)
    one, steps = np.ones(len(points)), np.array([p.step_s for p in points])
    counts = sorted({p.experts for p in points})
    reading = [np.array([p.activated if p.experts == n else 0.0 for p in points]) for n in counts]
    own = np.array([p.expert_s for p in points])
    experts_s, part_s, *betas = least(own, [one, batch * top_k / instances, *reading], steps)
    beside = np.array([p.exchange_s for p in points]) - own
    exchange_s, instance_s, exchange_row_s = least(beside, [one, instances, batch], steps)
    rest = steps - moe_layers * np.array([p.exchange_s for p in points])
    positions = layers * batch * np.array([p.context for p in points])
    step_s, step_row_s, position_s = least(rest, [one, batch, positions], steps)
    return Fitted(
        layers, moe_layers, top_k, step_s, step_row_s, position_s, experts_s, dict(zip(counts, betas, strict=True)),
        part_s, exchange_s, instance_s, exchange_row_s,
    )  # fmt: skip


def least(values: Floats, columns: Sequence[Floats], scale: Floats) -> list[float]:
    """Coefficients of the columns, none negative, with the least squares of errors / scale: the best of all subsets."""
    scaled, wanted = np.stack(columns, axis=1) / scale[:, None], values / scale
    best, coefficients = np.inf, np.zeros(len(columns))
    for size in range(1, len(columns) + 1):
        for some in map(list, combinations(range(len(columns)), size)):
            found, *_ = np.linalg.lstsq(scaled[:, some], wanted, rcond=None)
            error = float(np.sum((scaled[:, some] @ found - wanted) ** 2))
            if (found >= 0).all() and error < best - 1e-15:
                best, coefficients = error, np.zeros(len(columns))
                coefficients[some] = found
    return coefficients.tolist()


def errors(fitted: Fitted, points: Sequence[Point], a_max: Sequence[float]) -> list[float]:
    """Relative errors of predicted times per token, signed; ``a_max``: of each point."""
    return [fitted.tpot(p.experts, p.batch, p.context, a) / p.step_s - 1 for p, a in zip(points, a_max, strict=True)]
