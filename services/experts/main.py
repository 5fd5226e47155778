"""The experts process: settings in, a server in the compute thread, NATS in this one."""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

from shared.config import ExpertsConfig, load_config
from shared.devices import LEASE_BUCKET, LEASE_TTL_S, CudaDevices, LeaseStore, lease_device
from shared.errors import ConfigError
from shared.kernels.threads import thread_environment
from shared.lifecycle import Instance, run
from shared.messages import Kind


def check(config: ExpertsConfig) -> None:
    """Raises ConfigError for settings out of range."""
    if config.slots < 0:
        raise ConfigError("--slots", f"{config.slots} is below 0")
    if config.max_batched_tokens < 1:
        raise ConfigError("--max-batched-tokens", f"{config.max_batched_tokens} is less than 1")


async def serve(config: ExpertsConfig, threads: int) -> None:
    """Run one expert instance until it is told to stop.

    Raises ConfigError, ModelError, TransportError, BusUnavailable, and whatever ends the compute thread.
    """
    check(config)
    async with Instance(Kind.EXPERTS, config) as instance:
        owner = f"{instance.id} {instance.incarnation:x}"

        async def open_store() -> LeaseStore:
            return cast(LeaseStore, await instance.bus.store(LEASE_BUCKET, LEASE_TTL_S))

        async with lease_device(config.device, instance.node, owner, CudaDevices(), open_store) as device:
            await _serve_on(device, config, threads, instance)


async def _serve_on(device: str, config: ExpertsConfig, threads: int, instance: Instance) -> None:
    # Imported here: torch and numba read the environment that main has set.
    import torch

    from services.experts.build import Identity, build
    from services.experts.service import ExpertsService
    from shared.models.loader import open_checkpoint
    from shared.placement_watch import PlacementWatch

    loop = asyncio.get_running_loop()
    compute = ThreadPoolExecutor(1, "compute")

    def say(text: str) -> None:
        asyncio.run_coroutine_threadsafe(instance.say(text), loop)

    def record(trace: tuple[bytes, bytes], start_ns: int, end_ns: int, layer: int, parts: int) -> None:
        instance.telemetry.record("experts.exchange", trace, start_ns, end_ns, layer=layer, parts=parts)

    await instance.say("opening the model")
    checkpoint = await loop.run_in_executor(compute, open_checkpoint, config.model)
    await instance.join(checkpoint.facts())
    identity = Identity(instance.mesh, instance.id, instance.incarnation)
    work = partial(build, config, checkpoint, torch.device(device), threads, identity, record, say)
    built = await loop.run_in_executor(compute, work)
    service = ExpertsService(instance, built, checkpoint.spec.moe_layers)

    async def compute_until_stopped() -> None:
        await loop.run_in_executor(compute, built.run)

    computing = instance.spawn(compute_until_stopped(), "compute")
    instance.telemetry.collect(service.samples)
    await service.start(await PlacementWatch(instance).start())
    await instance.ready(lambda: {"experts": service.facts(), "device": device})
    await instance.until_stopped()
    await service.drain(config.drain_s)
    built.server.stop()
    await computing


def main(config: ExpertsConfig) -> int:
    """Returns the exit status."""
    threads = config.threads or len(os.sched_getaffinity(0))
    os.environ.update(thread_environment(threads, os.environ))
    return run(serve(config, threads), config)


if __name__ == "__main__":
    sys.exit(main(load_config(ExpertsConfig, os.environ)))
