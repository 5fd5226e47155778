"""What does the way of an exchange cost, and does the adaptive choice find the best one?

    sudo python bench/exchange.py [--networks A,B,C,D] [--rows 8,64,256] [--repeats 5] [--plot FILE]

Two attention nodes and two expert nodes of four instances each: processes in network namespaces that this script makes
and removes. Links have tc's rate limits; the time that a message occupies its sender and its latency are added by the
transport (nodes.py). Between nodes it is TCP, inside of one shared memory. A round trip is one exchange of a group's
rows: the experts are tiny. Both groups work at the same time. Ways take turns; figures are medians of steps of six
exchanges.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from common import Bar, report
from nodes import Network, Setup, SimulatedNode, nodes

from shared.kernels.threads import thread_environment
from shared.models.presets import make_checkpoint

NETWORKS = {
    "A": Network("A", 1, 100, 200),
    "B": Network("B", 10, 10, 20),
    "C": Network("C", 1, 10, 20),
    "D": Network("D", 10, 100, 200),
}
NO_WAIT = Setup()
ATTENTION_NODES = EXPERT_NODES = 2
PER_NODE = 4
FIXED = [f"{phase}/{gate}" for phase in ("one", "direct", "relay") for gate in ("experts", "attention")]
LEARNING, MOST_LEARNING = 30, 20
"""Steps in which the adaptive choice has its trials, as often as it takes."""
STEPS = 4


class Child:
    """A process in a namespace, spoken to by lines of JSON."""

    def __init__(
        self, kind: str, number: int, node: SimulatedNode, model: Path, network: Network, setup: Setup
    ) -> None:
        script = str(Path(__file__).with_name("exchange_node.py"))
        environment = {"UCX_NET_DEVICES": "eth0", "PYTHONPATH": str(Path(__file__).parents[1])}
        environment |= thread_environment(1, os.environ)
        arguments = [
            sys.executable,
            script,
            kind,
            str(number),
            node.name,
            str(model),
            json.dumps(asdict(network)),
            json.dumps(asdict(setup)),
        ]
        self.process = subprocess.Popen(
            [*node.enter, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=dict(os.environ) | environment,
        )  # fmt: skip
        self.kind = kind

    def tell(self, message: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the bench ended with status {self.process.wait(10)}")
        return json.loads(line)

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def mesh(network: Network, model: Path, setup: Setup = NO_WAIT) -> Iterator[list[Child]]:
    """The attention processes of a mesh on four nodes, ready for commands."""
    with nodes(ATTENTION_NODES + EXPERT_NODES, network.gbit) as made:
        places = [("attention", node) for node in made[:ATTENTION_NODES] for _ in range(PER_NODE)]
        places += [("experts", node) for node in made[ATTENTION_NODES:] for _ in range(PER_NODE)]
        children: list[Child] = []
        everybody: list[dict[str, Any]] = []
        try:
            for part in ([0], [len(places) - 1], range(1, len(places) - 1)):  # the first of a kind compiles for all
                new = [Child(places[i][0], i, places[i][1], model, network, setup) for i in part]
                children += new
                everybody += [child.hear() for child in new]
            everybody.sort(key=lambda one: one["incarnation"])
            for child in children:
                child.tell(everybody)
            attention = [child for child in children if child.kind == "attention"]
            for child in attention * 2:  # the first time neighbours do not know each other yet
                child.tell({"do": "meet"})
                child.hear()
            yield attention
            for child in attention:
                child.tell({"do": "stop"})
        finally:
            for child in children:
                child.stop()


def run(attention: list[Child], way: str, rows: int, steps: int) -> list[float]:
    """Seconds per exchange of steps in which a whole group took part, as its members saw them."""
    return [seconds for answer in answers(attention, way, rows, steps) for seconds in answer["all"]]


def answers(attention: list[Child], way: str, rows: int, steps: int) -> list[dict[str, Any]]:
    """What all of them say after so many steps."""
    for child in attention:
        child.tell({"do": "run", "way": way, "rows": rows // PER_NODE, "steps": steps})
    return [child.hear() for child in attention]


def learn(attention: list[Child], rows: int) -> list[str]:
    """Let the adaptive choice have its trials; returns what each node chose.

    Raises RuntimeError when a node's meeting place comes to no decision.
    """
    size = str(1 << (rows - 1).bit_length())
    for _ in range(MOST_LEARNING):
        said = answers(attention, "auto", rows, LEARNING)
        chosen = [said[host]["decided"].get(size, "") for host in range(0, len(attention), PER_NODE)]
        if all(chosen):
            return chosen
    raise RuntimeError(f"no way was chosen for {rows} rows after {MOST_LEARNING * LEARNING} steps")


def cell(attention: list[Child], rows: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per exchange by way, and which way the adaptive choice took on each node."""
    taken: dict[str, list[float]] = {way: [] for way in [*FIXED, "auto"]}
    chosen = learn(attention, rows)
    for _ in range(repeats):
        for way in taken:
            taken[way] += run(attention, way, rows, STEPS)
    ms = {way: round(median(values) * 1e3, 3) for way, values in taken.items() if values}
    return {"rows": rows, "chosen": chosen, "ms": ms}


