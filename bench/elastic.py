"""How often do exchanges wait for experts that come and go, and what does it cost to have none while nobody asks?

    python bench/elastic.py --heldout DIR [--share 0.6] [--seconds 20] --json

The demo model on 1A2E, each instance with memory for a share of the experts that have their home there. Streams
continue held-out text of one domain (DIR/bible.txt, DIR/python.txt), or of both. Waits are counted per call: an expert
that an exchange activates. Belady's optimum is that of the recorded calls with the same slots, when experts are started
only once they are called; whoever foresees calls can beat it. Then all experts are stopped after a silence, and called
again.
Bars as in docs/evaluation.md; without --heldout nothing is measured.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
from common import Bar, median, report, stream_tokens
from elastic_traffic import Counts, converse, counts, text_ids
from processes import pss_bytes, services

from shared.activation import layer_homes
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.status import look
from shared.elastic.belady import fewest_waits
from shared.models.loader import open_checkpoint
from shared.models.moe import expert_weights
from shared.models.slots import tensors_of
from shared.traces.load import load_trace
from shared.traces.recorder import Limits, record

MESH = "bench-elastic"
EXPERTS = 2
WARM_UP_S = 4.0
MOST_WAITS = {"bible": 0.02, "python": 0.04}
MOST_OF_BELADY, MOST_OF_LRU = 1.5, 0.5
KEEP_ALIVE_S = 3.0
MOST_MEMORY, MOST_FIRST_TOKEN = 0.1, 3.0
TURNS = 5


def options(share: float, model: str = "", **settings: str) -> MeshOptions:
    """A mesh whose expert instances hold that share of their homes."""
    checkpoint = open_checkpoint(model)
    spec = checkpoint.spec
    first = expert_weights(checkpoint, spec.moe_layers[0], 0, *_cpu())
    every = len(spec.moe_layers) * spec.router.experts * sum(tensor.nbytes for tensor in tensors_of(first))
    budget = {"expert_memory": str(int(share * every / EXPERTS)), "prefix_cache": "false"}
    return MeshOptions(model=model, experts=EXPERTS, port=0, mesh=MESH, settings=budget | settings)


def _cpu() -> tuple[Any, Any]:
    import torch

    return torch.device("cpu"), torch.float32


async def waits(
    share: float,
    texts: Mapping[str, list[int]],
    streams: int,
    seconds: float,
    trace: Path | None = None,
    **settings: str,
) -> tuple[Counts, int]:
    """What instances count while ``streams`` continue these texts, and the waits of Belady's optimum (0: no trace)."""
    turns = cycle(texts.values())
    client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=streams))
    async with LocalMesh(options(share, **settings)) as mesh, client:

        async def talk(duration: float, seed: int) -> None:
            end = time.monotonic() + duration
            await converse(client, mesh.url, lambda: next(turns), streams, lambda: time.monotonic() < end, seed)

        await talk(WARM_UP_S, 0)
        stop, recording = asyncio.Event(), None
        if trace:
            recording = asyncio.create_task(record(mesh.nats_url, MESH, trace, stop, Limits()))
        before = await counts(mesh)
        await talk(seconds, 1)
        counted = await counts(mesh) - before
        stop.set()
        if recording is None or trace is None:
            return counted, 0
        await recording
        return counted, await optimum(mesh, trace)


async def optimum(mesh: LocalMesh, trace: Path) -> int:
    """Waits of Belady's optimum, all instances together."""
    members, stored = await look(mesh.nats_url, MESH)
    assert stored and stored.committed
    homes, names = layer_homes(stored.committed), stored.committed.instances
    slots = {
        m.id: m.heartbeat.experts.elastic.slots for m in members if m.heartbeat.experts and m.heartbeat.experts.elastic
    }
    exchanges = load_trace(trace)
    total = 0
    for bit, name in enumerate(names):
        own = [
            (x.layer, sorted({e for e in x.ids.ravel().tolist() if int(homes[x.layer][e]) >> bit & 1}))
            for x in exchanges
        ]
        total += fewest_waits(own, slots[name])
    return total


async def same_tokens(share: float, texts: Mapping[str, list[int]]) -> int:
    """Greedy streams whose tokens differ from those of a mesh that holds every expert."""
    asked = [ids[start : start + 48] for ids in texts.values() for start in (100, 2000, 5000, 9000)]

    async def answers(of: MeshOptions) -> list[list[int]]:
        client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=len(asked)))
        async with LocalMesh(of) as mesh, client:
            streams = await asyncio.gather(*(stream_tokens(client, mesh.url, prompt, 96) for prompt in asked))
        return [stream.tokens for stream in streams]

    whole = await answers(MeshOptions(experts=EXPERTS, port=0, mesh=MESH))
    return sum(a != b for a, b in zip(whole, await answers(options(share)), strict=True))


