"""What do groups save? Expert weights that two attention instances read, beside one with the same total batch.

    python bench/groups.py --model DIR [--batch 16] [--repeats 3] --json

All streams decode at the same time; the instances count which experts their exchanges activate. Per generated token,
two instances that go alone read nearly twice the weights; as a group they read what one does.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from common import Bar, median, prompts, report
from limit import Sizes, decode, pages

from shared.cli.mesh import LocalMesh, MeshOptions

MOST = 1.1


async def measure_mesh(args: argparse.Namespace, attention: int, **settings: str) -> list[dict[str, float]]:
    """One row per repeat: bytes of expert weights per layer for each round of one token per stream."""
    sizes = Sizes.of(Path(args.model))
    fixed = {"prefix_cache": "false"} | settings
    rows = []
    async with LocalMesh(MeshOptions(args.model, attention, 2, port=0, mesh="bench", settings=fixed)) as mesh:
        urls = await pages(mesh)
        for repeat in range(args.repeats):
            ids = prompts(args.batch, args.prompt, args.vocab, seed=repeat)
            first, last = await decode(mesh.url, urls, ids, args.output)
            rounds = (last.tokens - first.tokens) / args.batch
            read = (last.activations - first.activations) / rounds * sizes.expert
            steps = (last.steps - first.steps) / rounds
            grouped = (last.groups - first.groups) / (last.steps - first.steps)
            rows.append({"bytes": read, "steps_per_round": round(steps, 2), "grouped": round(grouped, 3),
                         "ms": round((last.moment - first.moment) / rounds * 1e3, 2)})  # fmt: skip
            print(attention, settings, rows[-1], flush=True)
    return rows


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    one = await measure_mesh(args, 1)
    two = await measure_mesh(args, 2)
    apart = await measure_mesh(args, 2, group_wait="0")
    read = {name: median([row["bytes"] for row in rows]) for name, rows in (("1A", one), ("2A", two), ("apart", apart))}
    bar = Bar(f"expert bytes read by 2A2E / 1A2E, batch {args.batch}", read["2A"] / read["1A"], MOST, at_most=True)
    return {"1A2E": one, "2A2E": two, "2A2E without groups": apart, "apart": round(read["apart"] / read["1A"], 3)}, [
        bar
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--batch", type=int, default=16, help="streams in all")
    p.add_argument("--prompt", type=int, default=16, help="prompt tokens")
    p.add_argument("--output", type=int, default=64, help="output tokens")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("groups", result, bars)


if __name__ == "__main__":
    main()
