"""What does activation scheduling cost, how near is it to the optimum, and what does it save?

    python bench/activation.py [--exchanges 40] [--seed 0] [--trace FILE] [--synthetic]

Synthetic rows (160 experts, top-6, 27 slots per instance) whose experts follow Zipf's law; homes by services/scheduler
from a window of other exchanges of the same popularity. Times are the best of several runs on one core, the call from
Python included. Then a routing trace, recorded from a mesh of the embedded model that continues real text, or given as
a file: homes from its first half, judged by its second, with half as many slots more than experts. The last line is
one JSON object.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Bar, report
from numpy.typing import NDArray
from synthetic import Exchanges, Shape, exchanges, tokens_per_expert
from traced import record_demo

from services.attention.tap import RoutingTap
from shared.activation import schedule_activations
from shared.elastic.eplb import homes_of_replicas, rebalance_experts
from shared.placement.homes import Masks, to_masks
from shared.placement.replacement import fresh
from shared.planning.amax import mean_a_max, observe
from shared.planning.routing import zipf
from shared.scheduling.optimum import least_a_max
from shared.scheduling.policies import Policy
from shared.traces.load import load_trace

EXPONENTS, INSTANCES, TOKENS = (0.0, 0.6, 1.0), (8, 16), (16, 32, 64, 128, 256, 512)
TIMED_TOKENS, RUNS, RUN_S = (1, 16, 64, 256, 1024, 4096), 7, 0.05
TRACE_INSTANCES = (4, 8, 16)
WINDOW = 64
"""Exchanges that the placement was made from."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=40, help="exchanges per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="a routing trace to judge instead of one of the embedded model")
    parser.add_argument("--synthetic", action="store_true", help="leave out traces: starts no mesh")
    return parser.parse_args()


def microseconds(call: Callable[[NDArray[Any]], object], window: Sequence[NDArray[Any]]) -> float:
    """Best time of one call with an exchange of the window."""
    best = float("inf")
    for _ in range(RUNS):
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < RUN_S:
            call(window[done % len(window)])
            done += 1
        best = min(best, (time.perf_counter() - start) / done)
    return best * 1e6


def times(seed: int) -> list[dict[str, Any]]:
    """Microseconds of every policy by tokens, at 16 instances and Zipf 0.6, and of attention noting what was chosen."""
    shape, tap = Shape(), RoutingTap((0,), Shape().experts, first=0)
    rows = []
    for tokens in TIMED_TOKENS:
        window, homes = cell(shape, 0.6, tokens, 16, seed)
        spent = {policy.value: round(microseconds(partial(schedule, homes, policy), window), 2) for policy in Policy}
        spent["tap"] = round(microseconds(partial(tap.combined, 0), [ids.astype(np.uint32) for ids in window]), 2)
        rows.append({"rows": tokens, **spent})
        print(f"{tokens:>5} rows  " + "  ".join(f"{name} {us:8.2f} us" for name, us in spent.items()), flush=True)
    return rows


def schedule(homes: Masks, policy: Policy, ids: NDArray[np.int32]) -> None:
    schedule_activations(ids, homes, (1 << 16) - 1, policy)


def cell(shape: Shape, exponent: float, tokens: int, count: int, seed: int) -> tuple[Exchanges, Masks]:
    """Exchanges of a popularity, and homes that were made for it from others."""
    popularity = zipf(shape.experts, exponent, np.random.default_rng(seed))
    window = exchanges(popularity, shape.top_k, tokens, WINDOW, seed + 1)
    homes = to_masks(fresh(*observe(window, shape.experts), shape.instances, shape.slots))
    return exchanges(popularity, shape.top_k, tokens, count, seed + 2), homes


def compare(shape: Shape, exponent: float, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Mean a_max of every policy, and the optimum."""
    row = judge(shape, *cell(shape, exponent, tokens, args.exchanges, args.seed))
    return printed({"zipf": exponent, "rows": tokens, **row})


def compare_trace(path: Path, count: int) -> list[dict[str, Any]]:
    """The same for every layer of a trace, at most ``count`` exchanges of each, spread over its second half."""
    layers: dict[int, Exchanges] = {}
    for exchange in load_trace(path):
        layers.setdefault(exchange.layer, []).append(exchange.ids)
    experts = 1 + max(int(ids.max(initial=0)) for window in layers.values() for ids in window)
    rows = []
    for layer, window in sorted(layers.items()):
        seen, judged = window[: len(window) // 2], window[len(window) // 2 :]
        judged = judged[:: -(-len(judged) // count)]
        for instances in TRACE_INSTANCES:
            shape = Shape(experts, window[0].shape[1], instances, -(-experts * 3 // (2 * instances)))
            homes = to_masks(fresh(*observe(seen or judged, experts), shape.instances, shape.slots))
            rows.append(printed({"layer": layer, "exchanges": len(judged), **judge(shape, judged, homes)}))
    return rows


def traced(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cells of the trace that was asked for."""
    if args.synthetic:
        return []
    if args.trace:
        return compare_trace(args.trace, args.exchanges)
    with tempfile.TemporaryDirectory(prefix="moemesh-activation-") as scratch:
        out = Path(scratch) / "trace"
        asyncio.run(record_demo(out))
        return compare_trace(out, args.exchanges)


def printed(row: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def judge(shape: Shape, window: Exchanges, homes: Masks) -> dict[str, Any]:
    """Mean a_max of every policy, and the optimum."""
    live = (1 << shape.instances) - 1
    best = np.array([least_a_max(ids, homes, live) for ids in window])
    ours = np.array([schedule_activations(ids, homes, live).activated.max() for ids in window])
    means = {policy.value: mean_a_max(window, homes, shape.instances, policy) for policy in Policy}
    table = rebalance_experts(tokens_per_expert(window, shape.experts)[None], shape.instances * shape.slots, 1, 1,
                              shape.instances)  # fmt: skip
    eplb = homes_of_replicas(table, shape.instances, shape.experts)[0]
    return {
        "instances": shape.instances, "optimum": float(best.mean()), **means,
        "tokens_on_eplb_homes": mean_a_max(window, eplb, shape.instances, Policy.TOKENS),
        "of_optimum": float(ours.mean() / best.mean()), "worst_excess": int((ours - best).max()),
    }  # fmt: skip


def optimum_bars(of: str, cells: list[dict[str, Any]]) -> list[Bar]:
    return [
        Bar(f"a_max / optimum, worst cell, {of}", max(c["of_optimum"] for c in cells), 1.01, at_most=True),
        Bar(f"a_max - optimum, worst exchange, {of}", max(c["worst_excess"] for c in cells), 1, at_most=True),
    ]


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
    traces = traced(args)
    bars = [
        Bar("scheduler at 64 tokens [us]", spent[64]["activated"], 20, at_most=True),
        Bar("scheduler at 4096 tokens [us]", spent[4096]["activated"], 90, at_most=True),
        *optimum_bars("synthetic rows", cells),
        Bar("a_max / that of tokens, 16 instances, 64 rows", at["activated"] / at["tokens"], 0.5, at_most=True),
    ]
    bars += optimum_bars("trace", traces) if traces else []
    result = {"seed": args.seed, "times_us": list(spent.values()), "cells": cells, "trace": traces}
    report("activation", result, bars)


if __name__ == "__main__":
    main()
