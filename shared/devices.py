"""Which device an instance computes on, and the lease that keeps a GPU to one instance.

Leases are keys (node, GPU UUID) in a key-value bucket whose keys expire, because the instances of one host may run in
different containers that share nothing but NATS. A lease guards against a second instance that starts, not against
a process outside the mesh. CPU cores are not leased.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from shared.errors import BusUnavailable, ConfigError

LEASE_BUCKET = "moemesh-devices"
"""Of all meshes on one NATS, because they share the hosts."""
LEASE_TTL_S = 10.0
"""Time to live of a lease: how long the GPU of an instance that crashed stays reserved."""
RENEW_S = LEASE_TTL_S / 3
PATIENCE_S = LEASE_TTL_S + 2
"""How long a newcomer waits for a lease to end: an instance that was killed holds its own until it expires."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    index: int
    """Number in this process, as in ``cuda:1``."""
    uuid: str
    """The same in every container of the host."""
    name: str = ""

    @property
    def device(self) -> str:
        return f"cuda:{self.index}"


class Devices(Protocol):
    def gpus(self) -> list[Gpu]:
        """The GPUs that this process may use, by index."""
        ...


class CudaDevices:
    """The GPUs that torch sees; none with a CPU build."""

    def gpus(self) -> list[Gpu]:
        import torch  # here, because the gateway and the scheduler must not load it

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [Gpu(index, str(gpu.uuid), gpu.name) for index, gpu in enumerate(found)]


class LeaseStore(Protocol):
    """What leases need of a key-value bucket (shared/store.py: Store); all may raise BusUnavailable."""

    async def get(self, key: str) -> tuple[bytes, int] | None: ...
    async def create(self, key: str, value: bytes) -> int | None: ...
    async def update(self, key: str, value: bytes, revision: int) -> int | None: ...
    async def delete(self, key: str, revision: int) -> bool: ...


def eligible(requested: str, present: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that satisfy ``--device`` (auto, cpu, cuda or cuda:N), best first; empty means: compute on the CPU.

    Raises ConfigError when there is no such device.
    """
    if requested in ("auto", "cpu"):
        return list(present) if requested == "auto" else []
    if not re.fullmatch(r"cuda(:\d+)?", requested):
        raise ConfigError("--device", f"{requested!r} is not a device; write auto, cpu, cuda or cuda:1")
    chosen = [gpu for gpu in present if requested in ("cuda", gpu.device)]
    if not chosen:
        has = ", ".join(gpu.device for gpu in present) or "no GPU that torch can use"
        raise ConfigError("--device", f"{requested} is not on this host, which has {has}")
    return chosen


def lease_key(node: str, gpu: Gpu) -> str:
    """Key of a GPU's lease; bytes that a key may not contain become ``_``."""
    return re.sub(r"[^-_=A-Za-z0-9]", "_", node) + "." + re.sub(r"[^-_=A-Za-z0-9]", "_", gpu.uuid)


class Lease:
    """One GPU, reserved for ``owner``."""

    def __init__(self, store: LeaseStore, key: str, owner: str, revision: int) -> None:
        self.held = True
        """False while another instance has the key: NATS was away for longer than the lease lasts."""
        self._store = store
        self._key = key
        self._owner = owner
        self._revision = revision

    async def renew(self) -> None:
        """Start the time to live anew, or take an expired lease again. Raises BusUnavailable."""
        revision = await self._store.update(self._key, self._owner.encode(), self._revision)
        if revision is None:
            revision = await self._retake()
        if revision is not None:
            self._revision = revision
        elif self.held:
            log.error("the lease %s was lost to another instance; this GPU is shared now", self._key)
        self.held = revision is not None

    async def _retake(self) -> int | None:
        """The revision after the lease expired, or after a write of ours whose answer was lost."""
        entry = await self._store.get(self._key)
        if entry is None:
            return await self._store.create(self._key, self._owner.encode())
        value, revision = entry
        return revision if value.decode() == self._owner else None

    async def keep(self) -> None:
        """Renew until cancelled. Serving goes on while NATS is away."""
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self.renew()
            except BusUnavailable as error:
                log.warning("the lease was not renewed: %s", error)

    async def release(self) -> None:
        """Free the GPU for others; when NATS is away, the lease expires by itself."""
        with suppress(BusUnavailable):
            entry = await self._store.get(self._key)  # a renewal may have been cancelled half-way
            if entry is not None and entry[0].decode() == self._owner:
                await self._store.delete(self._key, entry[1])


async def _try_each(store: LeaseStore, node: str, owner: str, gpus: Sequence[Gpu]) -> tuple[Gpu, Lease] | None:
    for gpu in gpus:
        key = lease_key(node, gpu)
        revision = await store.create(key, owner.encode())
        if revision is not None:
            return gpu, Lease(store, key, owner, revision)
    return None


async def _holders(store: LeaseStore, node: str, gpus: Sequence[Gpu]) -> str:
    entries = [(gpu, await store.get(lease_key(node, gpu))) for gpu in gpus]
    return ", ".join(f"{gpu.device} by {entry[0].decode() if entry else 'nobody now'}" for gpu, entry in entries)


async def acquire(
    store: LeaseStore, node: str, owner: str, gpus: Sequence[Gpu], patience_s: float = PATIENCE_S
) -> tuple[Gpu, Lease]:
    """Lease the first free one of ``gpus``; ``owner`` must be unique to this process.

    Raises ConfigError, naming the holders, when none became free within ``patience_s`` seconds; BusUnavailable.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + patience_s
    while (won := await _try_each(store, node, owner, gpus)) is None:
        if clock() >= deadline:
            holders = await _holders(store, node, gpus)
            raise ConfigError("--device", f"no free GPU on this host ({holders}); start fewer instances, or on the cpu")
        await asyncio.sleep(min(0.5, patience_s))
    return won


@asynccontextmanager
async def lease_device(
    requested: str,
    node: str,
    owner: str,
    devices: Devices,
    open_store: Callable[[], Awaitable[LeaseStore]],
    patience_s: float = PATIENCE_S,
) -> AsyncIterator[str]:
    """The torch device of an instance, ``cpu`` or ``cuda:N``; a GPU stays leased to it until the block ends.

    Args:
        requested: the ``--device`` setting.
        owner: instance id and incarnation; shown to whoever finds no free GPU.
        open_store: opens the bucket, with LEASE_TTL_S; not called on a host without GPUs.

    Raises ConfigError when there is no such device or none is free; BusUnavailable.
    """
    gpus = eligible(requested, [] if requested == "cpu" else devices.gpus())
    if not gpus:
        yield "cpu"
        return
    gpu, lease = await acquire(await open_store(), node, owner, gpus, patience_s)
    log.info("leased %s (%s, %s)", gpu.device, gpu.name, gpu.uuid)
    keeper = asyncio.create_task(lease.keep(), name="lease")
    try:
        yield gpu.device
    finally:
        keeper.cancel()
        await lease.release()
