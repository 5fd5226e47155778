"""The attention process: settings in, an engine in the compute thread, NATS in this one."""

import asyncio
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

from shared.config import AttentionConfig, load_config
from shared.devices import LEASE_BUCKET, LEASE_TTL_S, CudaDevices, LeaseStore, lease_device
from shared.kernels.threads import thread_environment
from shared.lifecycle import Instance, run
from shared.messages import Kind
from shared.metrics import Sample


async def serve(config: AttentionConfig, threads: int) -> None:
    """Run one attention instance until it is told to stop.

    Raises ConfigError, ModelError, TransportError, BusUnavailable, and whatever ends the compute thread.
    """
    async with Instance(Kind.ATTENTION, config) as instance:
        owner = f"{instance.id} {instance.incarnation:x}"

        async def open_store() -> LeaseStore:
            return cast(LeaseStore, await instance.bus.store(LEASE_BUCKET, LEASE_TTL_S))

        async with lease_device(config.device, instance.node, owner, CudaDevices(), open_store) as device:
            await _serve_on(device, config, threads, instance)


async def _serve_on(device: str, config: AttentionConfig, threads: int, instance: Instance) -> None:
    # Imported here: torch and numba read the environment that main has set.
    import torch

    from services.attention.build import Identity, build
    from services.attention.server import AttentionServer
    from services.attention.stats import exchange_samples, facts, samples
    from shared.models.loader import open_checkpoint
    from shared.placement_watch import PlacementWatch

    loop = asyncio.get_running_loop()
    compute = ThreadPoolExecutor(1, "compute")

    def say(text: str) -> None:
        asyncio.run_coroutine_threadsafe(instance.say(text), loop)

    await instance.say("opening the model")
    checkpoint = await loop.run_in_executor(compute, open_checkpoint, config.model)
    await instance.join(checkpoint.facts())
    server = AttentionServer(instance, checkpoint.digest)
    identity = Identity(instance.mesh, instance.incarnation)
    work = partial(build, config, checkpoint, torch.device(device), threads, identity, server.emit, say)
    built = await loop.run_in_executor(compute, work)
    engine, limits = built.engine, built.limits

    def read_metrics() -> Iterable[Sample]:
        yield from samples(engine.stats, limits, engine.step_seconds, engine.desk.refused)
        yield from exchange_samples(built.exchange.stats())

    async def compute_until_stopped() -> None:
        await loop.run_in_executor(compute, built.run)

    instance.telemetry.collect(read_metrics)
    computing = instance.spawn(compute_until_stopped(), "compute")
    await server.start(engine, await PlacementWatch(instance).start(), limits.max_model_len)
    await instance.ready(lambda: {"attention": facts(engine.stats, limits, time.monotonic()), "device": device})
    await instance.until_stopped()
    await server.drain(config.drain_s)
    engine.stop()
    await computing


def main(config: AttentionConfig) -> int:
    """Returns the exit status."""
    threads = config.threads or len(os.sched_getaffinity(0))
    os.environ.update(thread_environment(threads, os.environ))
    return run(serve(config, threads), config)


if __name__ == "__main__":
    sys.exit(main(load_config(AttentionConfig, os.environ)))