async def scale_to_zero(model: str, texts: Mapping[str, list[int]]) -> dict[str, float]:
    """Memory of expert instances beyond what they need without experts, and first tokens: busy, and after silence."""
    prompt = next(iter(texts.values()))[:16]

    def pss() -> int:
        return sum(pss_bytes(pid) for name, pid in services(mesh).items() if name.startswith("experts"))

    async def first_token() -> float:
        async with httpx.AsyncClient(timeout=120) as client:
            return (await stream_tokens(client, mesh.url, prompt, 32)).ttft

    settings = {"keep_alive": str(KEEP_ALIVE_S), "predictor": ""}
    async with LocalMesh(options(1.0, model, **settings)) as mesh:
        await asyncio.sleep(1.0)
        empty, warm, cold, busy, idle = pss(), [], [], [], []
        for _ in range(TURNS):
            await first_token()
            warm += [await first_token() for _ in range(3)]
            busy.append(pss() - empty)
            await silent(mesh)
            idle.append(max(0, pss() - empty))
            cold.append(await first_token())
    return {
        "busy_mb": round(median(busy) / 1e6, 1),
        "idle_mb": round(median(idle) / 1e6, 1),
        "memory": median(idle) / median(busy),
        "warm_ms": round(median(warm) * 1e3, 1),
        "idle_ms": round(median(cold) * 1e3, 1),
        "first_token": median(cold) / median(warm),
    }


async def silent(mesh: LocalMesh) -> None:
    """Return two seconds after no expert was resident any more."""
    async with asyncio.timeout(60):
        while True:
            members, _ = await look(mesh.nats_url, MESH)
            if not any(m.heartbeat.experts.replicas for m in members if m.heartbeat.experts):
                break
    await asyncio.sleep(2.0)


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Everything, one mesh after the other."""
    texts = {name: text_ids(Path(args.heldout) / f"{name}.txt") for name in MOST_WAITS}
    bars = [Bar("streams with other tokens", await same_tokens(args.share, texts), 0, True)]
    result: dict[str, Any] = {"share": args.share}
    for part in (await waits_by_domain(args, texts), await beside_lru(args, texts)):
        result |= part[0]
        bars += part[1]
    for model in ("", *args.model):
        zero, name = await scale_to_zero(model, texts), Path(model).name or "demo"
        result[f"zero {name}"] = zero
        print("scale to zero", name, zero, flush=True)
        bars.append(Bar(f"experts' memory, none resident / busy, {name}", zero["memory"], MOST_MEMORY, True))
        bars.append(Bar(f"first token after silence / warm, {name}", zero["first_token"], MOST_FIRST_TOKEN, True))
    return result, bars


async def waits_by_domain(args: argparse.Namespace, texts: Mapping[str, list[int]]) -> tuple[dict[str, Any], list[Bar]]:
    """Four streams of either text."""
    rows, bars = {}, []
    with tempfile.TemporaryDirectory(prefix="moemesh-elastic-") as scratch:
        for name, most in MOST_WAITS.items():
            counted, best = await waits(args.share, {name: texts[name]}, 4, args.seconds, Path(scratch) / name)
            starts = counted.warm + counted.cold
            rows[name] = {"calls": counted.calls, "waits": counted.waits, "starts": starts, "belady": best}
            print(name, rows[name], f"{counted.share:.4f}", flush=True)
            bars.append(Bar(f"calls that wait, {name}", counted.share, most, True))
            bars.append(Bar(f"waits / Belady's optimum, {name}", counted.waits / max(1, best), MOST_OF_BELADY, True))
    return {"waits": rows}, bars


async def beside_lru(args: argparse.Namespace, texts: Mapping[str, list[int]]) -> tuple[dict[str, Any], list[Bar]]:
    """Eight streams of both texts, with the predictor and without."""
    foreseen, _ = await waits(args.share, texts, 8, args.seconds)
    recent, _ = await waits(args.share, texts, 8, args.seconds, eviction="lru")
    shares = {"foreseen": foreseen.share, "lru": recent.share}
    print("8 streams", shares, flush=True)
    name = "calls that wait, 8 streams, foreseen / least recently used"
    return {"of_lru": shares}, [Bar(name, foreseen.share / recent.share, MOST_OF_LRU, True)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heldout", default="", help="directory with bible.txt and python.txt")
    p.add_argument("--model", action="append", default=[], help="another checkpoint for the scale to zero")
    p.add_argument("--share", type=float, default=0.6, help="of all experts, in memory")
    p.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    if not args.heldout:
        print("held-out text is not given (--heldout DIR): nothing is measured")
        report("elastic", {}, [])
        return
    report("elastic", *asyncio.run(measure(args)))


if __name__ == "__main__":
    main()
