"""What `moemesh profile` measures: meshes of several sizes here, decoding batches of several sizes and contexts."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import httpx
import numpy as np

from shared.changes import Phase, PlacementRecord
from shared.cli.mesh import LocalMesh, MeshOptions
from shared.cli.status import look
from shared.errors import MoemeshError
from shared.membership import Member
from shared.messages import Kind
from shared.planning.amax import Amax
from shared.planning.fit import Point
from shared.traces.recorder import Limits, record

LEAST_TOKENS = 8
"""Of every stream in the span that is measured."""
LONGEST_START_S = 120.0
"""Until all instances of a mesh take part."""
MESH = "profile"
SETTINGS = {"prefix_cache": "false", "micro_batches": "1"}
"""Every batch computes its prompts, and steps are whole: the model has no second micro-batch here."""


class NotMeasured(MoemeshError):
    """A batch did not decode long enough together, or was refused."""


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


@dataclass(frozen=True)
class Counts:
    """What the instances of a mesh have counted, summed over each pool."""

    exchanges: float
    """As attention instances count them: those of a group count for each member."""
    exchange_s: float
    answers: float
    """Of expert instances to exchanges; those of a group count once."""
    compute_s: float
    activations: float
    modelled_s: float
    """Of paced instances: what their work should have taken,"""
    late_s: float
    """and what it took longer."""

    def __sub__(self, before: "Counts") -> "Counts":
        pairs = zip(vars(self).values(), vars(before).values(), strict=True)
        return Counts(*(a - b for a, b in pairs))


@dataclass(frozen=True)
class Pages:
    """Where the instances of a mesh show their metrics."""

    attention: tuple[str, ...]
    experts: tuple[str, ...]

    @classmethod
    async def of(cls, mesh: LocalMesh) -> "Pages":
        """Waits until all instances take part. Raises NotMeasured after LONGEST_START_S seconds."""
        give_up = time.monotonic() + LONGEST_START_S
        while True:
            members, record = await look(mesh.nats_url, MESH)
            if complete(mesh.options, members, record):
                urls = {kind: tuple(m.heartbeat.url for m in members if m.heartbeat.kind is kind) for kind in Kind}
                return cls(urls[Kind.ATTENTION], urls[Kind.EXPERTS])
            if time.monotonic() > give_up:
                states = ", ".join(f"{m.id} {m.heartbeat.state}" for m in members)
                raise NotMeasured(f"not all instances took part within {LONGEST_START_S:g} s: {states}")

    async def read(self, client: httpx.AsyncClient) -> Counts:
        """As of now."""
        attention, experts = [
            "".join([(await client.get(url + "/metrics")).text for url in urls])
            for urls in (self.attention, self.experts)
        ]
        return Counts(
            exchanges=total(attention, "exchange_seconds_count"),
            exchange_s=total(attention, "exchange_seconds_sum"),
            answers=total(experts, "answers_total"),
            compute_s=total(experts, "compute_seconds_total"),
            activations=total(experts, "expert_activations_total"),
            modelled_s=total(attention + experts, "paced_seconds_total"),
            late_s=total(attention + experts, "paced_late_seconds_total"),
        )


def complete(options: MeshOptions, members: Sequence[Member], record: PlacementRecord | None) -> bool:
    """Whether every instance is READY and every expert instance has experts, and nothing is about to change."""
    ready = [member.heartbeat.kind for member in members if member.ready]
    if [ready.count(kind) for kind in (Kind.ATTENTION, Kind.EXPERTS)] != [options.attention, options.experts]:
        return False
    if record is None or record.committed is None:
        return False
    return record.phase is Phase.SETTLED and len(record.committed.instances) == options.experts


async def measure(
    model: str, shapes: Sequence[Shape], vocab: int, trace: Path | None = None, pace: str = ""
) -> list[Point]:
    """The median of the repeats for every shape, by meshes. Shapes take turns, so that what the machine does meanwhile
    does not look like a difference between them.

    Args:
        trace: a new file for the routing of the first mesh.
        pace: profile whose times instances keep; "": their own.

    Raises:
        NotMeasured: a batch did not decode long enough together.
    """
    points, effort = [], PACED if pace else Effort()
    for attention, experts in sorted({(shape.attention, shape.experts) for shape in shapes}):
        mine = [shape for shape in shapes if (shape.attention, shape.experts) == (attention, experts)]
        options = MeshOptions(model, attention, experts, port=0, mesh=MESH, settings={**SETTINGS, "pace": pace})
        async with LocalMesh(options) as mesh, recorded_to(trace, mesh):
            trace = None  # of one mesh
            pages = await Pages.of(mesh)
            await one(mesh, pages, mine[0], effort.output, vocab, seed=effort.repeats)  # to warm up
            taken: list[list[Point]] = []
            for seed in range(effort.repeats):
                taken.append([await one(mesh, pages, shape, effort.output, vocab, seed) for shape in mine])
            points += map(middle, zip(*taken, strict=True))
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


async def one(mesh: LocalMesh, pages: Pages, shape: Shape, output: int, vocab: int, seed: int) -> Point:
    """One batch of so many tokens per stream. Raises NotMeasured."""
    prompt = max(1, shape.context - output // 2)
    ids = np.random.default_rng([seed, *astuple(shape)]).integers(1, vocab, (shape.batch, prompt)).tolist()
    arrivals: list[list[float]] = [[] for _ in ids]
    limits = httpx.Limits(max_connections=shape.batch + 1)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client, asyncio.TaskGroup() as tasks:
        for numbers, times in zip(ids, arrivals, strict=True):
            tasks.create_task(stream(client, mesh.url, numbers, output, times))
        await until(lambda: all(arrivals))  # prompts are computed
        before = await pages.read(client)
        await until(lambda: max(map(len, arrivals)) >= output - 4)
        taken = await pages.read(client) - before
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


def total(text: str, metric: str) -> float:
    """A metric of /metrics pages, summed over its labels."""
    return sum(float(value) for value in re.findall(rf"^moemesh_{metric}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))
