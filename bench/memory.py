"""How much memory does a mesh need after it has served, beside the bytes of its checkpoint?

    python bench/memory.py --model DIR [--batch 32] [--rounds 3] --json

Memory is the proportional set size of every service process, so that what they share counts once; NATS counts as a
service. Every setting has its default, KV memory included. Bar: all together at most 1.35 times the checkpoint's bytes
plus 400 MB for each service.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from common import Bar, prompts, report, run_mesh
from processes import pss_bytes, services

from shared.cli.mesh import LocalMesh, MeshOptions

MOST_OF_CHECKPOINT = 1.35
PER_SERVICE = 400 * 10**6
MOST = 1.0
"""Share of what is allowed."""


def checkpoint_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


async def serve(mesh: LocalMesh, args: argparse.Namespace) -> None:
    """Batches of different prompts, one after another."""
    for round_ in range(args.rounds):
        await run_mesh(mesh.url, prompts(args.batch, args.prompt, args.vocab, seed=round_), args.output)


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Serve, then look."""
    options = MeshOptions(model=args.model, attention=1, experts=2, port=0, mesh="bench")
    async with LocalMesh(options) as mesh:
        await serve(mesh, args)
        pss = {name: pss_bytes(pid) for name, pid in services(mesh).items()}
    checkpoint = checkpoint_bytes(Path(args.model))
    total, allowed = sum(pss.values()), MOST_OF_CHECKPOINT * checkpoint + PER_SERVICE * len(pss)
    megabytes = {name: round(size / 1e6) for name, size in {**pss, "together": total, "allowed": allowed}.items()}
    for name, size in megabytes.items():
        print(f"{name:<14}{size:>6} MB")
    result = {"model": args.model, "checkpoint_mb": round(checkpoint / 1e6), "pss_mb": megabytes}
    return result, [Bar("PSS of all services / (1.35 checkpoint + 400 MB per service)", total / allowed, MOST, True)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    p.add_argument("--output", type=int, default=64, help="output tokens")
    p.add_argument("--rounds", type=int, default=3, help="batches served before memory is read")
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("memory", result, bars)


if __name__ == "__main__":
    main()
