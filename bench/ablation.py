"""What does each part of the data path bring? Meshes that differ in one setting, measured in turns.

    python bench/ablation.py --model DIR [--batch 1,8,32] [--repeats 5] [--plot FILE]

First its premise (premise.py): a layer's time is linear in activated experts and nearly flat in their tokens. Then time
per MoE layer on meshes of one shape, all experts at home on every expert instance: from dispatch to the last combined
part, as the attention instance measures it while all streams decode. Ratios are medians over repeats. The last line
is one JSON object.
"""

import argparse
import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from bars import run
from common import Bar, median, prompts, refuse_paced, report
from limit import decode, pages

from shared.cli.mesh import LocalMesh, MeshOptions

COMMON = {"prefix_cache": "false", "micro_batches": "1"}
"""Repeats bring new prompts; an exchange is a whole step's, so that they compare."""


OURS, EVEN = "activated", "tokens"
VARIANTS: Mapping[str, Mapping[str, str]] = {OURS: {"policy": "activated"}, EVEN: {"policy": "tokens"}}
"""By the name in the table: the settings in which a mesh differs from the others."""
MOST = 0.9
"""Highest acceptable time per layer of OURS, as a share of that of EVEN, at BAR_BATCH."""
BAR_BATCH = 32
"""Where the policies differ most: an expert with several tokens can be activated on every instance."""


@dataclass(frozen=True)
class Layer:
    """One repeat: an average MoE layer."""

    ms: float
    activations: float
    """On all instances together."""


async def one_repeat(mesh: LocalMesh, urls: list[str], ids: list[list[int]], output: int) -> Layer:
    first, last = await decode(mesh.url, urls, ids, output)
    exchanges = last.exchanges - first.exchanges
    taken, activations = last.exchange_s - first.exchange_s, last.activations - first.activations
    return Layer(taken / exchanges * 1e3, activations / exchanges)


async def compare(args: argparse.Namespace, sides: Mapping[str, LocalMesh]) -> list[dict[str, Any]]:
    """Every variant at every batch size, in turns; the same prompts for all of a repeat."""
    urls = {variant: await pages(mesh) for variant, mesh in sides.items()}
    rows = []
    for batch in map(int, args.batch.split(",")):
        taken: dict[str, list[Layer]] = {variant: [] for variant in sides}
        for repeat in range(args.repeats + 1):
            ids = prompts(batch, args.prompt, args.vocab, seed=batch + 100 * repeat)
            for variant in list(sides)[:: 1 if repeat % 2 else -1]:
                layer = await one_repeat(sides[variant], urls[variant], ids, args.output)
                taken[variant] += [layer] if repeat else []  # the first repeat warms up
        rows += [row(batch, variant, layers, taken[EVEN]) for variant, layers in taken.items()]
        print(*rows[-len(sides) :], sep="\n", flush=True)
    return rows


def row(batch: int, variant: str, layers: list[Layer], even: list[Layer]) -> dict[str, Any]:
    """Medians of one variant, and its time as a share of that of an even split of tokens."""
    ratios = [ours.ms / theirs.ms for ours, theirs in zip(layers, even, strict=True)]
    return {
        "batch": batch,
        "variant": variant,
        "layer_ms": round(median([layer.ms for layer in layers]), 3),
        "activations_per_layer": round(median([layer.activations for layer in layers]), 1),
        "of_tokens": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


async def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Bar]]:
    """All variants are up all the time: an idle mesh takes next to nothing, and they share the checkpoint's pages."""
    sides = {
        variant: LocalMesh(
            MeshOptions(args.model, 1, 2, port=0, mesh=f"bench-{variant}", settings={**COMMON, **settings})
        )
        for variant, settings in VARIANTS.items()
    }
    async with AsyncExitStack() as stack:
        for mesh in sides.values():
            await stack.enter_async_context(mesh)
            await refuse_paced(mesh)
        rows = await compare(args, sides)
    at = [row for row in rows if (row["batch"], row["variant"]) == (BAR_BATCH, OURS)]
    name = f"time per MoE layer, activated / tokens, batch {BAR_BATCH}"
    return rows, [Bar(name, row["of_tokens"], MOST, at_most=True) for row in at]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--batch", default="1,8,32")
    p.add_argument("--prompt", type=int, default=16, help="prompt tokens")
    p.add_argument("--output", type=int, default=48, help="output tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--plot", default="", help="PNG file for the premise")
    p.add_argument("--no-premise", action="store_true", help="meshes alone")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    wanted = ["--plot", args.plot] if args.plot else []
    premise = {} if args.no_premise else run("premise.py", "--model", args.model, *wanted)
    rows, bars = asyncio.run(measure(args))
    report("ablation", {"model": args.model, "mesh": "1A2E", "premise": premise, "rows": rows}, bars)


if __name__ == "__main__":
    main()
