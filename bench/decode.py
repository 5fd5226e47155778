"""How fast does a mesh decode, beside the same checkpoint through transformers on the same cores?

    python bench/decode.py --model DIR --attention 1 --experts 2 --batch 1,8,32 --json

Both sides serve the same prompts in interleaved repeats of one run; transformers takes its fastest combination of dtype
and experts implementation, tried first for each batch size. Ratios are medians over repeats.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import Bar, Sample, median, medians, prompts, refuse_paced, report, run_mesh
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from shared.cli.mesh import LocalMesh, MeshOptions

PROBE_TOKENS = 6
GATHERED_MAX = 4 << 30
"""Bytes of weights that batched_mm may copy in a prefill, which gathers one expert's weights for every part."""


@dataclass(frozen=True)
class Peer:
    """One way to run the checkpoint in transformers; peers of one dtype share a model."""

    dtype: str
    experts: str
    model: Any

    def generate(self, x: torch.Tensor, output: int) -> Sample:
        """``output`` greedy tokens after the prompts x [batch, length]."""
        self.model.set_experts_implementation(self.experts)
        settings = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False}
        stamps = Stamps()
        start = time.perf_counter()
        with torch.inference_mode():
            y = self.model.generate(x, attention_mask=torch.ones_like(x), streamer=stamps, **settings)
        spent = time.perf_counter() - start
        assert y.shape[1] == x.shape[1] + output
        first, last = stamps.times[0] - start, stamps.times[-1] - start
        return Sample(first, (last - first) / max(1, output - 1), len(x) * output / spent)


class Stamps(BaseStreamer):
    """When each token of a batch came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def load_peers(model: str) -> list[Peer]:
    """The checkpoint in each dtype, with each experts implementation of transformers."""
    peers = []
    for dtype in ("float32", "bfloat16"):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        peers += [Peer(dtype, experts, loaded) for experts in ("eager", "grouped_mm", "batched_mm")]
    return peers


def fastest(peers: list[Peer], ids: list[list[int]], output: int) -> Peer:
    """The peer that would finish ``output`` tokens first, by a short trial; what it cannot run does not count."""
    trials: dict[float, Peer] = {}
    for peer in peers:
        if peer.experts == "batched_mm" and gathered_bytes(peer.model, sum(map(len, ids))) > GATHERED_MAX:
            continue
        try:
            sample = peer.generate(torch.tensor(ids), PROBE_TOKENS)
        except (RuntimeError, NotImplementedError) as error:
            print(f"transformers {peer.dtype} {peer.experts}: {str(error)[:80]}")
            continue
        trials[sample.ttft + (output - 1) * sample.tpot] = peer
    return trials[min(trials)]


def gathered_bytes(model: Any, rows: int) -> int:
    """Bytes that batched_mm gathers for ``rows`` rows of one layer."""
    config = model.config
    weights = 3 * config.hidden_size * config.moe_intermediate_size * model.dtype.itemsize
    return rows * config.num_experts_per_tok * weights


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Interleaved repeats for every batch size."""
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    batches = [int(b) for b in args.batch.split(",")]
    peers = [] if args.no_peer else load_peers(args.model)
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
                bars.append(Bar(f"mesh / transformers, tokens/s, batch {batch}", ratio, args.bar))
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
    p.add_argument("--bar", type=float, default=1.0, help="lowest acceptable ratio")
    p.add_argument("--set", type=lambda s: tuple(s.split("=", 1)), action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("--no-peer", action="store_true", help="the mesh alone")
    p.add_argument("--verbose", action="store_true", help="show the services' logs")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("decode", result, bars)


if __name__ == "__main__":
    main()
