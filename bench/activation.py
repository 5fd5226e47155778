"""What does activation scheduling cost, how near is it to the optimum, and what does it save?

    python bench/activation.py [--exchanges 40] [--seed 0]

Synthetic rows (160 experts, top-6, 27 slots per instance) whose experts follow Zipf's law; homes by services/scheduler
from a window of other exchanges of the same popularity. Times are the best of several runs on one core, the call from
Python included. The last line is one JSON object.
"""

import argparse
import time
from typing import Any

import numpy as np
from common import Bar, report
from synthetic import Exchanges, Shape, exchanges, mean_a_max, observe, tokens_per_expert, zipf

from services.scheduler.eplb import homes_of_replicas, rebalance_experts
from services.scheduler.homes import Masks, to_masks
from services.scheduler.replacement import fresh
from shared.activation import schedule_activations
from shared.scheduling.optimum import least_a_max
from shared.scheduling.policies import Policy

EXPONENTS, INSTANCES, TOKENS = (0.0, 0.6, 1.0), (8, 16), (16, 32, 64, 128, 256, 512)
TIMED_TOKENS, RUNS, RUN_S = (1, 16, 64, 256, 1024, 4096), 7, 0.05
WINDOW = 64
"""Exchanges that the placement was made from."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=40, help="exchanges per cell")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def microseconds(window: Exchanges, homes: Masks, live: int, policy: Policy) -> float:
    """Best time of one call over an exchange of the window."""
    best = float("inf")
    for _ in range(RUNS):
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < RUN_S:
            schedule_activations(window[done % len(window)], homes, live, policy)
            done += 1
        best = min(best, (time.perf_counter() - start) / done)
    return best * 1e6


def times(seed: int) -> list[dict[str, Any]]:
    """Microseconds of every policy by tokens, at 16 instances and Zipf 0.6."""
    shape = Shape()
    rows = []
    for tokens in TIMED_TOKENS:
        window, homes = cell(shape, 0.6, tokens, 16, seed)
        spent = {policy.value: round(microseconds(window, homes, (1 << 16) - 1, policy), 2) for policy in Policy}
        rows.append({"rows": tokens, **spent})
        print(f"{tokens:>5} rows  " + "  ".join(f"{name} {us:8.2f} us" for name, us in spent.items()), flush=True)
    return rows


def cell(shape: Shape, exponent: float, tokens: int, count: int, seed: int) -> tuple[Exchanges, Masks]:
    """Exchanges of a popularity, and homes that were made for it from others."""
    popularity = zipf(shape.experts, exponent, np.random.default_rng(seed))
    window = exchanges(popularity, shape.top_k, tokens, WINDOW, seed + 1)
    homes = to_masks(fresh(*observe(window, shape.experts), shape.instances, shape.slots))
    return exchanges(popularity, shape.top_k, tokens, count, seed + 2), homes


def compare(shape: Shape, exponent: float, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Mean a_max of every policy, and the optimum."""
    window, homes = cell(shape, exponent, tokens, args.exchanges, args.seed)
    live = (1 << shape.instances) - 1
    best = np.array([least_a_max(ids, homes, live) for ids in window])
    ours = np.array([schedule_activations(ids, homes, live).activated.max() for ids in window])
    means = {policy.value: mean_a_max(window, homes, shape.instances, policy) for policy in Policy}
    table = rebalance_experts(tokens_per_expert(window, shape.experts)[None], shape.instances * shape.slots, 1, 1,
                              shape.instances)  # fmt: skip
    eplb = homes_of_replicas(table, shape.instances, shape.experts)[0]
    row = {
        "zipf": exponent, "instances": shape.instances, "rows": tokens, "optimum": float(best.mean()), **means,
        "tokens_on_eplb_homes": mean_a_max(window, eplb, shape.instances, Policy.TOKENS),
        "of_optimum": float(ours.mean() / best.mean()), "worst_excess": int((ours - best).max()),
    }  # fmt: skip
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def main() -> None:
    args = parse()
    spent = {row["rows"]: row for row in times(args.seed)}
    cells = [
        compare(Shape(instances=instances), exponent, tokens, args)
        for exponent in EXPONENTS
        for instances in INSTANCES
        for tokens in TOKENS
    ]
    at = next(c for c in cells if (c["zipf"], c["instances"], c["rows"]) == (0.6, 16, 64))
    bars = [
        Bar("scheduler at 64 tokens [us]", spent[64]["activated"], 20, at_most=True),
        Bar("scheduler at 4096 tokens [us]", spent[4096]["activated"], 90, at_most=True),
        Bar("a_max / optimum, worst cell", max(c["of_optimum"] for c in cells), 1.01, at_most=True),
        Bar("a_max - optimum, worst exchange", max(c["worst_excess"] for c in cells), 1, at_most=True),
        Bar(
            "a_max / tokens policy, 16 instances, 64 tokens, Zipf 0.6",
            at["activated"] / at["tokens"],
            0.5,
            at_most=True,
        ),
    ]
    report("activation", {"seed": args.seed, "times_us": list(spent.values()), "cells": cells}, bars)


if __name__ == "__main__":
    main()
