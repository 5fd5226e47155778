"""What share of the memory's bandwidth does decoding reach?

    python bench/limit.py --model DIR [--batch 1,32] [--repeats 5] --json

At best a step takes as long as reading each weight that it needs once: those of the experts that the instances counted
as activated, all others but the embeddings, and the KV cache. How fast memory is read by two threads is measured
before every repeat. Share of the limit = that time / the time that a step took.
"""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from common import Bar, Stream, median, prompts, refuse_paced, report, stream_tokens
from pauses import reach
from prometheus_client.parser import text_string_to_metric_families

from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.status import look
from shared.messages import Kind
from shared.models.index import read_index

LEAST = {1: 0.75, 32: 0.60}
"""Batch -> lowest acceptable share; of other batches 0.5."""
READ_BYTES = 2 << 30
SETTLED, SPARE = 4, 4
"""Tokens that every stream has before anything is counted, and that the first one has left after that."""


@dataclass(frozen=True)
class Sizes:
    """Bytes, as they lie in the files and in the cache."""

    expert: int
    """One routed expert."""
    dense: int
    """What every step reads."""
    kv_per_token: int

    @classmethod
    def of(cls, model: Path) -> "Sizes":
        """Of a checkpoint whose experts are tensors of their own; the cache is fp32."""
        config, tensors = json.loads((model / "config.json").read_text()), read_index(model)
        sizes = {name: info.end - info.start for name, info in tensors.items()}
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        looked_up = sum(size for name, size in sizes.items() if "embed_tokens" in name)
        layers, experts = config["num_hidden_layers"], config["num_local_experts"]
        kv = 2 * config["num_key_value_heads"] * config["head_dim"] * 4 * layers
        return cls(routed // (layers * experts), sum(sizes.values()) - routed - looked_up, kv)


@dataclass(frozen=True)
class Counts:
    """Of all instances together, at a moment of ``time.perf_counter``."""

    moment: float
    steps: float
    activations: float
    tokens: float
    groups: float
    """Times that an attention instance took part in one."""
    exchanges: float
    exchange_s: float
    """Seconds of all exchanges."""


async def pages(mesh: LocalMesh) -> list[str]:
    """Where the metrics of both pools are read. To be asked for early: finding members takes a second."""
    members, _ = await look(mesh.nats_url, mesh.options.mesh)
    return [m.heartbeat.url + "/metrics" for m in members if m.heartbeat.kind in (Kind.ATTENTION, Kind.EXPERTS)]


async def count(urls: list[str]) -> Counts:
    async with httpx.AsyncClient() as client:
        answers = await asyncio.gather(*(client.get(url) for url in urls))
    totals: dict[str, float] = {}
    for family in (f for answer in answers for f in text_string_to_metric_families(answer.text)):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    names = ("steps_total", "expert_activations_total", "generated_tokens_total", "groups_total")
    names += ("exchange_seconds_count", "exchange_seconds_sum")
    return Counts(time.perf_counter(), *(totals.get(f"moemesh_{name}", 0.0) for name in names))


def bandwidth(memory: torch.Tensor) -> float:
    """Bytes per second at which all threads of torch together read it, the best of three times."""
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        memory.sum()
        spent.append(time.perf_counter() - start)
    return memory.nbytes / min(spent)


async def decode(url: str, urls: list[str], ids: list[list[int]], output: int) -> tuple[Counts, Counts]:
    """Counts at two moments between which all streams decode."""
    watched = [Stream(0.0) for _ in ids]
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=len(ids))) as client:
        tasks = [
            asyncio.create_task(stream_tokens(client, url, prompt, output, into=stream))
            for prompt, stream in zip(ids, watched, strict=True)
        ]
        await reach(watched, [SETTLED] * len(ids), tasks)
        first = await count(urls)
        while max(len(stream.arrivals) for stream in watched) < output - SPARE:
            if any(task.done() for task in tasks):
                raise RuntimeError("a stream ended too soon")
            await asyncio.sleep(0.002)
        last = await count(urls)
        await asyncio.gather(*tasks)
    return first, last


def row(batch: int, sizes: Sizes, speed: float, span: tuple[Counts, Counts], context: float) -> dict[str, float]:
    """One repeat: milliseconds per step as measured and at the limit, and what it read."""
    first, last = span
    steps = last.steps - first.steps
    activations = (last.activations - first.activations) / steps
    read = activations * sizes.expert + sizes.dense + batch * context * sizes.kv_per_token
    taken, limit = (last.moment - first.moment) / steps, read / speed
    named = {"ms": taken * 1e3, "limit_ms": limit * 1e3, "gb_per_s": speed / 1e9, "activations": activations}
    return {"batch": batch, **{name: round(value, 2) for name, value in named.items()}, "share": limit / taken}


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Repeats on one mesh, the batch sizes in turns."""
    torch.set_num_threads(args.threads)
    memory, sizes = torch.ones(READ_BYTES // 4), Sizes.of(Path(args.model))
    batches = [int(batch) for batch in args.batch.split(",")]
    options = MeshOptions(args.model, 1, 2, port=0, mesh="bench", settings={"prefix_cache": "false"})
    rows: list[dict[str, float]] = []
    async with LocalMesh(options) as mesh:
        await refuse_paced(mesh)
        urls = await pages(mesh)
        for repeat in range(args.repeats):
            for batch in batches:
                ids = prompts(batch, args.prompt, args.vocab, seed=batch + 100 * repeat)
                speed = bandwidth(memory)
                span = await decode(mesh.url, urls, ids, args.output)
                rows.append(row(batch, sizes, speed, span, args.prompt + args.output / 2))
                print(rows[-1], flush=True)
    shares = {batch: median([row["share"] for row in rows if row["batch"] == batch]) for batch in batches}
    bars = [Bar(f"share of the bandwidth's limit, batch {b}", share, LEAST.get(b, 0.5)) for b, share in shares.items()]
    return {"model": args.model, "rows": rows}, bars


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--batch", default="1,32")
    p.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    p.add_argument("--output", type=int, default=64, help="output tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that read memory together")
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("limit", result, bars)


if __name__ == "__main__":
    main()
