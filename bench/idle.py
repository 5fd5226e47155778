"""What does a mesh cost that nobody uses, and how long does the first request after a silence wait?

    python bench/idle.py --model DIR [--idle 60] [--repeats 5] --json

Each repeat: requests right after another, then silence, then one request. CPU is that of every service process and NATS
together, in percent of one core, over each silence. Times to first token are of a short prompt, each over a connection
of its own. Bars: at most 3 % of a core; first token after a silence at most 5 ms later than right after other requests.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx
from common import Bar, median, prompts, refuse_paced, report, stream_tokens
from processes import cpu_seconds, services

from shared.cli.mesh import LocalMesh, MeshOptions

OUTPUT = 4
BUSY = 5
"""Requests right after another; the first one of them is not measured."""
MOST_CPU, MOST_DELAY_MS = 3.0, 5.0


@dataclass(frozen=True)
class Sample:
    """One repeat: median time to first token right after other requests, and that after a silence, in ms; CPU in %."""

    busy_ms: float
    idle_ms: float
    cpu: dict[str, float]
    """Process -> percent of one core during the silence."""


async def first_token_ms(url: str, prompt: list[int]) -> float:
    """Time to first token over a new connection, as after a silence."""
    async with httpx.AsyncClient(timeout=600) as client:
        return (await stream_tokens(client, url, prompt, OUTPUT)).ttft * 1e3


async def silence(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """Ask nothing for so long -> percent of one core that each process takes meanwhile."""
    before, start = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.perf_counter()
    await asyncio.sleep(seconds)
    spent = time.perf_counter() - start
    return {name: (cpu_seconds(pid) - before[name]) / spent * 100 for name, pid in pids.items()}


async def repeat(mesh: LocalMesh, prompt: list[int], seconds: float) -> Sample:
    busy = [await first_token_ms(mesh.url, prompt) for _ in range(1 + BUSY)][1:]
    cpu = await silence(services(mesh), seconds)
    return Sample(median(busy), await first_token_ms(mesh.url, prompt), cpu)


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """All repeats on one mesh."""
    settings = {"prefix_cache": "false"}  # every request has the same prompt
    options = MeshOptions(model=args.model, attention=1, experts=2, port=0, mesh="bench", settings=settings)
    prompt = prompts(1, args.prompt, args.vocab, seed=1)[0]
    samples = []
    async with LocalMesh(options) as mesh:
        await refuse_paced(mesh)
        await first_token_ms(mesh.url, prompt)
        for _ in range(args.repeats):
            samples.append(await repeat(mesh, prompt, args.idle))
            print(show(samples[-1]), flush=True)
    busy, idle = (median([getattr(s, name) for s in samples]) for name in ("busy_ms", "idle_ms"))
    cpu = median([sum(s.cpu.values()) for s in samples])
    result = {
        "model": args.model,
        "silence_s": args.idle,
        "first_token_ms": {"busy": round(busy, 2), "idle": round(idle, 2)},
    }
    shares = {name: round(median([s.cpu[name] for s in samples]), 2) for name in samples[0].cpu}
    bars = [
        Bar("CPU of all services of an idle mesh, % of one core", cpu, MOST_CPU, True),
        Bar(f"first token after {args.idle:g} s of silence, ms more than busy", idle - busy, MOST_DELAY_MS, True),
    ]
    return {**result, "cpu_percent": shares}, bars


def show(sample: Sample) -> str:
    shares = "  ".join(f"{name} {share:.2f}" for name, share in sample.cpu.items())
    times = f"first token busy {sample.busy_ms:.1f} ms, after silence {sample.idle_ms:.1f} ms"
    return f"{times}; idle CPU {sum(sample.cpu.values()):.2f} %: {shares}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="checkpoint directory (moemesh models make --preset bench-1b)")
    p.add_argument("--idle", type=float, default=60.0, help="seconds of silence")
    p.add_argument("--prompt", type=int, default=8, help="prompt tokens")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--vocab", type=int, default=4096, help="prompts use ids below this")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    result, bars = asyncio.run(measure(p.parse_args()))
    report("idle", result, bars)


if __name__ == "__main__":
    main()
