"""The loop that makes pools as large as desired, with a real store and an actuator that does as it is told here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from services.scheduler import pool_loop
from services.scheduler.actuators.base import ActuatorFailed
from services.scheduler.leader import Leader
from services.scheduler.pool_loop import PoolLoop
from shared.config import MeshConfig
from shared.errors import Refused
from shared.lifecycle import Instance
from shared.messages import Kind, Pool, Subjects
from shared.nats_server import NatsServer
from shared.pool_messages import DesiredPools, Wish
from tests.integration.waiting import LIMIT_S, until

A, E = Pool.ATTENTION, Pool.EXPERTS


class Told:
    """Remembers what it was asked; fails while there are ``failures``."""

    def __init__(self, failures: int = 0) -> None:
        self.asked: list[tuple[Pool, int]] = []
        self.failures = failures
        self.closed = False

    async def scale(self, pool: Pool, count: int) -> None:
        self.asked.append((pool, count))
        if self.failures:
            self.failures -= 1
            raise ActuatorFailed("no room")

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def config(nats_server: NatsServer, mesh: str) -> MeshConfig:
    return MeshConfig(nats=nats_server.url, mesh=mesh)


@asynccontextmanager
async def loop(config: MeshConfig, id: str, actuator: Told) -> AsyncIterator[tuple[PoolLoop, Leader, Instance]]:
    """A loop whose leader takes the lease when a test lets it."""
    async with Instance(Kind.SCHEDULER, replace(config, id=id), signals=False) as instance:
        state = await instance.bus.store(instance.subjects.bucket)
        leader = Leader(await instance.bus.store(instance.subjects.leader_bucket, ttl=60.0), state, id)
        pools = PoolLoop(instance, leader, actuator, "told")
        await pools.start()
        await instance.ready(pools.facts)
        yield pools, leader, instance
        await pools.stop()


def outcomes(pools: PoolLoop) -> dict[str, float]:
    made = [s for s in pools.samples() if s.name == "pool_changes"]
    return {s.labels["outcome"]: s.value for s in made if isinstance(s.value, (int, float))}


async def test_a_change_that_fails_is_tried_again_and_told_until_it_is_made(config: MeshConfig):
    told = Told(failures=1)
    async with loop(config, "s1", told) as (pools, leader, instance):
        await leader.step()
        await pools.want({E: 2}, "by hand")
        await until(lambda: "experts: 2 wanted, attempt 1 failed: no room" in pools.problem)
        assert instance.heartbeat().pools[0].problem == pools.problem
        await until(lambda: len(told.asked) == 2 and not pools.problem)
        assert told.asked == [(E, 2), (E, 2)]
        assert outcomes(pools) == {"failed": 1, "made": 1}
    assert told.closed


async def test_asking_for_what_is_there_gives_a_failed_change_up(config: MeshConfig):
    told = Told(failures=99)
    async with loop(config, "s1", told) as (pools, leader, _):
        await leader.step()
        await pools.want({E: 2}, "by hand")
        await until(lambda: pools.problem)
        await pools.want({E: 0}, "by hand")
        assert pools.problem == ""
        assert all(asked == (E, 2) for asked in told.asked)


async def test_two_pools_are_desired_beside_each_other_with_author_reason_and_time(config: MeshConfig):
    async with loop(config, "s1", Told()) as (pools, leader, _):
        await leader.step()
        await pools.want({E: 2}, "by hand")
        await pools.want({A: 3}, "more requests")
        assert pools.desired is not None
        assert pools.page() == {"experts": 2, "attention": 3}
        wish = pools.desired.wishes[A]
        assert (wish.author, wish.reason, wish.time > 1e9) == ("s1", "more requests", True)


@pytest.mark.parametrize(("settle_s", "asked"), [(1000.0, [(A, 1)]), (0.0, [(E, 2), (A, 1)])])
async def test_what_was_desired_before_a_start_waits_for_instances_that_may_be_on_their_way(
    config: MeshConfig, monkeypatch: pytest.MonkeyPatch, settle_s: float, asked: list[tuple[Pool, int]]
):
    async with loop(config, "s1", Told()) as (pools, leader, _):
        await leader.step()
        await pools.want({E: 2}, "by hand")
        await leader.release()
    monkeypatch.setattr(pool_loop, "SETTLE_S", settle_s)
    told = Told()
    async with loop(config, "s2", told) as (pools, leader, _):
        await leader.step()
        await pools.want({A: 1}, "by hand")
        await until(lambda: (A, 1) in told.asked)
        assert told.asked == asked


async def test_who_does_not_lead_writes_nothing_and_asks_nobody(config: MeshConfig):
    told = Told()
    async with loop(config, "s1", told) as (pools, leader, _), loop(config, "s2", Told()) as (other, _, _):
        await leader.step()
        await pools.want({E: 2}, "by hand")
        with pytest.raises(Refused, match="another scheduler leads"):
            await other.want({E: 5}, "late")
        await until(lambda: other.page() == {"experts": 2}, "the follower reads what is desired")
        assert other.facts() == {}


async def test_a_leader_that_was_replaced_without_noticing_cannot_write_any_more(config: MeshConfig):
    async with loop(config, "s1", Told()) as (pools, leader, instance):
        await leader.step()
        await pools.want({E: 2}, "by hand")
        assert leader.epoch is not None
        store = await instance.bus.store(instance.subjects.bucket)
        found = await store.get(Subjects.POOLS_KEY)
        assert found is not None
        theirs = DesiredPools(
            epoch=leader.epoch + 1, wishes={E: Wish(count=4, author="s2", reason="by hand", time=1.0)}
        )
        assert await store.update(Subjects.POOLS_KEY, theirs.encode(), found[1])
        with pytest.raises(Refused, match="another scheduler leads"):
            await pools.want({E: 5}, "late")
        await until(lambda: pools.page() == {"experts": 4})


async def test_what_is_desired_is_written_again_when_the_store_has_lost_it(config: MeshConfig):
    async with loop(config, "s1", Told()) as (pools, leader, instance):
        await leader.step()
        await pools.want({E: 2}, "by hand")
        store = await instance.bus.store(instance.subjects.bucket)
        found = await store.get(Subjects.POOLS_KEY)
        assert found is not None
        assert await store.delete(Subjects.POOLS_KEY, found[1])
        async with asyncio.timeout(LIMIT_S):
            while (found := await store.get(Subjects.POOLS_KEY)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert DesiredPools.decode(found[0]).counts == {E: 2}
