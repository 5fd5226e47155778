"""What attention and expert instances have in common: a leased device, a compute thread, an opened checkpoint.

What is built on it is the services' own (``services/*/build.py``).
"""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from shared.config import AttentionConfig, ExpertsConfig, MeshConfig, parse_cores
from shared.device_profile import DeviceProfile, load_profile
from shared.devices import LEASE_BUCKET, LEASE_TTL_S, CudaDevices, lease_device
from shared.errors import ConfigError
from shared.kernels.threads import thread_environment
from shared.lifecycle import Instance, run
from shared.messages import Kind
from shared.priority import let_senders_finish, yield_to_others

if TYPE_CHECKING:  # torch and numba read an environment that `run_compute` has to set first
    import torch

    from shared.keep_awake import KeepAwake
    from shared.models.loader import Checkpoint
    from shared.pace import Pace
    from shared.transport.base import Transport

C = TypeVar("C", bound=MeshConfig)
T = TypeVar("T")
PACED_NAP_S = 0.01
"""Paced instances are many on few cores: they sleep longer at a time, and may lose more when UCX loses a wakeup."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeSide:
    """An instance with a device and a model; tensors and the data plane belong to the compute thread."""

    instance: Instance
    device: "torch.device"
    threads: int
    checkpoint: "Checkpoint"
    profile: DeviceProfile | None
    """Whose times this instance keeps; None: its own."""
    busy_cores: frozenset[int]
    """Cores that are kept from halting while there is work."""
    _executor: Executor
    _loop: asyncio.AbstractEventLoop

    @property
    def mesh(self) -> int:
        """Name of this mesh and its model in frame headers."""
        from shared.activation import mesh_hash

        return mesh_hash(self.instance.mesh, self.checkpoint.digest)

    def say(self, text: str) -> None:
        """Progress, one line for a person; from the compute thread."""
        asyncio.run_coroutine_threadsafe(self.instance.say(text), self._loop)

    async def call(self, work: Callable[[], T]) -> T:
        """``work()`` in the compute thread."""
        return await self._loop.run_in_executor(self._executor, work)

    def data_plane(self, rows: int, tls: str) -> tuple["Transport", "Pace"]:
        """The transport, for exchanges of at most ``rows`` rows, and the pace of this instance.

        In the compute thread. Raises TransportError.
        """
        from shared.exchange_frames import longest_frame
        from shared.pace import UNPACED, Pacer, sleep_exactly
        from shared.transport.paced import PacedTransport
        from shared.transport.ucx import SPIN_US, UcxTransport

        spec = self.checkpoint.spec
        longest = longest_frame(rows, spec.router.top_k, spec.hidden)
        # CPUs take longer than any polling lasts, and in EEVDF who yields a core forfeits its place in the queue.
        spin_us = 0.0 if self.device.type == "cpu" else SPIN_US
        make = partial(UcxTransport, longest, self.device, tls, spin_us=spin_us)
        if self.profile is None:
            return make(), UNPACED
        sleep_exactly()
        paced = PacedTransport(make(nap_s=PACED_NAP_S), self.profile)
        return paced, Pacer(self.profile if spec.shared_hidden else self.profile.without_shared(), paced.wait_until)

    def keep_awake(self) -> "KeepAwake":
        """Started in the compute thread, which closes it."""
        from shared.keep_awake import BusyCores, LetHalt

        return BusyCores(self.busy_cores) if self.busy_cores else LetHalt()


@asynccontextmanager
async def compute_side(kind: Kind, config: AttentionConfig | ExpertsConfig, threads: int) -> AsyncIterator[ComputeSide]:
    """An instance that has its device, has opened its model and has joined the mesh; it leaves with the context.

    Raises ConfigError, ModelError and BusUnavailable.
    """
    profile = load_profile("--pace", config.pace) if config.pace else None
    if profile:
        log.warning("paced by %s (%s): its times, not this machine's", profile.name, profile.about or "no source given")
    async with Instance(kind, config) as instance:
        owner = f"{instance.id} {instance.incarnation:x}"
        open_store = partial(instance.bus.store, LEASE_BUCKET, LEASE_TTL_S)
        async with lease_device(config.device, instance.node, owner, CudaDevices(), open_store) as device:
            yield await _open(instance, device, config, profile, threads)


async def _open(
    instance: Instance, device: str, config: MeshConfig, profile: DeviceProfile | None, threads: int
) -> ComputeSide:
    import torch

    from shared.models.loader import open_checkpoint

    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, "compute")
    if isinstance(config, ExpertsConfig):
        await loop.run_in_executor(executor, let_senders_finish)  # before it starts other threads
    await loop.run_in_executor(executor, _settle, parse_cores("--cores", config.cores), threads)
    yield_to_others(threading.get_native_id())
    await instance.say("opening the model")
    checkpoint = await loop.run_in_executor(executor, open_checkpoint, config.model)
    await instance.join(checkpoint.facts())
    where, cores = torch.device(device), parse_cores("--cores", config.cores) or os.sched_getaffinity(0)
    if where.type == "cuda":  # what UCX does in this thread happens on the current device
        await loop.run_in_executor(executor, torch.cuda.set_device, where)
    busy = frozenset(cores if config.keep_awake and where.type == "cpu" and profile is None else ())
    return ComputeSide(instance, where, threads, checkpoint, profile, busy, executor, loop)


def _settle(cores: set[int], threads: int) -> None:
    """Keep this thread, and those that it will start, on these cores; anywhere when there are none.

    With a core for each of them, they stay apart.
    """
    from shared.kernels.pinning import pin_team

    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ConfigError("--cores", f"{sorted(cores)}: this process may not run there") from error
    if len(cores) == threads > 1:
        pin_team(sorted(cores))


def run_compute(
    serve: Callable[[C, int], Coroutine[Any, Any, None]], config: C, environ: MutableMapping[str, str]
) -> int:
    """Set the environment for the compute threads, run ``serve(config, threads)``; returns the exit status."""
    threads = config.threads or len(parse_cores("--cores", config.cores) or os.sched_getaffinity(0))
    environ.update(thread_environment(threads, environ))
    return run(serve(config, threads), config)
