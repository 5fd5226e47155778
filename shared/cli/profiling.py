"""What `moemesh profile` measures: meshes of several sizes here, decoding batches of several sizes and contexts."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import httpx
import numpy as np

from shared.cli.counted import Counts, NotMeasured, Pages
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.planning.amax import Amax
from shared.planning.fit import Point
from shared.traces.recorder import Limits, record

LEAST_TOKENS = 8
"""Of every stream in the span that is measured."""
MOST_TRIES, DISTURBED = 3, 0.5
"""Of a shape, and the share of their time that paced instances may be late without another one."""
MESH = "profile"
SETTINGS = {"prefix_cache": "false", "micro_batches": "1"}
"""Every batch computes its prompts, and steps are whole: the model has no second micro-batch here."""


@dataclass(frozen=True)
class Shape:
    """What is measured in one go."""

    attention: int
    """Instances,"""
    experts: int
    """of either pool."""
    batch: int
    """Sequences of all attention instances."""
    context: int
    """Positions that a row attends to in the middle of the output."""


@dataclass(frozen=True)
class Effort:
    """How much of it is measured."""

    output: int = 96
    """Tokens of each stream; those that all streams have in common are measured."""
    repeats: int = 3
    """Of a shape; the one with the median time counts."""


PACED = Effort(output=48, repeats=1)
"""Steps of paced meshes are slow, and all alike."""


async def measure(
    model: str, shapes: Sequence[Shape], effort: Effort, vocab: int, trace: Path | None = None, pace: str = "",
    tell: Callable[[str, float], None] = lambda what, share: None,
) -> list[Point]:  # fmt: skip
    """The median of the repeats for every shape, by meshes. Shapes take turns, so that what the machine does meanwhile
    does not look like a difference between them.

    Args:
        trace: a new file for the routing of the first mesh.
        pace: profile whose times instances keep; "": their own.
        tell: told which mesh is measured, and which share of that is done.

    Raises:
        NotMeasured: a batch did not decode long enough together.
    """
    points = []
    for attention, experts in sorted({(shape.attention, shape.experts) for shape in shapes}):
        mine = [shape for shape in shapes if (shape.attention, shape.experts) == (attention, experts)]
        options = MeshOptions(model, attention, experts, port=0, mesh=MESH, settings={**SETTINGS, "pace": pace})
        async with LocalMesh(options) as mesh, recorded_to(trace, mesh):
            trace = None  # of one mesh
            pages = await Pages.of(mesh)
            take = partial(undisturbed, mesh, pages, effort.output, vocab)
            await take(mine[0], effort.repeats)  # to warm up
            turns, taken = list(product(range(effort.repeats), mine)), []
            for seed, shape in turns:
                tell(f"{attention}A{experts}E", len(taken) / len(turns))
                taken.append(await take(shape, seed))
            tell(f"{attention}A{experts}E", 1.0)
            points += [middle(taken[first :: len(mine)]) for first in range(len(mine))]
    return points


@asynccontextmanager
async def recorded_to(trace: Path | None, mesh: LocalMesh) -> AsyncIterator[None]:
    """The mesh's routing goes to a new file; None: nowhere."""
    if trace is None:
        yield
        return
    stop = asyncio.Event()
    recording = asyncio.create_task(record(mesh.nats_url, MESH, trace, stop, Limits()))
    try:
        yield
    finally:
        stop.set()
        await recording


def middle(points: Sequence[Point]) -> Point:
    """The one with the median time of a step."""
    return sorted(points, key=lambda point: point.step_s)[len(points) // 2]


async def undisturbed(mesh: LocalMesh, pages: Pages, output: int, vocab: int, shape: Shape, seed: int) -> Point:
    """One batch; again where paced instances were so late that something else must have had the cores."""
    tries = []
    while len(tries) < MOST_TRIES and (not tries or tries[-1].late > DISTURBED):
        tries.append(await one(mesh, pages, output, vocab, shape, seed))
    return min(tries, key=lambda point: point.late)


async def one(mesh: LocalMesh, pages: Pages, output: int, vocab: int, shape: Shape, seed: int) -> Point:
    """One batch of so many tokens per stream. Raises NotMeasured."""
    prompt = max(1, shape.context - output // 2)
    ids = np.random.default_rng([seed, *astuple(shape)]).integers(1, vocab, (shape.batch, prompt)).tolist()
    arrivals: list[list[float]] = [[] for _ in ids]
    limits = httpx.Limits(max_connections=shape.batch + 1)
    try:
        async with httpx.AsyncClient(timeout=600, limits=limits) as client, asyncio.TaskGroup() as tasks:
            for numbers, times in zip(ids, arrivals, strict=True):
                tasks.create_task(stream(client, mesh.url, numbers, output, times))
            await until(lambda: all(arrivals))  # prompts are computed
            before = await pages.read(client)
            await until(lambda: max(map(len, arrivals)) >= output - 4)
            taken = await pages.read(client) - before
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return point_of(shape, arrivals, taken)


def point_of(shape: Shape, arrivals: Sequence[Sequence[float]], taken: Counts) -> Point:
    """Times of the steps in which all streams decoded. Raises NotMeasured."""
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    spans = [[t for t in times if start <= t <= end] for times in arrivals]
    if min(map(len, spans)) < LEAST_TOKENS or not taken.exchanges:
        raise NotMeasured(f"{shape.batch} streams did not decode together: give a smaller batch")
    gaps = [(times[-1] - times[0]) / (len(times) - 1) for times in spans]
    activated = taken.activations / taken.answers
    return Point(
        attention=shape.attention,
        experts=shape.experts,
        batch=shape.batch,
        context=float(shape.context),
        step_s=float(np.median(gaps)),
        exchange_s=taken.exchange_s / taken.exchanges,
        expert_s=taken.compute_s / taken.answers,
        activated=activated,
        a_max=activated,
        late=taken.late_s / taken.modelled_s if taken.modelled_s else 0.0,
    )


def with_a_max(points: Sequence[Point], tables: Amax) -> list[Point]:
    """Points know what an instance activates in the mean; tables tell it of the busiest one."""
    instances, rows = (np.array([getattr(point, name) for point in points], float) for name in ("experts", "batch"))
    busiest = tables.look(instances, rows).mean(axis=0)
    return [replace(p, a_max=max(p.activated, float(most))) for p, most in zip(points, busiest, strict=True)]


async def stream(client: httpx.AsyncClient, url: str, ids: list[int], output: int, arrivals: list[float]) -> None:
    """One completion; notes when its tokens come. Raises NotMeasured.

    Sampled: greedy continuations soon agree in their tokens, and then a whole batch asks the same few experts.
    """
    body = {"prompt": ids, "max_tokens": output, "temperature": 1.0, "seed": sum(ids)}
    always = {"ignore_eos": True, "stream": True, "return_token_ids": True}
    async with client.stream("POST", url + "/v1/completions", json=body | always) as response:
        if response.status_code != 200:
            raise NotMeasured((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                tokens = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
                arrivals += [time.perf_counter()] * tokens


async def until(condition: Callable[[], bool]) -> None:
    """Look every other millisecond; a stream that fails ends the wait with its batch."""
    while not condition():  # noqa: ASYNC110 - what comes in is noted by the streams' tasks
        await asyncio.sleep(0.002)
