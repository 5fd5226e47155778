"""Coefficients that are known, and the steps that a mesh with them would take: formulas written out once more."""

from math import ceil

import numpy as np

from shared.planning.exchange import Measured
from shared.planning.fit import Fitted, Point
from tests.unit.planning_cases import small

MODEL = small()
TRUE = Fitted(
    sizes=MODEL, paced="", most_attention=4, most_experts=8, step_s=2e-3, row_s=3e-5, token_s=1e-5, member_s=4e-4,
    floor_s=1e-3, attention_row_s=6e-5, position_s=3e-7, experts_s=5e-5, expert_s={1: 2e-4, 4: 2.6e-4, 8: 3e-4},
    part_s=4e-6, exchange=Measured(exchange_s=1e-4, instance_s=2e-5, member_s=3e-5, row_s=3e-6),
)  # fmt: skip
SHAPES = [(a, e, b, s) for a, e in ((1, 1), (1, 4), (2, 4), (4, 8)) for b in (4, 8, 16, 48, 96) for s in (64, 512)]


def activated(experts: int, batch: int) -> float:
    share = MODEL.top_k / MODEL.experts
    return MODEL.experts * (1 - (1 - share) ** batch) / experts


def seconds(of: Fitted, attention: int, experts: int, batch: float, context: float, a_max: float) -> float:
    """Of a step."""
    own, layers, exchange = max(1.0, batch / attention), of.sizes.layers, of.exchange
    attend = max(of.floor_s, own * (of.attention_row_s + of.position_s * context))
    beside = exchange.exchange_s + exchange.instance_s * experts + exchange.member_s * (attention - 1)
    beside += exchange.row_s * batch
    inner = beside + compute(of, experts, batch, a_max)
    once = of.step_s + of.row_s * own + of.token_s * batch + of.member_s * (attention - 1)
    return once + layers * attend + len(of.sizes.moe_layers) * inner


def compute(of: Fitted, experts: int, batch: float, activated: float) -> float:
    """Of an expert instance, one exchange."""
    return of.experts_s + of.expert_s[experts] * activated + of.part_s * batch * of.sizes.top_k / experts


def points(of: Fitted, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Steps of all SHAPES."""
    rng, made = np.random.default_rng(seed), []
    for a, e, b, s in SHAPES:
        mean = activated(e, b)
        most = float(ceil(mean))
        beside = of.exchange.exchange_s + of.exchange.instance_s * e + of.exchange.member_s * (a - 1)
        exchange = beside + of.exchange.row_s * b + compute(of, e, b, most)
        step = seconds(of, a, e, b, s, most) * (1 + noise * rng.standard_normal())
        made.append(Point(a, e, b, s, step, exchange, compute(of, e, b, mean), mean, most))
    return made
