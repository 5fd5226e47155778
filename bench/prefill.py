"""How long does a long prompt take to its first token, beside the same checkpoint through transformers?

    python bench/prefill.py --model DIR [--prompt 1024] [--repeats 5] --json

Both sides prefill the same prompt and generate one token in interleaved repeats of one run: the mesh through its HTTP
API, transformers with its fastest combination of dtype and experts implementation, tried first. Bar: at least 0.95
times as fast (median of ratios).
"""

import argparse
import asyncio
from typing import Any

import torch
from common import Bar, median, prompts, refuse_paced, report, run_mesh
from transformers_peer import fastest, load_peers

from shared.cli.mesh import LocalMesh, MeshOptions

LEAST = 0.95
WARM = 2
"""Prompts served before anything is measured."""


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Interleaved repeats on one mesh."""
    ids = prompts(1, args.prompt, args.vocab, seed=1)
    peer = fastest(load_peers(args.model, args.threads), ids, 1)
    settings = {"prefix_cache": "false"}  # every repeat serves the same prompt
    options = MeshOptions(model=args.model, attention=1, experts=2, port=0, mesh="bench", settings=settings)
    ours, theirs = [], []
    async with LocalMesh(options) as mesh:
        await refuse_paced(mesh)
        for _ in range(WARM):
            await run_mesh(mesh.url, ids, 1)
        for _ in range(args.repeats):
            ours.append((await run_mesh(mesh.url, ids, 1)).ttft)
            theirs.append(peer.generate(torch.tensor(ids), 1).ttft)
            print(f"mesh {ours[-1]:.3f} s  transformers {theirs[-1]:.3f} s", flush=True)
    result = {
        "model": args.model,
        "first_token_s": {"mesh": round(median(ours), 3), "transformers": round(median(theirs), 3)},
        "transformers": {"dtype": peer.dtype, "experts": peer.experts},
    }
    ratio = median([b / a for a, b in zip(ours, theirs, strict=True)])
    return result, [Bar(f"mesh / transformers, speed of a prefill of {args.prompt} tokens", ratio, LEAST)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--prompt", type=int, default=1024, help="prompt tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of transformers")
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("prefill", result, bars)


if __name__ == "__main__":
    main()