def make_model(directory: Path) -> Path:
    """One layer of bench-1b's width, with experts that cost next to nothing."""
    model = directory / "model"
    make_checkpoint("bench-1b", model, num_hidden_layers=1, moe_intermediate_size=64, vocab_size=512)
    return model


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    bars = []
    for row in rows:
        ms = row["ms"]
        if row["network"] == "A" and row["rows"] <= 64:
            best = min(ms[way] for way in ("direct/experts", "relay/experts"))
            bars.append(Bar(f"one-phase / two-phase, network A, {row['rows']} rows", ms["one/experts"] / best, 1.5))
    ratios = [row["ms"]["auto"] / min(row["ms"][way] for way in FIXED) for row in rows]
    bars.append(Bar(f"adaptive / best fixed, mean of {len(ratios)} cells", geometric_mean(ratios), 1.05, at_most=True))
    bars.append(Bar("adaptive / best fixed, worst cell", max(ratios), 1.15, at_most=True))
    return bars


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Milliseconds of every way in every cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 4), layout="constrained")
    ways = [*FIXED, "auto"]
    for number, way in enumerate(ways):
        places = [cell + (number - len(ways) / 2) / (len(ways) + 2) for cell in range(len(rows))]
        axes.bar(places, [row["ms"][way] for row in rows], 1 / (len(ways) + 3), label=way)
    axes.set_xticks(range(len(rows)), [f"{row['network']}, {row['rows']} rows" for row in rows])
    axes.set(ylabel="one exchange of a group's rows [ms]", yscale="log")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--networks", default="A,B,C,D")
    p.add_argument("--rows", default="8,64,256", help="rows of a group's exchange")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--combine", choices=("exact", "partial"), default="exact", help="parts, or a sum per row")
    p.add_argument("--plot", type=Path, help="PNG file for all cells")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no namespaces behind
    rows = []
    with tempfile.TemporaryDirectory(prefix="moemesh-exchange-") as scratch:
        model = make_model(Path(scratch))
        for name in args.networks.split(","):
            with mesh(NETWORKS[name], model, Setup(partial=args.combine == "partial")) as attention:
                for count in map(int, args.rows.split(",")):
                    rows.append({"network": name} | cell(attention, count, args.repeats))
                    print(rows[-1], flush=True)
    if args.plot:
        plot(rows, args.plot)
    report(
        "exchange",
        {"combine": args.combine, "networks": {n: asdict(v) for n, v in NETWORKS.items()}, "cells": rows},
        bars_of(rows),
    )


if __name__ == "__main__":
    main()
