"""The paper's ablation, on simulated nodes: one-phase or two-phase, the gate on either side, activation scheduling.

    sudo python bench/ablation_ways.py [--networks A,B] [--rows 64,256] [--repeats 4] [--expert-us 100]

The nodes, networks and processes of exchange.py: 8 attention and 8 expert instances. An activated expert of an instance
takes a fixed time (paced: a device that is not there, so these are no speeds of this machine); every expert is at home
everywhere. Figures are milliseconds of one MoE layer, exchange and experts, medians over grouped steps.
"""

import argparse
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from common import report
from exchange import NETWORKS, STEPS, Child, make_model, mesh, run
from nodes import Setup

from shared.scheduling.policies import Policy

EVEN, OURS = Policy.TOKENS, Policy.ACTIVATED
VARIANTS: dict[str, tuple[Policy, tuple[str, ...]]] = {
    "one-phase, gate of experts": (EVEN, ("one/experts",)),
    "two-phase, gate of attention": (EVEN, ("direct/attention", "relay/attention")),
    "two-phase, gate of experts": (EVEN, ("direct/experts", "relay/experts")),
    "and activated experts balanced": (OURS, ("direct/experts", "relay/experts")),
}
"""Policy, and the ways of which the faster one counts."""


def one_policy(attention: list[Child], policy: Policy, rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a layer by variant."""
    mine = {name: ways for name, (of, ways) in VARIANTS.items() if of is policy}
    taken: dict[str, list[float]] = {way: [] for ways in mine.values() for way in ways}
    for repeat in range(repeats + 1):
        for way in taken:
            found = run(attention, way, rows, STEPS)
            taken[way] += found if repeat else []  # the first repeat warms up
    return {name: round(min(median(taken[way]) for way in ways) * 1e3, 3) for name, ways in mine.items()}


def measure(args: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = []
    for name in args.networks.split(","):
        cells: dict[int, dict[str, float]] = {rows: {} for rows in map(int, args.rows.split(","))}
        for policy in (EVEN, OURS):
            with mesh(NETWORKS[name], model, Setup(policy, args.expert_us)) as attention:
                for rows, found in cells.items():
                    found |= one_policy(attention, policy, rows, args.repeats)
        table += [{"network": name, "rows": rows, "ms": found} for rows, found in cells.items()]
        print(*table[-len(cells) :], sep="\n", flush=True)
    return table


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--networks", default="A,B")
    p.add_argument("--rows", default="64,256", help="rows of a group's exchange")
    p.add_argument("--repeats", type=int, default=4)
    p.add_argument("--expert-us", type=float, default=100.0, help="time of each activated expert")
    args = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no namespaces behind
    with tempfile.TemporaryDirectory(prefix="moemesh-ablation-") as scratch:
        table = measure(args, make_model(Path(scratch)))
    networks = {name: asdict(NETWORKS[name]) for name in args.networks.split(",")}
    report("ablation_ways", {"networks": networks, "expert_us": args.expert_us, "cells": table})


if __name__ == "__main__":
    main()
