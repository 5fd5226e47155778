"""Guards that a GPU goes to one instance only, and that a host without a free one says so."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from shared import devices
from shared.devices import Gpu, Lease, acquire, eligible, lease_device, lease_key
from shared.errors import BusUnavailable, ConfigError

TWO = [Gpu(0, "aaaa"), Gpu(1, "bbbb")]


class Host:
    """A fake device list."""

    def __init__(self, *gpus: Gpu) -> None:
        self._gpus = list(gpus)

    def gpus(self) -> list[Gpu]:
        return self._gpus


class Bucket:
    """The key-value rules in memory; ``expire`` stands for the time to live, ``away`` for a lost server."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.away = False
        self.missed = asyncio.Event()

    async def open(self) -> "Bucket":
        return self

    def _write(self, key: str, value: bytes) -> int:
        self.revision += 1
        self.values[key] = (value, self.revision)
        return self.revision

    def _check(self) -> None:
        if self.away:
            self.missed.set()
            raise BusUnavailable("leases", "away")

    async def get(self, key: str) -> tuple[bytes, int] | None:
        self._check()
        return self.values.get(key)

    async def create(self, key: str, value: bytes) -> int | None:
        self._check()
        await asyncio.sleep(0)
        return None if key in self.values else self._write(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        self._check()
        return self._write(key, value) if key in self.values and self.values[key][1] == revision else None

    async def delete(self, key: str, revision: int | None = None) -> bool:
        self._check()
        if key in self.values and revision not in (None, self.values[key][1]):
            return False
        self.values.pop(key, None)
        return True

    def expire(self) -> None:
        self.values.clear()


@pytest.mark.parametrize(
    ("requested", "present", "expected"),
    [
        ("auto", TWO, ["cuda:0", "cuda:1"]),
        ("auto", [], []),
        ("cpu", TWO, []),
        ("cuda", TWO, ["cuda:0", "cuda:1"]),
        ("cuda:1", TWO, ["cuda:1"]),
    ],
)
def test_the_setting_chooses_among_the_gpus_of_the_host(requested, present, expected):
    assert [gpu.device for gpu in eligible(requested, present)] == expected


@pytest.mark.parametrize(
    ("requested", "present", "said"),
    [
        ("cuda:7", TWO, "has cuda:0, cuda:1"),
        ("cuda", [], "has no GPU"),
        ("gpu0", TWO, "'gpu0' is not a device"),
        ("cuda:", TWO, "not a device"),
    ],
)
def test_a_device_that_is_not_there_is_refused(requested, present, said):
    with pytest.raises(ConfigError, match="--device") as error:
        eligible(requested, present)
    assert said in str(error.value)


def test_a_key_has_no_byte_that_the_bucket_refuses():
    assert lease_key("host one.example", Gpu(0, "GPU/12-34")) == "host_one_example.GPU_12-34"


async def test_every_instance_of_a_host_gets_a_gpu_of_its_own_and_the_next_one_is_refused():
    bucket, host = Bucket(), Host(*TWO)
    async with AsyncExitStack() as stack:

        async def start(owner: str) -> str:
            lease = lease_device("auto", "n1", owner, host, bucket.open, patience_s=0)
            return await stack.enter_async_context(lease)

        assert sorted(await asyncio.gather(start("attention-1"), start("experts-1"))) == ["cuda:0", "cuda:1"]
        with pytest.raises(ConfigError) as error:
            await start("experts-2")
        assert "no free GPU" in str(error.value)
        assert "attention-1" in str(error.value) and "experts-1" in str(error.value)
        async with lease_device("auto", "n2", "experts-3", host, bucket.open, patience_s=0) as device:
            assert device == "cuda:0", "another node has GPUs of its own"
    assert not bucket.values, "leases end with their block"


async def test_the_cpu_needs_no_lease():
    async def no_store() -> Bucket:
        raise AssertionError("opened the store for nothing")

    for requested, host in (("cpu", Host(*TWO)), ("auto", Host())):
        async with lease_device(requested, "n1", "experts-1", host, no_store) as device:
            assert device == "cpu"


async def test_a_newcomer_gets_the_gpu_of_an_instance_that_leaves_while_it_waits():
    bucket = Bucket()
    _, lease = await acquire(bucket, "n1", "old", TWO[:1])
    waiting = asyncio.create_task(acquire(bucket, "n1", "new", TWO[:1], patience_s=30))
    await lease.release()
    gpu, _ = await waiting
    assert gpu == TWO[0]


async def test_renewal_keeps_a_lease_and_takes_an_expired_one_again():
    bucket = Bucket()
    _, lease = await acquire(bucket, "n1", "me", TWO[:1])
    await lease.renew()
    bucket.expire()
    await lease.renew()
    assert lease.held and [value for value, _ in bucket.values.values()] == [b"me"]


async def test_a_renewal_whose_answer_was_lost_is_recognised():
    bucket = Bucket()
    gpu, lease = await acquire(bucket, "n1", "me", TWO[:1])
    bucket._write(lease_key("n1", gpu), b"me")
    await lease.renew()
    assert lease.held
    await lease.release()
    assert not bucket.values


async def test_an_instance_that_lost_its_lease_says_so_once_and_leaves_the_new_holder_alone(caplog):
    bucket = Bucket()
    gpu, lease = await acquire(bucket, "n1", "me", TWO[:1])
    bucket.expire()
    await acquire(bucket, "n1", "other", TWO[:1])
    await lease.renew()
    await lease.renew()
    assert not lease.held and caplog.text.count("was lost") == 1
    await lease.release()
    assert bucket.values[lease_key("n1", gpu)][0] == b"other"


async def test_a_lost_server_ends_neither_the_renewal_nor_the_release(monkeypatch, caplog):
    monkeypatch.setattr(devices, "RENEW_S", 0.001)
    bucket = Bucket()
    renewed = asyncio.Event()

    class Watched(Lease):
        async def renew(self) -> None:
            await super().renew()
            renewed.set()

    key = lease_key("n1", TWO[0])
    lease = Watched(bucket, key, "me", await bucket.create(key, b"me") or 0)
    bucket.away = True
    keeper = asyncio.create_task(lease.keep())
    await asyncio.wait_for(bucket.missed.wait(), 10)
    bucket.away = False
    await asyncio.wait_for(renewed.wait(), 10)
    assert "not renewed" in caplog.text
    bucket.away = True
    keeper.cancel()
    await lease.release()
