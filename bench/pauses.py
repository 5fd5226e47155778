"""How long do running streams pause while a long prompt is prefilled, and what does the prompt pay for that?

    python bench/pauses.py --model DIR [--streams 8] [--prompt 1500] [--repeats 5] --json

Interleaved repeats of one run: streams alone, the prompt alone, and the prompt among running streams. A pause is the
time between two tokens of one stream; among streams those count that overlap the time between the prompt's arrival and
its first token. Bars: p99 pauses at most 3 times, time to first token at most twice the quiet one.
"""

import argparse
import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from common import Bar, Stream, median, refuse_paced, report, stream_tokens

from shared.cli.mesh import LocalMesh, MeshOptions

SHORT = 64
"""Tokens of the streams' prompts."""
SETTLED = 8
"""Tokens that every stream has before anything is measured."""
MOST_PAUSE, MOST_DELAY = 3.0, 2.0


@dataclass(frozen=True)
class Sample:
    """Seconds."""

    quiet_pause: float
    quiet_first: float
    busy_pause: float
    busy_first: float


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 4096, count).tolist()


def pauses(streams: list[Stream], start: float, end: float) -> float:
    """99th percentile of the gaps that overlap what lies between start and end."""
    times = [np.array(stream.arrivals) for stream in streams]
    gaps = [np.diff(t)[(t[1:] > start) & (t[:-1] < end)] for t in times]
    return float(np.percentile(np.concatenate(gaps), 99))


async def reach(watched: list[Stream], counts: list[int], running: list[asyncio.Task[Stream]]) -> None:
    """Wait until every stream has so many tokens. Raises what ended one of them."""
    while any(len(s.arrivals) < count for s, count in zip(watched, counts, strict=True)):
        for task in running:
            if task.done():
                raise RuntimeError("a stream ended too soon") from task.exception()
        await asyncio.sleep(0.01)


async def among(client: httpx.AsyncClient, url: str, count: int, output: int, prompt: list[int]) -> tuple[float, float]:
    """Streams run to ``output`` tokens; once settled, the prompt comes: (p99 pause, its time to first token)."""
    watched = [Stream(0.0) for _ in range(count)]
    running = [
        asyncio.create_task(stream_tokens(client, url, tokens(SHORT, seed), output, into=stream))
        for seed, stream in enumerate(watched)
    ]
    await reach(watched, [SETTLED] * count, running)
    if not prompt:
        begun = max(stream.arrivals[SETTLED - 1] for stream in watched)
        await asyncio.gather(*running)
        return pauses(watched, begun, min(stream.arrivals[-1] for stream in watched)), 0.0
    late = await stream_tokens(client, url, prompt, 2)
    await reach(watched, [len(stream.arrivals) + 1 for stream in watched], running)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return pauses(watched, late.started, late.arrivals[0]), late.ttft


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Interleaved repeats on one mesh."""
    settings = {"prefix_cache": "false"}
    options = MeshOptions(model=args.model, attention=1, experts=2, port=0, mesh="bench", settings=settings)
    long = tokens(args.prompt, 99)
    samples = []
    async with LocalMesh(options, on_line=lambda name, line: None) as mesh, httpx.AsyncClient(timeout=600) as client:
        await refuse_paced(mesh)
        await among(client, mesh.url, args.streams, 400, long)
        for _ in range(args.repeats):
            quiet_pause, _ = await among(client, mesh.url, args.streams, 3 * SETTLED, [])
            alone = await stream_tokens(client, mesh.url, long, 2)
            busy_pause, busy_first = await among(client, mesh.url, args.streams, 400, long)
            samples.append(Sample(quiet_pause, alone.ttft, busy_pause, busy_first))
            print(samples[-1], flush=True)
    pause = median([s.busy_pause / s.quiet_pause for s in samples])
    delay = median([s.busy_first / s.quiet_first for s in samples])
    medians = {name: round(median([getattr(s, name) for s in samples]) * 1e3, 1) for name in Sample.__annotations__}
    bars = [
        Bar(f"p99 pause of {args.streams} streams while {args.prompt} tokens prefill / quiet", pause, MOST_PAUSE, True),
        Bar(
            f"time to first token of {args.prompt} tokens among {args.streams} streams / quiet", delay, MOST_DELAY, True
        ),
    ]
    return {"model": args.model, "milliseconds": medians}, bars


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--streams", type=int, default=8)
    p.add_argument("--prompt", type=int, default=1500, help="tokens of the long prompt")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("pauses", result, bars)


if __name__ == "__main__":
    main()
