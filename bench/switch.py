"""What do running streams feel of a placement switch?

    python bench/switch.py [--model DIR] [--streams 16] [--switches 6] --json

Two expert instances; streams generate while homes are given by hand, again and again: an eighth of each layer's experts
change places. Twice: with slots for a quarter more than the homes, so that new ones are loaded beside the old ones, and
with none to spare, so that they take each other's places, layer by layer. A gap is the time between two tokens of one
stream; those that overlap a switch, from the request to the release of the old homes, are compared with the others.
Bars: beside each other, p99 gap at most twice the quiet one; always, no failed request and the tokens of every stream
as without a switch. What it costs to change places without a free slot is reported.
"""

import argparse
import asyncio
import time
from typing import Any

import httpx
import numpy as np
from common import Bar, Stream, prompts, refuse_paced, report, stream_tokens

from shared.bus import Bus
from shared.changes import Rebalance, RebalancePlan
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.rebalance import until_ended
from shared.cli.status import look
from shared.messages import ModelFacts, Subjects
from shared.models.source import open_source

MESH = "bench"
SETTLED = 8
"""Tokens that every stream has before anything is switched."""
PAUSE_S = 1.0
"""Quiet between two switches."""
MOST_GAP = 2.0


def homes(model: ModelFacts, turn: int) -> dict[int, dict[str, tuple[int, ...]]]:
    """Each expert on one instance; every second ``turn`` an eighth of them is on the other one."""
    half, moved = model.experts // 2, max(1, model.experts // 16)
    first = list(range(half))
    second = list(range(half, model.experts))
    if turn % 2:
        first[:moved], second[:moved] = second[:moved], first[:moved]
    return {layer: {"experts-0": tuple(first), "experts-1": tuple(second)} for layer in model.moe_layers}


async def switch(bus: Bus, model: ModelFacts, turn: int) -> tuple[float, float]:
    """Have homes changed; (begin, end) in seconds of ``time.perf_counter``."""
    subjects, begin = Subjects(MESH), time.perf_counter()
    request = Rebalance(given=homes(model, turn))
    plan = await bus.request(subjects.scheduler("rebalance"), request, RebalancePlan, 60.0)
    await until_ended(bus, subjects, plan.ticket)
    return begin, time.perf_counter()


def gaps(streams: list[Stream], spans: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds between tokens: (those that overlap a span, the others), once all streams have begun."""
    start = max(stream.arrivals[SETTLED - 1] for stream in streams)
    during, quiet = [], []
    for stream in streams:
        times = np.array([t for t in stream.arrivals if t >= start])
        met = np.zeros(len(times) - 1, np.bool_)
        for begin, end in spans:
            met |= (times[1:] > begin) & (times[:-1] < end)
        during.append(np.diff(times)[met])
        quiet.append(np.diff(times)[~met])
    return np.concatenate(during), np.concatenate(quiet)


async def reach(streams: list[Stream], count: int, running: list[asyncio.Task[Stream]]) -> None:
    """Wait until every stream has so many tokens. Raises what ended one of them."""
    while any(len(stream.arrivals) < count for stream in streams):
        for task in running:
            if task.done():
                raise RuntimeError("a stream ended too soon") from task.exception()
        await asyncio.sleep(0.01)


async def run(args: argparse.Namespace, slots: int) -> dict[str, Any]:
    """Streams under switches on a mesh whose instances have so many slots per layer, and the same without any."""
    spec = open_source(args.model).spec
    settings = {"slots": str(slots * len(spec.moe_layers)), "prefix_cache": "false"}
    options = MeshOptions(model=args.model, attention=1, experts=2, port=0, mesh=MESH, settings=settings)
    ids = prompts(args.streams, 32, spec.vocab_size, seed=3)
    limits = httpx.Limits(max_connections=args.streams)
    async with (
        LocalMesh(options, on_line=lambda name, line: None) as mesh,
        httpx.AsyncClient(timeout=600, limits=limits) as client,
    ):
        await refuse_paced(mesh)
        members, _ = await look(mesh.nats_url, MESH)
        model = next(m.heartbeat.model for m in members if m.heartbeat.experts and m.heartbeat.model)
        bus = await Bus.connect(mesh.nats_url, "bench-switch")
        await switch(bus, model, 0)

        async def streamed(switches: int) -> tuple[list[Stream], list[tuple[float, float]], int]:
            watched = [Stream(0.0) for _ in ids]
            running = [
                asyncio.create_task(stream_tokens(client, mesh.url, p, args.output, into=s))
                for p, s in zip(ids, watched, strict=True)
            ]
            await reach(watched, SETTLED, running)
            spans = []
            for turn in range(switches):
                await asyncio.sleep(PAUSE_S)
                if any(task.done() for task in running):
                    break
                spans.append(await switch(bus, model, turn + 1))
            ended = await asyncio.gather(*running, return_exceptions=True)
            return watched, spans, sum(isinstance(end, BaseException) for end in ended)

        alone, _, _ = await streamed(0)
        watched, spans, failed = await streamed(args.switches)
        await bus.close()
    during, quiet = gaps(watched, spans)
    return {
        "switches": len(spans),
        "switch_s": round(float(np.mean([end - begin for begin, end in spans])), 2),
        "gap_ms": {name: percentiles(found) for name, found in (("switch", during), ("quiet", quiet))},
        "failed": failed,
        "other_tokens": sum(a.tokens != b.tokens for a, b in zip(alone, watched, strict=True)),
        "ratio": float(np.percentile(during, 99) / np.percentile(quiet, 99)),
    }


def percentiles(found: np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(found, p)) * 1e3, 1) for p in (50, 99, 100)}


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    experts = open_source(args.model).spec.router.experts
    cases = {"beside": experts // 2 + experts // 8, "in place": experts // 2}
    result, bars = {}, []
    for name, slots in cases.items():
        result[name] = found = await run(args, slots)
        print(name, found, flush=True)
        if name == "beside":
            what = f"p99 gap of {args.streams} streams during a switch / quiet"
            bars.append(Bar(what, found["ratio"], MOST_GAP, True))
        bars += [
            Bar(f"requests that failed ({name})", found["failed"], 0, True),
            Bar(f"streams with other tokens ({name})", found["other_tokens"], 0, True),
        ]
    return {"model": args.model or "demo", **result}, bars


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="", help="checkpoint directory; else the embedded demo model")
    p.add_argument("--streams", type=int, default=16)
    p.add_argument("--output", type=int, default=600, help="tokens per stream")
    p.add_argument("--switches", type=int, default=6)
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("switch", result, bars)


if __name__ == "__main__":
    main()
