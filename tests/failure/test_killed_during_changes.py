"""kill -9 while the placement changes under streams: every byte as without, and a placement that serves in the end."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from shared.bus import Bus
from shared.changes import Phase, PlacementRecord, Rebalance, RebalancePlan
from shared.errors import BusUnavailable, Refused
from shared.messages import Subjects
from shared.placement_watch import homes_array, read_record
from tests.failure.test_killed_services import BODY, streams
from tests.mesh import RunningMesh, running_mesh

MESH = "changes"
LAYERS = 6
LOW, HIGH = tuple(range(16)), tuple(range(16, 32))
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    """Two expert instances without a slot to spare: every change takes several versions."""
    settings = {"slots": str(16 * LAYERS), "lease_s": "1"}
    with running_mesh(attention=1, experts=2, mesh=MESH, settings=settings) as running:
        yield running


async def begin(nats: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Have all layers placed so, as soon as a scheduler takes it; returns when it has begun."""
    given = {layer: {"experts-0": first, "experts-1": second} for layer in range(LAYERS)}
    bus = await Bus.connect(nats, "test")
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    request = Rebalance(given=given)
                    await bus.request(Subjects(MESH).scheduler("rebalance"), request, RebalancePlan, 5.0)
                    return
                except (BusUnavailable, Refused):
                    await asyncio.sleep(0.1)
    finally:
        await bus.close()


async def settled(nats: str, instances: tuple[str, ...]) -> PlacementRecord:
    """The record once nothing is under way and the placement names just these instances."""
    bus = await Bus.connect(nats, "test")
    try:
        store = await bus.store(Subjects(MESH).bucket)
        async with asyncio.timeout(LIMIT_S):
            while True:
                record, _ = await read_record(store)
                placed = record.committed.instances if record and record.committed else ()
                if record and record.phase is Phase.SETTLED and placed == instances:
                    return record
                await asyncio.sleep(0.05)
    finally:
        await bus.close()


async def ready(url: str) -> None:
    """Return when requests are taken again."""
    async with asyncio.timeout(LIMIT_S), httpx.AsyncClient() as client:
        while (await client.get(url + "/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("victim", ["scheduler-0", "experts-1"])
def test_a_kill_in_the_midst_of_a_change_costs_no_byte_and_leaves_a_whole_placement(
    mesh: RunningMesh, victim: str
) -> None:
    expected = mesh.complete(**BODY)["choices"][0]["text"]
    nats = mesh.mesh.nats_url
    mesh.call(begin(nats, LOW, HIGH) if victim == "scheduler-0" else begin(nats, HIGH, LOW))
    running = streams(mesh, 4)
    mesh.kill(victim)
    assert {stream.result(180) for stream in running} == {expected}
    record = mesh.call(settled(nats, ("experts-0", "experts-1")))
    assert record.committed is not None
    assert (homes_array(record.committed) != 0).all()
    mesh.call(ready(mesh.url))  # the placement may have settled before who was killed is back
    assert mesh.complete(**BODY)["choices"][0]["text"] == expected
