"""A change of the placement over NATS: aborts, releases, drains, and kill -9 of the scheduler in every state."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from shared.changes import Phase
from shared.config import MeshConfig
from shared.lifecycle import Instance
from shared.messages import Kind
from shared.nats_server import NatsServer
from shared.placement_watch import PlacementWatch
from tests.integration.instances import attention, committed, expert
from tests.integration.test_scheduler_placement import instances, scheduler, scheduler_process
from tests.integration.waiting import until


@pytest.fixture
def config(nats_server: NatsServer, mesh: str) -> MeshConfig:
    return MeshConfig(nats=nats_server.url, mesh=mesh)


@pytest.fixture
async def watch(config: MeshConfig) -> AsyncIterator[PlacementWatch]:
    async with Instance(Kind.GATEWAY, replace(config, id="watcher"), signals=False) as instance:
        yield await PlacementWatch(instance).start()


def in_phase(watch: PlacementWatch, phase: Phase, version: int = 0) -> Callable[[], bool]:
    """Whether ``phase`` is under way for ``version``."""
    return lambda: watch.record is not None and (watch.record.phase, watch.record.newest) == (phase, version)


class Gate:
    """Lets instances load, or use, versions up to a number."""

    def __init__(self, open_to: int = 1) -> None:
        self.open_to = open_to

    def __call__(self, version: int) -> bool:
        return version <= self.open_to


async def start(stack: AsyncExitStack, config: MeshConfig, loads: Gate, uses: Gate, watch: PlacementWatch) -> Instance:
    """e1 with version 1 in use by an attention instance; then e2 joins. Returns e2."""
    enter = stack.enter_async_context
    e1 = await enter(expert(replace(config, id="e1"), loads=loads))
    await enter(attention(replace(config, id="a1"), uses=uses))
    await until(in_phase(watch, Phase.SETTLED, 1))
    del e1
    return await enter(expert(replace(config, id="e2"), loads=loads))


async def open_up(gate: Gate, *watchers: Instance) -> None:
    gate.open_to = 99
    for instance in watchers:
        await instance.announce()


@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.COMMIT, Phase.SETTLED])
async def test_another_scheduler_carries_on_when_the_first_is_killed_in_any_state(
    config: MeshConfig, watch: PlacementWatch, phase: Phase
) -> None:
    loads, uses = Gate(1 if phase is Phase.PREPARE else 99), Gate(1 if phase is Phase.COMMIT else 99)
    async with AsyncExitStack() as stack, scheduler_process(config, "s1") as first:
        e2 = await start(stack, config, loads, uses, watch)
        await until(in_phase(watch, phase, 2), f"{phase} of version 2")
        assert committed(watch.record) == (1 if phase is Phase.PREPARE else 2)
        first.kill()
        await first.wait()
        async with scheduler(config, "s2"):
            await until(lambda: watch.record is not None and watch.record.epoch == 2, "s2 leads")
            assert watch.record is not None
            assert (watch.record.phase, watch.record.newest) == (phase, 2)
            await open_up(loads, e2)
            await open_up(uses)
            await until(in_phase(watch, Phase.SETTLED, 2), "the change to end")
            assert instances(watch) == ("e1", "e2")
            assert watch.current is not None
            assert watch.current.author == "s1"


async def test_an_instance_that_is_lost_while_a_change_is_prepared_aborts_it(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    verdicts: list[str] = []
    watch.on_change(lambda: verdicts.append(watch.record.verdict if watch.record else ""))
    async with AsyncExitStack() as stack, scheduler(config, "s1"):
        async with AsyncExitStack() as passing:
            await stack.enter_async_context(expert(replace(config, id="e1")))
            await until(in_phase(watch, Phase.SETTLED, 1))
            await passing.enter_async_context(expert(replace(config, id="e2"), loads=Gate(1)))
            await until(in_phase(watch, Phase.PREPARE, 2))
        await until(in_phase(watch, Phase.SETTLED, 2))
        assert (instances(watch), committed(watch.record)) == (("e1",), 1)
        assert "placement 2 (e2 joined) was aborted: e2 left" in verdicts
        async with expert(replace(config, id="e3")):
            await until(in_phase(watch, Phase.SETTLED, 3))
            assert instances(watch) == ("e1", "e3")


async def test_who_does_not_load_in_time_aborts_the_change_and_the_old_version_stays(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    async with AsyncExitStack() as stack, scheduler(config, "s1", prepare_deadline=0.5):
        await start(stack, config, Gate(1), Gate(1), watch)
        await until(in_phase(watch, Phase.SETTLED, 2))
        assert watch.record is not None
        assert "e2 did not load it in time" in watch.record.verdict
        assert committed(watch.record) == 1


async def test_a_draining_instance_is_left_out_while_it_still_answers(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    async with AsyncExitStack() as stack, scheduler(config, "s1"):
        uses = Gate(99)
        e2 = await start(stack, config, Gate(99), uses, watch)
        await until(in_phase(watch, Phase.SETTLED, 2))
        e2.stop()
        await e2.announce()
        await until(lambda: instances(watch) == ("e1",))
        assert watch.current is not None
        assert watch.current.reason == "e2 draining"


async def test_instances_with_too_few_slots_get_no_placement_and_the_scheduler_says_why(
    config: MeshConfig, watch: PlacementWatch
) -> None:
    members = watch._instance.members
    async with scheduler(config, "s1"), expert(replace(config, id="e1"), slots=6):
        await until(lambda: (m := members.get("s1")) and "cannot hold 4 experts" in m.heartbeat.detail)
        async with expert(replace(config, id="e2"), slots=6):
            await until(lambda: instances(watch) == ("e1", "e2"))
            await until(lambda: (m := members.get("s1")) and not m.heartbeat.detail)
