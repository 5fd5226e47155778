"""How much of a fresh placement's gain does re-placement keep, and how many bytes does it move?

    python bench/rebalance.py [--shifts 300] [--seed 0]

Each shift: a layer of 160 experts (top-6, 27 slots per instance) is placed for one popularity (Zipf's law), then some
of its experts change ranks. Instances, exponent, share of experts and rows per exchange are drawn. Both placements see
a window of exchanges after the shift and are judged by others. Replicas of a layer have one size, so bytes are counted
in replicas. ``matched`` is the fresh placement with its instances renamed so that few replicas move. The last line is
one JSON object.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Bar, median, report
from synthetic import Shape, exchanges

from shared.placement.homes import Residents, moved_replicas, to_masks
from shared.placement.replacement import fresh, replace
from shared.planning.amax import mean_a_max, observe
from shared.planning.routing import zipf

INSTANCES, EXPONENTS, SHARES, TOKENS = (6, 7, 8, 12, 16), (0.6, 1.0, 1.4), (0.1, 0.25, 0.5, 1.0), (16, 64, 256)
WINDOW = 64
"""Exchanges that a placement is made from, and as many that it is judged by."""


@dataclass(frozen=True)
class Outcome:
    """One shift: mean a_max with each placement, replicas moved, seconds spent."""

    instances: int
    old: float
    fresh: float
    replaced: float
    fresh_moved: int
    matched_moved: int
    moved: int
    seconds: float


def shift(seed: int) -> Outcome:
    rng = np.random.default_rng(seed)
    shape = Shape(instances=int(rng.choice(INSTANCES)))
    tokens, share = int(rng.choice(TOKENS)), float(rng.choice(SHARES))
    before = zipf(shape.experts, float(rng.choice(EXPONENTS)), rng)
    after = before.copy()
    changed = rng.permutation(shape.experts)[: round(share * shape.experts)]
    after[changed] = before[rng.permutation(changed)]

    def sample(popularity: np.ndarray, number: int) -> list[np.ndarray]:
        return exchanges(popularity, shape.top_k, tokens, WINDOW, seed * 10 + number)

    old = fresh(*observe(sample(before, 0), shape.experts), shape.instances, shape.slots)
    activity, together = observe(sample(after, 1), shape.experts)
    start = time.perf_counter()
    replaced = replace(old, activity, shape.slots)
    seconds = time.perf_counter() - start
    best = fresh(activity, together, shape.instances, shape.slots)
    judged = sample(after, 2)

    def a_max(homes: Residents) -> float:
        return mean_a_max(judged, to_masks(homes), shape.instances)

    def moves(homes: Residents) -> int:
        return moved_replicas(to_masks(old), to_masks(homes))

    return Outcome(
        shape.instances, a_max(old), a_max(best), a_max(replaced),
        moves(best), moves(renamed(old, best)), moves(replaced), seconds,
    )  # fmt: skip


def renamed(old: Residents, new: Residents) -> Residents:
    """``new`` with every instance renamed to that of ``old`` with which it shares most, the best pairs first."""
    shared = old.astype(int) @ new.T.astype(int)
    result = np.empty_like(new)
    for _ in range(len(old)):
        mine, other = np.unravel_index(np.argmax(shared), shared.shape)
        result[mine] = new[other]
        shared[mine], shared[:, other] = -1, -1
    return result


def totals(outcomes: list[Outcome]) -> dict[str, Any]:
    """Sums over shifts: what a fresh placement gains is zero in many, so that single ratios mean nothing."""
    gain = sum(o.old - o.fresh for o in outcomes)
    moved = sum(o.fresh_moved for o in outcomes)
    return {
        "shifts": len(outcomes),
        "fresh_gain": gain / len(outcomes),
        "gain_share": sum(o.old - o.replaced for o in outcomes) / gain,
        "moved_share": sum(o.moved for o in outcomes) / moved,
        "matched_moved_share": sum(o.matched_moved for o in outcomes) / moved,
        "ms": median([o.seconds for o in outcomes]) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shifts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes = [shift(args.seed + number) for number in range(args.shifts)]
    result = {"seed": args.seed, "all": totals(outcomes)}
    for instances in INSTANCES:
        result[f"{instances}_instances"] = totals([o for o in outcomes if o.instances == instances])
    for name, row in result.items():
        if isinstance(row, dict):
            print(f"{name:>14}  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    bars = [
        Bar("share of a fresh placement's a_max gain", result["all"]["gain_share"], 0.9),
        Bar("share of its bytes moved", result["all"]["moved_share"], 0.5, at_most=True),
    ]
    report("rebalance", result, bars)


if __name__ == "__main__":
    main()
