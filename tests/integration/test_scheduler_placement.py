"""The placement follows the expert instances, through the store, restarts and competing schedulers."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from services.scheduler.leader import Leader
from services.scheduler.main import serve
from shared.bus import Bus
from shared.config import MeshConfig, SchedulerConfig
from shared.errors import ConfigError, ModelError
from shared.lifecycle import Instance
from shared.messages import Kind, ModelFacts, Placement, Subjects
from shared.nats_server import NatsServer
from shared.placement_watch import PlacementWatch, read_record
from shared.store import Store
from tests.integration.instances import MODEL, OTHER_MODEL, committed, expert
from tests.integration.waiting import until

LEASE_S = 1.0


@pytest.fixture
def config(nats_server: NatsServer, mesh: str) -> MeshConfig:
    return MeshConfig(nats=nats_server.url, mesh=mesh)


@pytest.fixture
async def watch(config: MeshConfig) -> AsyncIterator[PlacementWatch]:
    """A gateway that follows the placement."""
    async with Instance(Kind.GATEWAY, replace(config, id="watcher"), signals=False) as instance:
        yield await PlacementWatch(instance).start()


@asynccontextmanager
async def scheduler(config: MeshConfig, id: str, **settings: Any) -> AsyncIterator[asyncio.Task[None]]:
    """A scheduler in this process; cancelled at the end, as a crash: it keeps its lease."""
    made = SchedulerConfig(nats=config.nats, mesh=config.mesh, id=id, lease_s=LEASE_S, **settings)
    task = asyncio.create_task(serve(made))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def scheduler_process(config: MeshConfig, id: str) -> AsyncIterator[Process]:
    settings = {"NATS": config.nats, "MESH": config.mesh, "ID": id, "LEASE_S": str(LEASE_S)}
    environ = dict(os.environ) | {f"MOEMESH_{k}": v for k, v in settings.items()}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.scheduler.main", env=environ, stdout=DEVNULL, stderr=PIPE
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


def instances(watch: PlacementWatch) -> tuple[str, ...]:
    return watch.current.instances if watch.current else ()


def authors(watch: PlacementWatch, *ids: str) -> Callable[[], bool]:
    return lambda: watch.current is not None and watch.current.author in ids


async def test_the_placement_follows_who_joins_and_leaves(config: MeshConfig, watch: PlacementWatch) -> None:
    changes: list[int] = []
    watch.on_change(lambda: changes.append(committed(watch.record)))
    async with scheduler(config, "s1"), expert(replace(config, id="e1")):
        await until(lambda: instances(watch) == ("e1",))
        async with expert(replace(config, id="e2")):
            await until(lambda: instances(watch) == ("e1", "e2"))
        await until(lambda: instances(watch) == ("e1",))
    assert watch.current is not None
    assert (watch.current.author, watch.current.reason) == ("s1", "e2 left")
    assert changes == sorted(changes)
    assert set(changes) == {0, 1, 2, 3}


async def test_the_metrics_say_who_leads_and_what_the_reconciler_does(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    members = watch._instance.members

    def read(id: str) -> dict[str, float]:
        member = members.get(id)
        assert member is not None
        lines = [line for line in httpx.get(member.heartbeat.url + "/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    async with scheduler(config, "s1"), scheduler(config, "s2"):
        await until(lambda: {m.id for m in members.ready(Kind.SCHEDULER)} == {"s1", "s2"})
        async with expert(replace(config, id="e1")):
            await until(lambda: instances(watch) == ("e1",))
            found = {id: await asyncio.to_thread(read, id) for id in ("s1", "s2")}
            leading = max(found, key=lambda id: found[id]["moemesh_leader"])
            assert sorted(f["moemesh_leader"] for f in found.values()) == [0, 1]
            assert found[leading]["moemesh_placements_written_total"] == found[leading]["moemesh_leader_epoch"] == 1
            assert found[leading]["moemesh_placement_version"] == 1
            assert found[leading]["moemesh_placements_aborted_total"] == 0
            state = 'moemesh_reconciler_state{state="%s"}'
            follower = next(id for id in found if id != leading)
            assert found[follower][state % "following"] == 1
            await until_async(lambda: asyncio.to_thread(lambda: read(leading)[state % "steady"] == 1))
            assert found[leading]['moemesh_bus_messages_total{fate="published"}'] > 0
        await until_async(lambda: asyncio.to_thread(lambda: read(leading)[state % "waiting"] == 1))


async def until_async(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_the_last_placement_stays_when_the_last_expert_instance_leaves(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    async with scheduler(config, "s1"):
        async with expert(replace(config, id="e1")):
            await until(lambda: instances(watch) == ("e1",))
        async with expert(replace(config, id="e2")):
            await until(lambda: instances(watch) == ("e2",))
    assert watch.current is not None
    assert watch.current.version == 2


async def test_of_two_models_that_become_ready_in_the_same_moment_one_leaves(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    async def live(id: str, model: ModelFacts, both: asyncio.Barrier) -> None:
        async with expert(replace(config, id=id), model, joined=both) as instance:
            await instance.until_stopped()

    both = asyncio.Barrier(2)
    first = asyncio.create_task(live("e1", MODEL, both))
    second = asyncio.create_task(live("e2", OTHER_MODEL, both))
    await until(lambda: len(watch._instance.members.ready(Kind.EXPERTS)) == 2, "both to be READY")
    async with scheduler(config, "s1"):
        with pytest.raises(ModelError, match="serves another model: e1"):
            await second
        await until(lambda: instances(watch) == ("e1",))
    first.cancel()
    await asyncio.wait([first])


async def test_one_of_two_schedulers_leads_and_the_other_takes_over_when_it_is_killed(
    config: MeshConfig, watch: PlacementWatch, bus: Bus
) -> None:
    async with expert(replace(config, id="e1")), scheduler_process(config, "s1") as first:
        await until(authors(watch, "s1"))
        async with scheduler(config, "s2"):
            first.kill()
            await first.wait()
            async with expert(replace(config, id="e2")):
                await until(lambda: instances(watch) == ("e1", "e2"), "s2 to take over")
    assert watch.current is not None
    assert (watch.current.author, watch.current.version, watch.current.epoch) == ("s2", 2, 2)


async def test_a_scheduler_that_is_told_to_stop_hands_over_and_the_next_continues_the_versions(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    async with expert(replace(config, id="e1")):
        async with scheduler_process(config, "s1") as first:
            await until(authors(watch, "s1"))
            first.send_signal(signal.SIGTERM)
            assert await first.wait() == 0
        async with expert(replace(config, id="e2")), scheduler(config, "s2"):
            await until(lambda: instances(watch) == ("e1", "e2"))
    assert watch.current is not None
    assert (watch.current.version, watch.current.epoch) == (2, 2)


async def test_two_schedulers_that_start_together_write_one_line_of_versions(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    versions: set[int] = set()
    watch.on_change(lambda: versions.add(committed(watch.record)))
    async with scheduler(config, "s1"), scheduler(config, "s2"), expert(replace(config, id="e1")):
        await until(lambda: instances(watch) == ("e1",))
        async with expert(replace(config, id="e2")):
            await until(lambda: instances(watch) == ("e1", "e2"))
    assert versions == {0, 1, 2}
    assert watch.current is not None
    assert watch.current.epoch == 1


async def test_placement_goes_on_after_nats_was_killed(
    config: MeshConfig, watch: PlacementWatch, nats_server: NatsServer
) -> None:
    async with scheduler(config, "s1") as task, expert(replace(config, id="e1")):
        await until(lambda: instances(watch) == ("e1",))
        await nats_server.kill()
        await until(lambda: not watch._instance.bus.connected)
        await nats_server.start()
        async with expert(replace(config, id="e2")):
            await until(lambda: instances(watch) == ("e1", "e2"))
        assert not task.done()
    assert watch.current is not None
    assert watch.current.version == 2


@pytest.mark.parametrize("damage", [b"", b"no placement", "homes"])
async def test_a_stored_placement_that_cannot_be_read_is_replaced(
    config: MeshConfig, watch: PlacementWatch, bus: Bus, damage: bytes | str
) -> None:
    store = await bus.store(Subjects(config.mesh).bucket)
    async with expert(replace(config, id="experts-a")):
        async with scheduler(config, "scheduler-a") as task:
            await until(authors(watch, "scheduler-a"))
            record, revision = await read_record(store)
            assert record is not None
            assert record.committed is not None
            broken = record.committed.model_copy(update={"homes": b"x"})
            short = record.model_copy(update={"committed": broken}).encode()
            await store.update(Subjects.PLACEMENT_KEY, damage if isinstance(damage, bytes) else short, revision)
            await until_async(lambda: is_stored(store, record.committed))
            assert not task.done()
        assert instances(watch) == ("experts-a",)


async def is_stored(store: Store, placement: Placement | None) -> bool:
    record, _ = await read_record(store)
    return record is not None and record.committed == placement


async def test_a_deposed_leader_cannot_write_after_its_successor_has_begun(
    config: MeshConfig, watch: PlacementWatch, bus: Bus, mesh: str
) -> None:
    subjects = Subjects(mesh)
    store = await bus.store(subjects.bucket)
    async with expert(replace(config, id="e1")):
        async with scheduler(config, "s1"):
            await until(authors(watch, "s1"))
            before, revision = await read_record(store)
        assert before is not None
        async with scheduler(config, "s2"):
            await until_epoch(bus, subjects, 2)
            late = before.model_copy(update={"serial": before.serial + 1, "verdict": "late"})
            assert await store.update(Subjects.PLACEMENT_KEY, late.encode(), revision) is None


async def until_epoch(bus: Bus, subjects: Subjects, epoch: int) -> None:
    """Wait until the stored record carries ``epoch``."""
    store = await bus.store(subjects.bucket)
    async with asyncio.timeout(30):
        while True:
            record, _ = await read_record(store)
            if record and record.epoch == epoch:
                return
            await asyncio.sleep(0.05)


async def test_a_lease_is_held_by_one_and_every_leadership_has_a_higher_epoch(bus: Bus, mesh: str) -> None:
    subjects = Subjects(mesh)
    leases, state = await bus.store(subjects.leader_bucket, ttl=LEASE_S), await bus.store(subjects.bucket)
    leaders = [Leader(leases, state, f"s{i}") for i in range(3)]
    epochs: list[int] = []
    for leader in leaders:
        await until_leading(leader)
        for other in leaders:
            await other.step()
        assert [other.epoch is not None for other in leaders].count(True) == 1
        epochs.append(leader.epoch or 0)
        if leader is leaders[1]:
            await leader.release()  # the others just fall silent
        leader._lease = None
        leaders[leaders.index(leader)] = Leader(leases, state, "replaced")
    assert epochs == [1, 2, 3]


async def until_leading(leader: Leader) -> None:
    async with asyncio.timeout(30):
        while leader.epoch is None:
            await leader.step()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lease_s", 0.0),
        ("homes", -1),
        ("prepare_deadline", 0.0),
        ("rebalance_s", -1.0),
        ("target_layer_ms", -1.0),
        ("target_prefill_layer_ms", -1.0),
    ],
)
async def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting.replace("_", "-")):
        await serve(SchedulerConfig(**{setting: value}))  # type: ignore[arg-type]
