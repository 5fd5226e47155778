"""What does disaggregation cost? A mesh beside a monolith: the same engine on the same cores, without an exchange.

    python bench/monolith.py --model DIR --attention 1 --experts 2 --batch 1,32 --json

Both are up all the time (an idle one takes next to no CPU) and serve the same prompts in turn, in repeats of one run.
Ratios of the time per output token are medians over repeats.
"""

import argparse
import asyncio
from typing import Any

from common import Bar, median, medians, prompts, refuse_paced, report, run_mesh

from shared.cli.mesh import LocalMesh, MeshOptions

SETTINGS = {"prefix_cache": "false"}  # every repeat serves the same prompts
MOST = {1: 1.15, 32: 1.05}
"""Highest acceptable mesh / monolith, by batch size."""


def sides(args: argparse.Namespace) -> dict[str, LocalMesh]:
    """What is compared, not started yet."""
    pools = {"mesh": (args.attention, args.experts), "monolith": (1, 0)}
    return {
        name: LocalMesh(MeshOptions(args.model, *pool, port=0, mesh=f"bench-{name}", settings=SETTINGS))
        for name, pool in pools.items()
    }


async def compare(args: argparse.Namespace, urls: dict[str, str], batch: int) -> tuple[dict[str, Any], float]:
    """Medians of both sides, and the ratio of their times per output token."""
    ids = prompts(batch, args.prompt, args.vocab, seed=batch)
    for url in urls.values():
        await run_mesh(url, ids, 4)
    samples = {name: [] for name in urls}
    for number in range(args.repeats):
        for name in list(urls)[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(await run_mesh(urls[name], ids, args.output))
    ratios = [ours.tpot / own.tpot for ours, own in zip(samples["mesh"], samples["monolith"], strict=True)]
    row = {"batch": batch, **{name: medians(taken) for name, taken in samples.items()}}
    return {**row, "ratios": [round(ratio, 3) for ratio in ratios]}, median(ratios)


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Every batch size on two meshes that stay up."""
    rows, bars, both = [], [], sides(args)
    async with both["mesh"], both["monolith"]:
        urls = {name: side.url for name, side in both.items()}
        for side in both.values():
            await refuse_paced(side)
        for batch in map(int, args.batch.split(",")):
            row, ratio = await compare(args, urls, batch)
            rows.append(row)
            print(row, flush=True)
            if batch in MOST:
                bars.append(Bar(f"mesh / monolith, time per output token, batch {batch}", ratio, MOST[batch], True))
    return {"model": args.model, "mesh": f"{args.attention}A{args.experts}E", "rows": rows}, bars


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--attention", type=int, default=1)
    p.add_argument("--experts", type=int, default=2)
    p.add_argument("--batch", default="1,32")
    p.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    p.add_argument("--output", type=int, default=64, help="output tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("monolith", result, bars)


if __name__ == "__main__":
    main()
