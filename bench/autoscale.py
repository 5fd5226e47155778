"""Does a mesh follow its load, by an SLO that its first size just meets? Paced instances, and real processes.

    python bench/autoscale.py [--profile FILE] --json

Instances keep the times of a made-up profile (PACE) around the embedded model's computation, so that the number of
instances matters on two cores: nothing here is this machine's speed. Meshes of up to 2A3E are profiled first, as
`moemesh profile` does it, unless a profile is given. Then requests come evenly at a rate for which 1A1E is the plan, at
twice that rate, and at the first one again, while the scheduler sizes the pools with its default windows and cool-down.
Every output is compared with the unloaded mesh's. Time per token is a request's mean, after its first token.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import Bar, Stream, prompts, report, stream_tokens

from services.scheduler.autoscale_settings import read_profile
from services.scheduler.autoscaling import AIM
from shared.bus import Bus
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.owned import owned_directory
from shared.cli.profile import tables_of
from shared.cli.profiling import PACED, Shape, measure, with_a_max
from shared.membership import Members
from shared.messages import Kind, State
from shared.models.source import open_source
from shared.planning.amax import monte_carlo
from shared.planning.deciding import HEADROOM
from shared.planning.fit import fit
from shared.planning.fitted_file import save_fitted
from shared.planning.here import choose
from shared.planning.setting import Demand, Slo
from shared.planning.sizes import sizes_of

PACE = {
    "name": "autoscale-bench", "about": "made-up test values of no device: experts count most",
    "attention_row_s": 0.5e-3, "experts_s": 1e-3, "expert_s": 1.5e-3, "head_s": 2e-3, "link_latency_s": 0.3e-3,
}  # fmt: skip
SHAPES = [Shape(a, e, b, 64) for a, e in ((1, 1), (1, 2), (1, 3), (2, 3)) for b in (2, 6, 16)]
RATE, PROMPT, OUTPUT, KINDS = 2.0, 4, 14, 8
"""Requests per second at first, tokens, and different prompts."""
JUST = 1.25
"""The SLO over what 1A1E is planned to take at first."""
BEFORE_S, HIGH_S, AFTER_S = 60.0, 120.0, 170.0
SETTLED_S, WINDOW_S = 300.0, 10.0
"""Until the first size is there; what came while it was too small is served for so long after others have come."""
LOOK_S = 0.1
MOST_OUT_S, MOST_IN_S = 30.0, 120.0
Sizes = tuple[int, int]


@dataclass
class Looks:
    """Who was READY when, and how many were there at all."""

    times: list[float] = field(default_factory=list)
    ready: list[Sizes] = field(default_factory=list)
    there: list[Sizes] = field(default_factory=list)
    off: list[float] = field(default_factory=list)
    """Measured over predicted times, as the scheduler sees it."""

    async def keep(self, mesh: LocalMesh, stop: asyncio.Event) -> None:
        bus, members = await Bus.connect(mesh.nats_url, "autoscale-bench"), Members(mesh.options.mesh)
        await members.watch(bus)
        while not stop.is_set():
            pools = [[m for m in members.all() if m.heartbeat.kind is kind] for kind in (Kind.ATTENTION, Kind.EXPERTS)]
            self.times.append(time.perf_counter())
            self.ready.append(_sizes([sum(m.ready for m in pool) for pool in pools]))
            self.there.append(_sizes([sum(m.heartbeat.state is not State.GONE for m in pool) for pool in pools]))
            facts = [m.heartbeat.autoscale for m in members.all() if m.heartbeat.autoscale]
            self.off.append(facts[0].measured_over_predicted if facts else 1.0)
            await asyncio.sleep(LOOK_S)
        await bus.close()

    async def until(self, sizes: Sizes) -> None:
        """So many are there, and READY."""
        while not self.ready or not self.ready[-1] == self.there[-1] == sizes:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)

    def off_at(self, at: float) -> float:
        """Measured over predicted times just before."""
        return self.off[int(np.searchsorted(self.times, at)) - 1]

    def grown(self, start: float, end: float) -> float:
        """When the first instance came that has made the pools larger within a span; infinite: none."""
        changes = [
            at for at, before, now in zip(self.times[1:], self.ready, self.ready[1:], strict=False)
            if start <= at < end and sum(now) > sum(before)
        ]  # fmt: skip
        return min(changes, default=float("inf"))

    def back(self, start: float, sizes: Sizes) -> float:
        """When, after a time, there were so many for the first time, and nobody who was leaving; infinite: never."""
        pairs = zip(self.times, self.there, strict=True)
        return next((at for at, there in pairs if at >= start and there == sizes), float("inf"))


def _sizes(counts: Sequence[int]) -> Sizes:
    return counts[0], counts[1]


async def profiled(scratch: Path, pace: str) -> Path:
    """A profile of paced meshes."""
    source, path = open_source(""), scratch / "fitted.json"
    sizes, trace = sizes_of(source.spec, source.name), path.with_suffix(".trace")
    measured = await measure("", SHAPES, PACED, source.spec.vocab_size, trace, pace)
    points = with_a_max(measured, tables_of(trace, sizes, measured))
    save_fitted(path, fit(points, sizes, PACE["name"]), points, source.digest)
    return path


def just_met(path: Path) -> float:
    """Seconds per token that make 1A1E the plan for the first rate, with little to spare."""
    profile = read_profile(str(path), "")
    tables = monte_carlo(profile.routing, profile.fitted.sizes.experts, profile.fitted.most_experts)
    demand = Demand(HEADROOM * RATE, PROMPT, OUTPUT)
    plan = choose(profile.fitted, tables, demand, Slo(10.0), (1, 1), (1, 1)).plan
    assert plan, "1A1E cannot serve the first rate at all"
    return JUST * plan.tpot_s / AIM


@dataclass
class Asked:
    """One request."""

    at: float
    kind: int
    stream: Stream
    problem: str = ""


async def ask(client: httpx.AsyncClient, url: str, ids: list[int], asked: Asked) -> None:
    try:
        await stream_tokens(client, url, ids, OUTPUT, asked.stream)
    except (httpx.HTTPError, RuntimeError) as error:
        asked.problem = repr(error)


async def load(client: httpx.AsyncClient, url: str, ids: list[list[int]]) -> tuple[list[Asked], list[float]]:
    """All requests, and when the rate was doubled and halved."""
    start = time.perf_counter()
    moves = [start + BEFORE_S, start + BEFORE_S + HIGH_S]
    end, at, done = moves[1] + AFTER_S, start, []
    async with asyncio.TaskGroup() as tasks:
        while at < end:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            done.append(Asked(at, len(done) % KINDS, Stream(at)))
            tasks.create_task(ask(client, url, ids[done[-1].kind], done[-1]))
            at += 1 / (2 * RATE if moves[0] <= at < moves[1] else RATE)
    return done, moves


async def run(profile: Path, pace: str, slo_s: float) -> tuple[dict[str, Any], list[Bar]]:
    settings = {"pace": pace, "profile": str(profile), "autoscale": "on", "slo_tpot_ms": str(slo_s * 1e3)}
    settings |= {"micro_batches": "1", "prefix_cache": "false"}
    looks, stop = Looks(), asyncio.Event()
    client = httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=512))
    async with LocalMesh(MeshOptions(port=0, experts=1, mesh="autoscale", settings=settings)) as mesh, client:
        ids = prompts(KINDS, PROMPT, open_source("").spec.vocab_size, seed=0)
        expected = [(await stream_tokens(client, mesh.url, prompt, OUTPUT)).tokens for prompt in ids]
        watching = asyncio.create_task(looks.keep(mesh, stop))
        await asyncio.wait_for(looks.until((1, 1)), SETTLED_S)  # the first steps of all may have been slow
        asked, moves = await load(client, mesh.url, ids)
        stop.set()
        await watching
    return judged(asked, moves, expected, looks, slo_s)


def judged(
    asked: Sequence[Asked], moves: Sequence[float], expected: Sequence[list[int]], looks: Looks, slo_s: float
) -> tuple[dict[str, Any], list[Bar]]:
    doubled, halved = moves
    grown, back = looks.grown(doubled, halved), looks.back(halved, (1, 1))
    failed = [a.problem for a in asked if a.problem]
    changed = sum(not a.problem and a.stream.tokens != expected[a.kind] for a in asked)
    spans = {
        "before": (0.0, doubled), "doubled": (doubled, grown),
        "scaled out": (grown + WINDOW_S, halved), "scaled in": (back, np.inf),
    }  # fmt: skip
    times = {name: p99([a for a in asked if start <= a.at < end]) for name, (start, end) in spans.items()}
    changes = [
        (round(at - doubled, 1), f"{now[0]}A{now[1]}E")
        for at, before, now in zip(looks.times, [(0, 0), *looks.ready], looks.ready, strict=False)
        if now != before
    ]
    result = {
        "pace": PACE, "slo_ms": round(slo_s * 1e3, 1), "requests": len(asked), "problems": failed[:5],
        "measured_over_predicted": [round(looks.off_at(at), 2) for at in (*moves, np.inf)],
        "ready": changes, "p99_ms": {name: round(seconds * 1e3, 1) for name, seconds in times.items()},
    }  # fmt: skip
    return result, [
        Bar("paced: out after the load has doubled, s", grown - doubled, MOST_OUT_S, True),
        Bar("paced: in after it has halved, s", back - halved, MOST_IN_S, True),
        Bar("paced: p99 time per token before / SLO", times["before"] / slo_s, 1.0, True),
        Bar("paced: p99 time per token, scaled out / SLO", times["scaled out"] / slo_s, 1.0, True),
        Bar("paced: p99 time per token, scaled in again / SLO", times["scaled in"] / slo_s, 1.0, True),
        Bar("paced: requests that failed", len(failed), 0, True),
        Bar("paced: outputs that changed", changed, 0, True),
    ]


def p99(asked: Sequence[Asked]) -> float:
    """Seconds per token, of requests that were answered; infinite where there was none."""
    times = [a.stream.tpot for a in asked if not a.problem]
    return float(np.percentile(times, 99)) if times else float("inf")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--profile", type=Path, help="of an earlier run (with its trace) instead of a new one")
    p.add_argument("--keep", type=Path, help="directory for the profile that is made")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    with owned_directory("moemesh-autoscale-") as scratch:
        pace = scratch / "pace.json"
        pace.write_text(json.dumps(PACE))
        profile = args.profile or asyncio.run(profiled(args.keep or scratch, str(pace)))
        slo_s = just_met(profile)
        report("autoscale", *asyncio.run(run(profile, str(pace), slo_s)))


if __name__ == "__main__":
    main()
