"""When traffic moves from one domain to another: how soon do homes and residents of elastic experts follow?

    python bench/elastic_shift.py --heldout DIR [--before 60] [--after 40] --json

The demo model on 1A2E, with memory for a share of its experts; four streams continue DIR/bible.txt, then, all of a
sudden, DIR/python.txt. *Homes follow* when the busiest instance has at most 5 % more activated experts than under homes
that are computed with all that was activated afterwards; *residents* when no larger share of calls waits, in two
seconds, than the bar for Python. Gaps between tokens are compared as a client sees them: before the move, and from ten
seconds after it on. What is routed is recorded all the time, for that takes time of the same cores.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import Bar, Stream, report
from elastic import MOST_WAITS, options
from elastic_traffic import Counts, converse, counts, text_ids
from numpy.typing import NDArray

from services.scheduler.scaling import Room, Traffic, busiest, layer_homes
from shared.cli.mesh import LocalMesh
from shared.cli.status import look
from shared.messages import Placement
from shared.placement.homes import to_residents
from shared.placement_watch import homes_array
from shared.traces.load import load_trace
from shared.traces.recorder import Limits, record

STREAMS = 4
WARM_UP_S, SETTLED_S = 10.0, 10.0
LOOK_S, WAITS_S = 0.5, 2.0
NEAR = 1.05
MOST_FOLLOW_S, MOST_P99 = 10.0, 1.2


@dataclass
class Look:
    """What was so at a time."""

    at: float
    placement: Placement
    counts: Counts


async def watch(mesh: LocalMesh, looks: list[Look], stop: asyncio.Event) -> None:
    while not stop.is_set():
        _, stored = await look(mesh.nats_url, mesh.options.mesh)
        assert stored and stored.committed
        looks.append(Look(time.perf_counter(), stored.committed, await counts(mesh)))
        await asyncio.sleep(LOOK_S)


@dataclass
class Run:
    moved_at: float
    streams: list[Stream]
    looks: list[Look]
    slots: tuple[int, ...]
    """Of the instances."""
    active: dict[int, NDArray[np.float64]]
    """Layer -> [exchanges, experts]: what was activated after the move."""


async def run(share: float, texts: Sequence[Sequence[int]], before: float, after: float, scratch: Path) -> Run:
    looks: list[Look] = []
    stop, moved = asyncio.Event(), asyncio.Event()
    earlier, later = scratch / "before.trace", scratch / "after.trace"
    client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=STREAMS))
    async with LocalMesh(options(share)) as mesh, client:
        watching = asyncio.create_task(watch(mesh, looks, stop))
        end = time.monotonic() + before + after

        def text() -> Sequence[int]:
            return texts[moved.is_set()]

        def recorded(trace: Path, until: asyncio.Event) -> asyncio.Task[Any]:
            return asyncio.create_task(record(mesh.nats_url, mesh.options.mesh, trace, until, Limits()))

        talking = asyncio.create_task(converse(client, mesh.url, text, STREAMS, lambda: time.monotonic() < end, seed=0))
        same_work = recorded(earlier, moved)  # so that gaps before and after are those of cores with the same to do
        await asyncio.sleep(before)
        moved.set()
        moved_at = time.perf_counter()
        await same_work
        recording = recorded(later, stop)
        streams = await talking
        stop.set()
        await asyncio.gather(watching, recording)
        members, _ = await look(mesh.nats_url, mesh.options.mesh)
    facts = [m.heartbeat.experts.elastic for m in members if m.heartbeat.experts]
    return Run(moved_at, streams, looks, tuple(fact.slots for fact in facts if fact), activated(later))


def activated(trace: Path) -> dict[int, NDArray[np.float64]]:
    """Layer -> [exchanges, experts]."""
    exchanges = load_trace(trace)
    experts = 1 + max(int(x.ids.max()) for x in exchanges)
    found: dict[int, list[NDArray[np.float64]]] = {}
    for x in exchanges:
        row = np.zeros(experts)
        row[np.unique(x.ids)] = 1
        found.setdefault(x.layer, []).append(row)
    return {layer: np.stack(rows) for layer, rows in found.items()}


def load_of(placement: Placement, active: dict[int, NDArray[np.float64]]) -> float:
    """Activated experts on the busiest instance if loads were their means, summed over layers."""
    count = len(placement.instances)
    pairs = zip(placement.moe_layers, homes_array(placement).astype(np.uint64), strict=True)
    return sum(busiest(active[layer].mean(axis=0)[None], to_residents(masks, count)) for layer, masks in pairs)


def best_load(placement: Placement, active: dict[int, NDArray[np.float64]], slots: tuple[int, ...]) -> float:
    """The same under homes that are computed from what was activated."""
    count, total = len(placement.instances), 0.0
    for layer, masks in zip(placement.moe_layers, homes_array(placement).astype(np.uint64), strict=True):
        mean = active[layer].mean(axis=0)[None]
        room = Room(slots, len(placement.moe_layers))
        total += busiest(mean, layer_homes([Traffic(mean)], to_residents(masks, count), room))
    return total


def homes_follow(of: Run) -> tuple[float, list[float]]:
    """Seconds after the move from which on homes are near the best, and the loads of all placements since."""
    later = [x for x in of.looks if x.at >= of.moved_at]
    best = min(best_load(x.placement, of.active, of.slots) for x in later)
    loads = [load_of(x.placement, of.active) / best for x in later]
    far = [x.at - of.moved_at for x, load in zip(later, loads, strict=True) if load > NEAR]
    return (max(far) + LOOK_S if far else 0.0), loads


def residents_follow(of: Run, most: float) -> float:
    """Seconds after the move when, for the first time, no more calls wait than allowed."""
    later = [x for x in of.looks if x.at >= of.moved_at]
    for first in later:
        last = next((x for x in later if x.at >= first.at + WAITS_S), None)
        if last and (last.counts - first.counts).share <= most:
            return last.at - of.moved_at
    return float("inf")


def p99_gap(streams: Sequence[Stream], start: float, end: float) -> float:
    """Between tokens of a stream, of those that arrive within a span."""
    gaps = [b - a for s in streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False) if start <= b < end]
    return float(np.percentile(gaps, 99))


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    texts = [text_ids(Path(args.heldout) / f"{name}.txt") for name in MOST_WAITS]
    with tempfile.TemporaryDirectory(prefix="moemesh-shift-") as scratch:
        of = await run(args.share, texts, args.before, args.after, Path(scratch))
    homes, loads = homes_follow(of)
    residents = residents_follow(of, MOST_WAITS["python"])
    start, end = of.streams[0].started, max(s.arrivals[-1] for s in of.streams if s.arrivals)
    before = p99_gap(of.streams, start + WARM_UP_S, of.moved_at)
    after = p99_gap(of.streams, of.moved_at + SETTLED_S, end)
    versions = sorted({(x.placement.version, x.placement.reason) for x in of.looks})
    result = {
        "homes_follow_s": round(homes, 1),
        "residents_follow_s": round(residents, 1),
        "load_over_best": [round(x, 3) for x in loads[:: max(1, len(loads) // 20)]],
        "p99_ms": {"before": round(before * 1e3, 2), "after": round(after * 1e3, 2)},
        "placements": [f"{version}: {reason}" for version, reason in versions],
    }
    return result, [
        Bar("homes follow, s", homes, MOST_FOLLOW_S, True),
        Bar("residents follow, s", residents, MOST_FOLLOW_S, True),
        Bar("p99 gap between tokens, 10 s after the move / before it", after / before, MOST_P99, True),
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heldout", default="", help="directory with bible.txt and python.txt")
    p.add_argument("--share", type=float, default=0.6, help="of all experts, in memory")
    p.add_argument("--before", type=float, default=60.0, help="seconds until traffic moves")
    p.add_argument("--after", type=float, default=40.0, help="seconds from then on")
    p.add_argument("--json", action="store_true", help="accepted for symmetry: the last line is always JSON")
    args = p.parse_args()
    if not args.heldout:
        print("held-out text is not given (--heldout DIR): nothing is measured")
        report("elastic_shift", {}, [])
        return
    report("elastic_shift", *asyncio.run(measure(args)))


if __name__ == "__main__":
    main()
