"""What does a MoE layer cost an expert instance: how does its time grow with activated experts, and with their tokens?

    python bench/premise.py --model DIR [--threads 1] [--repeats 15] [--plot FILE]

Activated-expert scheduling pays if a layer's time is linear in the number of experts that an instance activates and
nearly flat in the tokens of each. Measured in this process with the kernels of an expert instance; every call takes
other experts of another layer, so that weights come from memory. Medians of interleaved repeats. The last line is one
JSON object.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import median, report

from shared.kernels.threads import thread_environment

ACTIVATED, TOKENS = (1, 2, 4, 8, 16, 24, 32), (1, 2, 4, 8, 16)
Times = dict[tuple[int, int], float]
"""(activated experts, tokens of each) -> median seconds."""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--threads", type=int, default=1, help="compute threads, as an expert instance of 1A2E on two cores")
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--plot", type=Path, help="PNG file to write")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    return p.parse_args()


def calls(model: str, threads: int) -> Callable[[int, int, random.Random], Callable[[], None]]:
    """(activated, tokens of each, where randomness comes from) -> one call of a layer's experts."""
    import torch  # it and numba read the environment when they are imported

    from shared.kernels.cpu import CpuKernels
    from shared.models.loader import open_checkpoint
    from shared.models.moe import MoeLayer
    from shared.models.precision import choose_precision

    device, checkpoint = torch.device("cpu"), open_checkpoint(model)
    precision, spec = choose_precision("auto", device, checkpoint), checkpoint.spec
    kernels = CpuKernels(threads, precise=precision.precise)
    layers = [MoeLayer(checkpoint, kernels, device, precision.tensors, layer) for layer in spec.moe_layers]
    for layer in layers:
        layer.load(range(spec.router.experts))
    most = max(ACTIVATED) * max(TOKENS)
    out = torch.empty(most, spec.hidden)
    rows, ones = torch.randn(most, spec.hidden), torch.ones(most)

    def prepare(activated: int, tokens: int, rng: random.Random) -> Callable[[], None]:
        layer, parts = rng.choice(layers), activated * tokens
        experts = torch.tensor(sorted(rng.sample(range(spec.router.experts), activated)), dtype=torch.int32)
        count = max(tokens, -(-parts // spec.router.top_k))  # rows of an exchange: each one chooses top_k experts
        numbers = (torch.arange(parts) % count).int()
        ids = experts.repeat_interleave(tokens)
        return lambda: layer.forward(rows[:count], numbers, ids, ones[:parts], out[:parts])

    return prepare


def measure(args: argparse.Namespace) -> Times:
    """Medians of all combinations, in another order in each repeat."""
    prepare, rng = calls(args.model, args.threads), random.Random(0)
    taken: dict[tuple[int, int], list[float]] = {(a, t): [] for a in ACTIVATED for t in TOKENS}
    for repeat in range(-1, args.repeats):
        for shape in rng.sample(sorted(taken), len(taken)):
            call = prepare(*shape, rng)
            start = time.perf_counter()
            call()
            if repeat >= 0:  # the first round maps the weights
                taken[shape].append(time.perf_counter() - start)
    return {shape: median(seconds) for shape, seconds in taken.items()}


def fit(times: Times, tokens: int) -> dict[str, float]:
    """Time by activated experts as a line: microseconds per expert and for none, and R squared."""
    y = np.array([times[a, tokens] for a in ACTIVATED]) * 1e6
    slope, offset = map(float, np.polyfit(ACTIVATED, y, 1))
    residual = y - (slope * np.array(ACTIVATED) + offset)
    r2 = float(1 - residual.var() / y.var())
    return {"tokens": tokens, "us_per_expert": round(slope, 1), "us_offset": round(offset, 1), "r2": round(r2, 4)}


def plot(times: Times, file: Path) -> None:
    """Both ways to look at it, side by side, on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
    draw(left, ACTIVATED, {f"{t} tokens each": [times[a, t] for a in ACTIVATED] for t in TOKENS})
    draw(right, TOKENS, {f"{a} activated": [times[a, t] for t in TOKENS] for a in ACTIVATED})
    left.set(xlabel="activated experts", ylabel="time of a layer's experts [ms]", ylim=(0, None))
    right.set(xlabel="tokens of each activated expert")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def draw(axes: Any, x: Sequence[int], lines: dict[str, list[float]]) -> None:
    for label, seconds in lines.items():
        axes.plot(x, np.array(seconds) * 1e3, marker="o", markersize=3, label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    args = parse()
    os.environ.update(thread_environment(args.threads, os.environ))
    times = measure(args)
    for a in ACTIVATED:
        print(f"{a:>3} activated  " + "  ".join(f"{t} tokens {times[a, t] * 1e3:7.3f} ms" for t in TOKENS), flush=True)
    fits = [fit(times, t) for t in TOKENS]
    for line in fits:
        print(line, flush=True)
    if args.plot:
        plot(times, args.plot)
    growth = {t: round(median([times[a, t] / times[a, 1] for a in ACTIVATED]), 2) for t in TOKENS}
    cells = [{"activated": a, "tokens": t, "us": round(times[a, t] * 1e6, 1)} for a in ACTIVATED for t in TOKENS]
    report("premise", {"model": args.model, "threads": args.threads, "cells": cells, "fits": fits, "growth": growth})


if __name__ == "__main__":
    main()
