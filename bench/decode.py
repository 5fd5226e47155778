"""How fast does a mesh decode, beside the same checkpoint through transformers on the same cores?

    python bench/decode.py --model DIR --attention 1 --experts 2 --batch 1,8,32 --json

Both sides serve the same prompts in interleaved repeats of one run; transformers takes its fastest combination of dtype
and experts implementation, tried first for each batch size. Ratios are medians over repeats.
"""

import argparse
import asyncio
from typing import Any

import torch
from common import Bar, Sample, median, medians, prompts, refuse_paced, report, run_mesh
from transformers_peer import Peer, fastest, load_peers

from shared.cli.mesh import LocalMesh, MeshOptions

LEAST = {1: 2.5, 8: 3.2, 32: 2.7}
"""Batch -> lowest acceptable ratio of tokens/s; of other batches 1."""


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Interleaved repeats for every batch size."""
    batches = [int(b) for b in args.batch.split(",")]
    peers = [] if args.no_peer else load_peers(args.model, args.threads)
    options = MeshOptions(
        model=args.model,
        attention=args.attention,
        experts=args.experts,
        port=0,
        mesh="bench",
        settings={"prefix_cache": "false", **dict(args.set)},  # every repeat serves the same prompts
    )
    rows, bars = [], []
    async with LocalMesh(options, on_line=print if args.verbose else lambda name, line: None) as mesh:
        await refuse_paced(mesh)
        for batch in batches:
            vocab = args.vocab
            ids = prompts(batch, args.prompt, vocab, seed=batch)
            peer = fastest(peers, ids, args.output) if peers else None
            await run_mesh(mesh.url, ids, 4)
            ours, theirs = [], []
            for _ in range(args.repeats):
                ours.append(await run_mesh(mesh.url, ids, args.output))
                if peer:
                    theirs.append(peer.generate(torch.tensor(ids), args.output))
            rows.append(row(batch, ours, theirs, peer))
            print_row(rows[-1])
            if theirs:
                ratio = median([a.rate / b.rate for a, b in zip(ours, theirs, strict=True)])
                bars.append(Bar(f"mesh / transformers, tokens/s, batch {batch}", ratio, LEAST.get(batch, 1.0)))
    return {"model": args.model, "mesh": f"{args.attention}A{args.experts}E", "rows": rows}, bars


def row(batch: int, ours: list[Sample], theirs: list[Sample], peer: Peer | None) -> dict[str, Any]:
    """Medians of both sides, in ms and tokens/s."""
    result: dict[str, Any] = {"batch": batch, "mesh": medians(ours)}
    if peer:
        result["transformers"] = {**medians(theirs), "dtype": peer.dtype, "experts": peer.experts}
    return result


def print_row(row: dict[str, Any]) -> None:
    for side in ("mesh", "transformers"):
        if side in row:
            print(f"batch {row['batch']:>3}  {side:<13}{row[side]}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--attention", type=int, default=1)
    p.add_argument("--experts", type=int, default=2)
    p.add_argument("--batch", default="1,8,32")
    p.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    p.add_argument("--output", type=int, default=64, help="output tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of transformers")
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--set", type=lambda s: tuple(s.split("=", 1)), action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("--no-peer", action="store_true", help="the mesh alone")
    p.add_argument("--verbose", action="store_true", help="show the services' logs")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("decode", result, bars)


if __name__ == "__main__":
    main()
