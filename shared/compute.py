"""What attention and expert instances have in common: a leased device, a compute thread, an opened checkpoint.

What is built on it is the services' own (``services/*/build.py``).
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from shared.config import MeshConfig, parse_cores
from shared.devices import LEASE_BUCKET, LEASE_TTL_S, CudaDevices, lease_device
from shared.errors import ConfigError
from shared.kernels.threads import thread_environment
from shared.lifecycle import Instance, run
from shared.messages import Kind
from shared.priority import yield_to_others

if TYPE_CHECKING:  # torch and numba read an environment that `run_compute` has to set first
    import torch

    from shared.models.loader import Checkpoint
    from shared.transport.ucx import UcxTransport

C = TypeVar("C", bound=MeshConfig)
T = TypeVar("T")


@dataclass(frozen=True)
class ComputeSide:
    """An instance with a device and a model; tensors and the data plane belong to the compute thread."""

    instance: Instance
    device: "torch.device"
    threads: int
    checkpoint: "Checkpoint"
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

    def transport(self, rows: int, tls: str) -> "UcxTransport":
        """The data plane, for exchanges of at most ``rows`` rows; in the compute thread. Raises TransportError."""
        from shared.activation import longest_frame
        from shared.transport.ucx import UcxTransport

        spec = self.checkpoint.spec
        return UcxTransport(longest_frame(rows, spec.router.top_k, spec.hidden), self.device, tls)


@asynccontextmanager
async def compute_side(kind: Kind, config: MeshConfig, threads: int) -> AsyncIterator[ComputeSide]:
    """An instance that has its device, has opened its model and has joined the mesh; it leaves with the context.

    Raises ConfigError, ModelError and BusUnavailable.
    """
    async with Instance(kind, config) as instance:
        owner = f"{instance.id} {instance.incarnation:x}"
        open_store = partial(instance.bus.store, LEASE_BUCKET, LEASE_TTL_S)
        async with lease_device(config.device, instance.node, owner, CudaDevices(), open_store) as device:
            yield await _open(instance, device, config.model, config.cores, threads)


async def _open(instance: Instance, device: str, model: str, cores: str, threads: int) -> ComputeSide:
    import torch

    from shared.models.loader import open_checkpoint

    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, "compute")
    await loop.run_in_executor(executor, _settle, parse_cores("--cores", cores), threads)
    yield_to_others(threading.get_native_id())
    await instance.say("opening the model")
    checkpoint = await loop.run_in_executor(executor, open_checkpoint, model)
    await instance.join(checkpoint.facts())
    return ComputeSide(instance, torch.device(device), threads, checkpoint, executor, loop)


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
    if os.environ.get("MM_BATCH") == "1" and threads == 1:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def run_compute(
    serve: Callable[[C, int], Coroutine[Any, Any, None]], config: C, environ: MutableMapping[str, str]
) -> int:
    """Set the environment for the compute threads, run ``serve(config, threads)``; returns the exit status."""
    threads = config.threads or len(parse_cores("--cores", config.cores) or os.sched_getaffinity(0))
    environ.update(thread_environment(threads, environ))
    return run(serve(config, threads), config)
