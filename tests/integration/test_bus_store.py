"""Key-value buckets on a real NATS server: compare-and-set, expiry, restarts, races."""

import asyncio
import shutil

import pytest

from shared.bus import MAX_MESSAGE_BYTES, Bus
from shared.errors import BadMessage, BusUnavailable
from shared.nats_server import NatsServer
from tests.integration.waiting import until


async def test_values_change_only_from_the_revision_that_was_read(bus: Bus) -> None:
    store = await bus.store("b")
    assert await store.get("k") is None
    first = await store.create("k", b"1")
    assert first is not None
    assert await store.create("k", b"2") is None
    second = await store.update("k", b"2", first)
    assert second is not None
    assert await store.update("k", b"3", first) is None
    assert await store.get("k") == (b"2", second)
    assert not await store.delete("k", first)
    assert await store.delete("k", second)
    assert await store.get("k") is None
    assert await store.create("k", b"4") is not None


async def test_of_many_writers_of_one_revision_one_wins(bus: Bus, nats_server: NatsServer) -> None:
    buses = [await Bus.connect(nats_server.url, str(i)) for i in range(4)]
    stores = await asyncio.gather(*(b.store("race") for b in buses))
    created = await asyncio.gather(*(s.create("k", str(i).encode()) for i, s in enumerate(stores)))
    revisions = [r for r in created if r is not None]
    assert len(revisions) == 1
    updated = await asyncio.gather(*(s.update("k", b"x", revisions[0]) for s in stores))
    assert len([r for r in updated if r is not None]) == 1
    for b in buses:
        await b.close()


async def test_a_bucket_with_other_parameters_is_used_as_it_is(bus: Bus) -> None:
    first = await bus.store("b", ttl=60.0)
    second = await bus.store("b", ttl=5.0)
    assert (first.ttl, second.ttl) == (60.0, 60.0)
    assert (await bus.store("forever")).ttl is None


async def test_a_key_lives_on_while_it_is_rewritten_and_expires_after_the_last_write(bus: Bus) -> None:
    store = await bus.store("lease", ttl=1.0)
    revision = await store.create("k", b"x")
    for _ in range(4):
        await asyncio.sleep(0.5)
        assert revision is not None
        revision = await store.update("k", b"x", revision)
    assert revision is not None
    taken = None
    async with asyncio.timeout(20):
        while taken is None:
            taken = await store.create("k", b"y")
    assert taken > revision


async def test_values_survive_a_killed_server_with_the_same_files(bus: Bus, nats_server: NatsServer) -> None:
    store = await bus.store("b")
    revision = await store.create("k", b"kept")
    await nats_server.kill()
    await until(lambda: not bus.connected)
    with pytest.raises(BusUnavailable):
        await store.get("k")
    await nats_server.start()
    await until(lambda: bus.connected)
    assert await store.get("k") == (b"kept", revision)


async def test_a_bucket_that_was_lost_with_the_server_is_made_again(bus: Bus, nats_server: NatsServer) -> None:
    store = await bus.store("b")
    revision = await store.create("k", b"lost")
    assert revision is not None
    await nats_server.kill()
    shutil.rmtree(nats_server.store_dir / "jetstream")
    await nats_server.start()
    await until(lambda: bus.connected)
    assert await store.get("k") is None
    assert await store.update("k", b"x", revision) is None
    assert await store.create("k", b"new") is not None


async def test_values_over_the_limit_are_refused(bus: Bus) -> None:
    store = await bus.store("b")
    with pytest.raises(BadMessage, match=str(MAX_MESSAGE_BYTES)):
        await store.create("k", b"x" * (MAX_MESSAGE_BYTES + 1))
    largest = b"x" * MAX_MESSAGE_BYTES
    assert await store.create("k", largest) is not None
    found = await store.get("k")
    assert found is not None
    assert found[0] == largest
